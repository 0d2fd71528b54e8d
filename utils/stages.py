"""A stage of a run: a piece of training that is logged, and that resumes where it was stopped."""

import json
import math
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from . import distributed
from .checkpoints import load_checkpoint, save_checkpoint
from .files import DamagedError

EPOCH_FIELDS = ("phase", "level", "epoch", "timesteps", "test_accuracy", "seconds")


class Stopped(Exception):
    """A signal came, and the epoch that ended is saved. ``number`` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stage:
    """A piece of training that can be resumed; see ``Run.stage``. ``run`` is the run that it belongs to."""

    def __init__(self, run, phase: str, level: int | None, state: dict):
        self.run, self.phase, self.level, self.state = run, phase, level, state
        self.name = phase if level is None else f"{phase}_{level:02d}"
        self.ended = False

    @property
    def rows(self) -> list[dict]:
        """The log of this stage, also of one that ended before the run was resumed."""
        return [row for row in self.run.rows if (row["phase"], row["level"]) == (self.phase, self.level)]

    def epochs(self, epochs: range) -> Iterator[int]:
        """Load the checkpoint if there is one, and yield the epochs that are left; each must be committed.

        Raises:
            DamagedError: the checkpoint does not fit the stage.
        """
        run, first = self.run, epochs.start
        run.stages.append(self.name)
        if self.name in run.resumed.get("passed", ()):
            run.live = False
            return
        if run.resumed:
            if self.name != run.resumed["stage"]:
                raise DamagedError(f"{run.checkpoint_path} is of stage {run.resumed['stage']}, not {self.name}")
            load_checkpoint(run.checkpoint_path, self.state, run.args.device)
            first, self.ended = run.resumed["epoch"], run.resumed["ended"]
            run.live, run.resumed = True, {}
        self.stop = epochs.stop
        self.curves = _curves(run, self) if run.args.tensorboard and distributed.rank() == 0 else None
        for epoch in range(first, epochs.stop):
            if self.ended:
                return
            yield epoch

    def commit(self, epoch: int, row: dict, last: bool = False) -> None:
        """End an epoch: add its row to the log and, when it is time, write a checkpoint.

        Args:
            epoch: the epoch that was trained.
            row: what to log of it.
            last: whether the stage ends here, before its range does.

        Raises:
            Stopped: a signal came; the checkpoint is written.
        """
        run = self.run
        row = {"phase": self.phase, "level": self.level, "epoch": epoch, "stop": self.stop, **row}
        run.log(row)
        self.ended = last or epoch + 1 == self.stop
        stop = int(distributed.largest(run.stop or 0))
        due = time.monotonic() - run.last_save >= 60 * run.args.checkpoint_minutes
        if distributed.rank() == 0 and (self.ended or stop or due):
            metadata = {"stage": self.name, "epoch": epoch + 1, "ended": self.ended}
            metadata |= {"passed": run.stages[:-1], "rows": len(run.rows)}
            save_checkpoint(run.checkpoint_path, self.state, metadata)
            run.last_save = time.monotonic()
        if self.curves is not None:
            _add_points(self.curves, row)
        values = ((name, row.get(f"{name}_accuracy")) for name in ("valid", "test"))
        tested = "".join(f"  {name} {value:.2f} %" for name, value in values if value is not None)
        left = "" if self.ended else f", {timedelta(seconds=round(row['seconds'] * (self.stop - epoch - 1)))} left"
        print(
            f"{self.name} epoch {epoch + 1}/{run.args.end_iter} T={row['timesteps']}  lr {row['lr']:.4f}  "
            f"loss {row['loss']:.4f}  train {row['train_accuracy']:.2f} %{tested}  {row['seconds']:.1f} s{left}",
            flush=True,
        )
        if stop:
            raise Stopped(stop)


def _curves(run, stage: Stage):
    """A TensorBoard writer for a stage. A TensorBoard that has read an older file of the stage forgets it, so all
    points so far are written again."""
    from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

    writer = SummaryWriter(str(run.folder / "tensorboard" / stage.name), purge_step=0)
    for row in stage.rows:
        _add_points(writer, row)
    return writer


def _add_points(writer, row: dict) -> None:
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    points = {name: value for name, value in numbers.items() if name not in ("epoch", "stop")}
    points |= {f"divergences/{t}_timesteps": value for t, value in enumerate(row.get("divergences", ()), start=2)}
    for name, value in points.items():
        writer.add_scalar(name, value, row["epoch"])
    writer.flush()


def read_rows(path: Path, count: int | None = None) -> list[dict]:
    """Read the rows of ``metrics.jsonl``, all or the first ``count``.

    Raises:
        DamagedError: a line does not parse, a field is missing, or there are fewer; the message names the file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines[:count]]
        missing = {field for row in rows for field in EPOCH_FIELDS if field not in row}
        if missing or (count is not None and len(rows) < count):
            raise ValueError(f"missing: {', '.join(missing) or 'epochs that the checkpoint holds'}")
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{path} is damaged ({error}): put it back, or use --restart") from error
    return rows


def search_costs(stages: list[Stage], until: float = math.inf) -> dict:
    """What a search has cost, for ``results.json``: seconds, epochs, epochs x timesteps, and the timesteps of its last
    epoch, if there is one. Nothing after the epoch ``until`` counts, which may be in the middle of one."""
    rows = [row for stage in stages for row in stage.rows if row["epoch"] < until]
    shares = [min(1, until - row["epoch"]) for row in rows]
    sums = {name: sum(s * row[name] for s, row in zip(shares, rows, strict=True)) for name in ("seconds", "timesteps")}
    costs = {"search_seconds": sums["seconds"], "search_epochs": sum(shares)}
    costs |= {"search_timestep_epochs": sums["timesteps"]}
    return costs | ({"search_timesteps": rows[-1]["timesteps"]} if rows else {})
