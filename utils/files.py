"""Files that are either whole or not there: written beside their place and renamed into it. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor  # slow to import, and the report does without

TEMPORARY = ".tmp"  # ending of a file that is being written


class InputError(Exception):
    """Something the user gave (a flag, a file, a folder) cannot be used; the message says what to do. Exit code 2."""


class DamagedError(InputError):
    """A file does not hold what such a file holds."""


class Finished(Exception):
    """The run was finished before; there is nothing left to do."""


class InUseError(Exception):
    """Another process is at the run. Exit code 75 (EX_TEMPFAIL): the same command can be tried again later."""


def check_folder(flag: str, path: Path) -> None:
    """Check that the file that a flag names can be written later.

    Raises:
        InputError: its folder is none, or not writable; the message names flag and folder.
    """
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise InputError(f"argument {flag}: no folder that can be written to: {path.parent}")


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file, others the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # a folder that is none
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file, whole or not at all."""
    _replace(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path):
    """Read a JSON file.

    Raises:
        DamagedError: it is not JSON; the message names the file.
        OSError: it cannot be opened.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error


def check_fields(path: Path, value, fields: tuple[str, ...]) -> None:
    """Check that what a file holds is a JSON object with these fields.

    Raises:
        DamagedError: it is not; the message names the file and the field.
    """
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is damaged ({value!r:.40} is no JSON object)")
    missing = [field for field in fields if field not in value]
    if missing:
        raise DamagedError(f"{path} is damaged ({missing[0]} is missing)")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write tensors and JSON metadata as safetensors, whole or not at all."""
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"metadata": json.dumps({"order": list(tensors), **metadata})}
    write_bytes(path, safetensors.torch.save(tensors, header))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read what ``write_tensors`` wrote: CPU tensors by name, in the order that they were written in, and the metadata.

    Raises:
        DamagedError: the file is damaged or of another kind; the message names it.
        OSError: it cannot be opened.
    """
    import safetensors.torch

    metadata = read_metadata(path)
    try:
        tensors = safetensors.torch.load(path.read_bytes())  # in any order
        return {name: tensors[name] for name in metadata.pop("order")}, metadata
    except (SafetensorError, LookupError, ValueError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error


def read_metadata(path: Path) -> dict:
    """Read the metadata of what ``write_tensors`` wrote, without the tensors; errors as in ``read_tensors``."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = json.loads(header["__metadata__"]["metadata"])
        if sorted(metadata["order"]) != sorted(header.keys() - {"__metadata__"}):
            raise ValueError("it does not hold the tensors that it lists")
        return metadata
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
        raise DamagedError(f"{path} is damaged or not a file of this project") from error


def hold(path: Path, complaint: str) -> FileLock:
    """Take the lock that a file stands for; it is held until the process ends, however it ends.

    Raises:
        InUseError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(f"{complaint} by another process") from error
    return lock


def delete_folder(folder: Path) -> None:
    """Delete a folder. It is moved away first: one that is half deleted must not look whole."""
    away = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(away, ignore_errors=True)  # left by a deletion that was interrupted
    if folder.exists():
        shutil.rmtree(folder.rename(away))
