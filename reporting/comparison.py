"""All methods like for like: one network, data set and number of epochs; Table 2 of the paper for whatever was run."""

from collections import Counter

from .experiments import Cell, Experiment, Section, against_dense
from .settings import REACHED
from .tables import plain_experiments, shown_columns
from .text import SILENT, Table, marks, measured, percent, with_n


def shared_columns(experiments: list[Experiment], most: int) -> list[float]:
    """The sparsities in % that more than half of the experiments have, ascending; else those that the most have.

    Args:
        experiments: to be compared.
        most: how many to keep, see ``shown_columns``.
    """
    counts = Counter(c for e in experiments for c in e.tickets["column"].unique() if c > 0)
    enough = min(len(experiments) // 2 + 1, max(counts.values(), default=0))
    return shown_columns([c for c, n in counts.items() if n >= enough for _ in range(n)], most)


def cells_for(experiment: Experiment, column: float, others: list[Experiment]) -> list[Cell]:
    """An experiment's tickets at a sparsity. A training that only reaches its sparsity has the tickets here that were
    to get as sparse as those of the others."""
    aims = {cell.ticket for other in others for cell in other.at(column)}
    near = experiment.cells if experiment.args["method"] in REACHED else []
    return experiment.at(column) or [cell for cell in near if cell.ticket in aims]


def table_2(section: Section, paper: list[dict[str, str]]) -> Table:
    """Table 2 of the paper: change of accuracy against the dense network, the paper's and that of these runs.

    Args:
        section: whose plain experiments are compared with its dense SNN, round by round.
        paper: the rows of the paper's Table 2; those of the section's data set are shown.
    """
    experiments, dense = plain_experiments(section), section.dense()
    columns = shared_columns(experiments, most=4)
    cells = [(e, cell) for e in experiments for c in columns for cell in cells_for(e, c, experiments)]
    compared = [(e, cell, against_dense(cell, dense[1])) for e, cell in cells] if dense else []
    ours = [
        _row(
            [e.label, "trained in place"] if cell.in_place else e.label,
            section.size["arch"],
            section.size["dataset"],
            with_n(measured(pair[0]), pair[0]),
            with_n(measured(pair[1], sign="+") + (SILENT if cell.silent else ""), pair[1]),
            percent(cell.column),
        )
        for e, cell, pair in compared
        if pair
    ]
    papers = [
        _row(
            [row["method"], row["name"]] if row["name"] != row["method"] else row["method"],
            row["arch"],
            row["dataset"],
            row["baseline_accuracy"],
            row["delta_accuracy"].replace("-", "−"),  # noqa: RUF001
            f"{row['sparsity']} %",
        )
        for row in paper
        if row["dataset"] == section.size["dataset"]
    ]
    if not ours:
        return Table("Table 2", [], [])
    rows = [_row("Paper"), *papers, _row("These runs"), *ours] if papers else ours
    reached = sorted({e.label for e, cell, _ in compared if cell.column not in columns})
    notes = [
        f"Baseline: the dense network ({dense[0]} before the first pruning) in the rounds that both have, in %. "
        "Δ accuracy: accuracy after the last epoch minus that of the dense network of the same round, in percent "
        "points; mean ± sample standard deviation. Sparsity is of the prunable weights, those that most methods have.",
        *([f"Listed at the sparsity that their training reached: {', '.join(reached)}."] if reached else []),
        *(
            ["Paper: Table 2; sparsity of all parameters, other networks and trainings, no spread given."]
            * bool(papers)
        ),
        *marks([cell for _, cell in cells]),
    ]
    return Table("Table 2", rows, notes)


def _row(method: str | list[str], *cells: str) -> dict:
    """A row of Table 2; a title of rows has no other cells."""
    titles = ("architecture", "data set", "baseline accuracy (%)", "Δ accuracy", "sparsity")
    return {"method": method} | dict(zip(titles, cells or [""] * len(titles), strict=True))
