"""Grad R: hidden strengths that follow the dense gradient, and the search for their prior's penalty."""

import numpy as np
import pytest
import torch
from one_layer import EPOCHS, MOMENTUM, OneLayer
from torch import nn

from models import build_model
from utils.flags import get_args
from utils.masks import prunable, surviving
from utils.rewiring import gradient_rewiring, next_penalty, signs_of
from utils.scores import magnitude_scores
from utils.training import make_optimizer


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(20, 30, bias=False)


def parts(layer):
    return layer.weight.detach().clone(), magnitude_scores(layer), signs_of(layer)


def test_without_a_gradient_strengths_fall_linearly_and_weights_follow(layer):
    start, strengths, signs = parts(layer)
    for step in range(1, 30):
        gradient_rewiring(layer, strengths, signs, 0.01, -100.0)
        torch.testing.assert_close(strengths["weight"], start.abs() - 0.01 * step, atol=1e-5, rtol=0)
        assert torch.equal(layer.weight, signs["weight"] * strengths["weight"].clamp(min=0))
    assert (layer.weight == 0).all()
    assert (strengths["weight"] < 0).all()


@pytest.mark.parametrize("undecayed", [False, True])
def test_decay_of_kernels_only_leaves_biases_and_batch_norm(undecayed):
    flags = "--dataset synthetic --device cpu --weight_decay 0.5 --learning_rate 0.1 --decay_kernels_only"
    args = get_args("train_snn_none.py", "none", None, flags.split())
    model = build_model("alexnet", 3, 10, width=0.05)
    model.tau = nn.Parameter(torch.tensor(2.0))  # a learnt one, as docs/extending.md has it
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, args, prunable(model).values() if undecayed else ())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        left = 1 if undecayed or name not in prunable(model) else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), left * before[name])


def reached(penalty):
    """A density that falls with the penalty, steep in one place and flat in others."""
    return 0.9 / (1 + (penalty / 0.037) ** 1.7) + 0.001


@pytest.mark.parametrize("first", [1e-6, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("density", [0.8, 0.3, 0.02])
def test_the_penalty_of_a_density_is_found(first, density):
    tried, penalty, bracketed = {}, first, 0
    for _ in range(40):
        tried[penalty] = reached(penalty)
        low = [p for p, d in tried.items() if d > density]
        high = [p for p, d in tried.items() if d <= density]
        penalty = next_penalty(tried, density)
        if low and high:
            assert max(low) <= penalty <= min(high)
            bracketed += 1
        else:
            assert penalty == pytest.approx(4 * max(tried) if low else min(tried) / 4)
        if abs(np.log(reached(penalty) / density)) < 0.05:
            break
    assert reached(penalty) == pytest.approx(density, rel=0.06)
    assert bracketed <= 6


def test_a_density_of_nothing_does_not_end_the_search():
    assert 1 < next_penalty({1.0: 0.5, 2.0: 0.0}, 0.1) < 2


def test_training_is_that_of_a_plain_numpy_loop():
    """Three epochs in which connections go and come back; strengths have no weight decay."""
    one = OneLayer()
    signs, strengths = signs_of(one.model), magnitude_scores(one.model)
    alpha, mean, rates = 0.35, -0.08, {epoch: next(one.gradients(epoch))[0] for epoch in range(EPOCHS)}
    optimizer = make_optimizer(one.model, one.args, undecayed=one.model.parameters())
    sign, theta, momentum = np.sign(one.weight), np.abs(one.weight), np.zeros((4, 12))

    def rewire(step, generator):
        gradient_rewiring(one.model, strengths, signs, rates[step // 5] * alpha, mean)

    gone, back, least = [], [], 0.0
    for epoch in range(EPOCHS):
        for rate, gradient_at in one.gradients(epoch):
            momentum = MOMENTUM * momentum + gradient_at(sign * np.maximum(theta, 0))
            before = theta > 0
            theta = theta - rate * sign * momentum - rate * alpha * np.sign(theta - mean)
            gone.append((before & (theta <= 0)).sum())
            back.append((~before & (theta > 0)).sum())
            least = min(least, theta.min())
        one.trainer.epoch(optimizer, None, epoch, 2, after_step=rewire)
    assert all(sum(gone[first : first + 5]) > 0 for first in (0, 5, 10))
    assert sum(back) > 0
    assert least < mean  # the prior pulls up, too
    assert np.array_equal(surviving(one.model)["weight"].numpy(), theta > 0)
    np.testing.assert_allclose(strengths["weight"].numpy(), theta, rtol=1e-5, atol=1e-7)
    one.assert_weights_are(sign * np.maximum(theta, 0))


def test_script_searches_and_its_ticket_is_what_is_left(finished):
    run = finished("gradrewiring")
    trials = [run.stage("search", trial) for trial in range(5)]
    assert [len(rows) for rows in trials] == [1] * 5
    assert not run.stage("search", 5)
    tried = {}
    for (row,) in [*trials, run.stage("train", None)[:1]]:
        if tried:
            assert row["penalty"] == next_penalty(tried, 0.75**2)
        tried[row["penalty"]] = 1 - row["sparsity"] / 100
    (result,) = run.results
    train = run.stage("train", None)
    mask, weights, _ = run.network("level_02")
    assert result["penalty"] == train[-1]["penalty"]
    assert result["sparsity"] == pytest.approx(train[-1]["sparsity"])
    assert all(torch.equal(m, weights[name] != 0) for name, m in mask.items())
    initial = run.ticket("initial")[1]
    ticket = run.ticket("level_02")
    assert all(torch.equal(m, mask[name]) for name, m in ticket[0].items())
    assert all(torch.equal(ticket[1][name], initial[name] * m) for name, m in mask.items())
    assert all((weights[name].sign() == initial[name].sign())[m].all() for name, m in mask.items())
    assert [result[field] for field in ("search_epochs", "search_timestep_epochs", "train_seconds")] == [9, 36, 0]


def test_a_network_that_is_to_stay_dense_is_no_error(run):
    dense = run("gradrewiring", *"--trials 1 --end_iter 1 --sparsity_round 0".split())
    assert dense.results[0]["sparsity"] < 50
