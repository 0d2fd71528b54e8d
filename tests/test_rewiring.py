"""ERK, drop and grow, and the script that uses them."""

import math

import numpy as np
import pytest
import torch
from one_layer import DECAY, EPOCHS, MOMENTUM, OneLayer
from torch import nn

from utils.rewiring import drop_and_grow
from utils.scores import erk_densities
from utils.training import make_optimizer

SHAPES = {"stem": (64, 3, 3, 3), "conv": (512, 512, 3, 3), "deep": (512, 256, 3, 3), "classifier": (10, 512)}
LIVELY = ("--sparsity", "80", "--update_every", "3", "--end_iter", "5")


@pytest.mark.parametrize("density", [0.01, 0.05, 0.5, 0.9, 1.0])
def test_erk_densities_follow_the_formula_and_the_budget(density):
    densities = erk_densities({name: torch.Size(shape) for name, shape in SHAPES.items()}, density)
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    total = sum(densities[name] * sizes[name] for name in sizes)
    assert total == pytest.approx(density * sum(sizes.values()))
    assert all(0 < value <= 1 for value in densities.values())
    ratios = [densities[name] * sizes[name] / sum(SHAPES[name]) for name in sizes if densities[name] < 1]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) if ratios else density == 1
    capped = [name for name in sizes if densities[name] == 1]
    assert all(ratios[0] * sum(SHAPES[name]) >= sizes[name] for name in capped if ratios)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_each_layer_keeps_its_count_and_what_grows_starts_at_0(growth, optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    mask = {name: torch.rand_like(weight) < 0.3 for name, weight in model.named_parameters() if weight.ndim > 1}
    kinds = {"sgd": torch.optim.SGD(model.parameters(), 0.1, 0.9), "adam": torch.optim.Adam(model.parameters(), 0.1)}
    model(torch.randn(8, 20)).square().sum().backward()
    kinds[optimizer].step()
    weights = {name: model.get_parameter(name) for name in mask}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(mask[name])
    before = {name: (m.clone(), weights[name].detach().clone()) for name, m in mask.items()}
    drop_and_grow(model, kinds[optimizer], mask, 0.4, growth, torch.Generator().manual_seed(0))
    for name, (old, values) in before.items():
        weight, new = weights[name], mask[name]
        count = round(0.4 * int(old.sum()))
        assert new.sum() == old.sum()
        assert 0 < (new & ~old).sum() <= count
        assert (weight[new & ~old] == 0).all()
        assert (weight[~new] == 0).all()
        assert torch.equal(weight[new & old], values[new & old])
        smallest = values.abs()[old].sort().values[count]
        assert (new[old & (values.abs() >= smallest)]).all(), "only the smallest may go"
        if growth == "gradient":
            grown, passed_over = weight.grad.abs()[new & ~old], weight.grad.abs()[~new]
            assert grown.min() >= passed_over.max()
        for memory in kinds[optimizer].state[weight].values():
            if memory.shape == weight.shape:
                assert (memory[~(old & new)] == 0).all()
                assert (memory[old & new] != 0).any()


def test_training_is_that_of_a_plain_numpy_loop():
    """Three epochs; the mask changes at every fourth step."""
    one = OneLayer()
    mask = {"weight": torch.rand(4, 12) < 0.5}
    with torch.no_grad():
        one.model.weight.mul_(mask["weight"])
    optimizer = make_optimizer(one.model, one.args)
    weight, alive, momentum = one.weight, mask["weight"].numpy().copy(), np.zeros((4, 12))

    def change(step, generator):
        if step % 4 == 0:
            drop_and_grow(one.model, optimizer, mask, 0.3, "gradient", generator)

    step = 0
    for epoch in range(EPOCHS):
        for rate, gradient_at in one.gradients(epoch):
            gradient = gradient_at(weight)
            momentum = MOMENTUM * momentum + gradient + DECAY * weight
            weight = (weight - rate * momentum) * alive
            if step % 4 == 0:
                count = round(0.3 * alive.sum())
                order = sorted(zip(*np.nonzero(alive), strict=True), key=lambda at: abs(weight[at]))
                new = alive.copy()
                for at in order[:count]:
                    new[at] = False
                dormant = sorted(zip(*np.nonzero(~new), strict=True), key=lambda at: -abs(gradient[at]))
                for at in dormant[:count]:
                    new[at] = True
                weight, momentum, alive = weight * (alive & new), momentum * (alive & new), new
            step += 1
        one.trainer.epoch(optimizer, mask, epoch, 2, after_step=change)
    assert step == 15
    assert np.array_equal(mask["weight"].numpy(), alive)
    one.assert_weights_are(weight)


def test_a_training_too_short_for_a_change_of_the_mask_says_so(run, capsys):
    for more, noted in (("--update_every 2", False), ("--update_every 3 --update_until 0.5 --round 2", True)):
        run("rigl", "--end_iter", "3", *more.split())  # 6 steps
        assert ("--update_every" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_other_distributions(run, distribution):
    mask, _, _ = run("rigl", *LIVELY, "--end_iter", "1", "--distribution", distribution).ticket("start")
    densities = [m.float().mean().item() for m in mask.values()]
    assert (max(densities) - min(densities) < 0.02) == (distribution == "uniform")


def test_snip_distribution_starts_with_snips_mask(run):
    moved = run("rigl", *LIVELY, "--distribution", "snip")
    alone = run("oneshot", *LIVELY[:2], "--ticket", "snip", "--end_iter", "1")
    start, snip, end = moved.ticket("start")[0], alone.ticket("sparsity_80")[0], moved.ticket("sparsity_80")[0]
    assert all(torch.equal(m, snip[name]) for name, m in start.items())
    assert any(not torch.equal(m, end[name]) for name, m in start.items())
    assert all(m.sum() == end[name].sum() for name, m in start.items())
