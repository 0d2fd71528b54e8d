"""The run folder: what a run is called, what it wrote, and how it goes on.

A script is resumed by running it again. It takes the same path; ``fit`` reads finished stages back from their
checkpoints and goes on with the interrupted one, so all that the script derives from the weights comes out the same.
"""

import json
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .activity import measure
from .curves import Curves
from .data import Data, Split
from .errors import InputError
from .files import TEMPORARY, checksum, part, read_json, read_tensors, write_json, write_tensors, write_text
from .flags import planned_epochs, reported_levels
from .masks import Mask, emptied_layers, layer_sparsity, sparsity
from .tickets import load_ticket

FORMAT = 2
PACKAGES = ("torch", "torchvision", "spikingjelly", "numpy", "safetensors")
WRITTEN = ("args.json", "metrics.jsonl", "results.json", "tickets", "checkpoints", "tensorboard")
REMEDY = "use another --exp_name, or --restart to delete that run and start over"
INTERRUPTED = "interrupted"  # the checkpoint of an epoch that was stopped before its end
_ABSENT = object()

EPOCH_FIELDS = {
    "phase": str, "level": int, "epoch": int, "timesteps": int, "seconds": (int, float),
    "test_accuracy": (int, float, type(None)),
}  # fmt: skip
RESULT_FIELDS = {
    "level": int, "sparsity": (int, float), "sparsity_all_parameters": (int, float), "timesteps": int,
    "search_timesteps": int, "test_accuracy": (int, float), "best_test_accuracy": (int, float),
    "search_seconds": (int, float), "search_epochs": int, "search_timestep_epochs": int,
}  # fmt: skip
# where things are, what they hold has a checksum; and what is only shown
MAY_DIFFER = ("output_dir", "exp_name", "data_dir", "ticket", "tensorboard")


@dataclass
class Progress:
    """What is done of an epoch of training."""

    losses: Tensor  # [steps], each summed over its batch; 0 where not done
    correct: Tensor  # int64 [], images
    step: int = 0  # steps that are done
    seconds: float = 0.0


class Run:
    """One run's folder, ``<output_dir>/<exp_name>/<dataset>-<arch>-round<N>``.

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
        self.curves = Curves(self._path("tensorboard")) if args.tensorboard else None
        self.rows, self.results = [], []
        self.position = 0  # where in the rows the next epoch belongs
        self.starts: dict[Path, str] = {}  # checksums of the states that stages started from
        self.start: str | None = None  # of the newest one
        if args.restart:
            return
        if self._path("args.json").exists():
            self._refuse_other_flags()
            self.rows, self.results = self._read_rows(), self._read_results()
        elif any(self._path(name).exists() for name in WRITTEN):
            raise InputError(f"{self.folder} holds a run without args.json: use another --exp_name, or --restart")

    def begin(self, data: Data) -> None:
        """Make the folder ready to be written to. Call it once nothing the user gave can turn out wrong any more: with
        ``--restart`` this is where an earlier run is deleted.

        Raises:
            InputError: the run was begun with other images.
        """
        path = self._path("args.json")
        if self.args.restart:
            for name in WRITTEN:
                _delete(self._path(name))
        images = data.checksum()
        if not path.exists():
            write_json(path, self._flags() | _circumstances(self.args, self.seed) | {"data_checksum": images})
        elif read_json(path, REMEDY).get("data_checksum") != images:
            raise InputError(f"{self.folder} was begun with other images than there are now: {REMEDY}")
        for leftover in self.folder.rglob(f"*{TEMPORARY}"):
            leftover.unlink()

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
            InputError: the checkpoint is damaged or another one's, or the log lacks its epochs.
        """
        self.start = self.starts[checkpoint] = checksum(model.state_dict())
        first = epochs.start
        if checkpoint.exists():
            first = load_checkpoint(checkpoint, model, optimizer, recent, self.starts[checkpoint])
        logged = {row["epoch"] for row in self.rows if (row["phase"], row["level"]) == (phase, level)}
        missing = set(range(epochs.start, first)) - logged
        if missing:
            raise InputError(
                f"{self._path('metrics.jsonl')} is damaged (epoch {min(missing)} of {checkpoint.stem} is missing): "
                "--restart starts the run over"
            )
        self.drop_rows(phase, level, range(first, epochs.stop))
        if self.curves is not None:
            self.curves.start_over(phase, level, self.rows)
        return first

    def save_checkpoint(
        self,
        checkpoint: Path,
        epoch: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        recent: "deque[Mask] | tuple" = (),
    ) -> None:
        """Write the checkpoint of a stage that ``resume`` began: tensors and numbers, nothing pickled.

        Args:
            checkpoint: the file.
            epoch: epochs of the schedule that are done.
            model: its parameters and statistics.
            optimizer: its state, or None where nothing is left to train.
            recent: the masks of the last epochs of an Early-Bird search.
        """
        tensors = _state(model, optimizer)
        for position, mask in enumerate(recent):
            tensors |= {f"recent.{position}.{name}": m for name, m in mask.items()}
        metadata = {"format": FORMAT, "stage": checkpoint.stem, "start": self.starts[checkpoint]}
        metadata |= {"epoch": epoch, "masks": len(recent)}
        write_tensors(checkpoint, tensors, metadata)
        self.checkpoint(INTERRUPTED).unlink(missing_ok=True)

    def save_epoch(
        self, phase: str, level: int, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> None:
        """Write an epoch that is stopped before its end, beside the checkpoint of the one before."""
        tensors = _state(model, optimizer) | {"losses": progress.losses, "correct": progress.correct}
        metadata = {"format": FORMAT, "phase": phase, "level": level, "epoch": epoch, "start": self.start}
        write_tensors(
            self.checkpoint(INTERRUPTED), tensors, metadata | {"step": progress.step, "seconds": progress.seconds}
        )

    def resume_epoch(
        self, phase: str, level: int, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
    ) -> Progress:
        """Begin an epoch of ``steps`` steps, or go on with the one that was stopped, if it was this: its state is read
        into model and optimizer."""
        device = next(model.parameters()).device
        begun = Progress(torch.zeros(steps, device=device), torch.zeros((), dtype=torch.long, device=device))
        path = self.checkpoint(INTERRUPTED)
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
        levels = reported_levels(self.args)
        tickets = all(self.ticket_path(level).exists() for level in levels)
        return tickets and [row["level"] for row in self.results] == levels

    # --- what is written -----------------------------------------------------------------------------------------

    def log_epoch(self, **row) -> None:
        """Add an epoch's row to ``metrics.jsonl``."""
        self.rows.insert(self.position, row)
        self.position += 1
        self._write_rows()
        if self.curves is not None:
            self.curves.add(row, row)

    def note(self, **fields) -> None:
        """Add fields to the row of the newest epoch."""
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
            InputError: the ticket on disk is damaged or another one.
        """
        empty = emptied_layers(mask)
        if empty:
            print(
                f"warning: at level {level} no weight is left in {', '.join(empty)}: no signal passes", file=sys.stderr
            )
        path = self.ticket_path(level)
        if path.exists():
            on_disk, on_disk_weights, _ = load_ticket(path)
            if checksum(on_disk) != checksum(mask) or checksum(on_disk_weights) != checksum(weights):
                raise InputError(f"{path} is not the ticket that this run found: remove it to have it written again")
            return
        names = ("method", "dataset", "arch", "neuron", "width", "seed", "round", "end_iter")
        origin = {name: getattr(self.args, name) for name in names}
        origin |= {
            "format": FORMAT,
            "level": level,
            "epoch": epoch,
            "rewind": self.args.rewind,
            "sparsity": 100 * sparsity(mask),
            "timesteps": self.args.timestep,
            "search_timesteps": self.search_timesteps,
        }
        if source is not None:
            origin["source"] = source
        tensors = {f"mask.{name}": m for name, m in mask.items()}
        write_tensors(path, tensors | {f"weights.{name}": w for name, w in weights.items()}, origin)

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
        if not any(result.items() <= row.items() for row in self.results):
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
            write_json(self._path("results.json"), self.results)

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
            load_ticket(self.ticket_path(level))
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

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _flags(self) -> dict:
        return {name: value for name, value in vars(self.args).items() if name != "restart"}

    def _refuse_other_flags(self) -> None:
        path = self._path("args.json")
        before = read_json(path, REMEDY)
        if not isinstance(before, dict):
            raise InputError(f"{path} is damaged (no JSON object): {REMEDY}")
        # through JSON, so that what is compared has the same types
        now = json.loads(json.dumps(self._flags()))
        differ = [name for name in now if name not in MAY_DIFFER and before.get(name, _ABSENT) != now[name]]
        if differ:
            changes = ", ".join(f"--{name} was {before.get(name, 'not there')}, now {now[name]}" for name in differ)
            raise InputError(f"{self.folder} holds a run with other flags ({changes}): {REMEDY}")
        if before.get("versions") != versions():
            print(f"note: {self.folder} was begun with {before.get('versions')}, now there are {versions()}")

    def _read_rows(self) -> list[dict]:
        path = self._path("metrics.jsonl")
        if not path.exists():
            return []
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for row in rows:
                check_fields(row, EPOCH_FIELDS)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): --restart starts the run over") from error
        return rows

    def _write_rows(self) -> None:
        write_text(self._path("metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in self.rows))

    def _read_results(self) -> list[dict]:
        path = self._path("results.json")
        if not path.exists():
            return []
        remedy = "remove it, and the same command writes it again"
        results = read_json(path, remedy)
        try:
            if not isinstance(results, list):
                raise TypeError("no list of results")
            for row in results:
                check_fields(row, RESULT_FIELDS)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): {remedy}") from error
        return results


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
        for name, tensor in part(tensors, "optimizer.").items():
            index, key = name.split(".")
            states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    recent: "deque[Mask] | None" = None,
    start: str | None = None,
) -> int:
    """Read a checkpoint into model, optimizer and recent masks, in place; the number of epochs done.

    Args:
        path: the file.
        model: takes the parameters and statistics.
        optimizer: takes its state, if there is one.
        recent: takes the masks of an Early-Bird search.
        start: checksum of the state that the stage must have started from; None asks for no certain one.

    Raises:
        InputError: the file is damaged, does not fit the network, or is another stage's.
    """
    remedy = "remove it and results.json to train this stage again, or use --restart"
    tensors, metadata = read_tensors(path, remedy)
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}, this program reads {FORMAT}")
        if start is not None and (metadata["stage"], metadata["start"]) != (path.stem, start):
            raise ValueError(f"it is of stage {metadata['stage']}, or started from other weights or another mask")
        _load_state(tensors, model, optimizer)
        if recent is not None:
            device = next(model.parameters()).device
            recent.extend(
                {name: m.to(device) for name, m in part(tensors, f"recent.{position}.").items()}
                for position in range(metadata["masks"])
            )
        return metadata["epoch"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit this run ({str(error).splitlines()[0]}): {remedy}") from error


def load_network(path: Path | str, model: nn.Module) -> nn.Module:
    """Read a trained network from a stage's checkpoint into ``model``, which is returned.

    Raises:
        InputError: the file is damaged or does not fit the network.
    """
    load_checkpoint(Path(path), model)
    return model
