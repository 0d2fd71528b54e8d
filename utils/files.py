"""Files that are either whole or not there: written beside their place and renamed into it. Nothing is unpickled."""

import json
import os
import socket
import uuid
import zlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .errors import DamagedError, InputError, InUseError

TEMPORARY = ".tmp"  # ending of a file that is being written; one left behind by a killed run is worthless


def _replace(path: Path, write, before: Path | None = None) -> None:
    # two processes, on two machines perhaps, may write one file: the cache of a data set
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
    except (Exception, KeyboardInterrupt) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, str(path)) from error
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
        DamagedError: it is not JSON; the message names the file and the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}): {remedy}") from error


def hold(path: Path, complaint: str) -> FileLock:
    """Take the lock that a file stands for. It is held until it is released, or the process ends, however it ends.

    Args:
        path: the file, which stays. The holder's name stands in another one beside it.
        complaint: what the message begins with if another process holds it.

    Raises:
        InUseError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path, timeout=0, is_singleton=True), path.with_name(path.name + ".holder")
    try:
        lock.acquire()
    except Timeout as error:
        name = holder.read_text(errors="replace") if holder.exists() else "another process"
        raise InUseError(f"{complaint} by {name}") from error
    write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def sealed(row: dict, after: str = "") -> dict:
    """The row with a checksum of all that it holds, in the field ``checksum``; and of the checksum that it comes after,
    so that no row of a chain can be lost from its middle, doubled or moved."""
    return row | {"checksum": checksum({}, after + json.dumps(row, sort_keys=True))}


def unsealed(row, after: str = "") -> dict:
    """The row that was sealed.

    Raises:
        ValueError: it is no JSON object, has changed since, or came after another one.
    """
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    held = {name: value for name, value in row.items() if name != "checksum"}
    if row.get("checksum") != sealed(held, after)["checksum"]:
        raise ValueError("a checksum does not match")
    return held


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict, before: Path | None = None) -> None:
    """Write tensors and JSON metadata as safetensors with a checksum, whole or not at all. A file that is there is kept
    as ``before``, if that is given."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata)
    header = {"metadata": text, "checksum": checksum(tensors, text)}
    # through bytes: save_file would make a file that only its owner may read
    _replace(path, lambda temporary: temporary.write_bytes(safetensors.torch.save(tensors, header)), before)


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict]:
    """Read what ``write_tensors`` wrote: CPU tensors by name, and the metadata.

    Raises:
        DamagedError: the file is damaged or of another kind; the message names it and the remedy.
        InputError: it is of an earlier version.
        OSError: it cannot be opened.
    """
    data = path.read_bytes()  # not mapped: what is checked here cannot change later, nor the file be cut under us
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        metadata = json.loads(header["metadata"])
        if not isinstance(metadata, dict):
            raise ValueError("its metadata are no JSON object")
        if header["checksum"] == checksum(tensors):
            raise InputError(f"{path} was written by an earlier version, this one does not read it: {remedy}")
        if header["checksum"] != checksum(tensors, header["metadata"]):
            raise ValueError("its checksum does not match")
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{path} is damaged ({error}): {remedy}") from error
    return tensors, metadata


def checksum(tensors: dict[str, Tensor], text: str = "") -> str:
    """A checksum of names, types, shapes and values, the same on every device, and of a text beside them."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"crc32:{crc:08x}"


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
