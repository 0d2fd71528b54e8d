import pytest
import torch
from conftest import same

from models import build_model
from utils.masks import (
    distance,
    drop_lowest,
    emptied_layers,
    layer_sparsity,
    prunable,
    rewind,
    shuffle_layers,
    sparsity,
    sparsity_after,
)
from utils.scores import magnitude_mask


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv": (7, 3, 3, 3), "linear": (5, 11), "small": (2, 3)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def full(scores):
    return {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}


def counts(mask):
    return {name: int(m.sum()) for name, m in mask.items()}


def by_sorting(scores, mask, fraction, names):
    """The pruned mask of these layers, which are ranked together, with Python's own sort."""
    kept = [(name, i) for name in names for i in range(mask[name].numel()) if mask[name].flatten()[i]]
    kept.sort(key=lambda place: scores[place[0]].flatten()[place[1]].item())
    new = {name: mask[name].clone() for name in names}
    for name, i in kept[: round(fraction * len(kept))]:
        new[name].view(-1)[i] = False
    return new


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("values", ["distinct", "tied"])
@pytest.mark.parametrize("fraction", [0, 0.001, 0.25, 0.5, 0.9, 1])
def test_drop_lowest_is_what_sorting_gives(scores, full, fraction, values, scope):
    if values == "tied":
        scores = {name: (4 * s).round() for name, s in scores.items()}
    mask = expected = full
    for share in (fraction, 0.3):
        mask = drop_lowest(scores, mask, share, scope)
        groups = [list(full)] if scope == "global" else [[name] for name in full]
        before, expected = expected, {}
        for names in groups:
            expected |= by_sorting(scores, before, share, names)
        assert same(mask, expected)


def test_neither_inputs_nor_scores_of_pruned_weights_matter(scores, full):
    before = {name: s.clone() for name, s in scores.items()}
    mask = drop_lowest(scores, full, 0.5)
    assert all(m.all() for m in full.values())
    assert same(scores, before)
    noise = {name: torch.where(mask[name], s, torch.randn_like(s)) for name, s in scores.items()}
    assert same(drop_lowest(scores, mask, 0.5), drop_lowest(noise, mask, 0.5))
    unpruned = drop_lowest(scores, mask, 0)
    unpruned["conv"].zero_()
    assert mask["conv"].any(), "the new mask shares no memory with the one before"


def test_bad_arguments_are_refused(scores, full):
    with pytest.raises(ValueError, match="global, local"):
        drop_lowest(scores, full, 0.5, "channel")
    with pytest.raises(ValueError, match=r"1\.5"):
        drop_lowest(scores, full, 1.5)
    with pytest.raises(ValueError, match="hamming, jaccard"):
        distance(full, full, "cosine")
    scores["small"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="not a number"):
        drop_lowest(scores, full, 0.5)
    full["small"][0, 0] = False
    drop_lowest(scores, full, 0.5)


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_the_papers_sparsities_are_of_all_parameters(arch):
    with torch.device("meta"):
        model = build_model(arch, 3, 10)
    parameters = sum(p.numel() for p in model.parameters())
    weights = survivors = sum(p.numel() for p in prunable(model).values())
    of_all, of_prunable = {}, {}
    for level in range(1, 15):
        survivors -= round(0.25 * survivors)
        of_all[level] = 100 * (weights - survivors) / parameters
        of_prunable[level] = 100 * (1 - survivors / weights)
        assert of_prunable[level] == pytest.approx(100 * sparsity_after(level, 0.25), abs=1e-4)
    assert [of_all[level] for level in (4, 8, 11, 14)] == pytest.approx([68.30, 89.91, 95.69, 98.13], abs=0.016)
    assert [round(of_prunable[level], 2) for level in (4, 8, 11, 14)] == [68.36, 89.99, 95.78, 98.22]


def test_sparsity_counts(full):
    full["small"][0] = False
    assert sparsity(full) == 3 / (189 + 55 + 6)
    assert sparsity(full, 1000) == 3 / 1000
    assert layer_sparsity(full) == {"conv": 0, "linear": 0, "small": 0.5}
    assert emptied_layers(full) == []
    full["small"][1] = False
    assert emptied_layers(full) == ["small"]


def test_distances_by_hand():
    a = {"x": torch.tensor([True, True, False, False]), "y": torch.tensor([True, False, False, False])}
    b = {"x": torch.tensor([True, False, True, False]), "y": torch.tensor([True, False, False, False])}
    nothing = {name: torch.zeros_like(m) for name, m in a.items()}
    assert distance(a, b) == distance(b, a) == 2 / 8
    assert distance(a, b, "jaccard") == distance(b, a, "jaccard") == 2 / 4
    assert distance(a, a) == distance(a, a, "jaccard") == 0
    assert distance(nothing, nothing, "jaccard") == 0
    assert distance(a, nothing, "jaccard") == 1


def test_shuffling_keeps_the_count_of_each_layer_and_depends_on_its_generator_alone():
    mask = {"a": torch.arange(10000).view(100, 100) < 3000, "b": torch.arange(8) < 1}
    other = {"a": torch.arange(10000).view(100, 100) % 2 == 0, "b": torch.arange(8) < 5}

    def shuffled(mask, seed, global_seed=0):
        torch.manual_seed(global_seed)
        return shuffle_layers(mask, torch.Generator().manual_seed(seed))

    assert counts(shuffled(mask, 1)) == counts(mask)
    assert 700 < int((shuffled(mask, 1)["a"] & mask["a"]).sum()) < 1100, "chance leaves 30 % of 3000 in place"
    assert same(shuffled(mask, 1), shuffled(mask, 1, global_seed=5))
    assert not same(shuffled(mask, 1), shuffled(mask, 2))
    both = {name: mask[name] & other[name] for name in mask}
    permuted = (shuffled(m, 1) for m in (mask, other, both))
    assert all(torch.equal(m & o, b) for m, o, b in zip(*(m.values() for m in permuted), strict=True)), "a permutation"


def test_rewinding_restores_weights_biases_and_batch_norm_from_what_training_does_not_change():
    torch.manual_seed(0)
    model = build_model("vgg16", 3, 10, width=0.0625)
    for parameter in model.parameters():
        parameter.data += 0.01  # no zeros: weight decay moves every one
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    untouched = {name: tensor.clone() for name, tensor in state.items()}
    mask = magnitude_mask(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, weight_decay=0.1)
    for _ in range(2):  # a state that shares memory with the model would have moved in the second round
        model.train()(torch.randn(8, 3, 32, 32), 2).square().sum().backward()
        optimizer.step()
        assert all(not torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
        rewind(model, state, mask)
        for name, tensor in model.state_dict().items():
            expected = untouched[name] * mask[name] if name in mask else untouched[name]
            assert torch.equal(tensor, expected), name
