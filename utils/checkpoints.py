"""Checkpoints: what a stage was given by name, as tensors and JSON. Objects with a ``state_dict`` are loaded through
it, dicts of tensors in place."""

from pathlib import Path

import torch
from torch import Tensor

from .files import DamagedError, read_tensors, write_tensors


def save_checkpoint(path: Path, state: dict[str, object], metadata: dict) -> None:
    """Write the state of objects by name, and metadata, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    tree = {name: _take(_state(value), tensors, name) for name, value in state.items()}
    write_tensors(path, tensors, {"metadata": metadata, "state": tree})


def load_checkpoint(path: Path, state: dict[str, object], device: str) -> None:
    """Load a checkpoint into the objects that it was made of.

    Raises:
        DamagedError: the file is damaged, or was made of other objects; the message names it.
        OSError: it cannot be opened.
    """
    tensors, metadata = read_tensors(path)
    try:
        if set(metadata["state"]) != set(state):
            raise ValueError(f"it holds {', '.join(metadata['state'])}, not {', '.join(state)}")
        for name, value in state.items():
            saved = _put_back(metadata["state"][name], tensors, device)
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(saved)
                if isinstance(value, torch.optim.Optimizer):
                    _lay_out_as_parameters(value)
            else:
                _load_in_place(value, saved)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DamagedError(f"{path} is not a checkpoint of this stage ({str(error).splitlines()[0]})") from error


def _state(value) -> object:
    return value.state_dict() if hasattr(value, "state_dict") else value


def _take(value, tensors: dict[str, Tensor], place: str):
    """A state as JSON, its tensors moved to a flat dict; keys of dicts may be numbers, which JSON does not know."""
    if torch.is_tensor(value):
        place = f"{place}#{len(tensors)}"  # names may look alike
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, dict):
        return {"dict": [[key, _take(inner, tensors, f"{place}.{key}")] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_take(inner, tensors, f"{place}.{index}") for index, inner in enumerate(value)]}
    return {"value": value}


def _put_back(tree: dict, tensors: dict[str, Tensor], device: str):
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value].to(device)
    if kind == "dict":
        return {key: _put_back(inner, tensors, device) for key, inner in value}
    if kind == "list":
        return [_put_back(inner, tensors, device) for inner in value]
    return value


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Lay an optimizer's tensors out in memory as its parameters are, which may have their channels innermost: a fused
    step takes that for granted. On a CPU it would give a weight another one's momentum, on a GPU it refuses."""
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _load_in_place(target: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """What refers to the tensors of ``target``, a captured step for instance, sees the values that were saved."""
    if {n: t.shape for n, t in target.items()} != {n: t.shape for n, t in saved.items()}:
        raise ValueError("it holds other tensors")
    for name, value in saved.items():
        target[name].copy_(value)
