"""The run folder: what a run is called, what it writes, and how it resumes.

A script is resumed by running it again. It takes the same path: stages that ended are passed by, what they found is
read from the folder, and the stage that was stopped loads its checkpoint and continues.
"""

import json
import math
import sys
import time
from pathlib import Path

from torch import Tensor, nn

from . import distributed
from .activity import measure
from .data import Split
from .files import (
    TEMPORARY,
    Finished,
    InputError,
    append_line,
    check_fields,
    delete_folder,
    hold,
    read_json,
    read_metadata,
    write_json,
    write_text,
)
from .masks import Mask, dense_mask, emptied_layers, layer_sparsity, sparsity
from .stages import Stage, read_rows, search_costs
from .summary import describe, read_results
from .tickets import load_ticket, write_ticket

# where things are, how a step is laid out and launched, what is only shown, and what follows from other flags
MAY_DIFFER = {"output_dir", "exp_name", "data_dir", "ticket", "device", "channels_last", "cuda_graph", "tensorboard"}
MAY_DIFFER |= {"label", "effective_seed"}
WRITTEN = ("tickets", "networks", "checkpoints")  # folders that are made after args.json
NOT_RECORDED = ("restart", "checkpoint_minutes")
REMEDY = "use another --exp_name, or --restart to delete that run and start over"
INITIAL = "initial"  # name of the ticket that holds the weights that a run starts from


class Run:
    """One run's folder, ``<output_dir>/<exp_name>/<dataset>-<arch>[-<sparsity>]-round<N>``. Every rank reads it, only
    rank 0 writes.

    Args:
        args: the checked flags.
        sparsity: that of the one ticket that the run is to find, 0 to 1; None if it finds several.

    Raises:
        InputError: the folder holds a run with other flags (named in the message), or one that cannot be read.
    """

    def __init__(self, args, sparsity: float | None = None):
        self.args = args
        part = "" if sparsity is None else f"-{round(100 * sparsity, 2):g}"
        self.folder = Path(args.output_dir) / args.exp_name / f"{args.dataset}-{args.arch}{part}-round{args.round}"
        self.network: dict = {}  # the arguments of build_model
        self.stop: int | None = None  # a signal that asks to stop
        self.live = True  # whether the model is what the script has made of it: no stage was passed by
        self.stages: list[str] = []  # that were begun
        self.last_save = time.monotonic()
        if not args.restart:
            self._read()

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.txt").exists() and not self.args.restart

    def begin(self, model: nn.Module, network: dict, data_checksum: str, circumstances: dict) -> None:
        """Take the folder and make it ready to be written to; with ``--restart`` an earlier run is deleted. Call it
        when nothing that the user gave can turn out to be wrong any more.

        Args:
            model: with freshly drawn weights; a run that resumes loads those that it began with.
            network: the arguments of ``build_model`` that made it.
            data_checksum: of all images.
            circumstances: what numbers and times depend on beside flags and images, for ``args.json``.

        Raises:
            Finished: another process has finished this run.
            InUseError: another process is at this run.
            InputError: the run was begun with other images.
        """
        self.network = network
        if distributed.rank() == 0:
            # it lies beside the folder, which a restart moves away
            self.lock = hold(self.folder.with_name(f".{self.folder.name}.lock"), f"{self.folder} is in use")
            if self.args.restart:
                delete_folder(self.folder)
        if distributed.largest(float(distributed.rank() == 0 and (self.folder / "summary.txt").exists())):
            self.show()  # another process has finished it meanwhile
            raise Finished
        if distributed.rank() == 0:
            before = self._read()
            if before is not None and before.get("data_checksum") != data_checksum:
                raise InputError(f"{self.folder} was begun with other images than there are now: {REMEDY}")
            if before is None:
                self.folder.mkdir(exist_ok=True)
                now = {"data_checksum": data_checksum, "circumstances": circumstances}
                write_json(self.folder / "args.json", self._flags() | now)
            else:
                self._note_changes(before, circumstances)
            for name in WRITTEN:
                (self.folder / name).mkdir(exist_ok=True)
            for leftover in self.folder.rglob(f"*{TEMPORARY}"):
                leftover.unlink()
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        distributed.barrier()
        self._read()
        _, weights = self.ticket(INITIAL, dense_mask(model), model.state_dict(), level=0, epoch=0)
        model.load_state_dict(weights)

    def stage(self, phase: str, level: int | None = 0, **state) -> Stage:
        """A piece of training that can be resumed.

        Args:
            phase: ``dense``, ``search`` or ``train``, for the log.
            level: prunings done, for the log. Phase and level name the stage.
            state: what a checkpoint must hold, by name: objects with a ``state_dict``, and dicts of tensors, which are
                loaded in place.
        """
        return Stage(self, phase, level, state)

    def ticket(
        self,
        name: str,
        mask: Mask,
        weights: dict[str, Tensor],
        level: int | None,
        epoch: int,
        dense: str | None = INITIAL,
        **origin,
    ) -> tuple[Mask, dict[str, Tensor]]:
        """Write a ticket of this run, a mask and the weights to start from, to ``tickets/<name>.safetensors``, unless
        it is there, and read it back: a run that resumes gets what it had, whatever it passes here.

        Args:
            name: the ticket's name.
            mask: what is kept.
            weights: the dense state to start from.
            level: prunings behind the mask, if that is how its sparsity was asked for.
            epoch: the ticket's own training begins with this one.
            dense: the name of the ticket that holds the same weights unpruned, if there is one.
            origin: what else the file is to say of where it comes from.

        Raises:
            InputError: the file is damaged, or it is gone and can no longer be made.
        """
        path = self.ticket_path(name)
        if distributed.rank() == 0 and not path.exists():
            if not self.live:
                raise InputError(f"{path} is missing: put it back, or {REMEDY}")
            empty = emptied_layers(mask)
            if empty:
                print(f"warning: {name} leaves no weight in {', '.join(empty)}: no signal passes", file=sys.stderr)
            more = {"level": level, "epoch": epoch, "dense": dense and f"{dense}.safetensors", **origin}
            write_ticket(path, mask, weights, self._origin(name, mask) | more)
        distributed.barrier()
        return self.read_ticket(name)

    def read_ticket(self, name: str) -> tuple[Mask, dict[str, Tensor]]:
        """A ticket that this run has written: its mask and weights.

        Raises:
            DamagedError: the file is damaged.
        """
        return load_ticket(self.ticket_path(name), self.args.device)[:2]

    def ticket_path(self, name: str) -> Path:
        return self.folder / "tickets" / f"{name}.safetensors"

    def save_result(
        self,
        name: str,
        level: int | None,
        mask: Mask,
        model: nn.Module,
        test: Split,
        search: list[Stage],
        train: Stage,
        until: float = math.inf,
        **more,
    ) -> None:
        """Write the row of a trained ticket to ``results.json`` and its network to ``networks/<name>.safetensors``,
        unless they are there.

        Args:
            name: of the ticket.
            level: prunings behind the mask, if that is how its sparsity was asked for.
            mask: of the trained network.
            model: the trained network; what it costs to run is measured on the test images at T.
            test: the test images.
            search: the stages that found the ticket; without its own training (Table 1), if that is another one.
            train: the stage that trained it; accuracy is that of its last epoch.
            until: epochs of the search, in fractions too, after which the ticket was found; the rest does not count.
            more: further fields of the row.

        Raises:
            InputError: what was written before is gone and can no longer be made; the message names the file.
        """
        path = self.folder / "networks" / f"{name}.safetensors"
        if any(row["ticket"] == name for row in self.results):
            if not path.exists():
                raise InputError(f"{path} is missing: put it back, or {REMEDY}")
            return
        if not self.live:
            raise InputError(f"{self.folder / 'results.json'} has lost {name}: put it back, or {REMEDY}")
        costs = measure(model, mask, test, self.args.timestep, self.args.precision)
        row = {
            "ticket": name,
            **{field: getattr(self.args, field) for field in ("method", "label", "dataset", "arch", "round")},
            "level": level,
            "sparsity": 100 * sparsity(mask),
            "sparsity_all_parameters": 100 * sparsity(mask, sum(p.numel() for p in model.parameters())),
            "timesteps": self.args.timestep,
            **{name: value for name, value in train.rows[-1].items() if name in ("valid_accuracy", "test_accuracy")},
            "best_test_accuracy": max(r["test_accuracy"] for r in train.rows if r["test_accuracy"] is not None),
            "search_timesteps": self.args.timestep,
            **search_costs(search, until),
            "train_seconds": 0.0 if train in search else search_costs([train])["search_seconds"],
            "ticket_bytes": self.ticket_path(name).stat().st_size,
            "layers": {layer: 100 * value for layer, value in layer_sparsity(mask).items()},
            **more,
            **costs,
        }
        silent = [layer for layer, rate in (costs["firing_rates"] or {}).items() if rate == 0]
        if silent:
            print(f"warning: {name}: no neuron of {', '.join(silent)} fires on any test image", file=sys.stderr)
        if distributed.rank() == 0:
            origin = self._origin(name, mask) | {"level": level, "epoch": self.args.end_iter}
            write_ticket(path, mask, model.state_dict(), origin)
            write_json(self.folder / "results.json", [*self.results, row])
        self.results.append(row)

    def finish(self) -> None:
        """Print what the run found, and write it to ``summary.txt``: the run is finished."""
        title = f"{self.args.label} on {self.args.dataset}, {self.args.arch}, round {self.args.round}"
        tickets = [f"ticket: {self.ticket_path(row['ticket'])}" for row in self.results]
        summary = "\n".join([title, *describe(self.results), *tickets, f"run folder: {self.folder}"]) + "\n"
        if distributed.rank() == 0:
            write_text(self.folder / "summary.txt", summary)
            self.checkpoint_path.unlink(missing_ok=True)  # nothing is left to resume
        print(f"\n{summary}", end="")

    def show(self) -> None:
        """Print again what the finished run found."""
        summary = (self.folder / "summary.txt").read_text(encoding="utf-8", errors="replace")
        print(f"this run is finished; --restart deletes it and starts over\n\n{summary}", end="")

    # --- files ---------------------------------------------------------------------------------------------------

    def log(self, row: dict) -> None:
        """Add an epoch's row to ``metrics.jsonl``."""
        self.rows.append(row)
        if distributed.rank() == 0:
            append_line(self.folder / "metrics.jsonl", json.dumps(row))

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoints" / "newest.safetensors"

    def _flags(self) -> dict:
        return {name: value for name, value in vars(self.args).items() if name not in NOT_RECORDED}

    def _origin(self, name: str, mask: Mask) -> dict:
        """What a ticket's file says of this run."""
        run = {n: getattr(self.args, n) for n in ("method", "label", "dataset", "seed", "round", "end_iter")}
        return run | {"ticket": name, "sparsity": 100 * sparsity(mask), "network": self.network}

    def _read(self) -> dict | None:
        """Read what is in the folder: its flags, which have to be those of now, or None if there is no run."""
        self.rows, self.results, self.resumed = [], [], {}
        path = self.folder / "args.json"
        if not path.exists():
            if any((self.folder / name).exists() for name in WRITTEN):
                raise InputError(f"{self.folder} holds files but no args.json: {REMEDY}")
            return None
        before = read_json(path)
        check_fields(path, before, ("data_checksum", "circumstances"))
        check_fields(path, before["circumstances"], ())
        now = json.loads(json.dumps(self._flags()))  # so that what is compared has the same types
        # a flag that the version before did not know was off
        differ = [n for n in now if n not in MAY_DIFFER and (now[n] != before[n] if n in before else now[n])]
        if differ:
            changes = ", ".join(f"--{name} was {before.get(name)}, now {now[name]}" for name in differ)
            raise InputError(f"{self.folder} holds a run with other flags ({changes}): {REMEDY}")
        if self.checkpoint_path.exists():
            self.resumed = read_metadata(self.checkpoint_path).get("metadata", {})
            check_fields(self.checkpoint_path, self.resumed, ("stage", "epoch", "ended", "passed", "rows"))
            self.rows = read_rows(self.folder / "metrics.jsonl", self.resumed["rows"])
        if (self.folder / "results.json").exists():
            self.results = read_results(self.folder / "results.json")
            if not (self.resumed or (self.folder / "summary.txt").exists()):
                raise InputError(f"{self.checkpoint_path} is missing: put it back, or {REMEDY}")
        self.live = not self.resumed
        return before

    def _note_changes(self, before: dict, now: dict) -> None:
        """Say what has changed since the run began, and write it down."""
        known = [before["circumstances"], *before.get("resumed_with", [])]
        for name, value in now.items():
            if before["circumstances"].get(name) != value:
                print(f"note: {self.folder} was begun with {name} {before['circumstances'].get(name)}, now {value}")
        if now not in known:
            write_json(self.folder / "args.json", before | {"resumed_with": [*known[1:], now]})
