"""Run folders: what their files hold, checked, and which of them cannot be reported."""

import json
import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from utils.energy import ADD_PJ, MEMORY, energies
from utils.files import InputError, read_json

FILES = ("args.json", "metrics.jsonl", "results.json")
TRACES = (*FILES, "summary.txt", "tickets", "checkpoints")  # what tells that a folder is a run's
# what a time depends on
TIMING = ("device_name", "threads", "ranks", "versions", "precision", "compile", "channels_last", "cuda_graph", "fused")
NUMBER, NONE = (int, float), type(None)
ARGS_REQUIRED = {
    **dict.fromkeys(("method", "label", "dataset", "arch", "neuron"), str),
    **dict.fromkeys(("round", "timestep", "end_iter"), int),
    "width": NUMBER,
    "circumstances": dict,
}
ARGS_OPTIONAL = {
    **dict.fromkeys(("train_samples", "test_samples", "valid_samples", "search_timestep", "rewinding_epoch"), int),
    **dict.fromkeys(("eb_tolerance", "early_time_threshold", "cycle_epochs"), NUMBER),
    "early_time": bool,
    "ticket_origin": dict,
}
EPOCH_REQUIRED = {
    "phase": str,
    "level": (int, NONE),
    "epoch": int,
    "timesteps": int,
    "seconds": NUMBER,
    "test_accuracy": (*NUMBER, NONE),
}
EPOCH_OPTIONAL = {"stop": int, "loss": NUMBER, "valid_accuracy": NUMBER, "divergences": list, "early_time": int}
COSTS = {
    "spikes_per_image": "per image: spikes",
    "synops_per_image": "per image: synaptic operations",
    "macs_per_image": "per image: MACs",
    "energy_uj_per_image": "per image: energy (µJ)",
    "dense_macs_per_image": "dense ANN: MACs",
    "ann_energy_uj_per_image": "dense ANN: energy (µJ)",
    "ticket_bytes": "its file: bytes",
}
NEUROBENCH = ("footprint", "connection_sparsity", "activation_sparsity", "Effective_MACs", "Effective_ACs", "Dense")
LAYER_COSTS = {  # of each layer, see utils.activity.measure
    "layer_costs": (
        *("weights", "weights_left", "connections", "connections_left", "synops", "macs", "dense_macs"),
        *("fan_in", "inputs", "outputs"),
    ),
    "neuron_costs": ("neurons", "silent", "spikes"),
}
ENERGIES = {  # tables.csv's numbers -> where ``utils.energy`` has them
    f"{name.replace(' ', '_')}_{kind}{with_memory * '_memory'}_uj": (name, MEMORY.format(kind) if with_memory else kind)
    for name, kind, with_memory in product(("this network", "pruned ANN", "dense ANN"), ADD_PJ, (False, True))
}
SECONDS = ("search_seconds", "train_seconds")
SEARCHED = ("search_timesteps", "search_seconds", "search_epochs", "search_timestep_epochs")
ALWAYS = ("sparsity", "sparsity_all_parameters", "test_accuracy", "best_test_accuracy", *SEARCHED[1:])
NUMBERS = (
    *(*ALWAYS, "valid_accuracy", "search_timesteps", "train_seconds", *COSTS),
    *(*(f"neurobench_{name}" for name in NEUROBENCH), *ENERGIES),
)
RESULT_REQUIRED = {
    "ticket": str,
    "level": (int, NONE),
    "search_timesteps": (int, NONE),
    **dict.fromkeys(ALWAYS, NUMBER),
}
RESULT_OPTIONAL = {
    "settled": bool,
    **dict.fromkeys(("method", "label"), str),
    **dict.fromkeys(("layers", "firing_rates", "neurobench", *LAYER_COSTS), dict),
    **dict.fromkeys(("valid_accuracy", "train_seconds", *COSTS), NUMBER),
}


@dataclass(frozen=True)
class Run:
    """A run folder: its path below the folder of runs, and what its files hold; what is not written yet is empty."""

    folder: str
    args: dict
    rows: list[dict]  # metrics.jsonl
    results: list[dict]
    finished: bool

    @property
    def timing(self) -> str | None:
        """All that its times depend on: times of two runs may be compared if these are equal. None if it was resumed
        on another machine or in another way: its times are of neither."""
        ways = {  # a flag that an older run does not know was off
            json.dumps([(now | self.args).get(name) or None for name in TIMING], sort_keys=True)
            for now in self.circumstances
        }
        return ways.pop() if len(ways) == 1 else None

    @property
    def circumstances(self) -> list[dict]:
        """Those that the run was begun in, and others that it was resumed in."""
        return [self.args["circumstances"], *self.args.get("resumed_with", [])]

    @property
    def stop(self) -> int:
        """The epoch before which the stage of the last row stops; an older log does not say it."""
        return max(self.rows[-1].get("stop") or self.args["end_iter"], self.rows[-1]["epoch"] + 1)

    def by_method(self) -> list["Run"]:
        """This run once for each method that its rows name, with that method's rows and epochs alone.

        Gradual pruning leaves a ticket and the network that it trained in place, whose row has a name of its own.
        """
        own = (self.args["method"], self.args["label"])
        results: dict[tuple, list[dict]] = {own: []}
        for row in self.results:
            results.setdefault((row.get("method") or own[0], row.get("label") or own[1]), []).append(row)
        runs = []
        for names, of_method in results.items():
            others = "in_place" if names == own else "train"
            epochs = [row for row in self.rows if row["phase"] != others]
            args = self.args | dict(zip(("method", "label"), names, strict=True))
            runs.append(replace(self, args=args, rows=epochs, results=of_method))
        return runs

    def epochs(self, level: int | None) -> list[dict]:
        """Epochs of a level's ticket: of its training at T, or of the search where there is no other."""
        own = [row for row in self.rows if row["level"] == level]
        return [row for row in own if row["phase"] == "train"] or own


def read_runs(root: Path) -> tuple[list[Run], dict[str, str]]:
    """All runs below a folder, and what is wrong with those that cannot be read, by folder."""
    runs, left_out = [], {}
    found = sorted({path.parent.relative_to(root) for path in root.rglob("*") if path.name in TRACES})
    for path in (path for path in found if not path.name.startswith(".")):  # a restart deletes what it moved there
        folder = path.as_posix()
        try:
            runs.append(read_run(root / path, folder))
        except (InputError, OSError) as error:
            left_out[folder] = f"{error}: the run is left out"
    return runs, left_out


def read_run(path: Path, folder: str) -> Run:
    """Read a run folder.

    Args:
        path: where it is.
        folder: what the report calls it.

    Raises:
        InputError: a file is not what a run writes; the message names the file.
        OSError: a file cannot be opened.
    """
    args, log, results = (path / name for name in FILES)
    if not args.exists():
        raise InputError(f"{args} is missing, which says what was run")
    (found,) = _checked(args, [read_json(args)], ARGS_REQUIRED, ARGS_OPTIONAL)
    if found.get("ticket_origin"):
        _checked(args, [found["ticket_origin"]], {"label": str, "dataset": str, "network": dict})
        _checked(args, [found["ticket_origin"]["network"]], {"arch": str, "neuron": str})
    lines = log.read_bytes().splitlines() if log.exists() else []
    rows = _checked(log, map(json.loads, lines), EPOCH_REQUIRED, EPOCH_OPTIONAL)
    tickets = _checked(results, read_json(results) if results.exists() else [], RESULT_REQUIRED, RESULT_OPTIONAL)
    tickets = [row | _derived(row) for row in tickets]
    return Run(folder, found, rows, tickets, (path / "summary.txt").exists())


def _derived(row: dict) -> dict[str, float]:
    """NeuroBench's metrics and the energies of a ticket, from its row of ``results.json``, as far as it has them."""
    found = {f"neurobench_{name}": value for name, value in (row.get("neurobench") or {}).items()}
    if row.get("layer_costs"):
        table = energies(row)
        found |= {name: table[network][kind] for name, (network, kind) in ENERGIES.items()}
    return found


def _checked(path: Path, content, required: dict, optional: dict | None = None) -> list[dict]:
    """The JSON objects of a file, whose fields have the types that are given.

    Raises:
        InputError: they are not; the message names the file.
    """
    try:
        rows = list(content)
        for row in rows:
            _check(row, required, optional or {})
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error})") from error
    return rows


def _check(row, required: dict, optional: dict) -> None:
    if not isinstance(row, dict):
        raise TypeError(f"{row!r} is no JSON object")
    if missing := sorted(required.keys() - row.keys()):
        raise ValueError(f"{', '.join(missing)} missing")
    present = {name: kind for name, kind in optional.items() if row.get(name) is not None}
    for name, kind in (required | present).items():
        value = row[name]
        infinite = isinstance(value, float) and not math.isfinite(value)
        if infinite or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} is {value!r}")
        if name in ("divergences", "layers", "firing_rates"):
            inner = value if isinstance(value, dict) else dict(enumerate(value))
            _check(inner, dict.fromkeys(inner, NUMBER), {})
        if name == "neurobench":
            _check(value, {}, dict.fromkeys(NEUROBENCH, NUMBER))
        for layer in value.values() if name in LAYER_COSTS else ():
            _check(layer, dict.fromkeys(LAYER_COSTS[name], NUMBER), {})
