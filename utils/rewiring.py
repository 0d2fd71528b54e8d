"""Rewiring: sparse networks whose mask changes while they train (RigL, Evci et al., ICML 2020; SET, Mocanu et al.,
Nature Communications 2018; Deep R, Bellec et al., ICLR 2018; Grad R, Chen et al., IJCAI 2021)."""

import math

import torch
from torch import Tensor, nn

from .masks import Mask, prunable

GROWTHS = ("gradient", "random")
NEW = 1e-12  # strength of a connection that Deep R makes active


@torch.no_grad()
def drop_and_grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mask: Mask,
    fraction: float,
    growth: str,
    generator: torch.Generator | None = None,
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
        generator: a CPU generator, which ``random`` needs.
    """
    new_mask = {}
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
        new_mask[name] = new.view_as(weight)
    replace_mask(model, optimizer, mask, new_mask)


@torch.no_grad()
def deep_rewiring(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mask: Mask,
    signs: dict[str, Tensor],
    least: dict[tuple[str, ...], int],
    penalty: float,
    noise: float,
    generator: torch.Generator,
) -> None:
    """One step of Deep R after the optimizer's, in place (Bellec et al., ICLR 2018, Algorithm 1).

    The strength of an active connection is its weight times its sign. The penalty and noise act on it; a connection
    whose strength is no longer positive becomes dormant. Where fewer than the least number are active then, dormant
    ones drawn uniformly become active, with a strength of ``NEW`` and without momentum.

    Args:
        model: after a step of the optimizer, its dormant weights 0.
        optimizer: of the model's parameters.
        mask: the active connections; changed in place.
        signs: +1 or -1 for every connection, by parameter name.
        least: the number of active connections that each group of layers has at least.
        penalty: what every strength loses, the learning rate times the l1 coefficient.
        noise: standard deviation of what is added to each.
        generator: a CPU generator of the noise and the draws.
    """
    weights = prunable(model)
    new_mask = {}
    for name, weight in weights.items():
        active = mask[name]
        strengths = (signs[name] * weight)[active] - penalty
        if noise:
            strengths += noise * torch.randn(strengths.shape, generator=generator).to(strengths.device)
        weight[active] = signs[name][active] * strengths
        new_mask[name] = active.clone()
        new_mask[name][active] = strengths > 0
    grown = {}
    for names, count in least.items():
        alive = torch.cat([new_mask[name].flatten() for name in names])
        chosen = _draw_dormant(alive, count - int(alive.count_nonzero()), generator)
        for name, part in zip(names, chosen.split([new_mask[name].numel() for name in names]), strict=True):
            grown[name] = part.view_as(new_mask[name])
            new_mask[name] |= grown[name]
    replace_mask(model, optimizer, mask, new_mask, fresh=grown)
    for name, new in grown.items():
        weights[name][new] = NEW * signs[name][new]


def _draw_dormant(alive: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """bool [n]: ``count`` of the entries that are not in ``alive`` [n], uniformly without replacement; none if the
    count is not positive."""
    taken = alive.clone()
    if 2 * int(alive.count_nonzero()) > len(alive):
        dormant = (~alive).nonzero().flatten()
        taken[dormant[torch.randperm(len(dormant), generator=generator)[: max(count, 0)].to(alive.device)]] = True
        return taken & ~alive
    while count > 0:  # where most is dormant it is faster to draw anywhere, and pass over what is taken
        drawn = torch.randint(len(alive), (count,), generator=generator).unique().to(alive.device)
        drawn = drawn[~taken[drawn]]
        taken[drawn] = True
        count -= len(drawn)
    return taken & ~alive


@torch.no_grad()
def gradient_rewiring(
    model: nn.Module, strengths: dict[str, Tensor], signs: dict[str, Tensor], pull: float | Tensor, mean: float
) -> None:
    """One step of Grad R after the optimizer's, in place (Chen et al., IJCAI 2021, Algorithm 1).

    A weight is its sign times its strength where that is positive, else 0. The optimizer has moved the weight by the
    dense gradient; the strength follows, also below 0, and the prior pulls it to its mean.

    Args:
        model: after a step of the optimizer.
        strengths: fp32 by parameter name, those before the step; changed in place.
        signs: +1 or -1 for every connection, by parameter name.
        pull: the learning rate times the penalty, what the prior moves a strength by.
        mean: the prior's mean.
    """
    for name, weight in prunable(model).items():
        strength, sign = strengths[name], signs[name]
        prior = pull * (strength - mean).sign()
        strength += sign * weight - strength.relu() - prior
        weight.copy_(sign * strength.relu())


def next_penalty(tried: dict[float, float], density: float) -> float:
    """The penalty of Grad R to try next: between the two that the wanted density lies between, interpolated in the
    logarithms of penalty and density; a quarter of the smallest or four times the largest where it lies outside.

    Args:
        tried: penalty -> density that it led to, 0 to 1; at least one.
        density: the one wanted.
    """
    weaker = [penalty for penalty, reached in tried.items() if reached > density]
    stronger = [penalty for penalty, reached in tried.items() if reached <= density]
    if not stronger:
        return 4 * max(weaker)
    if not weaker:
        return min(stronger) / 4
    low, high = max(weaker), min(stronger)
    steps = [math.log(max(value, 1e-9)) for value in (tried[low], density, tried[high])]
    share = (steps[0] - steps[1]) / (steps[0] - steps[2])
    return low * (high / low) ** share


def signs_of(model: nn.Module) -> dict[str, Tensor]:
    """+1 or -1 for every prunable weight, by parameter name: the sign that it has now, +1 for 0."""
    return {name: torch.where(weight < 0, -1.0, 1.0) for name, weight in prunable(model).items()}


@torch.no_grad()
def replace_mask(
    model: nn.Module, optimizer: torch.optim.Optimizer, mask: Mask, new: Mask, fresh: Mask | None = None
) -> None:
    """Make a live mask another one, in place. A weight that both keep stays as it was, and so does what the optimizer
    remembers of it; all others are 0. What is ``fresh`` is treated as if it had not been kept before."""
    for name, weight in prunable(model).items():
        stays = mask[name] & new[name]
        if fresh is not None:
            stays &= ~fresh[name]
        mask[name].copy_(new[name])
        weight.mul_(stays)
        for memory in optimizer.state[weight].values():
            if torch.is_tensor(memory) and memory.shape == weight.shape:
                memory.mul_(stays)
