"""Reading tickets: a mask, the weights to start from, and where they come from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import InputError
from .files import part, read_tensors
from .masks import REWINDS, Mask, prunable

WRONG_TICKET = "name a file of a run's tickets folder"


def load_ticket(
    path: Path | str, remedy: str = "remove it and run the command that made it again"
) -> tuple[Mask, dict[str, Tensor], dict]:
    """Read a ticket: its mask, the weights to start from (a state dict), and where it comes from.

    Raises:
        InputError: the file is damaged or not a ticket; the message names it and the remedy.
        OSError: it cannot be opened.
    """
    tensors, origin = read_tensors(Path(path), remedy)
    mask, weights = part(tensors, "mask."), part(tensors, "weights.")
    if not mask or any(name not in weights or m.shape != weights[name].shape for name, m in mask.items()):
        raise InputError(f"{path} is not a ticket (a mask, and weights for each of its entries): {remedy}")
    if any(m.dtype != torch.bool for m in mask.values()) or not all(w.isfinite().all() for w in weights.values()):
        raise InputError(f"{path} is not a ticket (bool masks and finite weights): {remedy}")
    if not isinstance(origin, dict) or any(not _is_count(origin.get(name)) for name in ("level", "epoch")):
        raise InputError(f"{path} does not say its level and epoch: {remedy}")
    if origin.get("rewind", REWINDS[0]) not in REWINDS:
        raise InputError(f"{path} is of --rewind {origin['rewind']!r}, not {', '.join(REWINDS)}: {remedy}")
    return mask, weights, origin


def load_fitting_ticket(path: Path | str, model: nn.Module) -> tuple[Mask, dict[str, Tensor], dict]:
    """Read a ticket onto the device of the model it is for.

    Raises:
        InputError: the ticket is damaged, or does not fit the model; the message names the first parameter that
            differs.
        OSError: it cannot be opened.
    """
    mask, weights, origin = load_ticket(path, WRONG_TICKET)
    state, device = model.state_dict(), next(model.parameters()).device
    for ours, theirs in ((state, weights), (prunable(model), mask)):
        for name in [*ours, *theirs]:
            a, b = (tuple(tensors[name].shape) if name in tensors else "not there" for tensors in (ours, theirs))
            if a != b:
                raise InputError(f"{path} does not fit this network: {name} is {b} in the ticket, {a} in the network")
    return {n: m.to(device) for n, m in mask.items()}, {n: w.to(device) for n, w in weights.items()}, origin


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
