"""The report's figures of what runs log at each epoch: learning curves, and what Early-Time measures."""

import pandas as pd

from .drawing import Panel, Plot, plot, points_of
from .experiments import Experiment, Section, dense_name

EPOCHS = "epochs of training"
DENSE = ("#777777", ".", "--")


def few(experiments: list[Experiment], most: int = 8) -> tuple[list[Experiment], str]:
    """The experiments of an overview: all if they are not many, else one for each method; and what to say about it."""
    if len(experiments) <= most:
        return experiments, ""
    plain_last = [e for e in reversed(experiments) if not e.ann and not e.control]
    chosen = list({e.name: e for e in plain_last}.values())[::-1]
    return chosen, f" Of {len(experiments)} experiments, one SNN of each method, without controls."


def learning_curves(section: Section, styles: dict[str, tuple]) -> Plot | None:
    """Loss and test accuracy over the epochs of each experiment's sparsest ticket, and of the dense network."""
    chosen, others = few([e for e in section.experiments if any(run.rows for run in e.runs)])
    stages = [(dense_name(label), cell.rows["epochs"], DENSE) for label, cell in filter(None, [section.dense()])]
    chosen = [e for e in chosen if not (stages and e.cells and e.cells[-1].column == 0)]  # that is the dense network
    stages += [(*_sparsest(experiment), styles[experiment.label]) for experiment in chosen]

    def points(runs, field: str) -> pd.DataFrame:
        # stages may overlap: the rewind point may lie before the epoch at which Early-Time decides
        once = [{row["epoch"]: row for row in rows}.values() for rows in runs]
        values = [(row["epoch"] + 1, row.get(field)) for rows in once for row in rows]
        return points_of(pd.DataFrame(values, columns=["epoch", field]).astype(float), "epoch", field)

    panels = [
        Panel("training loss", {name: points(runs, "loss") for name, runs, _ in stages}, "free"),
        Panel("test accuracy (%)", {name: points(runs, "test_accuracy") for name, runs, _ in stages}, "percent"),
    ]
    return plot(
        section,
        "learning-curves",
        panels,
        EPOCHS,
        others,
        styles={name: style for name, _, style in stages},
        bands=True,
    )


def _sparsest(experiment: Experiment) -> tuple[str, list[list[dict]]]:
    """Name and epochs of an experiment's sparsest ticket, of each round; without a ticket, of what it does now."""
    if experiment.cells:
        cell = experiment.cells[-1]
        return f"{experiment.label}, {cell.column:.4g} %", list(cell.rows["epochs"])
    started = [run for run in reversed(experiment.runs) if run.rows]
    now = started[-1].rows[-1]["level"]
    first = {run.args["round"]: run.epochs(now) for run in started}  # a round counts once
    return f"{experiment.label}, not finished", list(first.values())


def divergence_over_epochs(section: Section) -> Plot | None:
    """Fig. 5: the normalised divergence of each number of timesteps while the dense network trains at T."""
    found = [(e, divergences_at_t(e)) for e in section.experiments if _measures_kl(e)]
    # the longest; one that keeps T (threshold 0) comes before any other
    order = [(e.settings.get("early_time_threshold") == 0, frame["epoch"].nunique()) for e, frame in found]
    if not found:
        return None
    experiment, frame = found[order.index(max(order))]
    lines = {f"t = {t}": points_of(rows, "epoch", "divergence") for t, rows in frame.groupby("t")}
    return plot(
        section,
        "divergence",
        [Panel("normalised divergence", lines, "zero")],
        EPOCHS,
        f" {experiment.label}.",
        bands=True,
    )


def divergences_at_t(experiment: Experiment) -> pd.DataFrame:
    """Divergences of the dense network at T, in rows of t, epoch, round and divergence; a round counts once."""
    rows = [
        (t, row["epoch"] + 1, run.args["round"], value)
        for run in experiment.runs
        for row in run.rows
        if row["phase"] != "train" and row["level"] == run.rows[0]["level"] and row["timesteps"] == run.args["timestep"]
        for t, value in enumerate(row.get("divergences") or [], start=2)
    ]
    frame = pd.DataFrame(rows, columns=["t", "epoch", "round", "divergence"])
    return frame.drop_duplicates(["t", "epoch", "round"])


def _measures_kl(experiment: Experiment) -> bool:
    """Whether divergences are the paper's, and of an SNN; an ANN's say nothing about time."""
    return experiment.settings.get("divergence") == "kl" and not experiment.ann


def early_time_and_threshold(sections: list[Section]) -> Plot | None:
    """Fig. 8b: the timesteps that each threshold would have chosen, from the divergences that were logged."""
    lines = {section.title: early_time_by_threshold(section) for section in sections}
    return plot(None, "early-time-threshold", [Panel("T_early (timesteps)", lines, "zero")], "threshold λ")


def early_time_by_threshold(section: Section) -> pd.DataFrame:
    """T_early of thresholds from 0 to 1, over rounds: one vector of each, of the plainest experiment."""
    plain_last = sorted(filter(_measures_kl, section.experiments), key=lambda e: e.plain)
    vectors = {
        run.args["round"]: row["divergences"]
        for experiment in plain_last
        for run in reversed(experiment.runs)
        for row in run.rows
        if row.get("early_time") and row.get("divergences")
    }
    chosen = [(step / 10, chosen_timesteps(v, step / 10)) for step in range(11) for v in vectors.values()]
    return points_of(pd.DataFrame(chosen, columns=["threshold", "timesteps"]), "threshold", "timesteps")


def chosen_timesteps(divergences: list[float], threshold: float) -> int:
    """The fewest timesteps whose divergence (for t = 2 .. T-1) is below the threshold; T if there are none."""
    return next((t for t, value in enumerate(divergences, start=2) if value < threshold), len(divergences) + 2)
