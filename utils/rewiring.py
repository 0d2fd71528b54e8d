"""Drop and grow: a sparse network whose mask changes while it trains (RigL, Evci et al., ICML 2020; SET, Mocanu et al.,
Nature Communications 2018)."""

import torch
from torch import nn

from .masks import Mask, prunable

GROWTHS = ("gradient", "random")


@torch.no_grad()
def drop_and_grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mask: Mask,
    fraction: float,
    growth: str,
    generator: torch.Generator,
) -> None:
    """Drop the smallest surviving weights of each layer and grow as many others, in place; each layer keeps its count.

    A weight that is dropped may grow again at once, and then stays as it was. All others that grow start at 0, and what
    the optimizer remembers of a weight that was not there before and after is 0, too.

    Args:
        model: ``.grad`` of its weights holds the dense gradient of a step.
        optimizer: of the model's parameters.
        mask: what is kept; changed in place.
        fraction: of each layer's survivors, 0 to 1.
        growth: ``gradient``, where the dense gradient is largest (RigL); ``random``, anywhere (SET).
        generator: a CPU generator, for ``random``.
    """
    for name, weight in prunable(model).items():
        alive = mask[name].flatten()
        count = round(fraction * int(alive.count_nonzero()))
        kept = alive.clone()
        kept[weight.flatten().abs().masked_fill(~alive, torch.inf).argsort(stable=True)[:count]] = False
        if growth == "gradient":
            scores = weight.grad.flatten().abs()
        else:
            scores = torch.rand(kept.shape, generator=generator).to(kept.device)
        new = kept.clone()
        new[scores.masked_fill(kept, -1).argsort(stable=True, descending=True)[:count]] = True
        stays = (alive & new).view_as(weight)
        mask[name].copy_(new.view_as(weight))
        weight.mul_(stays)
        for memory in optimizer.state[weight].values():
            if torch.is_tensor(memory) and memory.shape == weight.shape:
                memory.mul_(stays)
