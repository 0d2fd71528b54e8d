"""ADMM pruning: the weights W are pulled towards a sparse Z while U, the scaled dual, gathers what is left between them
(Deng et al., TNNLS 2021)."""

import torch
from torch import Tensor, nn

from .masks import dense_mask, drop_lowest, prunable


class Admm:
    """Z and U of a network's prunable weights; U starts at 0, Z as the projection of W.

    Args:
        model: the trained network.
        sparsity: of Z, 0 to 1.
        scope: where the smallest weights are looked for, ``global`` or ``local``.
        rho: weight of the penalty rho/2 |W - Z + U|^2, which is summed over all weights.

    Attributes:
        target: Z by parameter name.
        dual: U by parameter name.
    """

    def __init__(self, model: nn.Module, sparsity: float, scope: str, rho: float):
        self.model, self.sparsity, self.scope, self.rho = model, sparsity, scope, rho
        self.dual = {name: torch.zeros_like(weight) for name, weight in prunable(model).items()}
        self.target = self._projection()

    @torch.no_grad()
    def pull(self, *_) -> None:
        """Add the penalty's gradient rho (W - Z + U) to the weights' gradients: a pre-hook of an optimizer's step."""
        for name, weight in prunable(self.model).items():
            weight.grad.add_(weight - self.target[name] + self.dual[name], alpha=self.rho)

    @torch.no_grad()
    def update(self) -> float:
        """End a round: Z becomes the largest of W + U, the rest 0; then W - Z is added to U. Returns |W - Z| / |W|."""
        left = size = 0.0
        target = self._projection()
        for name, weight in prunable(self.model).items():
            self.target[name].copy_(target[name])
            gap = weight - target[name]
            self.dual[name].add_(gap)
            left, size = left + float(gap.square().sum()), size + float(weight.square().sum())
        return (left / size) ** 0.5

    @torch.no_grad()
    def _projection(self) -> dict[str, Tensor]:
        moved = {name: weight + self.dual[name] for name, weight in prunable(self.model).items()}
        sizes = {name: value.abs() for name, value in moved.items()}
        mask = drop_lowest(sizes, dense_mask(self.model), self.sparsity, self.scope)
        return {name: value * mask[name] for name, value in moved.items()}
