"""Which runs repeat one experiment, and which experiments share a section.

Runs repeat one experiment if they differ only in ``--round``, in where they lie, in what they ran on and in how sparse
their tickets are. Any other flag makes another experiment, and the experiment's label names it.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, mode
from typing import NamedTuple

import pandas as pd

from .runs import NUMBERS, SEARCHED, SECONDS, Run
from .settings import (
    BASES,
    CONTROLS,
    METHODS,
    OF_PRUNING,
    REACHED,
    SIZE,
    key_of,
    names_of,
    settings_of,
    size_of,
    spoken,
    usual_settings,
)

OTHERS = (
    *("ticket", "level", "round", "folder", "column", "timing", "checksum"),
    *("layers", "firing_rates", "settled", "epochs"),
)
SAME = 0.01  # two densities that differ by less than this share are one sparsity: whole weights are pruned


class Spread(NamedTuple):
    """Mean, sample standard deviation (NaN for one value) and number of values."""

    mean: float
    std: float
    n: int


def spread(values: pd.Series) -> Spread | None:
    """Mean and spread of the values that are there; None if there are none."""
    there = values.dropna().astype(float)
    return Spread(there.mean(), there.std(), len(there)) if len(there) else None


@dataclass(frozen=True)
class Cell:
    """All repetitions of one ticket, a row for each round."""

    column: float  # the sparsity in % that the section lists it under
    ticket: str
    rows: pd.DataFrame

    @property
    def silent(self) -> dict[str, int]:
        """Layers that did not spike once on the test images, and in how many rounds."""
        return Counter(
            name for rates in self.rows["firing_rates"].dropna() for name, rate in rates.items() if rate == 0
        )

    @property
    def tickets(self) -> int:
        """How many tickets stand behind its rounds: several rounds may train one that was saved."""
        return self.rows["checksum"].fillna(self.rows["folder"]).nunique()

    @property
    def repeats_training(self) -> bool:
        """Whether rounds train one saved ticket: repetitions of its training and not of the search."""
        return self.tickets < len(self.rows)

    @property
    def in_place(self) -> bool:
        """Whether the search was the training: nothing is left to train."""
        return bool(((self.rows["train_seconds"] == 0) & (self.rows["search_timestep_epochs"] > 0)).all())

    def spread(self, field: str) -> Spread | None:
        """A field over the rounds; no time if the rounds ran on different machines."""
        return spread(self.rows[f"comparable_{field}" if field in SECONDS else field])


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their round alone."""

    name: str  # the label without the flags that tell the experiment from others
    label: str
    source: str  # of a control or a transferred ticket: label of the experiment that its tickets are from
    settings: dict
    runs: list[Run]
    tickets: pd.DataFrame  # a row for each ticket and round, with the fields of ``NUMBERS`` and ``OTHERS``, by sparsity

    @property
    def plain(self) -> bool:
        """Whether no flag had to be named to tell it from others."""
        return self.label == self.name

    @property
    def args(self) -> dict:
        """Of its first run."""
        return self.runs[0].args

    @property
    def ann(self) -> bool:
        return self.args["neuron"] == "relu"

    @property
    def searches(self) -> bool:
        """Whether the runs found their tickets themselves."""
        return not self.args.get("ticket_origin")

    @property
    def control(self) -> bool:
        return self.args["label"].endswith(CONTROLS)

    @cached_property
    def cells(self) -> list[Cell]:
        """By sparsity."""
        return [Cell(column, ticket, rows) for (column, ticket), rows in self.tickets.groupby(["column", "ticket"])]

    def at(self, column: float) -> list[Cell]:
        return [cell for cell in self.cells if cell.column == column]


@dataclass(frozen=True)
class Section:
    """All experiments on one data set with one network at one size."""

    size: dict
    experiments: list[Experiment]

    @property
    def title(self) -> str:
        more = [spoken(name, self.size[name]) for name in SIZE[2:] if self.size[name] not in (None, 1.0, 0)]
        return ", ".join([self.size["dataset"], self.size["arch"], *more])

    @property
    def slug(self) -> str:
        """The title as part of a file's name."""
        return re.sub(r"[^\w.]+", "-", self.title)

    def dense(self, ann: bool = False) -> tuple[str, Cell] | None:
        """The dense network, of the SNN or of the ANN: IMP before its first pruning, the plain experiment's first.

        Returns:
            The experiment's label and the cell, or None if there is none.
        """
        found = self._before_pruning(ann)
        return (found[0].label, found[0].at(0.0)[0]) if found else None

    def dense_of(self, experiment: Experiment) -> tuple[str, Cell] | None:
        """The dense network that an experiment is compared with: one trained in the same way, or else ``dense``."""
        alike = [e for e in self._before_pruning(experiment.ann) if agree(e, experiment, but=OF_PRUNING)]
        return (alike[0].label, alike[0].at(0.0)[0]) if alike else self.dense(experiment.ann)

    def _before_pruning(self, ann: bool) -> list[Experiment]:
        name = "IMP, ANN" if ann else "IMP"
        return [e for e in self.experiments if e.name == name and e.at(0.0)]


def sections_of(runs: list[Run]) -> list[Section]:
    """Sort runs into experiments, and experiments into sections by size."""
    by_size: dict[str, list[Run]] = {}
    for part in (part for run in runs for part in run.by_method()):
        by_size.setdefault(key_of(size_of(part.args)), []).append(part)
    sections = [Section(json.loads(size), _experiments(of_size)) for size, of_size in by_size.items()]
    return sorted(sections, key=lambda section: section.title)


def _experiments(runs: list[Run]) -> list[Experiment]:
    settings = settings_of(runs)
    usual = usual_settings(settings)
    columns = _columns(row["sparsity"] for run in runs for row in run.results if run.args["method"] not in REACHED)
    groups: dict[str, list[Run]] = {}
    for run, of_run in zip(runs, settings, strict=True):
        groups.setdefault(key_of([*names_of(run.args), run.args["method"], of_run]), []).append(run)
    experiments = []
    for key, members in groups.items():
        name, source, _, of_group = json.loads(key)
        named = [spoken(flag, value) for flag, value in of_group.items() if value != usual.get(flag, value)]
        # a ticket's settings are not those of the run that trains it
        source = source if members[0].args.get("ticket_origin") else ", ".join([source, *named])
        members.sort(key=lambda run: (run.args["round"], run.folder))
        tickets = _tickets(members, columns)
        experiments.append(Experiment(name, ", ".join([name, *named]), source, of_group, members, tickets))
    order = {name: index for index, name in enumerate(METHODS)}

    return sorted(
        experiments,
        key=lambda e: (order.get(e.name.removesuffix(", ANN"), len(order)), e.name, e.label),
    )


def _columns(sparsities) -> list[float]:
    """Sparsities in % to list tickets under: one for all that prune to the same density but for whole weights."""
    groups: list[list[float]] = []
    for value in sorted(sparsities):
        if not groups or not same_sparsity(groups[-1][0], value):
            groups.append([])
        groups[-1].append(value)
    return [mode(round(value, 2) for value in group) for group in groups]


def _column(sparsity: float, columns: list[float], reached: bool) -> float:
    """The column that a sparsity is listed under; one that was only reached may have none but its own."""
    nearest = min(columns, key=lambda column: abs(column - sparsity), default=sparsity)
    return round(sparsity, 2) if reached and not same_sparsity(nearest, sparsity) else nearest


def same_sparsity(one: float, other: float) -> bool:
    """Whether two sparsities in % are one but for whole weights."""
    return abs(one - other) <= SAME * max(100 - one, 100 - other) + 1e-9


def _tickets(runs: list[Run], columns: list[float]) -> pd.DataFrame:
    """Tickets by sparsity, each with its epochs; the first counts where several runs report a ticket of a round.

    Where a training only reached its sparsity, rounds of one ticket are listed under their mean.
    """
    rows = [
        {
            **row,
            "round": run.args["round"],
            "folder": run.folder,
            "timing": run.timing,
            "checksum": run.args.get("ticket_checksum"),
            "layers": row.get("layers") or None,
            "firing_rates": row.get("firing_rates") or None,
            "epochs": run.epochs(row["level"]),
            **(dict.fromkeys(SEARCHED) if run.args.get("ticket_origin") else {}),  # the run did not find its ticket
        }
        for run in runs
        for row in run.results
    ]
    frame = pd.DataFrame(rows, columns=[*NUMBERS, *OTHERS]).astype(dict.fromkeys(NUMBERS, float))
    frame["firing_rate"] = [fmean(rates.values()) if rates else None for rates in frame["firing_rates"]]  # of layers
    reached = runs[0].args["method"] in REACHED
    listed = frame.groupby("ticket")["sparsity"].transform("mean") if reached else frame["sparsity"]
    frame["column"] = listed.map(lambda sparsity: _column(sparsity, columns, reached)).astype(float)
    once = frame.drop_duplicates(["column", "ticket", "round"])
    counted = once.sort_values(["column", "ticket"], kind="stable", ignore_index=True)
    timings = counted.groupby(["column", "ticket"])["timing"]
    counted["one_machine"] = (timings.transform("nunique") == 1) & (
        timings.transform("count") == timings.transform("size")
    )
    for field in SECONDS:
        counted[f"comparable_{field}"] = counted[field].where(counted["one_machine"])
    return counted


def dense_name(label: str) -> str:
    """What the dense network is called, by the label of the experiment that it is of; a variant is named."""
    return f"dense{label.removeprefix('IMP')}"


def against_dense(cell: Cell, dense: Cell) -> tuple[Spread, Spread] | None:
    """A ticket against the dense network, over the rounds that both have.

    Returns:
        Accuracy of the dense network in these rounds, in %, and the difference to the dense network of the same round,
        in percent points; None if no round has both.
    """
    pairs = cell.rows.merge(dense.rows, on="round", suffixes=("", "_dense"))
    baseline = spread(pairs["test_accuracy_dense"])
    return baseline and (baseline, spread(pairs["test_accuracy"] - pairs["test_accuracy_dense"]))


def base_of(experiment: Experiment, section: Section) -> Experiment | None:
    """The experiment without Early-Time that an ET experiment is to be compared with: the same settings otherwise."""
    method = BASES.get(experiment.args["method"])
    return next((e for e in section.experiments if e.args["method"] == method and agree(e, experiment)), None)


def agree(one: Experiment, other: Experiment, but: tuple[str, ...] = ()) -> bool:
    """Whether two experiments have the same settings, so far as both have them, but for some."""
    return all(other.settings.get(flag, value) == value for flag, value in one.settings.items() if flag not in but)
