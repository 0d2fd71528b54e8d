"""The report's tables: Table 1 of the paper for whatever was run, what a ticket costs to run, and every ticket."""

from collections import Counter
from pathlib import Path

import pandas as pd

from .costs import cost_table, energy_table
from .experiments import Cell, Experiment, Section, Spread, against_dense, base_of, same_sparsity, spread
from .runs import NUMBERS
from .settings import PAPER_SETTING, SIZE
from .text import Table, accuracy_of, duration, marks, measured, percent, search_of, whole, with_n

PAPER = Path(__file__).resolve().parent.parent / "benchmarks" / "paper"
PAPER_SPARSITIES = [100 * (1 - 0.75**prunings) for prunings in (4, 8, 11, 14)]
GAINS = ("delta_accuracy", "speed_gain", "cost_gain")
SPREADS = (*NUMBERS, "firing_rate")
CSV_FIELDS = [
    *(*SIZE, "experiment", "method", "timestep", "ticket", "level", "column", "n", "tickets", "rounds", "dense"),
    *(f"{name}_{what}" for name in (*SPREADS, *GAINS, "against_dense") for what in ("mean", "std", "n")),
    *(f"paper_{name}" for name in ("accuracy", "hours", "delta_accuracy", "speed_gain")),
]


def paper_table(name: str = "table1") -> list[dict[str, str]]:
    """The rows of a table of the paper, as text."""
    return pd.read_csv(PAPER / f"{name}.csv", dtype=str, keep_default_na=False).to_dict("records")


def paper_row(experiment: Experiment, section: Section, column: float, paper: list[dict]) -> dict[str, str]:
    """The paper's numbers for an experiment's sparsity; empty without data for this data set, network and method.

    The size of the run and its training do not matter here; the report says where they are not the paper's.
    """
    ours = {"dataset": section.size["dataset"], "arch": section.size["arch"], "method": experiment.args["method"]}
    paper_like = {flag: PAPER_SETTING[flag] for flag in ("neuron", "pruning_scope")}
    comparable = experiment.plain and paper_like | experiment.settings == experiment.settings | paper_like
    # 25 % of the prunable weights each time; the paper counts all parameters, which is 0.1 % less
    found = [
        row for row in paper if same_sparsity(column, 100 * (1 - 0.75 ** int(row["prunings"]))) and row | ours == row
    ]
    return found[0] if comparable and found else {}


def shown_columns(columns: list[float], most: int = 5) -> list[float]:
    """A few sparsities to stand for many, ascending.

    Args:
        columns: sparsities in %, each as often as there are results at it. Those with the most results are kept, of
            equals the paper's first, the others evenly up to the sparsest.
        most: how many to keep.
    """
    ranks: dict[tuple[int, bool], list[float]] = {}
    for column, count in sorted(Counter(column for column in columns if column > 0).items()):
        ranks.setdefault((count, any(same_sparsity(column, p) for p in PAPER_SPARSITIES)), []).append(column)
    shown: list[float] = []
    for _, group in sorted(ranks.items(), reverse=True):
        keep = min(len(group), most - len(shown))
        shown += [group[-(-(i + 1) * len(group) // keep) - 1] for i in range(keep)]
    return sorted(shown)


def gains(early: Experiment, section: Section) -> dict[float, dict[str, Spread | None]]:
    """What Early-Time changes at each sparsity, over the rounds that it and its base method have both.

    Returns:
        By sparsity the difference of the accuracies and the ratios of search times and of epochs x timesteps. Only
        times of rounds that ran in the same circumstances have a ratio; it is None where there are none.
    """
    base = base_of(early, section)
    if base is None:
        return {}
    fields = ["column", "round", "test_accuracy", "search_seconds", "search_timestep_epochs", "timing"]
    mine, its = (e.tickets[fields].drop_duplicates(["column", "round"]) for e in (early, base))
    pairs = mine.merge(its, on=["column", "round"], suffixes=("", "_base"))
    pairs["delta_accuracy"] = pairs["test_accuracy"] - pairs["test_accuracy_base"]
    time, cost = (pairs[f"{field}_base"] / pairs[field] for field in ("search_seconds", "search_timestep_epochs"))
    searched = (pairs["search_timestep_epochs"] > 0) & (pairs["search_timestep_epochs_base"] > 0)
    alike = pairs["timing"].notna() & (pairs["timing"] == pairs["timing_base"])
    pairs["speed_gain"] = time.where(searched & (time > 0) & alike)
    pairs["cost_gain"] = cost.where(searched)
    return {column: {name: spread(rows[name]) for name in GAINS} for column, rows in pairs.groupby("column")}


def plain_experiments(section: Section) -> list[Experiment]:
    """One SNN experiment for each method that finds sparse tickets, the plainest; no controls."""
    searching = [e for e in section.experiments if e.searches and not e.ann and not e.control]
    sparse = [e for e in searching if (e.tickets["column"] > 0).any()]
    return list({e.name: e for e in reversed(sparse)}.values())[::-1]  # of one name the plain one comes first


def table_1(section: Section, paper: list[dict]) -> Table:
    """Table 1 of the paper: methods as rows, sparsities as columns; accuracy on the left, the search on the right.

    Variants of a method, controls, transferred tickets and ANNs are left to the list of every ticket.
    """
    plain = plain_experiments(section)
    columns = shown_columns([column for e in plain for column in e.tickets["column"].unique()], most=4)
    experiments = [e for e in plain if any(e.at(column) for column in columns)]
    rows, of_paper = [], []
    for e in experiments:
        papers = {column: paper_row(e, section, column, paper) if e.at(column) else {} for column in columns}
        accuracies = {column: [accuracy_of(cell) for cell in e.at(column)] for column in columns}
        searches = {column: [line for cell in e.at(column) for line in search_of(cell)] for column in columns}
        rows.append(_row([e.label], accuracies, searches, papers, ("accuracy", "hours")))
        if changes := gains(e, section):
            label = [f"Δ acc. / speed gain of {e.label}", f"against {base_of(e, section).label}"]
            texts = {column: _change(**changes[column]) if column in changes else ([], []) for column in columns}
            accuracies, searches = ({column: both[i] for column, both in texts.items()} for i in (0, 1))
            rows.append(_row(label, accuracies, searches, papers, ("delta_accuracy", "speed_gain")))
        of_paper += [f"Paper, {e.label} at {p['sparsity']} %: {p['note']}." for p in papers.values() if p.get("note")]
    notes = [
        *dense_note(section, experiments),
        "Accuracy in % after the last epoch, mean ± sample standard deviation over rounds. Search: training time spent "
        "to find the ticket, its own training excluded, and the same in epochs x timesteps. Sparsity is of the "
        "prunable weights. What ET changes is the mean of the differences and ratios of the rounds that both have, of "
        "times only where both ran on the same machine in the same way. The search of what is trained in place is its "
        "whole training. Paper: Table 1, search on an RTX 2080 Ti. More "
        "experiments and sparsities: in the list of every ticket and in tables.csv.",
        *marks([cell for e in experiments for column in columns for cell in e.at(column)]),
        *of_paper,
    ]
    return Table("Table 1", rows, notes)


def _row(label: list[str], accuracies: dict, searches: dict, papers: dict, fields: tuple[str, str]) -> dict:
    """A row of Table 1: what stands in its cells by sparsity, with the paper's values of two fields below."""
    row = {"method": label}
    for group, texts, field in zip(("accuracy (%)", "search"), (accuracies, searches), fields, strict=True):
        for column, lines in texts.items():
            value = papers[column].get(field, "").replace("-", "−")  # noqa: RUF001
            unit = {"hours": f"{value} h", "speed_gain": f"×{value}"}.get(field, value)  # noqa: RUF001
            row[f"{group}: {percent(column)}"] = [*lines, f"paper {unit}"] if lines and value else lines
    return row


def _change(delta_accuracy: Spread, speed_gain: Spread | None, cost_gain: Spread | None) -> tuple[list[str], list[str]]:
    factors = [with_n(f"×{measured(value)}", value) if value else "no ratio" for value in (speed_gain, cost_gain)]  # noqa: RUF001
    return [with_n(measured(delta_accuracy, sign="+"), delta_accuracy)], [factors[0], f"{factors[1]} in epochs x T"]


def dense_note(section: Section, experiments: list[Experiment]) -> list[str]:
    """Accuracy of the dense networks that experiments are compared with."""
    found = dict(filter(None, (section.dense_of(e) for e in experiments)))
    written = "; ".join(f"{label} {accuracy_of(cell)}" for label, cell in found.items())
    return [f"Accuracy of the dense network in %, before the first pruning: {written}."] if written else []


def overview(section: Section) -> Table:
    """A line for each experiment: its sparsest ticket."""
    sparsest = [
        (e, e.cells[-1], _against_dense(e.cells[-1], section.dense_of(e))) for e in section.experiments if e.cells
    ]
    rows = [
        {
            "method": e.label,
            "sparsest ticket": percent(cell.column),
            "its accuracy (%)": accuracy_of(cell),
            "against dense": with_n(measured(change, sign="+"), change) if change else "",
            "its search": search_of(cell),
        }
        for e, cell, change in sparsest
    ]
    notes = dense_note(section, section.experiments) + marks([cell for _, cell, _ in sparsest])
    return Table("Sparsest tickets", rows, notes)


def _against_dense(cell: Cell, dense: tuple[str, Cell] | None) -> Spread | None:
    """Difference of a sparse ticket to the dense network of the same round, in percent points."""
    pair = dense and cell.column and against_dense(cell, dense[1])
    return pair[1] if pair else None


def costs(section: Section) -> list[Table]:
    """What the tickets cost to run, at a few sparsities."""
    shown = {0.0, *shown_columns([c for e in section.experiments for c in e.tickets["column"].unique()])}
    return [cost_table(section, shown), energy_table(section)]


def every_ticket(section: Section) -> Table:
    """One line for each experiment and ticket; accuracy on held-out images where a run held some out."""
    any_held = any(cell.spread("valid_accuracy") for e in section.experiments for cell in e.cells)
    rows = [
        {
            "method": e.label,
            "ticket": cell.ticket,
            "sparsity": percent(cell.column),
            "of all parameters": percent(cell.rows["sparsity_all_parameters"].mean()),
            "rounds": ", ".join(map(str, cell.rows["round"])),
            "accuracy (%)": accuracy_of(cell),
            **({"held out (%)": _held_out(cell)} if any_held else {}),
            "best (%)": measured(cell.spread("best_test_accuracy")),
            "search T": whole(cell.spread("search_timesteps")),
            "search": search_of(cell),
            "search epochs": whole(cell.spread("search_epochs")),
            "own training": _own_training(cell),
        }
        for e in section.experiments
        for cell in e.cells
    ]
    return Table("Every ticket", rows, marks([cell for e in section.experiments for cell in e.cells]))


def _held_out(cell: Cell) -> str:
    accuracy = cell.spread("valid_accuracy")
    return with_n(measured(accuracy), accuracy) if accuracy else ""


def _own_training(cell: Cell) -> str:
    if cell.in_place:
        return "none, in place"
    return duration(cell.spread("train_seconds")) if cell.rows["train_seconds"].notna().any() else ""


def tables_csv(sections: list[Section], paper: list[dict]) -> str:
    """Every number as CSV, a line for each experiment and ticket; percents, seconds, and the paper's hours."""
    rows = [_csv_row(s, e, cell, paper) for s in sections for e in s.experiments for cell in e.cells]
    return pd.DataFrame(rows, columns=CSV_FIELDS).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _csv_row(section: Section, experiment: Experiment, cell: Cell, paper: list[dict]) -> dict:
    values = {name: cell.spread(name) for name in SPREADS} | gains(experiment, section).get(cell.column, {})
    dense = section.dense_of(experiment)
    values["against_dense"] = _against_dense(cell, dense)
    spreads = {name: value._asdict() for name, value in values.items() if value}
    return {
        **section.size,
        "experiment": experiment.label,
        "method": experiment.args["method"],
        "timestep": experiment.args["timestep"],
        "ticket": cell.ticket,
        "level": cell.rows["level"].iloc[0],
        "column": cell.column,
        "n": len(cell.rows),
        "tickets": cell.tickets,
        "rounds": " ".join(map(str, cell.rows["round"])),
        "dense": dense[0] if values["against_dense"] else None,
        **{f"{name}_{what}": number for name, value in spreads.items() for what, number in value.items()},
        **{f"paper_{name}": value for name, value in paper_row(experiment, section, cell.column, paper).items()},
    }
