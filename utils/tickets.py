"""Tickets and trained sparse networks as files: a mask, the surviving weights, and where they come from.

A mask is stored as bits, of a pruned layer only the surviving weights, everything else (biases, batch norm) whole. The
metadata holds what ``build_model`` needs, so that a file is enough to rebuild the network.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import build_model

from .files import DamagedError, InputError, read_tensors, write_tensors
from .masks import Mask, apply_mask, prunable

Ticket = tuple[Mask, dict[str, Tensor], dict]
WANTED = "name a file of a run's folder tickets or networks"


def write_ticket(path: Path, mask: Mask, state: dict[str, Tensor], origin: dict) -> None:
    """Write a mask and a network's state, whole or not at all.

    Args:
        path: the file.
        mask: what is kept.
        state: the network's state dict; what the mask prunes is left out.
        origin: where it comes from, as JSON; ``network`` holds the arguments of ``build_model``.
    """
    tensors = {f"mask.{n}": torch.from_numpy(np.packbits(m.cpu().numpy())) for n, m in mask.items()}
    tensors |= {f"weights.{n}": value[mask[n]] if n in mask else value for n, value in state.items()}
    write_tensors(path, tensors, {"shapes": {n: list(m.shape) for n, m in mask.items()}, "origin": origin})


def load_ticket(path: Path | str, device: str = "cpu") -> Ticket:
    """Read a ticket: its mask, its weights (a state dict, pruned weights 0), and where it comes from; masks and weights
    are in the network's order.

    Raises:
        DamagedError: the file is damaged or not a ticket; the message names it.
        OSError: it cannot be opened.
    """
    tensors, metadata = read_tensors(Path(path))
    try:
        origin, mask = metadata["origin"], {}
        for name, shape in metadata["shapes"].items():
            bits = np.unpackbits(tensors[f"mask.{name}"].numpy(), count=int(np.prod(shape)))
            mask[name] = torch.from_numpy(bits).bool().view(shape).to(device)
        weights = {n: value.to(device) for n, value in tensors.items() if n.startswith("weights.")}
        weights = {n.removeprefix("weights."): value for n, value in weights.items()}
        for name, kept in mask.items():
            dense = weights[name].new_zeros(kept.shape)
            dense[kept] = weights[name]
            weights[name] = dense
        _check_origin(origin)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DamagedError(f"{path} is not a ticket ({error}): {WANTED}") from error
    return mask, weights, origin


def _check_origin(origin: dict) -> None:
    """What scripts rely on; a ticket may be a stranger's."""
    level, epoch, dense = origin["level"], origin["epoch"], origin.get("dense")
    if not (level is None or (isinstance(level, int) and level >= 0)):
        raise ValueError(f"level {level!r}")
    if not (isinstance(epoch, int) and epoch >= 0 and isinstance(origin["network"], dict)):
        raise ValueError(f"epoch {epoch!r}")
    if not (dense is None or Path(dense).name == dense):
        raise ValueError(f"dense {dense!r}")


def load_fitting_ticket(path: Path | str, model: nn.Module) -> Ticket:
    """Read a ticket onto the device of the model that it is for.

    Raises:
        InputError: the ticket is damaged, or does not fit the model; the message names the first parameter that
            differs.
        OSError: it cannot be opened.
    """
    mask, weights, origin = load_ticket(path, str(next(model.parameters()).device))
    for ours, theirs in ((model.state_dict(), weights), (prunable(model), mask)):
        for name in [*ours, *theirs]:
            a, b = (tuple(tensors[name].shape) if name in tensors else "not there" for tensors in (ours, theirs))
            if a != b:
                raise InputError(f"{path} does not fit this network: {name} is {b} in the ticket, {a} in the network")
    return mask, weights, origin


def load_dense_weights(path: Path | str, model: nn.Module) -> dict[str, Tensor]:
    """The weights that a ticket was cut from, pruned ones included: its run holds them once, in another file of the
    ticket's folder.

    Raises:
        InputError: that file is damaged or of another network, or there is none.
        OSError: it cannot be opened.
    """
    _, _, origin = load_ticket(path)
    if origin.get("dense") is None:
        raise InputError(f"{path} was not cut from weights that its run has kept: its pruned weights are not known")
    return load_fitting_ticket(Path(path).with_name(origin["dense"]), model)[1]


def load_ticket_network(path: Path | str, device: str = "cpu") -> tuple[nn.Module, Mask, dict]:
    """Rebuild a network from a ticket, or from a trained network of a run (its folder ``networks``).

    Returns:
        The network, ``model(images [B,C,H,W], timesteps) -> logits [T,B,classes]``, pruned; its mask; and where it
        comes from.

    Raises:
        DamagedError: the file is damaged or not a ticket.
        OSError: it cannot be opened.
    """
    mask, weights, origin = load_ticket(path, device)
    try:
        model = build_model(**origin["network"]).to(device)
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{path} does not hold the network that it names ({error})") from error
    apply_mask(model, mask)
    return model, mask, origin


def network_file(source: Path) -> Path:
    """The file that is meant: the source itself, or the one trained network of a finished run.

    Raises:
        InputError: it is a folder without a finished run, or of a run with several networks.
    """
    if not source.is_dir():
        return source
    if not (source / "args.json").exists():
        raise InputError(f"{source} is not the folder of a run: name one, or a file of its folder networks")
    if not (source / "summary.txt").exists():
        raise InputError(f"{source} holds a run that is not finished: its command resumes it")
    found = sorted((source / "networks").glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(str(path) for path in found) or "none"
        raise InputError(f"{source} holds {len(found)} networks ({names}): name the file")
    return found[0]
