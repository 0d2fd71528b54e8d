"""Scores of the prunable weights, by parameter name: what is pruned first. A score is not a mask; ``masks.drop_lowest``
makes one of it."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Split
from .masks import Mask, dense_mask, drop_lowest, prunable

BATCH = 100  # images; the gradient is summed over batches, so that memory does not grow with the number of samples


def magnitude_scores(model: nn.Module) -> dict[str, Tensor]:
    """|w| of every prunable weight (section 3.1)."""
    return {name: weight.detach().abs() for name, weight in prunable(model).items()}


def prune_by_magnitude(model: nn.Module, mask: Mask, fraction: float, scope: str = "global") -> Mask:
    """One pruning of IMP: the mask without the given fraction of its survivors, the smallest weights (section 3.1)."""
    return drop_lowest(magnitude_scores(model), mask, fraction, scope)


def magnitude_mask(model: nn.Module, target: float, scope: str = "global") -> Mask:
    """One-shot magnitude pruning of the dense network to the sparsity ``target`` (0 to 1): EB's mask of an epoch."""
    return drop_lowest(magnitude_scores(model), dense_mask(model), target, scope)


def random_scores(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform random scores from a CPU generator, for random pruning; the same on every device."""
    return {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in prunable(model).items()}


def snip_scores(model: nn.Module, samples: Split, timesteps: int) -> dict[str, Tensor]:
    """|w dL/dw| of every prunable weight: SNIP, connection sensitivity (Lee et al., ICLR 2019; Fig. 10 of the paper).

    L is the training loss on the un-augmented samples, with batch norm in training mode and the gradient of spikes that
    of the surrogate. The model is not changed.

    Args:
        model: at initialisation.
        samples: class-balanced training images.
        timesteps: number of timesteps T of the forward pass.
    """
    model = copy.deepcopy(model).train()
    model.zero_grad()
    for images, labels in samples.batches(BATCH):
        logits = model(images, timesteps)  # [T,B,classes]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(timesteps))
        (loss * len(labels) / len(samples)).backward()
    return {name: (weight * weight.grad).detach().abs() for name, weight in prunable(model).items()}
