"""What args.json, metrics.jsonl and results.json hold, and reading them back. What has changed is found out."""

import json
from pathlib import Path

from .errors import DamagedError, InputError
from .files import read_json, sealed, unsealed, write_json, write_text

EPOCH_FIELDS = {
    "phase": str, "level": int, "epoch": int, "timesteps": int, "seconds": (int, float),
    "test_accuracy": (int, float, type(None)),
}  # fmt: skip
RESULT_FIELDS = {
    "level": int, "sparsity": (int, float), "sparsity_all_parameters": (int, float), "timesteps": int,
    "search_timesteps": int, "test_accuracy": (int, float), "best_test_accuracy": (int, float),
    "search_seconds": (int, float), "search_epochs": int, "search_timestep_epochs": int,
}  # fmt: skip


def read_args(path: Path, remedy: str) -> dict:
    """Read ``args.json``.

    Raises:
        DamagedError: it is not what was written; the message names it and the remedy.
        InputError: it is of an earlier version.
        OSError: it cannot be opened.
    """
    args = read_json(path, remedy)
    if isinstance(args, dict) and "checksum" not in args and "method" in args:
        raise InputError(f"{path} was written by an earlier version, this one does not read it: {remedy}")
    return _checked(path, remedy, [args], {})[0]


def identity(args: dict) -> str:
    """What tells a run from all others: the checksum of what ``args.json`` holds. Its log and results are sealed with
    it, so that those of another run are not taken for its own."""
    return sealed(args)["checksum"]


def read_rows(path: Path, remedy: str, run: str) -> list[dict]:
    """Read ``metrics.jsonl`` of the run with an identity, no rows if it is not there; errors as in ``read_args``."""
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}): {remedy}") from error
    return _checked(path, remedy, rows, EPOCH_FIELDS, run, chained=True)


def write_rows(path: Path, rows: list[dict], run: str) -> None:
    """Write ``metrics.jsonl``, whole or not at all; a row's checksum goes on from that of the row before."""
    lines, last = [], run
    for row in rows:
        row = sealed(row, last)
        last = row["checksum"]
        lines.append(json.dumps(row) + "\n")
    write_text(path, "".join(lines))


def read_results(path: Path, remedy: str, run: str) -> list[dict]:
    """Read ``results.json`` of the run with an identity, no rows if it is not there; errors as in ``read_args``."""
    return _checked(path, remedy, read_json(path, remedy), RESULT_FIELDS, run) if path.exists() else []


def write_results(path: Path, results: list[dict], run: str) -> None:
    """Write ``results.json``, whole or not at all."""
    write_json(path, [sealed(row, run) for row in results])


def check_fields(row, fields: dict) -> None:
    """Check that a row is a JSON object that holds these fields, of these types.

    Raises:
        TypeError: it does not; the message names the field.
    """
    if not isinstance(row, dict):
        raise TypeError("a row is no JSON object")
    for name, kind in fields.items():
        if name not in row or not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise TypeError(f"{name} of a row is {row.get(name, 'missing')!r}")


def _checked(path: Path, remedy: str, rows, fields: dict, first: str = "", chained: bool = False) -> list[dict]:
    checked, last = [], first
    try:
        if not isinstance(rows, list):
            raise TypeError("no list of rows")
        for row in rows:
            checked.append(unsealed(row, last))
            check_fields(checked[-1], fields)
            last = row["checksum"] if chained else first
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{path} is damaged ({error}): {remedy}") from error
    return checked
