"""ADMM: weights that are pulled towards their sparse projection."""

import numpy as np
import pytest
import torch
from one_layer import DECAY, EPOCHS, MOMENTUM, OneLayer
from torch import nn

from utils.admm import Admm
from utils.training import make_optimizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))


def largest(values, count):
    """The ``count`` largest entries of arrays, all others 0."""
    flat = np.concatenate([value.ravel() for value in values])
    flat[np.argsort(-np.abs(flat), kind="stable")[count:]] = 0
    parts = np.split(flat, np.cumsum([value.size for value in values])[:-1])
    return [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_target_is_the_largest_of_weights_and_dual(model, scope):
    admm = Admm(model, 0.8, scope, 0.1)
    names, draws = list(admm.target), torch.Generator().manual_seed(1)
    assert all((dual == 0).all() for dual in admm.dual.values())
    for _ in range(3):
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).add_(0.3 * torch.randn(admm.dual[name].shape, generator=draws))
        weights = [model.get_parameter(name).detach().numpy().copy() for name in names]
        duals = [admm.dual[name].numpy().copy() for name in names]
        moved = [weight + dual for weight, dual in zip(weights, duals, strict=True)]
        groups = [moved] if scope == "global" else [[value] for value in moved]
        targets = [t for group in groups for t in largest(group, round(0.2 * sum(v.size for v in group)))]
        residual = admm.update()
        for name, weight, dual, target in zip(names, weights, duals, targets, strict=True):
            np.testing.assert_array_equal(admm.target[name].numpy(), target)
            np.testing.assert_allclose(admm.dual[name].numpy(), dual + weight - target, rtol=1e-6, atol=1e-6)
        gaps = [weight - target for weight, target in zip(weights, targets, strict=True)]
        norms = [np.sqrt(sum((part**2).sum() for part in parts)) for parts in (gaps, weights)]
        assert residual == pytest.approx(norms[0] / norms[1])


def test_the_dual_stays_0_where_the_weights_are_sparse(model):
    target = Admm(model, 0.8, "global", 0.1).target
    with torch.no_grad():
        for name, value in target.items():
            model.get_parameter(name).copy_(value)
    admm = Admm(model, 0.8, "global", 0.1)
    assert admm.update() == 0
    assert all((dual == 0).all() for dual in admm.dual.values())
    assert all(torch.equal(value, target[name]) for name, value in admm.target.items())


def test_the_pull_is_the_gradient_of_the_penalty(model):
    admm = Admm(model, 0.7, "global", 0.3)
    with torch.no_grad():
        for dual in admm.dual.values():
            dual.normal_()
    inputs = torch.randn(8, 20)
    loss = model(inputs).square().mean()
    squares = [(model.get_parameter(n) - admm.target[n] + admm.dual[n]).square().sum() for n in admm.target]
    whole = loss + 0.3 / 2 * sum(squares)
    expected = torch.autograd.grad(whole, list(model.parameters()), retain_graph=True)
    loss.backward()
    admm.pull()
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


def test_rounds_are_those_of_a_plain_numpy_loop():
    """Three rounds; the penalty is in the momentum, as any gradient is."""
    one, rho = OneLayer(), 0.05
    optimizer = make_optimizer(one.model, one.args)
    admm = Admm(one.model, 0.75, "global", rho)
    optimizer.register_step_pre_hook(admm.pull)
    weight, momentum, dual = one.weight, np.zeros((4, 12)), np.zeros((4, 12))
    (target,) = largest([weight.copy()], 12)
    supports = []
    for epoch in range(EPOCHS):
        for rate, gradient_at in one.gradients(epoch):
            gradient = gradient_at(weight) + rho * (weight - target + dual)
            momentum = MOMENTUM * momentum + gradient + DECAY * weight
            weight = weight - rate * momentum
        (target,) = largest([weight + dual], 12)
        dual = dual + weight - target
        supports.append(target != 0)
        one.trainer.epoch(optimizer, None, epoch, 2)
        admm.update()
        one.assert_weights_are(weight)
        np.testing.assert_allclose(admm.target["weight"].numpy(), target, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(admm.dual["weight"].numpy(), dual, rtol=1e-5, atol=1e-6)
    assert (supports[0] != supports[-1]).any()
