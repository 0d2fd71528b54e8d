import pytest
import torch
from torch import nn

from models import build_model
from utils.masks import (
    apply_mask,
    dense_mask,
    distance,
    drop_lowest,
    emptied_layers,
    layer_sparsity,
    magnitude_mask,
    magnitude_scores,
    prunable,
    prune_by_magnitude,
    rewind,
    sparsity,
    sparsity_after,
    state_after_pruning,
)


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv": (7, 3, 3, 3), "linear": (5, 11), "small": (2, 3)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def full(scores):
    return {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}


def kept(mask):
    return sum(int(m.sum()) for m in mask.values())


def brute_force(scores, mask, fraction):
    """Global pruning with Python's own sort."""
    survivors = [
        (float(scores[name].flatten()[i]), order, i, name)
        for order, name in enumerate(mask)
        for i in range(mask[name].numel())
        if mask[name].flatten()[i]
    ]
    new = {name: m.clone() for name, m in mask.items()}
    for _, _, i, name in sorted(survivors)[: round(fraction * len(survivors))]:
        new[name].view(-1)[i] = False
    return new


@pytest.mark.parametrize("fraction", [0, 0.001, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("values", ["distinct", "tied"])
def test_drop_lowest_is_what_sorting_gives(scores, full, fraction, values):
    if values == "tied":
        scores = {name: (s * 4).round() for name, s in scores.items()}
    once = drop_lowest(scores, full, fraction)
    expected = brute_force(scores, full, fraction)
    assert all(torch.equal(once[name], expected[name]) for name in full)
    twice, expected = drop_lowest(scores, once, 0.3), brute_force(scores, expected, 0.3)
    assert all(torch.equal(twice[name], expected[name]) for name in full)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_levels_are_nested_exact_and_follow_the_formula(scores, full, scope):
    mask, count = full, kept(full)
    counts = {name: m.numel() for name, m in full.items()}
    for level in range(1, 8):
        smaller = drop_lowest({name: torch.rand_like(s) for name, s in scores.items()}, mask, 0.25, scope)
        assert all((smaller[name] <= mask[name]).all() for name in mask), "what is pruned stays pruned"
        if scope == "global":
            count -= round(0.25 * count)
            assert kept(smaller) == count
            assert sparsity(smaller) == pytest.approx(sparsity_after(level, 0.25), abs=2 * level / kept(full))
        else:
            counts = {name: c - round(0.25 * c) for name, c in counts.items()}
            assert {name: int(m.sum()) for name, m in smaller.items()} == counts
        mask = smaller


def test_inputs_are_not_changed(scores, full):
    before = {name: s.clone() for name, s in scores.items()}
    drop_lowest(scores, full, 0.5)
    assert kept(full) == sum(m.numel() for m in full.values())
    assert all(torch.equal(scores[name], before[name]) for name in scores)


def test_scores_of_pruned_weights_do_not_matter(scores, full):
    mask = drop_lowest(scores, full, 0.5)
    noisy = {name: torch.where(mask[name], s, torch.randn_like(s)) for name, s in scores.items()}
    a, b = drop_lowest(scores, mask, 0.5), drop_lowest(noisy, mask, 0.5)
    assert all(torch.equal(a[name], b[name]) for name in mask)


def test_bad_arguments(scores, full):
    with pytest.raises(ValueError, match="global, local"):
        drop_lowest(scores, full, 0.5, "channel")
    with pytest.raises(ValueError, match="0 to 1"):
        drop_lowest(scores, full, 1.5)
    scores["small"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="not a number"):
        drop_lowest(scores, full, 0.5)
    with pytest.raises(ValueError, match="hamming, jaccard"):
        distance(full, full, "cosine")


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_the_papers_sparsities_are_of_all_parameters(arch):
    # 4, 8, 11, 14 prunings of 25 %; the paper prints the first of each pair
    with torch.device("meta"):
        model = build_model(arch, 3, 10)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() for p in prunable(model).values())
    survivors, of_all, of_prunable = weights, {}, {}
    for level in range(1, 15):
        survivors -= round(0.25 * survivors)
        of_all[level] = round(100 * (weights - survivors) / parameters, 2)
        of_prunable[level] = round(100 * (1 - survivors / weights), 2)
        assert of_prunable[level] == pytest.approx(100 * sparsity_after(level, 0.25), abs=0.0051)
    assert [of_all[level] for level in (4, 8, 11, 14)] == pytest.approx([68.30, 89.91, 95.69, 98.13], abs=0.011)
    assert [of_prunable[level] for level in (4, 8, 11, 14)] == [68.36, 89.99, 95.78, 98.22]


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
    assert distance(a, b) == 2 / 8
    assert distance(a, b, "jaccard") == 2 / 4
    assert distance(a, a) == distance(a, a, "jaccard") == 0
    nothing = {name: torch.zeros_like(m) for name, m in a.items()}
    assert distance(nothing, nothing, "jaccard") == 0
    assert distance(a, nothing, "jaccard") == 1


def test_only_kernels_are_pruned():
    model = build_model("vgg16", 3, 10, width=0.0625)
    kernels = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(dense_mask(model)) == kernels
    assert len(kernels) == 14


@pytest.mark.parametrize("scope", ["global", "local"])
def test_magnitude_masks_prune_the_smallest_weights(scope):
    torch.manual_seed(0)
    model = build_model("resnet19", 3, 10, width=0.0625)
    mask = magnitude_mask(model, 0.6, scope)
    assert sparsity(mask) == pytest.approx(0.6, abs=0.01)
    scores = magnitude_scores(model)
    groups = [list(mask)] if scope == "global" else [[name] for name in mask]
    for names in groups:
        dropped = torch.cat([scores[name][~mask[name]] for name in names])
        survivors = torch.cat([scores[name][mask[name]] for name in names])
        assert dropped.max() <= survivors.min()
    again = prune_by_magnitude(model, mask, 0.5, scope)
    assert sparsity(again) == pytest.approx(0.8, abs=0.01)


def test_one_shot_pruning_of_the_untrained_vgg16_empties_its_classifier():
    torch.manual_seed(0)
    model = build_model("vgg16", 3, 10)
    assert emptied_layers(magnitude_mask(model, sparsity_after(14, 0.25))) == ["classifier.weight"]


def test_state_after_pruning_is_the_rewind_point_or_a_copy_of_the_trained_network():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    point = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()(torch.randn(4, 1, 5, 5))
    model[0].weight.data.add_(1)
    assert state_after_pruning(model, point) is point
    for kind in ("lr", "none"):
        state = state_after_pruning(model, point, kind)
        assert not torch.equal(state["1.running_mean"], point["1.running_mean"])
        weight = state["0.weight"].clone()
        model[0].weight.data.add_(1)
        torch.testing.assert_close(weight, model[0].weight.data - 1)
        assert torch.equal(state["0.weight"], weight)
    with pytest.raises(ValueError, match="choose from weights, lr, none"):
        state_after_pruning(model, point, "rate")


def test_rewinding_restores_weights_biases_and_batch_norm():
    torch.manual_seed(0)
    model = build_model("vgg16", 3, 10, width=0.0625)
    for parameter in model.parameters():
        parameter.data += 0.01  # no zeros: weight decay moves every one
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = magnitude_mask(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, weight_decay=0.1)

    def train():
        logits = model(torch.randn(8, 3, 32, 32), 2)
        logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # the second round is where aliased biases showed
        train()
        assert all(not torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        rewind(model, state, mask)
        for name, tensor in model.state_dict().items():
            expected = state[name] * mask[name] if name in mask else state[name]
            assert torch.equal(tensor, expected), name


def test_apply_mask_keeps_survivors_bit_for_bit():
    torch.manual_seed(0)
    model = build_model("vgg16", 3, 10, width=0.0625)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = magnitude_mask(model, 0.7)
    apply_mask(model, mask)
    for name, p in model.named_parameters():
        keep = mask.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p[keep], before[name][keep])
        assert (p[~keep] == 0).all()
