"""The report's figures: those of the paper that the runs hold data for, at the width of a column of text."""

import io
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .flags import uses_early_bird, uses_early_time, uses_rewinding
from .report_runs import CONTROLS, NAMES, Cell, Experiment, Found, Section, Spread, base_of, source_of, spread
from .report_tables import shown_columns

INCHES = 3.3  # width of a column
MOST_LINES = 8
# neighbours differ in grey, dash, marker and its filling, so that any two lines can be told apart in grey print
COLOURS = ("#0B4F8A", "#E07B00", "#000000", "#4FA8DC", "#8E1B63", "#5BA845", "#7A6A58")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<")
LINES = ("-", "--", "-.", ":", (0, (7, 1.5)), (0, (4, 1, 1, 1, 1, 1)))
STYLE = {
    "font.size": 7.5, "axes.labelsize": 7.5, "axes.titlesize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5, "axes.linewidth": 0.6, "lines.linewidth": 1.1,
    "lines.markersize": 3.8, "legend.frameon": False, "svg.hashsalt": "report", "text.parse_math": False,
    "figure.facecolor": "white", "savefig.facecolor": "white", "axes.axisbelow": True,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A finished figure: file name without ending, what it shows and how many runs stand behind it, both formats."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes

    @property
    def alt(self) -> str:
        return f"{self.title}. {self.caption}"


@dataclass(frozen=True)
class Line:
    """Points of one line: positions, and the values behind each."""

    label: str
    points: list[tuple[float, Spread]]
    style: int


def draw_all(sections: list[Section]) -> dict[str, list[Plot]]:
    """Every figure that a section's runs hold data for, by the section's slug; those over all sections under ``""``."""
    with matplotlib.rc_context(STYLE):
        plots = {section.slug: list(_of_section(section)) for section in sections}
        plots[""] = [plot for plot in [early_time_and_threshold(sections)] if plot]
    return plots


def _of_section(section: Section) -> Iterator[Plot]:
    figures = (
        accuracy_and_sparsity, search_and_sparsity, accuracy_and_rewind_epoch, global_and_local, layer_sparsity,
        settling, divergence_over_epochs, accuracy_and_early_time, accuracy_and_search_timestep, transfer,
        controls, snip_and_random, spikes_and_sparsity, firing_rates, learning_curves,
    )  # fmt: skip
    for figure in figures:
        plot = figure(section)
        if plot is not None:
            yield plot


# --- parts of a figure -------------------------------------------------------------------------------------------


def _style(index: int) -> dict:
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "markerfacecolor": "white" if index % 2 else colour,
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def _figure(panels: int = 1, legend: list[str] = (), height: float = 1.75):
    """A figure of panels below each other, with room for a legend below them. Returns it, its axes, its columns."""
    columns = _legend_columns(legend)
    lines = sum(len(_wrap(label).splitlines()) for label in legend) / max(columns, 1)
    figure = Figure(figsize=(INCHES, height * panels + 0.35 + 0.15 * math.ceil(lines)), layout="constrained")
    return figure, figure.subplots(panels, 1, squeeze=False)[:, 0], columns


def _legend_columns(labels: list[str]) -> int:
    longest = max((len(label) for label in labels), default=1)
    return max(1, min(len(labels), 4, 62 // (longest + 8)))


def _wrap(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 50)) or " "


def _legend(figure: Figure, axis, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=2.6,
            borderaxespad=0.1,
        )  # fmt: skip


def _plot(axis, line: Line, shift: float = 0.0) -> None:
    """A line with a bar of one standard deviation where there is more than one value."""
    xs = [x + shift for x, _ in line.points]
    bars = [value.std or 0.0 for _, value in line.points]
    axis.errorbar(
        xs, [value.mean for _, value in line.points], yerr=bars if any(bars) else None, label=_wrap(line.label),
        capsize=1.8, elinewidth=0.7, **_style(line.style),
    )  # fmt: skip


def _finish(figure: Figure, section: Section | None, name: str, title: str, caption: str) -> Plot:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=300, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    file = f"{section.slug}-{name}" if section else name
    return Plot(file, f"{title}: {section.title}" if section else title, caption, svg.getvalue(), png.getvalue())


def _decades(column: float) -> float:
    """Position of a sparsity in % on an axis that is even in prunings: decades of weights that are gone."""
    return -math.log10(max(1 - column / 100, 1e-5))


def _sparsity_axis(axis, columns: list[float], label: bool = True) -> None:
    """Label as many of the sparsities as there is room for, the paper's and the ends first."""
    columns = sorted(columns)
    span = max(_decades(columns[-1]) - _decades(columns[0]), 1e-9)
    ticks: list[float] = []
    for column in [columns[-1], columns[0], *shown_columns(columns), *columns]:
        if all(abs(_decades(column) - _decades(other)) >= 0.11 * span for other in ticks):
            ticks.append(column)
    axis.xaxis.set_major_locator(FixedLocator([_decades(column) for column in ticks]))
    axis.xaxis.set_minor_locator(FixedLocator([_decades(column) for column in columns]))
    axis.xaxis.set_minor_formatter(NullFormatter())
    by_place = {round(_decades(column), 9): column for column in ticks}
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _percent(by_place.get(round(x, 9), 0.0))))
    if len(columns) == 1:
        axis.set_xlim(_decades(columns[0]) - 0.5, _decades(columns[0]) + 0.5)
    if label:
        axis.set_xlabel("sparsity (% of the prunable weights)")


def _percent(column: float) -> str:
    text = f"{column:.2f}" if column > 99.9 else f"{column:.1f}"
    return text.removesuffix(".0")


def _integers(axis) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))


def _wide_range(axis, values: list[float]) -> None:
    """A logarithmic y axis for what differs by more than a factor of 20, with plain numbers at its ticks."""
    values = [value for value in values if value > 0]
    if not values or max(values) < 20 * min(values):
        axis.set_ylim(bottom=0)
        return
    axis.set_yscale("log")
    few = max(values) < 300 * min(values)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _repetitions(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _behind(lines: list[Line]) -> str:
    """How many rounds stand behind the points, and what the bars are."""
    counts = [value.n for line in lines for _, value in line.points]
    bars = "; bars: one sample standard deviation" if max(counts) > 1 else ""
    return f"{_repetitions(counts)}{bars}."


def _time_unit(seconds: list[float]) -> tuple[float, str]:
    longest = max(seconds, default=0)
    return (3600, "h") if longest >= 7200 else (60, "min") if longest >= 180 else (1, "s")


def _styles(section: Section) -> dict[str, int]:
    """A style for each experiment, by label: a method looks the same in all figures, its variants come after it."""
    fixed = {name: index for index, name in enumerate(NAMES.values())}
    others = sorted(section.experiments, key=lambda e: not e.method.startswith("oneshot-transfer"))
    others = [experiment.label for experiment in others if experiment.label not in fixed]
    return fixed | {label: len(fixed) + index for index, label in enumerate(others)}


def _chosen(experiments: list[Experiment]) -> tuple[list[Experiment], str]:
    """The experiments of an overview: all if they are few, else one for each method; and a sentence on the others."""
    if len(experiments) <= MOST_LINES:
        return experiments, ""
    plain: dict[str, Experiment] = {}
    for experiment in sorted(experiments, key=lambda e: not e.plain):
        if not experiment.ann and not experiment.method.endswith(CONTROLS):
            plain.setdefault(experiment.label.split(", ")[0], experiment)
    kept = [experiment for experiment in experiments if experiment in plain.values()]
    return kept, f" Of {len(experiments)} experiments, one SNN of each method, without controls."


def _lines_over_sparsity(section: Section, experiments: list[Experiment], value, dense: bool = True) -> list[Line]:
    lines, styles = [], _styles(section)
    for experiment in experiments:
        points = [(cell.column, value(cell)) for cell in experiment.cells if dense or cell.column > 0]
        points = [(_decades(column), point) for column, point in points if point is not None]
        if points:
            lines.append(Line(experiment.label, points, styles[experiment.label]))
    return lines


def _over_sparsity(axis, lines: list[Line], section: Section, label: bool = True) -> None:
    """Draw lines over sparsity, each moved aside a little so that bars do not hide each other."""
    places = {round(x, 9) for line in lines for x, _ in line.points}
    columns = [column for column in section.columns if round(_decades(column), 9) in places]
    span = (max(places) - min(places)) or 1.0
    for index, line in enumerate(lines):
        _plot(axis, line, shift=0.007 * span * (index - (len(lines) - 1) / 2))
    _sparsity_axis(axis, columns, label)


def _dense_lines(section: Section, experiments: list[Experiment]) -> dict[str, float]:
    """Accuracy of the dense network, by label: of the SNN, of the ANN, or of both, as the experiments are."""
    names = {False: "dense", True: "dense, ANN"}
    dense = {names[ann]: section.dense(ann) for ann in sorted({experiment.ann for experiment in experiments})}
    return {name: cell.spread("test_accuracy").mean for name, cell in dense.items() if cell is not None}


def _draw_dense(axis, lines: dict[str, float]) -> None:
    for name, accuracy in lines.items():
        dash, colour = ((0, (1, 1.5)), "#777777") if name == "dense" else ((0, (5, 2)), "#aaaaaa")
        axis.axhline(accuracy, color=colour, linewidth=0.8, linestyle=dash, label=name)


def _accuracies(section: Section, lines: list[Line], name: str, title: str, caption: str, dense=None, **size) -> Plot:
    """Accuracy over sparsity, a line for each experiment, and the dense networks."""
    dense = dense or {}
    figure, (axis,), columns = _figure(1, [*(line.label for line in lines), *dense], **size)
    _draw_dense(axis, dense)
    _over_sparsity(axis, lines, section)
    axis.set_ylabel("test accuracy (%)")
    _legend(figure, axis, columns)
    return _finish(figure, section, name, title, caption)


# --- the figures -------------------------------------------------------------------------------------------------


def accuracy_and_sparsity(section: Section) -> Plot | None:
    """Figs. 1 and 6: what each method's tickets reach."""
    chosen, others = _chosen([e for e in section.experiments if any(cell.column > 0 for cell in e.cells)])
    lines = _lines_over_sparsity(section, chosen, lambda cell: cell.spread("test_accuracy"))
    if not lines:
        return None
    caption = f"Accuracy of the last epoch over sparsity (paper: Figs. 1 and 6). {_behind(lines)}{others}"
    dense = _dense_lines(section, chosen)
    return _accuracies(section, lines, "accuracy-sparsity", "Accuracy against sparsity", caption, dense, height=2.1)


def search_and_sparsity(section: Section) -> Plot | None:
    """Fig. 1: what the search for a ticket takes, in time and in epochs x timesteps."""
    searching = [e for e in section.experiments if e.searches]
    searching = [e for e in searching if any(row["search_timestep_epochs"] for c in e.cells for row in c.rows)]
    chosen, others = _chosen(searching)
    costs = _lines_over_sparsity(section, chosen, lambda cell: cell.spread("search_timestep_epochs"), dense=False)
    if not costs:
        return None
    seconds = [row["search_seconds"] for e in chosen for cell in e.cells for row in cell.rows]
    unit, name = _time_unit(seconds)
    times = _lines_over_sparsity(
        section, chosen, lambda cell: spread(row["search_seconds"] / unit for row in cell.rows), dense=False
    )
    figure, axes, columns = _figure(2, [line.label for line in costs], height=1.6)
    for axis, lines, label in zip(axes, (times, costs), (f"search time ({name})", "epochs x timesteps"), strict=True):
        _over_sparsity(axis, lines, section, label=axis is axes[-1])
        _wide_range(axis, [value.mean for line in lines for _, value in line.points])
        axis.set_ylabel(label)
    _legend(figure, axes[0], columns)
    caption = (
        "Training that finds the ticket, in time and in epochs x timesteps; the ticket's own training is not counted, "
        f"methods that train nothing to find it are not shown (paper: Fig. 1). {_behind(costs)}{others}"
    )
    return _finish(figure, section, "search-sparsity", "Search against sparsity", caption)


def _varied(section: Section, flag: str, keep=lambda experiment: True) -> list[Experiment]:
    """The largest group of experiments of one method whose settings differ in one flag alone."""
    groups: dict[str, list[Experiment]] = {}
    for experiment in section.experiments:
        if flag in experiment.settings and keep(experiment) and experiment.cells:
            others = {name: value for name, value in experiment.settings.items() if name != flag}
            groups.setdefault(f"{experiment.method} {others} {experiment.label.split(',')[0]}", []).append(experiment)
    return max(groups.values(), key=len, default=[])


def _by_sparsity(points: list[tuple[float, Cell]]) -> list[Line]:
    """A line per sparsity through accuracies at other positions; few sparsities stand for many."""
    lines = []
    for column in shown_columns([cell.column for _, cell in points]):
        by_place: dict[float, list] = {}
        for x, cell in points:
            if cell.column == column:
                by_place.setdefault(x, []).extend(row["test_accuracy"] for row in cell.rows)
        lines.append(Line(f"{_percent(column)} %", [(x, spread(v)) for x, v in sorted(by_place.items())], len(lines)))
    return lines


def _accuracy_over(
    section: Section, group: list[Experiment], lines: list[Line], label: str, name: str, title: str, text: str
) -> Plot | None:
    if len({x for line in lines for x, _ in line.points}) < 2:
        return None
    dense = _dense_lines(section, group)
    figure, (axis,), columns = _figure(1, [*(line.label for line in lines), *dense])
    _draw_dense(axis, dense)
    for line in lines:
        _plot(axis, line)
    _integers(axis)
    axis.set_xlabel(label)
    axis.set_ylabel("test accuracy (%)")
    _legend(figure, axis, columns)
    return _finish(figure, section, name, title, f"{text} A line per sparsity. {_behind(lines)}")


def accuracy_and_rewind_epoch(section: Section) -> Plot | None:
    """Fig. 7a: how late to rewind."""
    group = _varied(section, "rewinding_epoch")
    points = [(e.settings["rewinding_epoch"], cell) for e in group for cell in e.cells]
    return _accuracy_over(
        section, group, _by_sparsity(points), "rewind epoch", "accuracy-rewind", "Accuracy against rewind epoch",
        "Accuracy of IMP's tickets over the epoch that their weights are taken from (paper: Fig. 7a).",
    )  # fmt: skip


def accuracy_and_early_time(section: Section) -> Plot | None:
    """Fig. 8c: what fewer timesteps of search cost; T is the base method."""
    group = _varied(section, "early_time_threshold")
    if not group:
        return None
    lines = _by_sparsity(accuracy_by_early_time(section, group))
    name = group[0].label.split(",")[0]
    return _accuracy_over(
        section, group, lines, "timesteps of the search, T_early", "accuracy-early-time", "Accuracy against T_early",
        f"Accuracy of tickets of {name} over the timesteps they were searched with, the base method at T; a round "
        "counts once at each (paper: Fig. 8c).",
    )  # fmt: skip


def accuracy_by_early_time(section: Section, group: list[Experiment]) -> list[tuple[int, Cell]]:
    """Tickets by the timesteps of their search, a round once at each: of several, the base's, then the plainest's."""
    bases = [base for base in [base_of(group[0], section)] if base]
    shared = {cell.column for experiment in group for cell in experiment.cells}
    kept: dict[tuple[int, float, int], dict] = {}
    for experiment in [*bases, *sorted(group, key=lambda e: not e.plain)]:
        for cell in experiment.cells:
            for row in cell.rows:
                if cell.column in shared:
                    kept.setdefault((row["search_timesteps"], cell.column, row["round"]), row)
    return [(x, Cell(row["level"], column, [row])) for (x, column, _), row in kept.items()]


def accuracy_and_search_timestep(section: Section) -> Plot | None:
    """Fig. 4: one-shot magnitude tickets of a network trained with fewer timesteps."""
    group = _varied(section, "search_timestep", lambda e: e.method == "oneshot-magnitude")
    points = [(e.settings["search_timestep"] or e.runs[0].args["timestep"], cell) for e in group for cell in e.cells]
    return _accuracy_over(
        section, group, _by_sparsity(points), "timesteps before the pruning, T_pre", "accuracy-t-pre",
        "Accuracy against T_pre",
        "Accuracy at T of one-shot magnitude tickets over the timesteps of the dense training before (paper: Fig. 4).",
    )  # fmt: skip


def global_and_local(section: Section) -> Plot | None:
    """Fig. 7b: weights ranked in the network or per layer."""
    group = _varied(section, "pruning_scope")
    if len(group) < 2:
        return None
    lines = _lines_over_sparsity(section, group, lambda cell: cell.spread("test_accuracy"))
    lines = [Line(e.settings["pruning_scope"], line.points, line.style) for e, line in zip(group, lines, strict=True)]
    name = group[0].label.split(",")[0]
    caption = f"Accuracy of {name}, weights ranked in the network or in each layer (paper: Fig. 7b). {_behind(lines)}"
    return _accuracies(section, lines, "global-local", "Global against local pruning", caption)


def _over_layers(section: Section, field: str, label: str, name: str, title: str, text: str) -> Plot | None:
    """A line per sparsity over the layers, of IMP if it has been run, else of the first experiment that has them."""
    with_field = [e for e in section.experiments if any(row.get(field) for cell in e.cells for row in cell.rows)]
    if not with_field:
        return None
    experiment = with_field[0]
    cells = {c.column: c for c in experiment.cells if any(row.get(field) for row in c.rows)}
    keep = shown_columns(list(cells)) or list(cells)
    if field != "layers" and 0.0 in cells and 0.0 not in keep:
        keep = [0.0, *keep]
    names = list(next(row[field] for row in cells[keep[0]].rows if row.get(field)))
    lines = []
    for style, column in enumerate(keep):
        points = [(i, spread((row.get(field) or {}).get(n) for row in cells[column].rows)) for i, n in enumerate(names)]
        points = [(i + 1, value) for i, value in points if value is not None]
        lines.append(Line("dense" if column == 0 else f"{_percent(column)} %", points, style))
    figure, (axis,), columns = _figure(1, [line.label for line in lines])
    for line in lines:
        _plot(axis, line)
    axis.xaxis.set_major_locator(FixedLocator(range(1, len(names) + 1, 1 + len(names) // 17)))
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"layer, from the input (1 to {len(names)})")
    axis.set_ylabel(label)
    _legend(figure, axis, columns)
    caption = (
        f"{text} {experiment.label}, a line per sparsity; layer 1 is {names[0]}, layer {len(names)} is {names[-1]}."
    )
    return _finish(figure, section, name, title, f"{caption} {_behind(lines)}")


def _beside(section: Section, own: list[Experiment], others: list[Experiment], name: str, title: str, text: str):
    """Accuracy over sparsity of experiments beside those that they are to be compared with."""
    lines = _lines_over_sparsity(section, own + others, lambda cell: cell.spread("test_accuracy"))
    return _accuracies(section, lines, name, title, f"{text} {_behind(lines)}")


def transfer(section: Section) -> Plot | None:
    """Fig. 9: tickets found elsewhere, such as in the ANN, beside those that IMP found in the SNN and in the ANN."""
    moved = [e for e in section.experiments if e.method == "oneshot-transfer" and e.cells]
    own = [e for e in section.experiments if e.label in ("IMP", "IMP, ANN") and e.cells]
    if not moved:
        return None
    text = "Tickets that another run found (paper: Fig. 9)."
    return _beside(section, own, moved, "transfer", "Transferred tickets", text)


def controls(section: Section) -> Plot | None:
    """What is left of a ticket without its positions (shuffle) or its weights (reinit), beside the ticket itself."""
    controlled = [e for e in section.experiments if e.method.endswith(CONTROLS) and e.cells]
    if not controlled:
        return None
    sources = {source_of(experiment) for experiment in controlled}
    own = [e for e in section.experiments if e.label in sources and e.cells]
    text = "Tickets with their positions shuffled in each layer or their weights drawn anew, beside the tickets."
    return _beside(section, own, controlled, "controls", "Controls", text)


def layer_sparsity(section: Section) -> Plot | None:
    """Fig. 7c: where a ticket is sparse."""
    text = "Sparsity of each layer (paper: Fig. 7c)."
    return _over_layers(section, "layers", "sparsity of the layer (%)", "layer-sparsity", "Layer-wise sparsity", text)


def firing_rates(section: Section) -> Plot | None:
    """Fig. 11 by layer: how often neurons fire."""
    text = "Spikes per neuron and timestep in each layer."
    return _over_layers(section, "firing_rates", "firing rate (per timestep)", "firing-rates", "Firing rates", text)


def spikes_and_sparsity(section: Section) -> Plot | None:
    """Fig. 11: spikes per image."""
    having = [e for e in section.experiments if any(cell.spread("spikes_per_image") for cell in e.cells)]
    chosen, others = _chosen(having)
    lines = _lines_over_sparsity(section, chosen, lambda cell: cell.spread("spikes_per_image"))
    if not lines:
        return None
    most = max(value.mean for line in lines for _, value in line.points)
    unit, name = (1000, "thousand spikes per image") if most >= 5000 else (1, "spikes per image")
    lines = _lines_over_sparsity(
        section,
        chosen,
        lambda cell: spread(
            None if row.get("spikes_per_image") is None else row["spikes_per_image"] / unit for row in cell.rows
        ),
    )
    figure, (axis,), columns = _figure(1, [line.label for line in lines])
    _over_sparsity(axis, lines, section)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(name)
    _legend(figure, axis, columns)
    caption = (
        f"Spikes of the whole network per test image, over all timesteps (paper: Fig. 11). {_behind(lines)}{others}"
    )
    return _finish(figure, section, "spikes-sparsity", "Spikes per image against sparsity", caption)


def settling(section: Section) -> Plot | None:
    """Fig. 8a: after how many epochs the mask of Early-Bird has settled."""
    birds = [e for e in section.experiments if uses_early_bird(e.method) and e.cells]
    chosen, others = _chosen(birds)
    lines = _lines_over_sparsity(section, chosen, lambda cell: cell.spread("search_epochs"))
    if not lines:
        return None
    figure, (axis,), columns = _figure(1, [line.label for line in lines])
    _over_sparsity(axis, lines, section)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.set_ylabel("epochs of search")
    _legend(figure, axis, columns)
    unsettled = sum(row.get("settled") is False for e in birds for cell in e.cells for row in cell.rows)
    text = f" {unsettled} of the searches ended without a settled mask." if unsettled else ""
    caption = f"Epochs until the mask had settled (paper: Fig. 8a). {_behind(lines)}{text}{others}"
    return _finish(figure, section, "settling", "When Early-Bird settles", caption)


def divergence_over_epochs(section: Section) -> Plot | None:
    """Fig. 5: the normalised divergence of each number of timesteps while the dense network trains at T."""
    found = divergences_at_t(section)
    if found is None:
        return None
    experiment, by_place = found
    lines = []
    for t in sorted({t for t, _ in by_place}):
        points = [(e + 1, spread(values.values())) for (at, e), values in sorted(by_place.items()) if at == t]
        lines.append(Line(f"t = {t}", points, t - 2))
    figure, (axis,), columns = _figure(1, [line.label for line in lines])
    for line in lines:
        _curve(axis, line)
    _integers(axis)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("epochs of training")
    axis.set_ylabel("normalised divergence")
    _legend(figure, axis, columns)
    caption = (
        "KL divergence of the prediction after t timesteps from that after all, divided by that of t = 2, while the "
        f"network trains at T (paper: Fig. 5). {experiment.label}, {_behind(lines)}"
    )
    if not _keeps_t(experiment):
        caption += " After the deciding epoch the network was trained at T_early; epochs at fewer timesteps than T are "
        caption += "not shown."
    return _finish(figure, section, "divergence", "Divergence over epochs", caption)


def divergences_at_t(section: Section) -> tuple[Experiment, dict[tuple[int, int], dict[int, float]]] | None:
    """The experiment that trained the dense network at T for longest, and its divergences: (t, epoch) -> by round.

    One that keeps T (threshold 0) comes before any other.
    """
    measured = []
    for experiment in filter(_measures_kl, section.experiments):
        by_place: dict[tuple[int, int], dict[int, float]] = {}
        for run in experiment.runs:
            for row in run.rows:
                at_t = row["timesteps"] == run.args.get("timestep")
                if row["level"] == 0 and row["phase"] != "train" and at_t:
                    for t, value in enumerate(row.get("divergences") or [], start=2):
                        by_place.setdefault((t, row["epoch"]), {}).setdefault(run.args["round"], value)
        if by_place:
            measured.append((experiment, by_place))
    return max(measured, key=lambda found: (_keeps_t(found[0]), len(found[1])), default=None)


def _keeps_t(experiment: Experiment) -> bool:
    return experiment.settings.get("early_time_threshold") == 0


def early_time_and_threshold(sections: list[Section]) -> Plot | None:
    """Fig. 8b: the timesteps that each threshold would have chosen, from the divergences that were logged."""
    lines = []
    for section in sections:
        points = early_time_by_threshold(section)
        if points:
            lines.append(Line(section.title, points, len(lines)))
    if not lines:
        return None
    figure, (axis,), columns = _figure(1, [line.label for line in lines])
    for index, line in enumerate(lines):
        _plot(axis, line, shift=0.01 * (index - (len(lines) - 1) / 2))
    most = max(value.mean for line in lines for _, value in line.points)
    axis.set_ylim(1.6, most + 0.4)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.set_xlabel("threshold λ")
    axis.set_ylabel("T_early (timesteps)")
    _legend(figure, axis, columns)
    caption = (
        "Timesteps that each threshold chooses, from the KL divergences of the epoch that decided, one vector per "
        f"round (paper: Fig. 8b). {_behind(lines)}"
    )
    return _finish(figure, None, "early-time-threshold", "T_early against threshold", caption)


def early_time_by_threshold(section: Section) -> list[tuple[float, Spread]]:
    """T_early of thresholds from 0 to 1 over rounds: one of each, with KL divergence, of the plainest experiment."""
    vectors: dict[int, list[float]] = {}
    for experiment in sorted(section.experiments, key=lambda e: not e.plain):
        if uses_early_time(experiment.method) and _measures_kl(experiment):
            for run in experiment.runs:
                deciding = next((row for row in run.rows if "early_time" in row and row.get("divergences")), None)
                if deciding:
                    vectors.setdefault(run.args["round"], deciding["divergences"])
    thresholds = [step / 10 for step in range(11)] if vectors else []
    return [(x, spread(chosen_timesteps(vector, x) for vector in vectors.values())) for x in thresholds]


def _measures_kl(experiment: Experiment) -> bool:
    """Whether an experiment's divergences are the paper's, of an SNN; an ANN's say nothing about time."""
    return experiment.settings.get("divergence", "kl") == "kl" and not experiment.ann


def chosen_timesteps(divergences: list[float], threshold: float) -> int:
    """The fewest timesteps whose divergence (for t = 2 .. T-1) is below the threshold; T if there are none."""
    return next((t for t, value in enumerate(divergences, start=2) if value < threshold), len(divergences) + 2)


def snip_and_random(section: Section) -> Plot | None:
    """Fig. 10: pruning before any training, SNN and ANN."""
    both = [e for e in section.experiments if e.method in ("oneshot-snip", "oneshot-random") and e.cells]
    if not any(e.method == "oneshot-snip" for e in both) or len(both) < 2:
        return None
    lines = _lines_over_sparsity(section, both, lambda cell: cell.spread("test_accuracy"))
    names = [e.label if "ANN" in e.label else f"{e.label}, SNN" for e in both]
    lines = [Line(name, line.points, line.style) for name, line in zip(names, lines, strict=True)]
    caption = f"Tickets of an untrained network: SNIP against a random mask (paper: Fig. 10). {_behind(lines)}"
    return _accuracies(section, lines, "snip-random", "SNIP against random", caption)


def learning_curves(section: Section) -> Plot | None:
    """Loss and test accuracy over the epochs of each experiment's sparsest ticket, and of the dense network."""
    chosen, others = _chosen([e for e in section.experiments if any(run.rows for run in e.runs)])
    stages = []
    for experiment in chosen:
        sparsest = max((row["level"] for run in experiment.runs for row in run.rows), default=0)
        if experiment.method == "laterewindlth" and sparsest > 0:
            stages.append((f"{experiment.label}, dense", [(run, run.stage(0)) for run in experiment.runs]))
        name = experiment.label
        if uses_rewinding(experiment.method) or sparsest:
            column = [cell.column for cell in experiment.cells if cell.level == sparsest]
            name += f", {_percent(column[0])} %" if column else f", level {sparsest}"
        stages.append((name, [(run, run.stage(sparsest)) for run in experiment.runs]))
    losses = _curves(stages, "loss")
    accuracies = _curves(stages, "test_accuracy")
    if not losses and not accuracies:
        return None
    figure, axes, columns = _figure(2, [name for name, _ in stages], height=1.7)
    for axis, lines, label in zip(axes, (losses, accuracies), ("training loss", "test accuracy (%)"), strict=True):
        for line in lines:
            _curve(axis, line)
        _integers(axis)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("epochs of training")
    axes[1].sharex(axes[0])
    _legend(figure, axes[0] if losses else axes[1], columns)
    runs = _repetitions([value.n for line in losses or accuracies for _, value in line.points])
    caption = (
        "Loss and test accuracy of each experiment's sparsest ticket; bands: one sample standard deviation. "
        f"{runs} at an epoch.{others}"
    )
    return _finish(figure, section, "learning-curves", "Learning curves", caption)


def _curves(stages: list[tuple[str, list[tuple[Found, list[dict]]]]], field: str) -> list[Line]:
    lines = []
    for style, (name, runs) in enumerate(stages):
        by_epoch: dict[int, list[float]] = {}
        for _, rows in runs:
            for row in rows:
                if row.get(field) is not None:
                    by_epoch.setdefault(row["epoch"] + 1, []).append(row[field])
        if by_epoch:
            lines.append(Line(name, [(epoch, spread(values)) for epoch, values in sorted(by_epoch.items())], style))
    return lines


def _curve(axis, line: Line) -> None:
    """A line over epochs with a band of one standard deviation, and a marker now and then."""
    xs, means = [x for x, _ in line.points], [value.mean for _, value in line.points]
    every = max(1, len(xs) // 6)
    style = _style(line.style) | {"markevery": (line.style % every, every)}
    axis.plot(xs, means, label=_wrap(line.label), **style)
    bars = [value.std or 0.0 for _, value in line.points]
    if any(bars):
        low, high = [m - b for m, b in zip(means, bars, strict=True)], [m + b for m, b in zip(means, bars, strict=True)]
        axis.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0)
