import copy

import pytest
import torch
from networks import Exact, lively
from torch.nn import functional as F

from models import build_model
from utils import scores
from utils.augment import Recipe
from utils.datasets import Spec
from utils.masks import prunable, sparsity_after
from utils.scores import magnitude_mask, snip_scores


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("vgg16", 3, 10, width=0.125).double()


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Exact(images, torch.arange(20) % 10, Spec((0.5,) * 3, (0.25,) * 3, Recipe(), 1))


def test_one_shot_pruning_of_the_untrained_vgg16_empties_its_classifier():
    torch.manual_seed(0)
    mask = magnitude_mask(build_model("vgg16", 3, 10), sparsity_after(14, 0.25))
    assert [name for name, m in mask.items() if not m.any()] == ["classifier.weight"]


def test_snip_is_the_sensitivity_to_a_factor_on_each_connection(model, samples, monkeypatch):
    """The definition: |dL/dc| at c = 1, where every weight is multiplied by its own c; L is the mean over images."""
    monkeypatch.setattr(scores, "BATCH", 8)  # the last of three batches has four images
    lively(model, next(samples.batches(20))[0]).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = snip_scores(model, samples, 3)
    left_over = copy.deepcopy(model)
    for parameter in left_over.parameters():
        parameter.grad = torch.ones_like(parameter)
    again = snip_scores(left_over, samples, 3)
    assert all(torch.equal(score, again[name]) for name, score in found.items()), "earlier gradients do not count"
    assert not model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    factors = {name: torch.ones_like(weight).requires_grad_() for name, weight in prunable(model).items()}
    loss = 0
    for images, labels in samples.batches(8):
        tensors = {**state, **{name: state[name] * factor for name, factor in factors.items()}}
        logits = torch.func.functional_call(model.train(), tensors, (images, 3))
        loss = loss + sum(F.cross_entropy(step, labels, reduction="sum") for step in logits) / 3 / 20
    expected = torch.autograd.grad(loss, list(factors.values()))
    assert list(found) == list(factors)
    for (name, score), gradient in zip(found.items(), expected, strict=True):
        assert score.max() > 0
        torch.testing.assert_close(score, gradient.abs(), rtol=1e-6, atol=1e-12, msg=name)
