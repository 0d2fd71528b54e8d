"""What a ticket is: prune, rewind, sparsity, distance.

A mask is a ``dict[str, Tensor]``: parameter name -> bool tensor of the parameter's shape, True keeps the weight. It
covers the prunable weights, which are the kernels of convolutions and linear layers; biases and batch norm are never
pruned. All functions work on the device their tensors are on.
"""

import copy

import torch
from torch import Tensor, nn

Mask = dict[str, Tensor]

SCOPES = ("global", "local")
DISTANCES = ("hamming", "jaccard")
REWINDS = ("weights", "lr", "none")


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The prunable weights by name: every parameter with more than one dimension."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}


def dense_mask(model: nn.Module) -> Mask:
    """The mask that keeps everything."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}


def surviving(model: nn.Module) -> Mask:
    """The mask that keeps what is not 0."""
    return {name: weight.detach() != 0 for name, weight in prunable(model).items()}


def drop_lowest(scores: dict[str, Tensor], mask: Mask, fraction: float, scope: str = "global") -> Mask:
    """Prune the given fraction of the surviving weights, those with the lowest scores.

    Only survivors are ranked, so what is pruned stays pruned. The count is exact: ``round(fraction * survivors)``, in
    the whole network (``global``) or in each layer (``local``). Equal scores go in the order of the mask's entries.

    Args:
        scores: parameter name -> score, the shapes of ``mask``; the scores of pruned weights do not matter.
        mask: the mask to prune further; it is not changed.
        fraction: of the survivors, 0 to 1.
        scope: ``global`` or ``local``.

    Raises:
        ValueError: an unknown scope, a fraction outside 0 to 1, or a survivor's score that is not a number.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown pruning scope {scope!r}: choose from {', '.join(SCOPES)}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction to prune must be from 0 to 1, got {fraction}")
    groups = [list(mask)] if scope == "global" else [[name] for name in mask]
    pruned = {}
    for names in groups:
        alive = torch.cat([mask[name].flatten() for name in names])
        ranked = torch.cat([scores[name].flatten() for name in names]).masked_fill_(~alive, torch.inf)
        keep = _all_but_lowest(ranked, alive, round(fraction * int(alive.count_nonzero())))
        for name, kept in zip(names, keep.split([mask[name].numel() for name in names]), strict=True):
            pruned[name] = kept.view_as(mask[name]).clone()
    return pruned


def _all_but_lowest(scores: Tensor, alive: Tensor, count: int) -> Tensor:
    """bool [n], a new one: ``alive`` [n] without its ``count`` lowest scores [n], the first of equals first; what is
    not alive has a score of infinity."""
    if scores.isnan().any():
        raise ValueError("a weight's score is not a number")
    if count == 0:
        return alive.clone()
    threshold = scores.kthvalue(count).values
    keep = alive & (scores > threshold)
    spared = int(alive.count_nonzero() - keep.count_nonzero()) - count
    if spared:
        equals = (alive & (scores == threshold)).nonzero().flatten()
        keep[equals[-spared:]] = True
    return keep


def sparsity_after(prunings: int, fraction: float) -> float:
    """Sparsity, 0 to 1, that a number of prunings of the given fraction of the survivors reach: 1 - (1 - f)^n."""
    return 1 - (1 - fraction) ** prunings


def sparsity(mask: Mask, parameters: int | None = None) -> float:
    """Fraction pruned, 0 to 1, of the prunable weights; with ``parameters``, of that many parameters.

    The paper's 68.30 ... 98.13 % are fractions of all parameters, biases and batch norm included.
    """
    total = sum(m.numel() for m in mask.values())
    kept = sum(int(m.count_nonzero()) for m in mask.values())
    return (total - kept) / (total if parameters is None else parameters)


def layer_sparsity(mask: Mask) -> dict[str, float]:
    """Fraction pruned, 0 to 1, of each layer by parameter name (Fig. 7c)."""
    return {name: sparsity({name: m}) for name, m in mask.items()}


def emptied_layers(mask: Mask) -> list[str]:
    """Names of the layers that have lost every weight: no signal passes them."""
    return [name for name, m in mask.items() if not m.any()]


def distance(a: Mask, b: Mask, kind: str = "hamming") -> float:
    """How much two masks of one network differ, 0 to 1.

    Args:
        a: a mask.
        b: another of the same shapes.
        kind: ``hamming``, the entries that differ over all entries (section 3.2); ``jaccard``, the entries that differ
            over those that either mask keeps, which stays meaningful at high sparsity (0 for two empty masks).

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in DISTANCES:
        raise ValueError(f"unknown mask distance {kind!r}: choose from {', '.join(DISTANCES)}")
    differing = sum((a[name] ^ b[name]).count_nonzero() for name in a)
    if kind == "hamming":
        return float(differing) / sum(m.numel() for m in a.values())
    return float(differing) / max(1, int(sum((a[name] | b[name]).count_nonzero() for name in a)))


def shuffle_layers(mask: Mask, generator: torch.Generator) -> Mask:
    """The mask with its entries permuted within each layer, in the mask's order: every layer keeps its sparsity and
    loses its structure (Frankle et al. 2021; Su et al. 2020). ``generator`` is one of the CPU."""
    orders = {name: torch.randperm(m.numel(), generator=generator).to(m.device) for name, m in mask.items()}
    return {name: m.flatten()[orders[name]].view(m.shape) for name, m in mask.items()}


def apply_mask(model: nn.Module, mask: Mask) -> None:
    """Set the pruned weights of the model to 0, in place."""
    with torch.no_grad():
        for name, weight in prunable(model).items():
            weight.mul_(mask[name])


def state_after_pruning(model: nn.Module, rewind_point: dict[str, Tensor], kind: str = "weights") -> dict[str, Tensor]:
    """The state that a network is trained again from once it is pruned (Renda et al., ICLR 2020).

    Args:
        model: the network as it was trained before the pruning.
        rewind_point: its state at the rewind epoch.
        kind: ``weights``, the rewind point; ``lr`` and ``none``, a copy of what it was trained to. They differ in the
            learning rate, see ``training.learning_rate``.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in REWINDS:
        raise ValueError(f"unknown rewinding {kind!r}: choose from {', '.join(REWINDS)}")
    return rewind_point if kind == "weights" else copy.deepcopy(model.state_dict())


def rewind(model: nn.Module, state: dict[str, Tensor], mask: Mask) -> None:
    """Set the model back to a state, in place, and prune it.

    Biases, batch-norm weights and running statistics go back too (Frankle et al. 2019); ``state`` itself is not
    changed by what the model does afterwards.
    """
    model.load_state_dict(state)
    apply_mask(model, mask)
