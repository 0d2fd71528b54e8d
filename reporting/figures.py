"""The report's figures: those of the paper that the runs hold data for. A figure is None where there are none."""

from pathlib import Path

import pandas as pd
from matplotlib import style

from .curves import divergence_over_epochs, early_time_and_threshold, few, learning_curves
from .drawing import SPARSITY, Panel, Plot, plot, points_of, styles_of
from .experiments import Experiment, Section, base_of, dense_name
from .search_cost import accuracy_and_cost
from .settings import METHODS, key_of
from .tables import shown_columns

ACCURACY = "test accuracy (%)"
BY_ACCURACY = {ACCURACY: ("test_accuracy", 1, "percent")}


def draw_all(sections: list[Section]) -> dict[str, list[Plot]]:
    """Every figure that a section's runs hold data for, by the section's slug; those over all sections under ``""``."""
    styles = styles_of((e.label for section in sections for e in section.experiments), METHODS)
    with style.context(Path(__file__).parent / "style.mplstyle"):
        plots = {
            section.slug: [
                *of_all_methods(section, styles),
                accuracy_and_cost(section, styles),
                *of_some_methods(section, styles),
                *over_a_setting(section),
                over_the_layers(section, "layer-sparsity", "layers", "sparsity of the layer (%)", "percent"),
                over_the_layers(section, "firing-rates", "firing_rates", "firing rate (per timestep)", "zero"),
                divergence_over_epochs(section),
                learning_curves(section, styles),
            ]
            for section in sections
        }
        plots[""] = [early_time_and_threshold(sections)]
    return {slug: list(filter(None, of_section)) for slug, of_section in plots.items()}


def of_all_methods(section: Section, styles: dict[str, tuple]) -> list[Plot | None]:
    """Over sparsity: accuracy (Figs. 1 and 6), search (Fig. 1), when Early-Bird settles (Fig. 8a), spikes (Fig. 11)."""
    sparse, others = few([e for e in section.experiments if (e.tickets["column"] > 0).any()])
    searching, more = few([e for e in section.experiments if e.tickets["search_timestep_epochs"].any()])
    longest = max((e.tickets["search_seconds"].max() for e in searching), default=0)
    unit, name = (3600, "h") if longest >= 7200 else (60, "min") if longest >= 180 else (1, "s")
    search = {
        f"search time ({name})": ("comparable_search_seconds", unit, "wide"),
        "epochs x timesteps": ("search_timestep_epochs", 1, "wide"),
    }
    birds, text = few([e for e in section.experiments if "eb_window" in e.settings])
    text += f" Searches without a settled mask: {sum(int(e.tickets['settled'].eq(False).sum()) for e in birds)}."
    epochs = {"epochs of search": ("search_epochs", 1, "zero")}
    spiking, rest = few([e for e in section.experiments if e.tickets["spikes_per_image"].notna().any()])
    spikes = {"thousand spikes per image": ("spikes_per_image", 1000, "zero")}
    return [
        _over_sparsity(
            section, styles, "accuracy-sparsity", sparse, BY_ACCURACY, more=others, dense=_dense(section, sparse)
        ),
        _over_sparsity(section, styles, "search-sparsity", searching, search, more=more),
        _over_sparsity(section, styles, "settling", birds, epochs, more=text),
        _over_sparsity(section, styles, "spikes-sparsity", spiking, spikes, more=rest),
    ]


def of_some_methods(section: Section, styles: dict[str, tuple]) -> list[Plot | None]:
    """Accuracy over sparsity: pruning scopes (Fig. 7b), transfer (Fig. 9), SNIP and random (Fig. 10), controls."""
    experiments = section.experiments
    scopes = _varied(section, "pruning_scope")
    moved = [e for e in experiments if not e.searches and not e.control]
    own = [e for e in experiments if e.label in ("IMP", "IMP, ANN")]
    controls = [e for e in experiments if e.control]
    sources = [e for e in experiments if not e.control and e.label in {control.source for control in controls}]
    sparse = [e for e in experiments if (e.tickets["column"] > 0).any()]
    snip, random = ([e for e in sparse if e.args["method"] == f"oneshot-{kind}"] for kind in ("snip", "random"))
    groups = {
        "global-local": scopes if len(scopes) > 1 else [],
        "transfer": own + moved if moved else [],
        "snip-random": snip + random if snip and random else [],
        "controls": sources + controls if controls else [],
    }
    return [_over_sparsity(section, styles, name, group, BY_ACCURACY) for name, group in groups.items()]


def _over_sparsity(
    section: Section, styles: dict[str, tuple], name: str, experiments: list[Experiment], panels: dict, **options
) -> Plot | None:
    """A line for each experiment over the sparsities of its tickets.

    Args:
        name: of the figure.
        panels: field, unit and scale, by what is written at the axis.
    """
    shown = []
    for label, (field, unit, scale) in panels.items():
        points = {e.label: points_of(e.tickets, ["column", "ticket"], field).droplevel("ticket") for e in experiments}
        kept = {name: p[(p["mean"] > 0) & (p.index > 0)] if scale == "wide" else p for name, p in points.items()}
        lines = {name: p / [unit, unit, 1] for name, p in kept.items()}
        shown.append(Panel(label, lines, scale))
    return plot(section, name, shown, SPARSITY, styles=styles, **options)


def _dense(section: Section, experiments: list[Experiment]) -> list[tuple[str, float]]:
    """Accuracy of the dense network, of the SNN, of the ANN or of both, as the experiments are."""
    found = filter(None, (section.dense(ann) for ann in sorted({experiment.ann for experiment in experiments})))
    return [(dense_name(label), cell.rows["test_accuracy"].mean()) for label, cell in found]


def _varied(section: Section, flag: str) -> list[Experiment]:
    """The largest group of experiments of one name whose settings differ in one flag alone."""
    groups: dict[str, list[Experiment]] = {}
    for e in section.experiments:
        if flag in e.settings and len(e.tickets):
            groups.setdefault(key_of([e.args["method"], e.name, e.settings | {flag: None}]), []).append(e)
    return max(groups.values(), key=len, default=[])


def over_a_setting(section: Section) -> list[Plot | None]:
    """Accuracy over rewind epoch (Fig. 7a), T_early (Fig. 8c) and timesteps of the dense training before (Fig. 4)."""
    rewound, early, before = (
        _varied(section, flag) for flag in ("rewinding_epoch", "early_time_threshold", "search_timestep")
    )
    frames = {
        ("accuracy-rewind", "rewind epoch"): [e.tickets.assign(x=e.settings["rewinding_epoch"]) for e in rewound],
        ("accuracy-early-time", "timesteps of the search, T_early"): early_time_tickets(section, early),
        ("accuracy-t-pre", "timesteps before the pruning, T_pre"): [
            e.tickets.assign(x=e.settings["search_timestep"] or e.args["timestep"]) for e in before
        ],
    }
    groups = (rewound, early, before)
    return [
        _over_setting(section, name, xlabel, pd.concat(tickets), group)
        for ((name, xlabel), tickets), group in zip(frames.items(), groups, strict=True)
        if tickets
    ]


def _over_setting(
    section: Section, name: str, xlabel: str, tickets: pd.DataFrame, experiments: list[Experiment]
) -> Plot | None:
    """Accuracy over the column ``x`` of tickets, a line per sparsity; a round counts once at each place."""
    once = tickets.drop_duplicates(["x", "column", "round"])
    columns = shown_columns(list(once.drop_duplicates(["x", "column"])["column"]))  # few stand for many
    lines = {f"{c:.4g} %": points_of(once[once["column"] == c], "x", "test_accuracy") for c in columns}
    panels = [Panel(ACCURACY, lines, "percent")] if once["x"].nunique() > 1 else []
    return plot(section, name, panels, xlabel, dense=_dense(section, experiments))


def early_time_tickets(section: Section, group: list[Experiment]) -> list[pd.DataFrame]:
    """Tickets with Early-Time, and at their sparsities those of its base; ``x``: timesteps of the search."""
    shared = {column for experiment in group for column in experiment.tickets["column"]}
    bases = [base for base in (base_of(experiment, section) for experiment in group[:1]) if base]
    # of several tickets of a round the first counts
    tickets = [e.tickets[e.tickets["column"].isin(shared)] for e in [*bases, *group]]
    return [of_experiment.assign(x=of_experiment["search_timesteps"]) for of_experiment in tickets]


def over_the_layers(section: Section, name: str, field: str, ylabel: str, scale: str) -> Plot | None:
    """Sparsity (Fig. 7c) or firing rate of each layer, a line per sparsity, of IMP or the first that has them."""
    having = [e for e in section.experiments if e.tickets[field].notna().any()]
    if not having:
        return None
    frame = having[0].tickets.dropna(subset=[field])
    table = pd.DataFrame(list(frame[field]), index=frame["column"], dtype=float)  # layers in the network's order
    more = f" {having[0].label}; layer 1 is {table.columns[0]}, layer {len(table.columns)} is {table.columns[-1]}."
    table.columns = range(1, len(table.columns) + 1)
    shown = table.index.isin(shown_columns(list(frame["column"].unique())))
    shown |= (table.index == 0.0) & (field == "firing_rates")
    cells = table[shown].melt(var_name="layer", ignore_index=False).groupby(level=0)
    lines = {f"{c:.4g} %" if c else "dense": points_of(rows, "layer", "value") for c, rows in cells}
    return plot(section, name, [Panel(ylabel, lines, scale)], "layer, from the input", more)
