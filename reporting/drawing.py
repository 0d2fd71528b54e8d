"""How a figure looks: lines with their spread in panels below each other, at the width of a column of text."""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from .captions import CAPTIONS
from .experiments import Section
from .tables import shown_columns

SPARSITY = "sparsity (% of the prunable weights)"
COLOURS = ("#0B4F8A", "#E07B00", "#000000", "#4FA8DC", "#8E1B63", "#5BA845", "#7A6A58")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<")
DASHES = ("-", "--", "-.", ":", (0, (7, 1.5)), (0, (4, 1, 1, 1, 1, 1)))
# neighbours differ in grey, marker, dash and filling, so that any two lines can be told apart in grey print
CYCLE = [(COLOURS[i % 7], MARKERS[i % 9], DASHES[i % 6]) for i in range(126)]


class Panel(NamedTuple):
    """Lines on one pair of axes.

    Points have their position as index and the columns mean, std and n. ``scale`` is "percent" (at most 100), "zero"
    (from 0), "wide" (logarithmic for what differs by more than a factor of 20, else from 0) or "free".
    """

    label: str
    lines: dict[str, pd.DataFrame]
    scale: str


@dataclass(frozen=True)
class Plot:
    """A figure: file name without ending, what it shows, how many rounds stand behind it, the drawing and pictures."""

    name: str
    title: str
    caption: str
    figure: Figure
    svg: bytes
    png: bytes


def styles_of(labels: Iterable[str], fixed: dict[str, tuple]) -> dict[str, tuple]:
    """Colour, marker and dash of each label: those that are fixed, or the next whose colour and marker no fixed one
    has."""
    taken = {look[:2] for look in fixed.values()}
    free = iter([style for style in CYCLE if style[:2] not in taken] * 9)
    return fixed | {label: next(free) for label in dict.fromkeys(labels) if label not in fixed}


def points_of(frame: pd.DataFrame, by: str | list[str], field: str) -> pd.DataFrame:
    """Mean, sample standard deviation (NaN for one value) and number of a field's values, by position."""
    return frame.dropna(subset=[field]).groupby(by)[field].agg(mean="mean", std="std", n="count")


def plot(
    section: Section | None,
    name: str,
    panels: list[Panel],
    xlabel: str,
    more: str = "",
    drawing: Callable[..., Figure] | None = None,
    **options,
) -> Plot | None:
    """A figure of the panels that show more than their numbers do in a table, if there are any.

    Args:
        section: what it is of; None if of all.
        name: one of ``CAPTIONS``.
        panels: what to draw; lines without points are left out, and panels whose lines have one point each.
        xlabel: see ``draw``, and for the options.
        more: what the caption says besides.
        drawing: draws it, one point for each line too; ``draw`` if None.
    """
    found = [{label: points for label, points in panel.lines.items() if len(points)} for panel in panels]
    panels = [
        panel._replace(lines=lines)
        for panel, lines in zip(panels, found, strict=True)
        if drawing or any(points.index.nunique() > 1 for points in lines.values())
    ]
    if not panels:
        return None
    counts = [int(n) for panel in panels for points in panel.lines.values() for n in points["n"]]
    low, high = min(counts), max(counts)
    title, caption = CAPTIONS[name]
    caption += f"{more} n = {low}" + (f" to {high}" if low < high else "")
    caption += "; bars and bands: one sample standard deviation." if high > 1 else "."
    svg, png = io.BytesIO(), io.BytesIO()
    figure = (drawing or draw)(panels, xlabel, **options)
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    figure.savefig(png, format="png", dpi=300, metadata={"Software": None})  # the same bytes each time
    if section:
        name, title = f"{section.slug}-{name}", f"{title}: {section.title}"
    return Plot(name, title, caption, figure, svg.getvalue(), png.getvalue())


def draw(
    panels: list[Panel], xlabel: str, styles: dict | None = None, dense: Sequence[tuple] = (), bands=False
) -> Figure:
    """Draw panels below each other over one x axis, with a legend below them.

    Args:
        panels: what to draw.
        xlabel: of the x axis; ``SPARSITY`` makes that axis even in prunings.
        styles: colour, marker and dash by label; if None, the lines are steps of one quantity and get steps of colour.
        dense: names and accuracies of dense networks, horizontal lines.
        bands: the spread is a band and not bars, and only some points have a marker.
    """
    figure = Figure(layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    counts = Counter(x for panel in panels for points in panel.lines.values() for x in points.index)
    positions = sorted(counts)
    styles = styles or _steps(dict.fromkeys(label for panel in panels for label in panel.lines))
    for axis, panel in zip(axes, panels, strict=True):
        if xlabel == SPARSITY:
            _sparsity_axis(axis, counts)
        elif all(x == int(x) for x in positions):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        for index, (name, accuracy) in enumerate(dense):
            axis.axhline(accuracy, color="#777777", linewidth=0.8, linestyle=(0, (4 - 3 * index, 2)), label=name)
        apart = min(1, 8 / len(panel.lines))  # many lines are less apart
        for index, (label, points) in enumerate(panel.lines.items()):
            _line(axis, label, points, styles[label], apart * (index - (len(panel.lines) - 1) / 2), bands)
        _y_axis(axis, panel)
    axes[-1].set_xlabel(xlabel)
    put_legend(figure, axes, 1.75 * len(panels))
    return figure


def _steps(labels: Iterable[str]) -> dict[str, tuple]:
    """Colours from dark to light, so that none of them reads as a method's, with markers."""
    labels = list(labels)
    colours = colormaps["viridis"](np.linspace(0.0, 0.8, len(labels)))
    looks = zip(colours, MARKERS * (1 + len(labels) // len(MARKERS)), strict=False)
    return {label: (to_hex(colour), marker, "-") for label, (colour, marker) in zip(labels, looks, strict=False)}


def put_legend(figure: Figure, axes: Iterable, height: float) -> None:
    """Put one legend below the axes of a figure, and give it the width of a column of text.

    Args:
        figure: to be changed.
        axes: whose lines are named.
        height: of all axes, in inches.
    """
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(1, min(len(handles), 4, 58 // (max(map(len, handles)) + 8)))
    rows = sum(1 + len(name) // 50 for name in handles) / columns
    figure.set_size_inches(3.3, height + 0.6 + 0.15 * rows)
    figure.legend(
        handles.values(),
        [fill(name, 50) for name in handles],
        loc="outside lower center",
        ncols=columns,
        handlelength=2.6,
        columnspacing=1.2,
    )


def _line(axis, label: str, points: pd.DataFrame, style: tuple, aside: float, bands: bool) -> None:
    """A line with its spread, as bars that are moved aside a little so that they do not hide others, or as a band."""
    colour, marker, dash = style
    x, mean, bar = points.index, points["mean"], points["std"].fillna(0)
    look = {"color": colour, "marker": marker, "mfc": colour if dash == "-" else "white", "clip_on": False}
    every = (0.02 * abs(aside), 0.2) if bands and len(x) > 10 else None  # of the axes' diagonal; all of a few
    drawn = axis.plot(x, mean, label=label, linestyle=dash, markevery=every, **look)
    if bands:
        axis.fill_between(x, mean - bar, mean + bar, color=colour, alpha=0.18, linewidth=0)
        return
    bars = axis.errorbar(x, mean, bar.where(bar > 0), fmt="none", ecolor=colour, elinewidth=0.7, capsize=1.8)
    for artist in [*drawn, *bars.get_children()]:
        artist.set_transform(offset_copy(axis.transData, axis.figure, x=1.5 * aside, units="points"))


def _sparsity_axis(axis, counts: Counter[float]) -> None:
    """An axis that is even in prunings, decades of weights that are gone, with the paper's sparsities and the ends.

    Of two that are so near that their numbers would overlap, the one with more points has its number.
    """
    columns = sorted(counts)
    decades = (lambda column: -np.log10(np.clip(1 - column / 100, 1e-5, None)), lambda x: 100 * (1 - 10**-x))
    axis.set_xscale("function", functions=decades)
    ticks: list[float] = []
    near = 0.05 * (decades[0](columns[-1]) - decades[0](columns[0]))
    for tick in sorted({columns[0], *shown_columns(columns), columns[-1]}, key=lambda column: -counts[column]):
        if all(abs(decades[0](tick) - decades[0](other)) > near for other in ticks):
            ticks.append(tick)
    axis.set_xticks(ticks, [f"{column:.4g}" for column in ticks], rotation=45)
    axis.set_xticks(columns, [""] * len(columns), minor=True)


def _y_axis(axis, panel: Panel) -> None:
    axis.set_ylabel(panel.label)
    means = pd.concat([points["mean"] for points in panel.lines.values()])
    if panel.scale == "wide" and means.max() >= 20 * means.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    elif panel.scale == "percent":
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 0), min(high, 100))
    elif panel.scale != "free":
        axis.set_ylim(bottom=0)
