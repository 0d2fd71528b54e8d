"""What a report is made of: run folders, and which of them are repetitions of one experiment.

Runs that differ only in ``--round``, in where they lie and in what they ran on repeat one experiment. A flag that has
no effect on a method, and one that only says how sparse its ticket is, makes no difference either; any other flag does.
"""

import json
import math
import re
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, mode, stdev

from .errors import InputError
from .flags import METHODS, make_parser, reported_levels, uses_early_time, uses_rewinding, without_effect
from .records import EPOCH_FIELDS, RESULT_FIELDS, check_fields, identity, read_args, read_results, read_rows

NAMES = {
    "laterewindlth": "IMP", "earlyT_laterewindlth": "IMP + ET", "earlybird": "EB", "earlyT_earlybird": "EB + ET",
    "oneshot-magnitude": "magnitude", "oneshot-snip": "SNIP", "oneshot-random": "random",
}  # fmt: skip
CONTROLS = ("-shuffle", "-reinit")  # ends of a method's name
SIZE = ("dataset", "arch", "width", "train_samples", "test_samples", "end_iter")  # runs of one size share a table
PLACE = ("round", "output_dir", "exp_name", "data_dir", "device", "channels_last", "cuda_graph", "tensorboard",
         "restart")  # fmt: skip
CIRCUMSTANCES = ("effective_seed", "versions", "device_name", "ranks", "threads", "git_commit")
HOW_SPARSE = ("sparsity_round", "prune_iterations", "evaluate_levels")
TICKET = ("ticket", "ticket_checksum", "ticket_level", "ticket_epoch", "control")  # the label names them in its own way
NO_SETTING = {"method", "format", *SIZE, *PLACE, *CIRCUMSTANCES, *HOW_SPARSE, *TICKET}
# section 4.1 of the paper; epochs are those of its four data sets
PAPER_EPOCHS = {"svhn": 150, "fmnist": 150, "cifar10": 300, "cifar100": 300}
PAPER_SETTING = {
    "width": 1.0, "train_samples": None, "test_samples": None, "neuron": "lif", "timestep": 5, "optimizer": "sgd",
    "scheduler": "cosine", "batch_size": 128, "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 5e-4,
    "prune_percent": 25.0, "pruning_scope": "global", "rewinding_epoch": 20, "eb_window": 5, "eb_tolerance": 0.02,
    "eb_distance": "hamming", "early_time_epoch": 2, "early_time_threshold": 0.6,
    "rewind": "weights", "divergence": "kl",
}  # fmt: skip
SPOKEN = {
    "rewinding_epoch": "rewind epoch", "search_timestep": "T_pre", "early_time_threshold": "λ", "timestep": "T",
    "prune_percent": "pruned by %", "random_scope": "random scope", "eb_window": "window", "eb_tolerance": "tolerance",
    "data_checksum": "images", "end_iter": "epochs", "train_samples": "training images", "test_samples": "test images",
}  # fmt: skip
VALUE_ALONE = ("pruning_scope", "eb_distance", "optimizer", "scheduler", "precision")
SAME = 0.01  # two densities that differ by less than this share are one sparsity: whole weights are pruned

NUMBER = (int, float)
ARGS_FIELDS = {"method": str, "dataset": str, "arch": str, "round": int}
MORE_ARGS_FIELDS = {"timestep": int, "rewinding_epoch": int, "search_timestep": int, "eb_tolerance": NUMBER}
MORE_EPOCH_FIELDS = {
    "loss": NUMBER, "train_accuracy": NUMBER, "hamming": NUMBER, "jaccard": NUMBER, "divergences": list,
    "early_time": int,
}  # fmt: skip
COSTS = {
    "spikes_per_image": NUMBER, "synops_per_image": NUMBER, "dense_macs_per_image": NUMBER,
    "energy_uj_per_image": NUMBER, "ann_energy_uj_per_image": NUMBER, "ticket_bytes": NUMBER,
}  # fmt: skip
MORE_RESULT_FIELDS = {"layers": dict, "firing_rates": dict, "settled": bool, "train_seconds": NUMBER} | COSTS


@dataclass(frozen=True)
class Found:
    """A run folder that could be read: its path below the runs folder, its flags with defaults filled in and as it
    noted them, its rows."""

    folder: str
    args: dict
    noted: dict
    rows: list[dict]
    results: list[dict]

    @property
    def missing(self) -> list[int] | None:
        """Levels that the run was to report and has not; None where its flags do not say which."""
        try:
            return sorted(set(reported_levels(Namespace(**self.args))) - {row["level"] for row in self.results})
        except (AttributeError, TypeError):
            return None

    @property
    def finished(self) -> bool:
        return bool(self.results) and not self.missing

    def stage(self, level: int) -> list[dict]:
        """Epochs of a level's ticket: of its training at T, or of the search where that is all there is."""
        own = [row for row in self.rows if row["level"] == level]
        return [row for row in own if row["phase"] == "train"] or own


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for one value) and number of values."""

    mean: float
    std: float | None
    n: int


def spread(values) -> Spread | None:
    """Mean and spread of the values that are there."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Cell:
    """All repetitions of one ticket: the rows of ``results.json``, one per round."""

    level: int
    column: float  # the sparsity in % that the section lists it under
    rows: list[dict]

    def spread(self, field: str) -> Spread | None:
        return spread(row.get(field) for row in self.rows)

    @property
    def rounds(self) -> list[int]:
        return [row["round"] for row in self.rows]

    @property
    def silent(self) -> dict[str, int]:
        """Layers that did not spike once on the test images, and in how many rounds."""
        return Counter(n for row in self.rows for n, rate in (row.get("firing_rates") or {}).items() if rate == 0)


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their round alone."""

    label: str
    method: str
    settings: dict
    plain: bool  # no flag had to be named to tell it from others, or all that were have the paper's value
    runs: list[Found]
    cells: list[Cell]  # by sparsity

    @property
    def ann(self) -> bool:
        return self.settings.get("neuron") == "relu"

    @property
    def searches(self) -> bool:
        """Whether the run itself found its ticket."""
        return not self.method.startswith("oneshot-transfer")

    @property
    def repeated(self) -> list[str]:
        """Folders of runs that report a ticket of a round that another one has reported already; it counts once."""
        seen, folders = set(), []
        for run in self.runs:
            tickets = {(run.args["round"], row["level"], round(row["sparsity"], 2)) for row in run.results}
            if tickets & seen:
                folders.append(run.folder)
            seen |= tickets
        return folders

    def at(self, column: float) -> list[Cell]:
        return [cell for cell in self.cells if cell.column == column]


@dataclass(frozen=True)
class Section:
    """All experiments on one data set with one network at one size."""

    size: dict
    experiments: list[Experiment]

    @property
    def columns(self) -> list[float]:
        """Sparsities in %, the dense network's 0 among them."""
        return sorted({cell.column for experiment in self.experiments for cell in experiment.cells})

    def dense(self, ann: bool = False) -> Cell | None:
        """The dense network, of the SNN or of the ANN: IMP before its first pruning."""
        imp = [e for e in self.experiments if e.method == "laterewindlth" and e.ann == ann]
        cells = [cell for experiment in imp for cell in experiment.cells if cell.level == 0]
        return max(cells, key=lambda cell: len(cell.rows), default=None)

    @property
    def slug(self) -> str:
        parts = [str(self.size["dataset"]), str(self.size["arch"])]
        parts += [f"{name}{self.size[name]}" for name in SIZE[2:] if self.size[name] not in (None, 1.0)]
        return re.sub(r"[^\w.-]+", "", "-".join(parts))

    @property
    def title(self) -> str:
        size = self.size
        more = [f"width {size['width']}"] if size["width"] != 1 else []
        more += [f"{size[name]} {SPOKEN[name]}" for name in SIZE[3:] if size[name] is not None]
        return ", ".join([f"{size['dataset']}, {size['arch']}", *more])


def read_runs(root: Path) -> tuple[list[Found], dict[str, str]]:
    """All runs below a folder, and what is wrong with those that cannot be read, by folder.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    if not root.is_dir():
        raise InputError(f"{root} is no folder: name the one that the train scripts wrote to (--output_dir)")
    found, damaged = [], {}
    for path in sorted(root.rglob("args.json")):
        folder = path.parent.relative_to(root).as_posix()
        try:
            found.append(read_run(path.parent, folder))
        except (InputError, OSError) as error:
            damaged[folder] = str(error)
    if not found and not damaged:
        raise InputError(f"there is no run below {root}: none of its folders holds an args.json")
    known = NO_SETTING | {"data_checksum"} | _defaults("oneshot").keys()  # that script has all flags
    for name in {name for run in found for name in run.noted} - known:
        for run in found:
            run.args.setdefault(name, None)  # a flag that only other runs know
    return found, damaged


def read_run(path: Path, folder: str) -> Found:
    """Read a run folder; what a run that is not finished has not written yet is empty.

    Raises:
        InputError: a file is damaged; the message names it.
    """
    remedy = "the run is left out"
    args = read_args(path / "args.json", remedy)
    rows = read_rows(path / "metrics.jsonl", remedy, identity(args))
    results = read_results(path / "results.json", remedy, identity(args))
    name = path / "args.json"
    try:
        check_fields(args, ARGS_FIELDS)
        check_fields(args, {flag: kind for flag, kind in MORE_ARGS_FIELDS.items() if flag in args})
        name = path / "metrics.jsonl"
        for row in rows:
            _check_row(row, EPOCH_FIELDS, MORE_EPOCH_FIELDS)
        name = path / "results.json"
        for row in results:
            _check_row(row, RESULT_FIELDS, MORE_RESULT_FIELDS)
            row["round"] = args["round"]
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is damaged ({error}): {remedy}") from error
    return Found(folder, _defaults(args["method"]) | args, args, rows, results)


def _check_row(row, fields: dict, optional: dict) -> None:
    check_fields(row, fields)
    values = []
    for field, value in row.items():
        if field in optional and value is not None and not isinstance(value, optional[field]):
            raise TypeError(f"{field} of a row is {value!r}")
        values += value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        if field in ("divergences", "layers", "firing_rates") and value is not None:
            inner = value.values() if isinstance(value, dict) else value
            if any(not isinstance(v, NUMBER) or isinstance(v, bool) for v in inner):
                raise TypeError(f"{field} of a row holds what is no number")
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise ValueError("a number is not finite")


def _defaults(method: str) -> dict:
    """What flags that a run does not know yet would have been."""
    script = method if method in METHODS else "oneshot"  # which has all flags
    return vars(make_parser(script).parse_args([]))


def settings_of(run: Found) -> dict:
    """The flags that make a difference to the run's results, beside method, size, sparsity and saved ticket."""
    unused = without_effect(Namespace(**{"ticket": "random"} | run.args))
    ignored = NO_SETTING | {flag.removeprefix("--") for flag in unused}
    if not uses_rewinding(run.args["method"]):
        ignored.add("prune_percent")
    if (run.args.get("neuron"), run.args.get("timestep")) == ("relu", 1):
        ignored.add("timestep")  # an ANN has no other
    settings = {name: value for name, value in sorted(run.args.items()) if name not in ignored}
    if "search_timestep" in settings and settings["search_timestep"] == run.args.get("timestep"):
        settings["search_timestep"] = None
    return settings


def sections_of(runs: list[Found]) -> list[Section]:
    """Sort runs into experiments, and experiments into tables."""
    by_size: dict[str, list[Found]] = {}
    for run in runs:
        by_size.setdefault(_key([run.args.get(name) for name in SIZE]), []).append(run)
    labels: dict[str, str] = {}  # of runs whose tickets others may have taken, by the end of their path
    return [
        Section(dict(zip(SIZE, json.loads(size), strict=True)), _experiments(of_size, labels))
        for size, of_size in sorted(by_size.items())
    ]


def _key(value) -> str:
    return json.dumps(value, sort_keys=True)


def _experiments(runs: list[Found], labels: dict[str, str]) -> list[Experiment]:
    usual = _usual([settings_of(run) for run in runs])
    columns = _columns(row["sparsity"] for run in runs for row in run.results)
    groups: dict[str, list[Found]] = {}
    for run in sorted(runs, key=lambda run: (run.args["method"].startswith("oneshot-transfer"), run.folder)):
        settings = settings_of(run)
        name = _name(run, labels)
        if not run.args["method"].startswith("oneshot-transfer"):
            labels[_tail(run.folder)] = ", ".join([name, *_differing(settings, usual)])
        groups.setdefault(_key([name, run.args["method"], settings]), []).append(run)
    experiments = []
    for key, members in groups.items():
        name, method, settings = json.loads(key)
        named = {flag: value for flag, value in settings.items() if _differs(flag, value, usual)}
        plain = all(flag in PAPER_SETTING and value == PAPER_SETTING[flag] for flag, value in named.items())
        label = ", ".join([name, *_differing(settings, usual)])
        members.sort(key=lambda run: (run.args["round"], run.folder))
        experiments.append(Experiment(label, method, settings, plain, members, _cells(members, columns)))
    order = list(NAMES)
    position = {e.label: order.index(e.method) if e.method in order else len(order) for e in experiments}
    return sorted(experiments, key=lambda e: (position[e.label], not e.plain, e.label))


def _usual(settings: list[dict]) -> dict:
    """For each flag that differs between runs the value that goes without saying: the paper's, or the most common."""
    usual = {"search_timestep": None}  # T
    for flag in sorted({flag for of_run in settings for flag in of_run}):
        values = [_key(of_run[flag]) for of_run in settings if flag in of_run]
        if len(set(values)) > 1:
            paper = _key(PAPER_SETTING.get(flag))
            counts = Counter(values)
            usual[flag] = json.loads(
                paper if paper in counts else max(sorted(counts), key=lambda v: (counts[v], bool(json.loads(v))))
            )
    return usual


def _differing(settings: dict, usual: dict) -> list[str]:
    return [
        spoken(flag, value) for flag, value in settings.items() if flag != "neuron" and _differs(flag, value, usual)
    ]


def _differs(flag: str, value, usual: dict) -> bool:
    return flag in usual and value != usual[flag]


def spoken(flag: str, value) -> str:
    """A flag and its value as a label names them."""
    if flag in VALUE_ALONE:
        return str(value)
    if isinstance(value, bool):
        return ("" if value else "no ") + flag.replace("_", " ")
    return f"{SPOKEN.get(flag, flag.replace('_', ' '))} {value}"


def _name(run: Found, labels: dict[str, str]) -> str:
    """What the ticket is called before any flag: its method, what a control kept of it, whether it is an ANN's."""
    method, control = run.args["method"], run.args.get("control")
    if method.startswith("oneshot-transfer"):
        source = _source(run, labels)
        name = f"{source} transfer" if control in (None, "none") else f"{source} {control}"
    else:
        kind = method.removesuffix("-shuffle").removesuffix("-reinit")
        name = NAMES.get(kind, kind) + ("" if control in (None, "none") else f" {control}")
    return f"{name}, ANN" if run.args.get("neuron") == "relu" else name


def _source(run: Found, labels: dict[str, str]) -> str:
    """The experiment that a saved ticket is from, from the path of its file."""
    parts = Path(str(run.args.get("ticket"))).parts
    if len(parts) < 4:
        return parts[-1] if parts else "saved ticket"
    place = re.sub(r"-round\d+$", "", parts[-3])
    name = labels.get(f"{parts[-4]}/{parts[-3]}") or NAMES.get(parts[-4], parts[-4])
    name = name.replace(", ANN", " (ANN)")
    return name if place == f"{run.args['dataset']}-{run.args['arch']}" else f"{name} of {place}"


def _tail(folder: str) -> str:
    return "/".join(folder.split("/")[-2:])


def _columns(sparsities) -> list[float]:
    """Sparsities in % to list tickets under: one for all that prune to the same density but for whole weights."""
    columns, group = [], []
    for value in sorted(sparsities):
        if group and not same_sparsity(group[0], value):
            columns.append(mode(round(v, 2) for v in group))
            group = []
        group.append(value)
    return [*columns, mode(round(v, 2) for v in group)] if group else []


def same_sparsity(one: float, other: float) -> bool:
    """Whether two sparsities in % are one but for whole weights."""
    return abs(one - other) <= SAME * max(100 - one, 100 - other) + 1e-9


def _cells(runs: list[Found], columns: list[float]) -> list[Cell]:
    """Tickets by level and sparsity; of the same round twice, only the first counts."""
    cells: dict[tuple[float, int], dict[int, dict]] = {}
    for run in runs:
        for row in run.results:
            column = min(columns, key=lambda column: abs(column - row["sparsity"]))
            cells.setdefault((column, row["level"]), {}).setdefault(run.args["round"], row)
    return [Cell(level, column, list(rows.values())) for (column, level), rows in sorted(cells.items())]


def base_of(experiment: Experiment, section: Section) -> Experiment | None:
    """The experiment without Early-Time that an ET experiment is to be compared with: the same settings otherwise."""
    if not uses_early_time(experiment.method):
        return None
    method = experiment.method.removeprefix("earlyT_")
    for other in section.experiments:
        same = all(experiment.settings.get(flag, value) == value for flag, value in other.settings.items())
        if other.method == method and same:
            return other
    return None


def source_of(control: Experiment) -> str:
    """Label of the experiment whose tickets a control (a method that ends with one of CONTROLS) starts from."""
    source, _, more = control.label.partition(f" {control.method.rsplit('-', 1)[1]}")
    return source.replace(" (ANN)", ", ANN") if control.method.startswith("oneshot-transfer") else source + more


def unlike_paper(experiment: Experiment, section: Section) -> dict[str, str]:
    """Flags of an experiment that are not the paper's and that its label does not name, in words with both values."""
    epochs = PAPER_EPOCHS.get(section.size["dataset"])
    paper = PAPER_SETTING | ({"end_iter": epochs} if epochs else {})
    ours = section.size | experiment.settings
    ours = {flag: value for flag, value in ours.items() if spoken(flag, value) not in experiment.label.split(", ")}
    if experiment.ann:
        ours.pop("neuron", None)
    return {
        flag: f"{SPOKEN.get(flag, flag.replace('_', ' '))} {_or_all(ours[flag])} (paper: {_or_all(value)})"
        for flag, value in paper.items()
        if flag in ours and ours[flag] != value
    }


def _or_all(value):
    return "all" if value is None else value
