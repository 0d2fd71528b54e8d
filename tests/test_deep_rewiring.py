"""Deep R: connections that go dormant and others that are drawn."""

import numpy as np
import pytest
import torch
from one_layer import DECAY, EPOCHS, MOMENTUM, OneLayer
from torch import nn

from utils.masks import dense_mask
from utils.rewiring import NEW, _draw_dormant, deep_rewiring, signs_of
from utils.training import make_optimizer

GROUPS = {"global": [("0.weight", "2.weight")], "local": [("0.weight",), ("2.weight",)]}


def network(kind, density):
    """A small network in training: model, optimizer, mask and signs; its dormant weights are 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    signs = signs_of(model)
    mask = {name: torch.rand_like(m.float()) < density for name, m in dense_mask(model).items()}
    with torch.no_grad():
        for name, kept in mask.items():
            model.get_parameter(name).mul_(kept)
    optimizers = {"sgd": torch.optim.SGD(model.parameters(), 0.05, 0.9), "adam": torch.optim.Adam(model.parameters())}
    return model, optimizers[kind], mask, signs


def step(model, optimizer, mask):
    """A step of the optimizer, as the trainer makes it."""
    optimizer.zero_grad()
    model(torch.randn(8, 20)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for name, kept in mask.items():
            model.get_parameter(name).mul_(kept)


def counts(mask, groups):
    return {names: sum(int(mask[name].sum()) for name in names) for names in groups}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("scope", GROUPS)
def test_the_number_of_connections_never_changes_and_what_is_new_starts_afresh(scope, optimizer):
    model, optimizer, mask, signs = network(optimizer, 0.3)
    least, draws, moved = counts(mask, GROUPS[scope]), torch.Generator().manual_seed(0), 0
    by_layer = counts(mask, GROUPS["local"])
    for _ in range(40):
        before = {name: m.clone() for name, m in mask.items()}
        step(model, optimizer, mask)
        deep_rewiring(model, optimizer, mask, signs, least, 1e-3, 1e-3, draws)
        assert counts(mask, GROUPS[scope]) == least
        for name, kept in mask.items():
            weight, new = model.get_parameter(name).detach(), kept & ~before[name]
            assert (weight[~kept] == 0).all()
            assert (weight[kept].sign() == signs[name][kept]).all()
            assert torch.equal(weight[new], NEW * signs[name][new])
            fresh = kept & (weight.abs() == weight.new_tensor(NEW))
            for memory in optimizer.state[model.get_parameter(name)].values():
                if memory.shape == weight.shape:
                    assert (memory[fresh | ~kept] == 0).all(), "also of what went and came back at once"
                    assert (memory[kept & ~fresh] != 0).any()
            moved += int(new.sum())
    assert moved > 50
    assert (counts(mask, GROUPS["local"]) == by_layer) == (scope == "local")


@pytest.mark.parametrize("size", [60, 100])  # most of the entries are dormant, or most are alive
def test_dormant_connections_are_drawn_uniformly(size):
    alive, draws = torch.arange(size) % 3 == 0, torch.Generator().manual_seed(0)
    alive[60:] = True
    drawn = torch.stack([_draw_dormant(alive, 7, draws) for _ in range(2000)])
    assert (drawn.sum(1) == 7).all()
    assert not (drawn & alive).any()
    often = drawn.sum(0)[~alive].double()
    expected = 2000 * 7 / 40
    # without replacement the deviation is smaller than a chi-square's by 1 - 7/40
    assert 15 < ((often - expected) ** 2 / expected).sum() / (1 - 7 / 40) < 75, "39 on average, deviation 9"
    pairs = (drawn[:, ~alive].double().T @ drawn[:, ~alive].double()).fill_diagonal_(torch.nan)
    usual = 2000 * 7 * 6 / (40 * 39)
    assert (pairs - usual).abs().nan_to_num(0).max() < 6 * usual**0.5, "no two are drawn together more than others"


@pytest.mark.parametrize("size", [60, 100])
@pytest.mark.parametrize("count", [-3, 0, 1, 20, 40])
def test_as_many_are_drawn_as_are_wanted(count, size):
    alive = torch.arange(size) % 3 == 0
    alive[60:] = True
    drawn = _draw_dormant(alive, count, torch.Generator().manual_seed(0))
    assert drawn.sum() == max(0, count)
    assert not (drawn & alive).any()


def test_from_dense_each_layer_gets_sparser_and_stops_where_it_is_wanted():
    model, optimizer, mask, signs = network("sgd", 2.0)
    least = {("0.weight",): 120, ("2.weight",): 60}
    seen = [counts(mask, GROUPS["local"])]
    for _ in range(150):
        step(model, optimizer, mask)
        deep_rewiring(model, optimizer, mask, signs, least, 3e-3, 0.0, torch.Generator().manual_seed(0))
        seen.append(counts(mask, GROUPS["local"]))
    for names, count in least.items():
        path = [one[names] for one in seen]
        assert path == sorted(path, reverse=True)
        assert count < path[3] < path[0] == mask[names[0]].numel()
        assert path[-5:] == [count] * 5


@pytest.mark.parametrize("from_dense", [False, True])
def test_training_is_that_of_a_plain_numpy_loop(from_dense):
    """Three epochs with drops and regrowth in each; only the drawing itself is shared."""
    one, l1, noise = OneLayer(), 0.3, 0.0 if from_dense else 0.1
    signs = {name: sign.double() for name, sign in signs_of(one.model).items()}
    mask = {"weight": torch.ones(4, 12, dtype=torch.bool) if from_dense else torch.rand(4, 12) < 0.5}
    with torch.no_grad():
        one.model.weight.mul_(mask["weight"])
    optimizer = make_optimizer(one.model, one.args)
    sign, alive = signs["weight"].numpy(), mask["weight"].numpy().copy()
    theta, momentum, wanted = one.weight * sign, np.zeros((4, 12)), 22 if from_dense else int(alive.sum())
    rates = {epoch: next(one.gradients(epoch))[0] for epoch in range(EPOCHS)}

    def rewire(step, generator):
        rate = rates[step // 5]
        least = {("weight",): wanted}
        deep_rewiring(one.model, optimizer, mask, signs, least, rate * l1, rate * noise, generator)

    dropped, grown = [], []
    for epoch in range(EPOCHS):
        draws = one.draws(epoch)
        for rate, gradient_at in one.gradients(epoch):
            weight = sign * theta * alive
            momentum = MOMENTUM * momentum + gradient_at(weight) + DECAY * weight
            theta = theta - rate * sign * momentum - rate * l1
            if noise:
                theta[alive] += rate * noise * torch.randn(int(alive.sum()), generator=draws).numpy()
            left = alive & (theta > 0)
            new = np.zeros(48, dtype=bool)
            while (missing := wanted - left.sum() - new.sum()) > 0:  # as _draw_dormant: redraw what is taken
                for at in set(torch.randint(48, (int(missing),), generator=draws).tolist()):
                    new[at] |= not left.flat[at]
            new = new.reshape(4, 12)
            momentum = momentum * (left & ~new)
            theta = np.where(new, NEW, theta) * (left | new)
            dropped, grown, alive = [*dropped, int((alive & ~left).sum())], [*grown, int(new.sum())], left | new
        one.trainer.epoch(optimizer, mask, epoch, 2, after_step=rewire)
    assert sum(dropped) > 20
    assert all(sum(part) > 0 for part in (grown[:5], grown[5:10], grown[10:])) or from_dense
    assert alive.sum() == wanted
    assert sum(grown) > 0
    assert np.array_equal(mask["weight"].numpy(), alive)
    one.assert_weights_are(sign * theta)
