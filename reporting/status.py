"""How far each run is, as plain text: read from its files, without waiting and without writing."""

import fcntl
from datetime import timedelta
from pathlib import Path

from .runs import Run, read_runs

TITLES = ("run", "state", "stage", "epoch", "test accuracy", "time left of the stage")


def status(root: Path) -> str:
    """A line for each run below a folder, and one for each folder that cannot be read."""
    runs, left_out = read_runs(root)
    if not runs and not left_out:
        return f"{root} holds no run"
    rows = [TITLES, *(_row(run, _state(run, root)) for run in runs)] if runs else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{folder}: {' '.join(why.split())}" for folder, why in left_out.items())])


def _state(run: Run, root: Path) -> str:
    """``done``, ``running`` if a process holds its lock, or ``stopped``."""
    if run.finished:
        return "done"
    folder = root.resolve() / run.folder
    return "running" if held(folder.with_name(f".{folder.name}.lock")) else "stopped"


def held(lock: Path) -> bool:
    """Whether a process holds a lock of ``utils.files.hold``. It is asked for a share of it, for no longer than a call
    takes: two that ask do not see each other, and the file stays as it is."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # nobody has taken it yet, or it may not be read
    return False


def _row(run: Run, state: str) -> tuple[str, ...]:
    if not run.rows:
        return run.folder, state, *[""] * (len(TITLES) - 2)
    last = run.rows[-1]
    stage = last["phase"] if last["level"] is None else f"{last['phase']}_{last['level']:02d}"
    tested = [row["test_accuracy"] for row in run.rows if row["test_accuracy"] is not None]
    accuracy = f"{tested[-1]:.2f} %" if tested else ""
    seconds = last["seconds"] * (run.stop - last["epoch"] - 1)
    left = str(timedelta(seconds=round(seconds))) if state == "running" else ""
    return run.folder, state, stage, f"{last['epoch'] + 1} of {run.stop}", accuracy, left
