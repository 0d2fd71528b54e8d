"""The run folder: what a run is called, what it wrote, and how it goes on.

A script is resumed by running it again. It takes the same path; ``fit`` reads finished stages back from their
checkpoints and goes on with the interrupted one, so all that the script derives from the weights comes out the same.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import distributed
from .activity import measure
from .curves import Curves
from .data import Data, Split
from .errors import DamagedError, InputError
from .files import TEMPORARY, checksum, hold, part, read_tensors, sealed, write_json, write_tensors
from .flags import planned_epochs, reported_levels
from .masks import Mask, emptied_layers, layer_sparsity, sparsity
from .records import identity, read_args, read_results, read_rows, write_results, write_rows
from .signals import stop_deferred
from .tickets import load_ticket

FORMAT = 3
PACKAGES = ("torch", "torchvision", "spikingjelly", "numpy", "safetensors")
WRITTEN = ("args.json", "metrics.jsonl", "results.json", "tickets", "checkpoints", "tensorboard")
REMEDY = "use another --exp_name, or --restart to delete that run and start over"
COPY = "checkpoints/flags.json"  # of args.json
PREVIOUS = "previous"  # the checkpoint that the newest one took the place of
INTERRUPTED = "interrupted"  # the checkpoint of an epoch that was stopped before its end
REMOVE = "remove it, previous.safetensors and results.json to train this stage again, or use --restart"
RESTORED = "it is restored from the checkpoints"
_ABSENT = object()

# where things are, what they hold has a checksum; how a step is laid out and launched; and what is only shown
MAY_DIFFER = ("output_dir", "exp_name", "data_dir", "ticket", "channels_last", "cuda_graph", "tensorboard")


@dataclass
class Progress:
    """What is done of an epoch of training."""

    losses: Tensor  # [steps], each summed over its batch; 0 where not done
    correct: Tensor  # int64 [], images
    step: int = 0  # steps that are done
    seconds: float = 0.0


class Run:
    """One run's folder, ``<output_dir>/<exp_name>/<dataset>-<arch>-round<N>``. Of several ranks all read it, and rank 0
    writes.

    Args:
        args: the checked flags.

    Raises:
        InputError: the folder holds a run with other flags (named in the message), or one that cannot be read; or
            ``--tensorboard`` cannot be had.
    """

    def __init__(self, args):
        self.args = args
        self.folder = Path(args.output_dir) / args.exp_name / f"{args.dataset}-{args.arch}-round{args.round}"
        self.seed = int(np.random.SeedSequence([args.seed, args.round]).generate_state(1)[0])
        saved = getattr(args, "ticket_checksum", None) is not None
        if saved and Path(args.ticket).resolve().is_relative_to(self.folder.resolve()):
            raise InputError(f"{args.ticket} lies in this run's own folder: give the run another --exp_name")
        self.curves = Curves(self._path("tensorboard")) if args.tensorboard and distributed.rank() == 0 else None
        self.rows, self.results = [], []
        self.identity = ""  # what they are sealed with
        self.damage: list[str] = []  # what is wrong with these files
        self.position = 0  # where in the rows the next epoch belongs
        self.stage: tuple[str, int] | None = None  # phase and level of the newest stage
        self.start: str | None = None  # checksum of the flags and of the state that it started from
        self.writing: Future | None = None  # the newest checkpoint, on its way to the disk
        if not args.restart:
            self._read()

    def begin(self, data: Data) -> None:
        """Take the folder and make it ready to be written to. Call it once nothing the user gave can turn out wrong any
        more: with ``--restart`` this is where an earlier run is deleted.

        Raises:
            InUseError: another process is at this run.
            InputError: the run was begun with other images.
        """
        with distributed.in_turn():
            self._begin(data)

    def _begin(self, data: Data) -> None:
        first = distributed.rank() == 0
        if first:
            self.lock = hold(self._path("lock"), f"{self.folder} is in use")
        if first and self.args.restart:
            for name in WRITTEN:
                _delete(self._path(name))
        before = self._read()  # the process that had the folder may have gone on
        for line in self.damage:
            print(f"warning: {line}", file=sys.stderr)
        images, now = data.checksum(), _circumstances(self.args, self.seed)
        if before is None:
            before = self._flags() | now | {"data_checksum": images, "format": FORMAT}
            self.identity = identity(before)
        if before.get("data_checksum") != images:
            raise InputError(f"{self.folder} was begun with other images than there are now: {REMEDY}")
        if first:
            for path in (self._path("args.json"), self._path(COPY)):
                # folders are made here alone: a run whose folder is moved or unmounted must not begin another
                path.parent.mkdir(exist_ok=True)
                if self.damage or not path.exists():
                    write_json(path, sealed(before))
            self._path("tickets").mkdir(exist_ok=True)
            for leftover in self.folder.rglob(f"*{TEMPORARY}"):
                leftover.unlink()
        for name in ("versions", "device_name", "threads", "ranks"):
            if before.get(name) != now[name]:
                print(f"note: {self.folder} was begun with {name} {before.get(name)}, now there are {now[name]}")

    # --- going on ------------------------------------------------------------------------------------------------

    def checkpoint(self, stage: str) -> Path:
        """File of a stage's checkpoint."""
        return self.folder / "checkpoints" / f"{stage}.safetensors"

    def resume(
        self,
        checkpoint: Path,
        phase: str,
        level: int,
        epochs: range,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recent: "deque[Mask] | None" = None,
    ) -> int:
        """Begin a stage or go on with it: a checkpoint is read into model, optimizer and recent masks, and epochs that
        it does not hold leave the log. Call it with the model in the state that the stage starts from.

        Returns:
            The epoch to go on with; the first of ``epochs`` if there is no checkpoint.

        Raises:
            InputError: the checkpoint is another one's. A damaged one is put aside with a warning; the one before it
                takes its place or, where there is none, the start of the stage.
        """
        self.wait_for_checkpoint()
        settings = {name: value for name, value in self._flags().items() if name not in MAY_DIFFER}
        self.stage, self.start = (phase, level), checksum(model.state_dict(), json.dumps(settings, sort_keys=True))
        first = epochs.start
        with distributed.in_turn():  # a damaged one is put aside
            metadata = self._load_newest(checkpoint, model, optimizer, recent)
        if metadata is not None:
            first = metadata["epoch"]
            self._restore_rows(metadata["rows"])
        self.drop_rows(phase, level, range(first, epochs.stop))
        if self.curves is not None:
            self.curves.start_over(phase, level, self.rows)
        return first

    def _load_newest(self, checkpoint: Path, model, optimizer, recent) -> dict | None:
        """Read the newest checkpoint of the stage that is not damaged: its metadata, None if there is none."""
        for path in filter(Path.exists, (checkpoint, self.checkpoint(PREVIOUS))):
            aside = path.with_suffix(".damaged")
            try:
                tensors, metadata = read_tensors(path, f"put aside as {aside.name}, going on without it")
            except DamagedError as error:
                if distributed.rank() == 0:
                    os.replace(path, aside)
                print(f"warning: {error}", file=sys.stderr)
            else:
                if path == checkpoint or metadata.get("stage") == checkpoint.stem:
                    _load_checkpoint(path, tensors, metadata, model, optimizer, recent, (checkpoint.stem, self.start))
                    return metadata
        return None

    def _restore_rows(self, kept: list[dict]) -> None:
        """Put epochs of the newest stage that the log has lost back to their place."""
        stage = self._rows_of(*self.stage)
        logged = [row["epoch"] for row in stage]
        lost = [row for row in kept if row["epoch"] not in logged]
        if lost:
            if not self.damage:  # or it was said
                self.damage.append(f"{self._path('metrics.jsonl')} is damaged (epochs are missing): {RESTORED}")
                print(f"warning: {self.damage[0]}", file=sys.stderr)
            place = self.rows.index(stage[0]) if stage else len(self.rows)
            self.rows = [row for row in self.rows if row not in stage]
            self.rows[place:place] = sorted([*stage, *lost], key=lambda row: row["epoch"])
            self._write_rows()

    def save_checkpoint(
        self,
        checkpoint: Path,
        epoch: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        recent: "deque[Mask] | tuple" = (),
    ) -> None:
        """Write the checkpoint of the stage that ``resume`` began: tensors and numbers, nothing pickled. The one before
        it is kept. In a single process it is written while the training goes on; see ``wait_for_checkpoint``.

        Args:
            checkpoint: the file.
            epoch: epochs of the schedule that are done.
            model: its parameters and statistics.
            optimizer: its state, or None where nothing is left to train.
            recent: the masks of the last epochs of an Early-Bird search.

        Raises:
            OSError: this checkpoint, or the one before it, could not be written.
        """
        tensors = _state(model, optimizer)
        for position, mask in enumerate(recent):
            tensors |= {f"recent.{position}.{name}": m for name, m in mask.items()}
        rows = [row for row in self._rows_of(*self.stage) if row["epoch"] < epoch]
        metadata = {"format": FORMAT, "stage": checkpoint.stem, "start": self.start}
        metadata |= {"epoch": epoch, "masks": len(recent), "rows": rows}

        def write(tensors: dict[str, Tensor], metadata: dict) -> None:
            write_tensors(checkpoint, tensors, metadata, before=self.checkpoint(PREVIOUS))
            self.checkpoint(INTERRUPTED).unlink(missing_ok=True)

        with stop_deferred():
            distributed.check_same("a checkpoint", lambda: metadata | {"tensors": checksum(tensors)})
            self.wait_for_checkpoint()
            if distributed.rank() == 0:
                # copies, for the training goes on
                copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
                executor = ThreadPoolExecutor(1)
                self.writing = executor.submit(write, copies, copy.deepcopy(metadata))
                executor.shutdown(wait=False)
            if distributed.ranks() > 1:
                self.wait_for_checkpoint()
                distributed.barrier()

    def wait_for_checkpoint(self) -> None:
        """Wait until the newest checkpoint is on the disk. The interpreter does so before it ends.

        Raises:
            OSError: it could not be written.
        """
        if self.writing is not None:
            self.writing.result()

    def save_epoch(
        self, phase: str, level: int, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> None:
        """Write an epoch that is stopped before its end, beside the checkpoint of the one before."""
        self.wait_for_checkpoint()
        tensors = _state(model, optimizer) | {"losses": progress.losses, "correct": progress.correct}
        metadata = {"format": FORMAT, "phase": phase, "level": level, "epoch": epoch, "start": self.start}
        metadata |= {"step": progress.step, "seconds": progress.seconds}
        distributed.check_same("an epoch that is stopped", lambda: metadata | {"tensors": checksum(tensors)})
        if distributed.rank() == 0:
            write_tensors(self.checkpoint(INTERRUPTED), tensors, metadata)
        distributed.barrier()

    def resume_epoch(
        self, phase: str, level: int, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
    ) -> Progress:
        """Begin an epoch of ``steps`` steps, or go on with the one that was stopped, if it was this: its state is read
        into model and optimizer."""
        progress = self._resume_epoch(phase, level, epoch, model, optimizer, steps)
        here = {"phase": phase, "level": level, "epoch": epoch, "step": progress.step}
        distributed.check_same("the start of an epoch", lambda: here)
        return progress

    def _resume_epoch(self, phase, level, epoch, model, optimizer, steps) -> Progress:
        device = next(model.parameters()).device
        begun = Progress(torch.zeros(steps, device=device), torch.zeros((), dtype=torch.long, device=device))
        path = self.checkpoint(INTERRUPTED)
        if path.exists():  # a checkpoint on its way removes it
            self.wait_for_checkpoint()
        if not path.exists():
            return begun
        here = {"format": FORMAT, "phase": phase, "level": level, "epoch": epoch, "start": self.start}
        try:
            tensors, metadata = read_tensors(path, "its epoch starts over")
        except InputError as error:
            print(f"warning: {error}", file=sys.stderr)
            return begun
        if here.items() <= metadata.items() and tensors["losses"].shape == begun.losses.shape:
            _load_state(tensors, model, optimizer)
            if distributed.rank() == 0:  # they are the sums over the ranks
                begun.losses.copy_(tensors["losses"])
                begun.correct.copy_(tensors["correct"])
            begun.step, begun.seconds = metadata["step"], metadata["seconds"]
        return begun

    def generator(self, level: int, epoch: int) -> torch.Generator:
        """CPU generator of an epoch; it depends on ``--seed``, ``--round``, the level and the epoch alone."""
        state = np.random.SeedSequence([self.seed, level, epoch]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def once(self, key: str, compute):
        """A small value that is decided once: ``compute()``, noted in the log, and read back from there ever after."""
        for row in self.rows:
            if key in row:
                return row[key]
        value = compute()
        self.note(**{key: value})
        return value

    @property
    def finished(self) -> bool:
        """Whether the folder holds all that the run is to find: results, tickets, and the log of their training."""
        levels, phase = reported_levels(self.args), "search" if self.args.method == "laterewindlth" else "train"
        last = [row["level"] for row in self.rows if (row["phase"], row["epoch"] + 1) == (phase, self.args.end_iter)]
        tickets = all(self.ticket_path(level).exists() for level in levels)
        found = [row["level"] for row in self.results] == levels and set(levels) <= set(last)
        return found and tickets and not self.damage

    # --- what is written -----------------------------------------------------------------------------------------

    def log_epoch(self, **row) -> None:
        """Add an epoch's row to ``metrics.jsonl``."""
        distributed.check_same("the end of an epoch", lambda: row)
        self.rows.insert(self.position, row)
        self.position += 1
        self._write_rows()
        if self.curves is not None:
            self.curves.add(row, row)

    def note(self, **fields) -> None:
        """Add fields to the row of the newest epoch."""
        distributed.check_same("a decision", lambda: fields)
        row = self.rows[self.position - 1]
        row.update(fields)
        self._write_rows()
        if self.curves is not None:
            self.curves.add(row, fields)

    def drop_rows(self, phase: str, level: int, epochs: range) -> None:
        """Forget epochs of a stage that are about to be run again; their new rows will take the old ones' place."""
        stage = [i for i, row in enumerate(self.rows) if (row["phase"], row["level"]) == (phase, level)]
        stale = [i for i in stage if self.rows[i]["epoch"] in epochs]
        done = [i + 1 for i in stage if self.rows[i]["epoch"] < epochs.start]
        self.position = stale[0] if stale else done[-1] if done else len(self.rows)
        for index in reversed(stale):
            del self.rows[index]

    def save_ticket(
        self, level: int, mask: Mask, weights: dict[str, Tensor], epoch: int, source: dict | None = None
    ) -> None:
        """Write ``tickets/level_NN.safetensors``, the mask and the weights to start from; a layer that is left without
        weights is named in a warning. A ticket that is there already is only checked.

        Args:
            level: prunings behind the mask.
            mask: what the ticket keeps.
            weights: the dense state to start from.
            epoch: the ticket's own training begins with this one.
            source: where a saved ticket came from, if this one was made of it.

        Raises:
            InputError: the ticket on disk is another one.
        """
        self.wait_for_checkpoint()  # no ticket without the training that it comes from
        empty = emptied_layers(mask)
        if empty:
            print(
                f"warning: at level {level} no weight is left in {', '.join(empty)}: no signal passes", file=sys.stderr
            )
        results = {"level": level, "epoch": epoch}
        distributed.check_same("a ticket", lambda: results | {"mask": checksum(mask), "weights": checksum(weights)})
        with distributed.in_turn():
            self._save_ticket(level, mask, weights, epoch, source)

    def _save_ticket(self, level: int, mask: Mask, weights: dict[str, Tensor], epoch: int, source: dict | None) -> None:
        path = self.ticket_path(level)
        try:
            on_disk = load_ticket(path, "it is written again") if path.exists() else None
        except DamagedError as error:
            print(f"warning: {error}", file=sys.stderr)
            on_disk = None
        if on_disk is not None:
            if checksum(on_disk[0]) != checksum(mask) or checksum(on_disk[1]) != checksum(weights):
                raise InputError(f"{path} is not the ticket that this run found: remove it to have it written again")
            return
        origin = self._origin(level) | {
            "format": FORMAT,
            "epoch": epoch,
            "rewind": self.args.rewind,
            "sparsity": 100 * sparsity(mask),
            "timesteps": self.args.timestep,
            "search_timesteps": self.search_timesteps,
        }
        if source is not None:
            origin["source"] = source
        tensors = {f"mask.{name}": m for name, m in mask.items()}
        if distributed.rank() == 0:
            write_tensors(path, tensors | {f"weights.{name}": w for name, w in weights.items()}, origin)

    def _origin(self, level: int) -> dict:
        """What tells a ticket of this run from those of others."""
        names = ("method", "dataset", "arch", "neuron", "width", "seed", "round", "end_iter")
        return {name: getattr(self.args, name) for name in names} | {"level": level}

    def ticket_path(self, level: int) -> Path:
        return self.folder / "tickets" / f"level_{level:02d}.safetensors"

    def save_result(self, level: int, mask: Mask, model: nn.Module, test: Split, **more) -> None:
        """Write the row of a trained ticket to ``results.json``, from the log and from one pass over the test images.

        What a ticket cost is everything that was trained at fewer prunings to find it; its own training is not counted
        (Table 1). Accuracy is that of the last epoch. What it costs to run is measured at T, unless the row is there.
        """
        own = [row for row in self.rows if row["level"] == level and row["phase"] == "train"]
        own = own or [row for row in self.rows if row["level"] == level]
        search = [row for row in self.rows if row["level"] < level and row["phase"] != "train"]
        result = {
            "method": self.args.method,
            "dataset": self.args.dataset,
            "arch": self.args.arch,
            "round": self.args.round,
            "level": level,
            "sparsity": 100 * sparsity(mask),
            "sparsity_all_parameters": 100 * sparsity(mask, sum(p.numel() for p in model.parameters())),
            "timesteps": self.args.timestep,
            "search_timesteps": self.search_timesteps,
            "test_accuracy": own[-1]["test_accuracy"],
            "best_test_accuracy": max(row["test_accuracy"] for row in own if row["test_accuracy"] is not None),
            "search_seconds": sum(row["seconds"] for row in search),
            "search_epochs": len(search),
            "search_timestep_epochs": sum(row["timesteps"] for row in search),
            "train_seconds": sum(row["seconds"] for row in own),
            "layers": {name: 100 * value for name, value in layer_sparsity(mask).items()},
            "ticket_bytes": self.ticket_path(level).stat().st_size,
            **more,
        }
        known = any(result.items() <= row.items() for row in self.results)
        distributed.check_same("a result", lambda: {"level": level, "known": known})
        if not known:
            result |= measure(model, mask, test, self.args.timestep, self.args.precision)
            silent = [name for name, rate in (result["firing_rates"] or {}).items() if rate == 0]
            if silent:
                print(
                    f"warning: at level {level} no neuron of {', '.join(silent)} fires on any test image: "
                    "what follows sees nothing",
                    file=sys.stderr,
                )
            others = [row for row in self.results if row["level"] != level]
            self.results = sorted([*others, result], key=lambda row: row["level"])
            if distributed.rank() == 0:
                write_results(self._path("results.json"), self.results, self.identity)
            distributed.barrier()

    @property
    def search_timesteps(self) -> int:
        """T_early once it is chosen; before and without it, the timesteps that the search began with."""
        trained = [row["timesteps"] for row in self.rows if row["phase"] == "search"]
        return next(
            (row["early_time"] for row in self.rows if "early_time" in row), (trained or [self.args.timestep])[0]
        )

    # --- what is shown -------------------------------------------------------------------------------------------

    def time_left(self, phase: str, timesteps: int, seconds_per_epoch: float) -> float:
        """Seconds that the whole run still takes at this pace, the current epoch not begun; for EB at most."""
        search, train = planned_epochs(self.args)
        done = sum(row["phase"] == "train" for row in self.rows)
        search = 0 if phase == "train" else search - (len(self.rows) - done)
        return seconds_per_epoch * (search + (train - done) * self.args.timestep / timesteps)

    def report_epoch(self, title: str, images_per_second: float) -> None:
        """Print one line on the newest epoch."""
        row = self.rows[self.position - 1]
        tested = "" if row["test_accuracy"] is None else f", test {row['test_accuracy']:.2f} %"
        left = self.time_left(row["phase"], row["timesteps"], row["seconds"])
        print(
            f"{title}  lr {row['lr']:.4f}  loss {row['loss']:.4f}  train {row['train_accuracy']:.2f} %{tested}  "
            f"{images_per_second:.0f} images/s  {clock(left)} left",
            flush=True,
        )

    def report_finished(self) -> None:
        """Say that nothing is left to do, check the tickets, draw the curves and print the table again."""
        for level in reported_levels(self.args):
            _, _, origin = load_ticket(self.ticket_path(level))
            if not self._origin(level).items() <= origin.items():
                raise InputError(f"{self.ticket_path(level)} is another ticket: remove it to have it written again")
        if self.curves is not None:
            for phase, level in dict.fromkeys((row["phase"], row["level"]) for row in self.rows):
                self.curves.start_over(phase, level, self.rows)
        print("this run is finished; --restart deletes it and starts over")
        self.report()

    def report(self) -> None:
        """Print what the run found: a table of its tickets, and where they are."""
        print(f"\n{self.args.method} on {self.args.dataset}, {self.args.arch}, round {self.args.round}")
        print(results_table(self.results))
        if any("early_time" in row for row in self.rows):
            print(f"T_early: {self.search_timesteps} of {self.args.timestep} timesteps")
        for row in self.results:
            if row.get("settled"):
                print(f"the mask settled after {row['search_epochs']} epochs of search")
            elif "settled" in row:
                print(f"note: no mask settled within {row['search_epochs']} epochs; the ticket is the last mask")
            print(f"ticket: {self.ticket_path(row['level'])}")
        print(f"run folder: {self.folder}")

    # --- files ---------------------------------------------------------------------------------------------------

    def _rows_of(self, phase: str, level: int) -> list[dict]:
        return [row for row in self.rows if (row["phase"], row["level"]) == (phase, level)]

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _flags(self) -> dict:
        return {name: value for name, value in vars(self.args).items() if name != "restart"}

    def _read(self) -> dict | None:
        """Read what is in the folder: its flags, which have to be those of now, or None if there is no run."""
        self.damage = []
        before = self._read_flags()
        if before is None:
            if any(self._path(name).exists() for name in WRITTEN):
                raise InputError(f"{self.folder} holds a run without args.json: use another --exp_name, or --restart")
            return None
        # through JSON, so that what is compared has the same types
        now = json.loads(json.dumps(self._flags()))
        differ = [name for name in now if name not in MAY_DIFFER and before.get(name, _ABSENT) != now[name]]
        if differ:
            changes = ", ".join(f"--{name} was {before.get(name, 'not there')}, now {now[name]}" for name in differ)
            raise InputError(f"{self.folder} holds a run with other flags ({changes}): {REMEDY}")
        self.identity = identity(before)
        self.rows = self._or_none(read_rows, "metrics.jsonl", RESTORED, self.identity) or []
        self.results = self._or_none(read_results, "results.json", "it is written again", self.identity) or []
        return before

    def _read_flags(self) -> dict | None:
        """From args.json or, if that is damaged or gone, from its copy."""
        path, copy = self._path("args.json"), self._path(COPY)
        if not copy.exists():
            return read_args(path, REMEDY) if path.exists() else None
        before = self._or_none(read_args, "args.json", f"{copy} takes its place") if path.exists() else None
        return before or read_args(copy, REMEDY)

    def _or_none(self, read, name: str, *more: str):
        try:
            return read(self._path(name), *more)
        except DamagedError as error:
            self.damage.append(str(error))
            return None

    def _write_rows(self) -> None:
        if distributed.rank() == 0:
            write_rows(self._path("metrics.jsonl"), self.rows, self.identity)


def results_table(results: list[dict]) -> str:
    """The rows of ``results.json`` as a table; percents as in the paper, search cost without the final training."""
    header = (
        "level",
        "sparsity %",
        "of all %",
        "T",
        "search T",
        "accuracy %",
        "best %",
        "search epochs",
        "x T",
        "search s",
    )
    lines = [header]
    for row in results:
        lines.append((
            f"{row['level']}", f"{row['sparsity']:.2f}", f"{row['sparsity_all_parameters']:.2f}", f"{row['timesteps']}",
            f"{row['search_timesteps']}", f"{row['test_accuracy']:.2f}", f"{row['best_test_accuracy']:.2f}",
            f"{row['search_epochs']}", f"{row['search_timestep_epochs']}", f"{row['search_seconds']:.1f}",
        ))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES}


def _circumstances(args, seed: int) -> dict:
    """What a result depends on beside the flags."""
    return {
        "effective_seed": seed,
        "versions": versions(),
        "device_name": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU",
        "ranks": distributed.ranks(),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(Path(__file__).resolve().parent.parent),
    }


def _git_commit(root: Path) -> str | None:
    """The commit of this checkout, with ``-dirty`` if files differ from it; None without git or outside a checkout."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Parameters, statistics, and what the optimizer remembers."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items() if tensor is not None}
    return tensors


def _load_state(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    model.load_state_dict(part(tensors, "model."))
    if optimizer is not None:
        states: dict[int, dict[str, Tensor]] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, tensor in part(tensors, "optimizer.").items():
            index, key = name.split(".")
            if tensor.shape == parameters[int(index)].shape:  # fused steps need it in the parameter's layout
                tensor = torch.empty_like(parameters[int(index)], device="cpu").copy_(tensor)
            states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _load_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    recent: "deque[Mask] | None" = None,
    wanted: tuple[str, str] | None = None,
) -> None:
    """Put what a checkpoint holds into model, optimizer and recent masks, if it is of the ``wanted`` stage: its name,
    and the checksum of the state that it started from."""
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}, this program reads {FORMAT}")
        if wanted is not None and (metadata["stage"], metadata["start"]) != wanted:
            raise ValueError(f"it is of stage {metadata['stage']}, or began with other flags, weights or another mask")
        _load_state(tensors, model, optimizer)
        if recent is not None:
            device = next(model.parameters()).device
            recent.extend(
                {name: m.to(device) for name, m in part(tensors, f"recent.{position}.").items()}
                for position in range(metadata["masks"])
            )
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit this run ({str(error).splitlines()[0]}): {REMOVE}") from error


def load_network(path: Path | str, model: nn.Module) -> nn.Module:
    """Read a trained network from a stage's checkpoint into ``model``, which is returned.

    Raises:
        InputError: the file is damaged or does not fit the network.
    """
    _load_checkpoint(Path(path), *read_tensors(Path(path), REMOVE), model)
    return model
