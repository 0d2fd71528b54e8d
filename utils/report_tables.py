"""The report's tables: Table 1 of the paper for whatever was run, what a ticket costs to run, and every ticket."""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .flags import uses_early_bird
from .report_runs import (
    COSTS,
    NAMES,
    PAPER_SETTING,
    Cell,
    Experiment,
    Section,
    Spread,
    base_of,
    same_sparsity,
    spread,
    unlike_paper,
)

PAPER_TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "paper" / "table1.csv"
MOST_COLUMNS = 5  # sparsities side by side
SILENT = "†"  # marks an accuracy of a network with a layer that does not spike
IN_SOURCE = "see its source"  # a saved ticket's cost stands with the run that found it
CSV_FIELDS = (
    "dataset", "arch", "width", "train_samples", "test_samples", "end_iter", "experiment", "method", "level",
    "sparsity", "n", "rounds", "accuracy_mean", "accuracy_std", "best_accuracy_mean", "search_timesteps_mean",
    "search_seconds_mean", "search_seconds_std", "search_epochs_mean", "search_timestep_epochs_mean",
    "train_seconds_mean", "delta_accuracy", "delta_accuracy_std", "speed_gain", "speed_gain_std",
    "timestep_epochs_gain", "timestep_epochs_gain_std", "base_n", "paper_accuracy",
    "paper_hours", "paper_delta_accuracy", "paper_speed_gain", *(f"{name}_mean" for name in COSTS),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table as text: each cell is its lines, the first one the number and the others what stands small below it."""

    title: str
    head: list[str]
    rows: list[list[list[str]]]
    notes: list[str]
    groups: tuple[tuple[str, int], ...] = ()  # titles over columns, and how many each spans


def paper_table() -> dict[tuple[str, str, str, int], dict[str, str]]:
    """Table 1 of the paper by data set, network, method and prunings."""
    with PAPER_TABLE.open(encoding="utf-8", newline="") as file:
        return {(r["dataset"], r["arch"], r["method"], int(r["prunings"])): r for r in csv.DictReader(file)}


def paper_row(
    experiment: Experiment, section: Section, column: float, paper: dict[tuple[str, str, str, int], dict[str, str]]
) -> dict[str, str] | None:
    """The paper's numbers for an experiment's sparsity, if it has them for this data set, network and method.

    The size of the run and its training do not matter here; the report says where they are not the paper's.
    """
    comparable = experiment.plain and all(
        experiment.settings.get(flag, PAPER_SETTING[flag]) == PAPER_SETTING[flag]
        for flag in ("neuron", "pruning_scope")
    )
    if not comparable:
        return None
    for (dataset, arch, method, prunings), row in paper.items():
        ours = (section.size["dataset"], section.size["arch"], experiment.method)
        # 25 % of the prunable weights each time; the paper counts all parameters, which is 0.1 % less
        if ours == (dataset, arch, method) and same_sparsity(column, 100 * (1 - 0.75**prunings)):
            return row
    return None


def shown_columns(columns: list[float], most: int = MOST_COLUMNS) -> list[float]:
    """A few sparsities to stand for many, ascending.

    Args:
        columns: sparsities in %, each as often as there are results at it. Those with the most results are kept, of
            equals the paper's first, the others evenly up to the sparsest.
        most: how many to keep.
    """
    counts = Counter(column for column in columns if column > 0)
    papers = [100 * (1 - 0.75**prunings) for prunings in (4, 8, 11, 14)]
    ranks: dict[tuple[int, bool], list[float]] = {}
    for column in sorted(counts):
        ranks.setdefault((counts[column], any(same_sparsity(column, p) for p in papers)), []).append(column)
    shown: list[float] = []
    for _, group in sorted(ranks.items(), reverse=True):
        keep = min(len(group), most - len(shown))
        shown += [group[-(-(i + 1) * len(group) // keep) - 1] for i in range(keep)]
    return sorted(shown)


def columns_of(experiments: list[Experiment]) -> list[float]:
    """Sparsities in %, each once for every experiment that has a ticket there."""
    return [column for experiment in experiments for column in {cell.column for cell in experiment.cells}]


# --- text --------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")  # noqa: RUF001


def signed(value: float, digits: int = 2) -> str:
    text = number(value, digits)
    return text if text.startswith("−") else f"+{text}"  # noqa: RUF001


def significant(value: Spread) -> str:
    """A mean of any size in about three digits, with a deviation where the values differ."""
    steps = ((1e9, " G"), (1e6, " M"), (1e3, " k"))
    unit, name = next(((unit, name) for unit, name in steps if abs(value.mean) >= 10 * unit), (1, ""))
    shown = value.mean / unit
    digits = 0 if shown == int(shown) or abs(shown) >= 1000 else 1 if abs(shown) >= 10 else 2
    deviation = f" ± {number(value.std / unit, max(digits, 1))}" if value.std else ""
    return number(shown, digits) + deviation + name


def duration(value: Spread) -> str:
    """Seconds, mean and deviation in the unit they are read best in."""
    unit, name, digits = (3600, "h", 2) if value.mean >= 3600 else (60, "min", 1) if value.mean >= 120 else (1, "s", 1)
    deviation = "" if value.std is None else f" ± {number(value.std / unit, digits)}"
    return f"{number(value.mean / unit, digits)}{deviation} {name}"


def count(value: Spread) -> str:
    """Mean of whole numbers, with a deviation where they differ."""
    digits = 0 if value.mean == int(value.mean) else 1
    return number(value.mean, digits) + (f" ± {number(value.std, 1)}" if value.std else "")


def measured(value: Spread) -> str:
    """Mean, and the deviation where there is one."""
    return number(value.mean) + ("" if value.std is None else f" ± {number(value.std)}")


def accuracy_of(cell: Cell) -> str:
    """Accuracy of a ticket, marked where a layer of it is silent."""
    return measured(cell.spread("test_accuracy")) + (SILENT if cell.silent else "")


def silent_note(cells: list[Cell]) -> list[str]:
    """What the mark says, where one of the cells has it."""
    layers = list(dict.fromkeys(name for cell in cells for name in cell.silent))
    if not layers:
        return []
    return [
        f"{SILENT} In at least one round a layer is silent, it does not spike once on the test images (here: "
        f"{', '.join(layers)}): what follows it may see nothing of the image, and the accuracy is then chance."
    ]


def signed_spread(value: Spread) -> str:
    return signed(value.mean) + measured(value).removeprefix(number(value.mean))


def with_n(text: str, value: Spread) -> str:
    """A number never stands without how many it is the mean of."""
    return f"{text} (n={value.n})"


def percent(column: float) -> str:
    return f"{column:.2f} %"


# --- Early-Time against its base ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """What Early-Time changes at one sparsity; a ratio is None where nothing was searched or the machines differ.

    Values are over the rounds that both have; where there are none, of the two means, and without a deviation.
    """

    delta_accuracy: Spread
    speed: Spread | None
    cost: Spread | None
    repetitions: str


def gain(early: Experiment, base: Experiment, column: float) -> Gain | None:
    """Compare two experiments round by round at a sparsity that both have: accuracy, search time and search cost."""
    if not early.at(column) or not base.at(column):
        return None
    one, other = early.at(column)[0], base.at(column)[0]
    of_base = {row["round"]: row for row in other.rows}
    pairs = [(row, of_base[row["round"]]) for row in one.rows if row["round"] in of_base]
    repetitions = f"(n={len(pairs)})"
    if not pairs:
        fields = ("test_accuracy", "search_seconds", "search_timestep_epochs")
        pairs = [tuple({field: cell.spread(field).mean for field in fields} for cell in (one, other))]
        repetitions = f"(n={len(one.rows)}, base n={len(other.rows)})"

    def ratio(field):
        return spread(its[field] / mine[field] for mine, its in pairs if mine[field] > 0 and its[field] > 0)

    same_machine = len({run.args.get("device_name") for run in early.runs + base.runs}) == 1
    return Gain(
        spread(mine["test_accuracy"] - its["test_accuracy"] for mine, its in pairs),
        ratio("search_seconds") if same_machine else None,
        ratio("search_timestep_epochs"),
        repetitions,
    )


def factor(value: Spread) -> str:
    return f"×{measured(value)}"  # noqa: RUF001


# --- tables ------------------------------------------------------------------------------------------------------


def table_1(section: Section, paper: dict) -> Table | None:
    """Table 1 of the paper: methods as rows, sparsities as columns; accuracy on the left, the search on the right.

    Variants of a method, controls, transferred tickets and ANNs are left to the list of every ticket.
    """
    plain = plain_experiments(section)
    columns = shown_columns(columns_of(plain))
    experiments = [e for e in plain if any(e.at(column) for column in columns)]
    if not experiments:
        return None
    rows = []
    for experiment in experiments:
        row = [[experiment.label]]
        row += [_accuracy(experiment, section, column, paper) for column in columns]
        row += [_search(experiment, section, column, paper) for column in columns]
        rows.append(row)
        base = base_of(experiment, section)
        if base is not None:
            change = _change(experiment, base, section, columns, paper)
            rows += [change] if any(change[1:]) else []
    notes = []
    notes += dense_note(section)
    others = len([e for e in section.experiments if e.cells and e not in experiments])
    further = len([column for column in section.columns if column > 0 and column not in columns])
    left_out = [f"{others} more experiment{'s' * (others > 1)}"] if others else []
    left_out += [f"{further} more {'sparsities' if further > 1 else 'sparsity'}"] if further else []
    if left_out:
        notes.append(f"In the list of every ticket and in tables.csv: {', '.join(left_out)}.")
    notes.append(
        "Accuracy in % after the last epoch, mean ± sample standard deviation over rounds. Search: training time spent "
        "to find the ticket, its own training excluded, and the same in epochs x timesteps. Sparsity is of the "
        "prunable weights. What ET changes is the mean of the differences and ratios of the rounds that both have. "
        "Paper: Table 1, search on an RTX 2080 Ti."
    )
    notes += silent_note([cell for e in experiments for column in columns for cell in e.at(column)])
    for experiment in experiments:
        for column in columns:
            row = paper_row(experiment, section, column, paper) if experiment.at(column) else None
            if row and row["note"]:
                notes.append(f"Paper, {experiment.label} at {row['sparsity']} %: {row['note']}.")
    head = ["method", *map(percent, columns), *map(percent, columns)]
    groups = (("", 1), ("accuracy (%)", len(columns)), ("search for the ticket", len(columns)))
    return Table("Table 1", head, rows, notes, groups)


def plain_experiments(section: Section) -> list[Experiment]:
    """One SNN experiment for each method of the paper that prunes: the plainest with a sparse ticket."""
    plain: dict[str, Experiment] = {}
    for experiment in sorted(section.experiments, key=lambda e: not e.plain):
        if experiment.method in NAMES and not experiment.ann and any(cell.column > 0 for cell in experiment.cells):
            plain.setdefault(experiment.method, experiment)
    return [experiment for experiment in section.experiments if experiment in plain.values()]


def dense_note(section: Section) -> list[str]:
    """Accuracy of the dense SNN and of the dense ANN, if they were run."""
    dense = {"SNN": section.dense(), "ANN": section.dense(ann=True)}
    accuracies = {name: cell.spread("test_accuracy") for name, cell in dense.items() if cell is not None}
    written = [f"{name} {with_n(f'{measured(value)} %', value)}" for name, value in accuracies.items()]
    return [f"Dense network (IMP before its first pruning): {', '.join(written)}."] if written else []


def _accuracy(experiment: Experiment, section: Section, column: float, paper: dict) -> list[str]:
    cells = experiment.at(column)
    row = paper_row(experiment, section, column, paper)
    lines = [with_n(accuracy_of(cell), cell.spread("test_accuracy")) for cell in cells]
    return lines + ([f"paper {row['accuracy']}"] if cells and row else [])


def _search(experiment: Experiment, section: Section, column: float, paper: dict) -> list[str]:
    cells = experiment.at(column)
    if cells and not experiment.searches:
        return [IN_SOURCE]
    lines = []
    for cell in cells:
        seconds, cost = cell.spread("search_seconds"), cell.spread("search_timestep_epochs")
        if cost.mean:
            lines += [with_n(duration(seconds), seconds), f"{count(cost)} epochs x T"]
        else:
            lines.append(with_n("no training", cost))
    row = paper_row(experiment, section, column, paper)
    return lines + ([f"paper {row['hours']} h"] if lines and row else [])


def _change(early: Experiment, base: Experiment, section: Section, columns: list[float], paper: dict) -> list:
    accuracy, speed = [], []
    for column in columns:
        change, row = gain(early, base, column), paper_row(early, section, column, paper)
        if change is None:
            accuracy.append([])
            speed.append([])
            continue
        accuracy.append([f"{signed_spread(change.delta_accuracy)} {change.repetitions}"])
        speed.append([f"{'no ratio' if change.speed is None else factor(change.speed)} {change.repetitions}"])
        if change.cost is not None:
            speed[-1].append(f"{factor(change.cost)} in epochs x T")
        if row:
            accuracy[-1].append(f"paper {row['delta_accuracy'].replace('-', '−')}")  # noqa: RUF001
            speed[-1].append(f"paper ×{row['speed_gain']}")  # noqa: RUF001
    return [[f"Δ acc. / speed gain of {early.label}", f"against {base.label}"], *accuracy, *speed]


def cost_table(section: Section) -> Table | None:
    """What a ticket costs to run: spikes, operations and energy per image, and its size."""
    heads = {
        "spikes_per_image": "spikes per image", "synops_per_image": "synaptic operations per image",
        "dense_macs_per_image": "MACs of the dense ANN per image", "energy_uj_per_image": "energy per image (µJ)",
        "ann_energy_uj_per_image": "energy of the dense ANN per image (µJ)", "ticket_bytes": "ticket (bytes)",
    }  # fmt: skip
    cells = [(e, cell) for e in section.experiments for cell in e.cells]
    fields = [name for name in COSTS if any(cell.spread(name) for _, cell in cells)]
    if not fields:
        return None
    keep = {0.0, *shown_columns(columns_of(section.experiments))}
    rows = []
    for experiment, cell in cells:
        values = [cell.spread(name) for name in fields]
        if cell.column in keep and any(values):
            written = [[with_n(significant(value), value)] if value else [] for value in values]
            rows.append([[experiment.label], [percent(cell.column)], *written])
    notes = ["Means ± sample standard deviation over rounds, on the test images, as the runs counted them."]
    return Table("What a ticket costs to run", ["method", "sparsity", *(heads[f] for f in fields)], rows, notes)


def every_ticket(section: Section) -> Table:
    """One line per experiment and level."""
    head = ["method", "level", "sparsity", "n", "rounds", "accuracy (%)", "best (%)", "search T", "search", "epochs"]
    head += ["epochs x T", "own training"]
    rows = []
    for experiment in section.experiments:
        for cell in experiment.cells:
            trained = cell.spread("train_seconds")
            search = [duration(cell.spread("search_seconds")), count(cell.spread("search_epochs"))]
            search.append(count(cell.spread("search_timestep_epochs")))
            texts = [
                experiment.label, str(cell.level), percent(cell.column), str(len(cell.rows)),
                ", ".join(map(str, cell.rounds)), accuracy_of(cell),
                measured(cell.spread("best_test_accuracy")), count(cell.spread("search_timesteps")),
                *(search if experiment.searches else [IN_SOURCE, "", ""]), duration(trained) if trained else "",
            ]  # fmt: skip
            rows.append([[text] for text in texts])
    notes = ["Mean ± sample standard deviation over the n rounds named."]
    notes += silent_note([cell for experiment in section.experiments for cell in experiment.cells])
    return Table("Every ticket", head, rows, notes)


def remarks(section: Section) -> list[str]:
    """What has to be known to read a section's numbers: how it differs from the paper, machines, repeated rounds."""
    lines = []
    for experiment in section.experiments:
        lines += [
            f"{folder} repeats a round of {experiment.label} that another run has reported; it is counted once."
            for folder in experiment.repeated
        ]
    unlike = {experiment.label: unlike_paper(experiment, section) for experiment in section.experiments}
    common = {}
    for flag, text in {flag: text for texts in unlike.values() for flag, text in texts.items()}.items():
        concerned = [e for e in section.experiments if flag in section.size or flag in e.settings]
        if all(unlike[e.label].get(flag) == text for e in concerned):
            common[flag] = text
    if common:
        lines.append(f"Not the paper's size and settings: {', '.join(common.values())}.")
    alike: dict[str, list[str]] = {}  # what differs from the paper -> labels
    for label, texts in unlike.items():
        own = ", ".join(text for flag, text in texts.items() if flag not in common)
        if own:
            alike.setdefault(own, []).append(label)
    lines += [f"Not as in the paper: {own} ({'; '.join(labels)})." for own, labels in alike.items()]
    silent: dict[str, list[str]] = {}  # layers -> tickets
    for experiment in section.experiments:
        for cell in filter(lambda cell: cell.silent, experiment.cells):
            by_count: dict[int, list[str]] = {}
            for name, n in cell.silent.items():
                by_count.setdefault(n, []).append(name)
            layers = "; ".join(f"{', '.join(names)} in {n} of {len(cell.rows)} rounds" for n, names in by_count.items())
            silent.setdefault(layers, []).append(f"{experiment.label} at {percent(cell.column)}")
    lines += [f"Silent on all test images: {'; '.join(tickets)} ({layers})." for layers, tickets in silent.items()]
    at_once = {experiment.label: settles_at_once(experiment) for experiment in section.experiments}
    named = "; ".join(f"{label} at {', '.join(map(percent, columns))}" for label, columns in at_once.items() if columns)
    if named:
        lines.append(
            "Two masks of one sparsity s differ in at most 2 (1 - s) of their entries, which is below the tolerance of "
            f"Early-Bird here, so that it settles as soon as its window is full, whatever the masks are: {named}."
        )
    machines: dict[str, list[str]] = {}
    for experiment in section.experiments:
        for name in sorted({str(run.args.get("device_name", "not noted")) for run in experiment.runs}):
            machines.setdefault(name, []).append(experiment.label)
    if len(machines) == 1:
        lines.append(f"All ran on: {next(iter(machines))}.")
    else:
        lines += [f"On {name}: {'; '.join(labels)}." for name, labels in machines.items()]
    return lines


def settles_at_once(experiment: Experiment) -> list[float]:
    """Sparsities in % at which no two masks of Early-Bird are as far apart (Hamming) as its tolerance."""
    if not uses_early_bird(experiment.method) or experiment.settings.get("eb_distance") != "hamming":
        return []
    tolerance = experiment.settings["eb_tolerance"]
    cells = [cell for cell in experiment.cells if 2 * (1 - cell.rows[0]["sparsity"] / 100) < tolerance]
    return [cell.column for cell in cells]


def tables_csv(sections: list[Section], paper: dict) -> str:
    """Every number as CSV, a line per experiment and level; percents, seconds, and the paper's hours."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    for section in sections:
        for experiment in section.experiments:
            for cell in experiment.cells:
                writer.writerow(_csv_row(section, experiment, cell, paper))
    return out.getvalue()


def _csv_row(section: Section, experiment: Experiment, cell: Cell, paper: dict) -> dict:
    row = {name: "" if value is None else value for name, value in section.size.items()}
    row |= {"experiment": experiment.label, "method": experiment.method, "level": cell.level}
    row |= {"sparsity": cell.column, "n": len(cell.rows), "rounds": " ".join(map(str, cell.rounds))}

    def put(name, value, std=False):
        if value is not None:
            row[f"{name}_mean"] = f"{value.mean:.6g}"
        if std and value is not None and value.std is not None:
            row[f"{name}_std"] = f"{value.std:.6g}"

    put("accuracy", cell.spread("test_accuracy"), std=True)
    put("best_accuracy", cell.spread("best_test_accuracy"))
    if experiment.searches:
        put("search_seconds", cell.spread("search_seconds"), std=True)
        for name in ("search_timesteps", "search_epochs", "search_timestep_epochs"):
            put(name, cell.spread(name))
    for name in ("train_seconds", *COSTS):
        put(name, cell.spread(name))
    base = base_of(experiment, section)
    change = gain(experiment, base, cell.column) if base else None
    if change:
        row["base_n"] = len(base.at(cell.column)[0].rows)
        found = (("delta_accuracy", change.delta_accuracy), ("speed_gain", change.speed))
        for name, value in (*found, ("timestep_epochs_gain", change.cost)):
            if value is not None:
                row[name] = f"{value.mean:.6g}"
                row[f"{name}_std"] = "" if value.std is None else f"{value.std:.6g}"
    of_paper = paper_row(experiment, section, cell.column, paper)
    if of_paper:
        row |= {"paper_accuracy": of_paper["accuracy"], "paper_hours": of_paper["hours"]}
        row |= {"paper_delta_accuracy": of_paper["delta_accuracy"], "paper_speed_gain": of_paper["speed_gain"]}
    return row


def markdown(table: Table) -> str:
    """A table as GitHub's Markdown, with its notes."""
    over = [name for name, span in table.groups for _ in range(span)] or [""] * len(table.head)
    head = [f"{group}: {name}" if group else name for group, name in zip(over, table.head, strict=True)]
    lines = [head, ["---"] * len(head)]
    lines += [["<br>".join(map(_escape, cell)) for cell in row] for row in table.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {table.title}\n\n{text}\n\n" + "".join(f"{_escape(note)}\n\n" for note in table.notes)


def _escape(text: str) -> str:
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")
