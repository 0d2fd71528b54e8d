"""Files that are either whole or not there: written beside their place and renamed into it. Nothing is unpickled."""

import json
import os
import zlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import InputError

TEMPORARY = ".tmp"  # ending of a file that is being written; one left behind by a killed run is worthless


def _replace(path: Path, write) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file, whole or not at all."""
    _replace(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, remedy: str):
    """Read a JSON file.

    Raises:
        InputError: it is not JSON; the message names the file and the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write tensors and JSON metadata as safetensors with a checksum, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"metadata": json.dumps(metadata), "checksum": checksum(tensors)}
    # through bytes: save_file would make a file that only its owner may read
    _replace(path, lambda temporary: temporary.write_bytes(safetensors.torch.save(tensors, header)))


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict]:
    """Read what ``write_tensors`` wrote: CPU tensors by name, and the metadata.

    Raises:
        InputError: the file is damaged or of another kind; the message names it and the remedy.
        OSError: it cannot be opened.
    """
    with path.open("rb"):
        pass  # a file that is missing or not readable says so itself
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        metadata = json.loads(header["metadata"])
        if header["checksum"] != checksum(tensors):
            raise ValueError("its checksum does not match")
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from error
    return tensors, metadata


def checksum(tensors: dict[str, Tensor]) -> str:
    """A checksum of names, types, shapes and values, the same on every device."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"crc32:{crc:08x}"


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
