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
    """|w| of every prunable weight, of its shape (section 3.1)."""
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


def erk_densities(shapes: dict[str, torch.Size], density: float) -> dict[str, float]:
    """Density of each layer, 0 to 1, when all together have ``density``: Erdos-Renyi-Kernel (Evci et al., ICML 2020).

    A layer's density is in proportion to the sum of its kernel's sizes over their product, (n_out + n_in + k_h + k_w) /
    (n_out n_in k_h k_w); layers that this would make more than dense are dense, and the rest is solved again.
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    budget = density * sum(sizes.values())
    dense: set[str] = set()
    while True:
        left = {name: sum(shapes[name]) for name in shapes if name not in dense}  # raw density x size
        factor = (budget - sum(sizes[name] for name in dense)) / max(sum(left.values()), 1)
        too_dense = {name for name in left if factor * left[name] > sizes[name]}
        if not too_dense:
            return {name: 1.0 if name in dense else factor * left[name] / sizes[name] for name in shapes}
        dense |= too_dense


def erk_scores(model: nn.Module, density: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Random scores from a CPU generator such that global pruning to ``density`` (0 to 1) leaves each layer its ERK
    density, see ``erk_densities``: uniform ranks in a layer minus the share that it is to lose."""
    weights, scores = prunable(model), {}
    densities = erk_densities({name: weight.shape for name, weight in weights.items()}, density)
    for name, weight in weights.items():
        ranks = (torch.randperm(weight.numel(), generator=generator, dtype=torch.float64) + 0.5) / weight.numel()
        scores[name] = (ranks - (1 - densities[name])).view(weight.shape).to(weight.device)
    return scores
