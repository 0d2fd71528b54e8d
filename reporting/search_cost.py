"""The figure that says which method to use: accuracy against what the search for a ticket costs."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import offset_copy

from .comparison import cells_for, shared_columns
from .drawing import Panel, Plot, plot, put_legend
from .experiments import Cell, Experiment, Section, dense_name
from .settings import key_of
from .tables import plain_experiments

XLABEL = "search (epochs x timesteps)"
GREY = "#777777"
NEAR = 1.5  # times the density that was asked for: what a training reached beyond it is no result of that sparsity
SIZES = {"*": 7.5, (4, 1, 0): 7.5, "P": 6, "X": 6}  # of markers that look small
# ticks in %: errors of 1, 1.5, 2, 3, 5, 7 and their tens
TICKS = [0.0, *(100 - share * 10.0**power for power in (1, 0, -1) for share in (7, 5, 3, 2, 1.5, 1))]


def accuracy_and_cost(section: Section, styles: dict[str, tuple]) -> Plot | None:
    """Accuracy over the search's epochs x timesteps, for the two highest sparsities that most methods have."""
    methods = plain_experiments(section)
    chosen = [e for e in methods if e.args["method"] != "oneshot-random"]
    panels, lines, beside = [], [], {}
    for column in shared_columns(methods, most=4)[-2:]:
        cells = {e.label: _cells(e, column, methods) for e in chosen}
        beside |= {
            f"{label} at {cell.column:.4g} %": None
            for label, of_e in cells.items()
            for cell in of_e
            if cell.column != column
        }
        points = {e.label: _points(e, column, section, methods) for e in chosen}
        if sum(map(len, points.values())) < 2:
            continue  # nothing to compare
        panels.append(Panel(f"accuracy (%) at {column:.4g} %", points, "free"))
        lines.append(_references(section, methods, column))
    more = f" Sparsities that were only reached: {'; '.join(beside)}." if beside else ""
    return plot(
        section, "accuracy-search-cost", panels, XLABEL, more, drawing=draw_costs, styles=styles, references=lines
    )


def _cells(experiment: Experiment, column: float, methods: list[Experiment]) -> list[Cell]:
    """Its tickets at a sparsity, without what missed it by far."""
    return [cell for cell in cells_for(experiment, column, methods) if 100 - cell.column <= NEAR * (100 - column)]


def _points(experiment: Experiment, column: float, section: Section, methods: list[Experiment]) -> pd.DataFrame:
    """Where a method lies: by cost, accuracy in % over rounds, spread of the cost, and whether it trains in place.

    Short cycles that differ in their length alone are points of one line.
    """
    flag = "cycle_epochs"
    same = [e for e in section.experiments if flag in experiment.settings and _but(e, flag) == _but(experiment, flag)]
    first = [cells[0] for e in same or [experiment] if (cells := _cells(e, column, methods))]
    rows = [_point(cell) for cell in first if cell.spread("search_timestep_epochs")]
    return (
        pd.DataFrame(rows, columns=["cost", "mean", "std", "n", "cost_std", "in_place"]).set_index("cost").sort_index()
    )


def _but(experiment: Experiment, flag: str) -> str:
    """What an experiment is apart from one flag."""
    return key_of([experiment.args["method"], experiment.name, experiment.settings | {flag: None}])


def _point(cell: Cell) -> tuple:
    cost, accuracy = cell.spread("search_timestep_epochs"), cell.spread("test_accuracy")
    return cost.mean, *accuracy, cost.std, cell.in_place


def _references(section: Section, methods: list[Experiment], column: float) -> dict[str, float]:
    """Mean accuracy in % of the dense network and of a random ticket."""
    random = [("random", cell) for e in methods if e.args["method"] == "oneshot-random" for cell in e.at(column)]
    dense = [(dense_name(label), cell) for label, cell in filter(None, [section.dense()])]
    return {name: cell.rows["test_accuracy"].mean() for name, cell in [*dense, *random[:1]]}


def draw_costs(panels: list[Panel], xlabel: str, styles: dict, references: list[dict[str, float]]) -> Figure:
    """Draw a point for each method in panels below each other, with a legend below them.

    Args:
        panels: what to draw; points have their cost as index, and the columns of ``_points``.
        xlabel: of the x axis, which is logarithmic; what costs nothing stands in a band at its left.
        styles: colour, marker and dash by label.
        references: for each panel accuracies in % that are drawn as lines, by name.
    """
    figure = Figure(layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    costs = pd.concat([points.reset_index() for panel in panels for points in panel.lines.values()])["cost"]
    for axis, panel, lines in zip(axes, panels, references, strict=True):
        _cost_axis(axis, costs)
        ends = [p["mean"] + sign * p["std"].fillna(0) for p in panel.lines.values() for sign in (-1, 1)]
        _accuracy_axis(axis, pd.concat([*ends, pd.Series(lines, dtype=float)]))
        aside = _asides(axis, panel.lines)
        for label, points in panel.lines.items():
            _draw_points(axis, label, points, styles[label], aside[label])
        ordered = sorted(lines.items(), key=lambda line: line[1])
        for index, (name, accuracy) in enumerate(ordered):
            axis.axhline(accuracy, color=GREY, linewidth=0.8, linestyle=":" if name == "random" else "--", zorder=1)
            place = "bottom" if index else "top" if len(ordered) > 1 else "center"
            text = f"{fill(name, 12)}\n{accuracy:.1f}"
            axis.annotate(text, (1.01, accuracy), xycoords=axis.get_yaxis_transform(), va=place, size=6.5, color=GREY)
        axis.set_ylabel(panel.label)
    axes[-1].set_xlabel(xlabel)
    put_legend(figure, axes, 2.2 * len(panels))
    return figure


def _draw_points(axis, label: str, points: pd.DataFrame, style: tuple, aside: float) -> None:
    """Points with bars for the spread of accuracy and cost; several are joined."""
    colour, marker, _ = style
    face = "white" if points["in_place"].all() else colour
    look = {
        "color": colour,
        "marker": marker,
        "mfc": face,
        "markersize": SIZES.get(marker, 5.2),
        "clip_on": False,
        "zorder": 3,
    }
    drawn = axis.plot(points.index, points["mean"], label=label, linestyle="-" if len(points) > 1 else "", **look)
    bars = axis.errorbar(
        points.index,
        points["mean"],
        points["std"].where(points["std"] > 0),
        points["cost_std"].where(points["cost_std"] > 0),
        fmt="none",
        ecolor=colour,
        elinewidth=0.7,
        capsize=1.8,
    )
    for artist in [*drawn, *bars.get_children()]:
        artist.set_transform(offset_copy(axis.transData, axis.figure, x=aside, units="points"))


def _asides(axis, lines: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Points of 1/72 inch by which to move a method aside that would hide another of almost its cost and accuracy."""
    scale = axis.transData - axis.transAxes
    places = {label: scale.transform(np.c_[points.index, points["mean"]]) for label, points in lines.items()}
    asides = {label: 0.0 for label, points in places.items() if len(points) > 1}  # joined ones stay
    for label, points in sorted(places.items(), key=lambda item: item[1][0, 1]):
        near = [asides[o] for o in asides if (abs(places[o] - points[0]) < (0.03, 0.05)).all(axis=1).any()]
        asides.setdefault(label, next((shift for shift in (0, 4.5, -4.5) if shift not in near), 0))
    return asides


def _cost_axis(axis, costs: pd.Series) -> None:
    """Logarithmic; if there is a cost of 0, linear below the lowest other cost, in a grey band."""
    paid = costs[costs > 0]
    if paid.empty:
        return
    if (costs == 0).any():
        start = paid.min() / 1.6
        axis.set_xscale("symlog", linthresh=start, linscale=0.25 * np.log10(paid.max() * 1.5 / start))
        axis.set_xlim(-start / 2, paid.max() * 1.5)
        axis.axvspan(-start / 2, start / 1.3, color="#eeeeee", linewidth=0, zorder=0)
    else:
        axis.set_xscale("log")
        axis.set_xlim(paid.min() / 1.5, paid.max() * 1.5)
    low, high = paid.min() / 1.3, paid.max() * 1.4
    steps = (1, 3) if high > 30 * low else (1, 2, 5)
    ticks = {0: "none"} if (costs == 0).any() else {}
    least, last = (high / low) ** 0.15, 0.0  # between two ticks
    for tick in LogLocator(subs=steps).tick_values(low, high):
        if low <= tick <= high and tick > least * last:
            ticks[tick], last = f"{tick:g}", tick
    axis.set_xticks(list(ticks), ticks.values())
    axis.xaxis.set_minor_locator(NullLocator())


def _accuracy_axis(axis, accuracies: pd.Series) -> None:
    """Even in the logarithm of the error where errors differ by more than a factor of 3: chance squeezes nothing."""
    worst, best = 100 - accuracies.min(), max(100 - accuracies.max(), 0)
    if worst <= 3 * max(best, 0.1):
        edge = 0.06 * max(worst - best, 0.1)
        axis.set_ylim(100 - worst - edge, min(100 - best + edge, 100))
        return
    scale = (lambda accuracy: -np.log10(np.clip(100 - accuracy, 0.05, None)), lambda x: 100 - 10**-x)
    low, high = max(100 - worst * 1.1, 0), 100 - best / 1.15
    axis.set_yscale("function", functions=scale)
    axis.set_ylim(low, high)
    least, ticks = (scale[0](high) - scale[0](low)) / 12, []  # between two ticks
    for tick in TICKS:
        if low <= tick <= high and (not ticks or scale[0](tick) - scale[0](ticks[-1]) > least):
            ticks.append(tick)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
