"""Short cycles: tickets of all levels from one training."""

import itertools
import math

import pytest
import torch

import train_snn_shortcycle
from utils import stages, training
from utils.scores import prune_by_magnitude

SMALL = "--train_samples 36 --timestep 2".split()  # 5 steps an epoch
ALL = ["--evaluate_levels", "0", "1", "2"]


@pytest.fixture
def prunings(monkeypatch):
    """The steps of training after which the script prunes."""
    steps, found, loss = [], [], training.loss_over_time

    def count(*more):
        steps.append(1)
        return loss(*more)

    def prune(*more):
        found.append(len(steps))
        return prune_by_magnitude(*more)

    monkeypatch.setattr(training, "loss_over_time", count)
    monkeypatch.setattr(train_snn_shortcycle, "prune_by_magnitude", prune)
    return found


def epochs_of(run, phase, level=0):
    return [row["epoch"] for row in run.stage(phase, level)]


SLOW = [pytest.param(*values, marks=pytest.mark.slow) for values in (("1", 5, 0), ("0.01", 1, 1))]


@pytest.mark.parametrize(("cycle", "steps", "first"), [("0.4", 2, 1), ("1.4", 7, 1), *SLOW])
def test_a_cycle_may_be_a_part_of_an_epoch(run, prunings, cycle, steps, first):
    flags = [*SMALL, "--cycle_epochs", cycle, "--rewinding_epoch", str(first), "--end_iter", "2", *ALL]
    short = run("shortcycle", *flags)
    assert prunings == [5 * first + steps, 5 * first + 2 * steps]
    until = first + math.ceil(2 * steps / 5)
    assert epochs_of(short, "dense") == list(range(first))
    assert epochs_of(short, "search") == list(range(first, until))
    search = short.stage("dense") + short.stage("search")
    for row in short.results:
        spent = first + row["level"] * steps / 5 if row["level"] else 0
        shares = [min(1, max(0, spent - one["epoch"])) for one in search]
        assert row["search_epochs"] == pytest.approx(spent)
        assert row["search_timestep_epochs"] == pytest.approx(2 * spent)
        seconds = sum(share * one["seconds"] for share, one in zip(shares, search, strict=True))
        assert row["search_seconds"] == pytest.approx(seconds)
        own = short.stage("train", row["level"])
        assert [one["epoch"] for one in own] == list(range(first, 2))
        assert row["train_seconds"] == pytest.approx(sum(one["seconds"] for one in own))


def test_tickets_are_exact_nested_and_on_one_rewind_point(run, monkeypatch):
    points, commit = {}, stages.Stage.commit

    def look(self, epoch, row, last=False):
        points[self.phase, epoch] = {n: t.clone() for n, t in self.state["model"].state_dict().items()}
        commit(self, epoch, row, last)

    monkeypatch.setattr(stages.Stage, "commit", look)
    short = run("shortcycle", *SMALL, "--sparsity", "65", "--rewinding_epoch", "2", "--cycle_epochs", "0.6")
    tickets = [short.ticket(f"level_{level:02d}") for level in range(5)]
    left = [sum(int(m.sum()) for m in mask.values()) for mask, _, _ in tickets]
    for before, after in itertools.pairwise(left[:4]):
        assert after == before - round(0.25 * before)
    assert left[4] == pytest.approx(0.35 * left[0], abs=1.5)
    point = points["dense", 1]
    for level, (mask, weights, origin) in enumerate(tickets):
        larger = tickets[max(0, level - 1)][0]
        assert all((m <= larger[name]).all() for name, m in mask.items())
        assert all(torch.equal(weights[name], point[name] * m) for name, m in mask.items())
        assert all(torch.equal(weights[name], point[name]) for name in point if name not in mask)
        assert (origin["level"], origin["epoch"], origin["dense"]) == (level, 2, "level_00.safetensors")
    assert [row["ticket"] for row in short.results] == ["level_04"]
    assert all(torch.equal(m, tickets[4][0][name]) for name, m in short.network("level_04")[0].items())


@pytest.mark.parametrize("first", [0, *(pytest.param(epoch, marks=pytest.mark.slow) for epoch in (1, 2))])
def test_the_default_is_one_training_in_all(run, prunings, first):
    """Also where the cycles are not whole numbers of steps."""
    run = run("shortcycle", *SMALL, "--rewinding_epoch", str(first), "--prune_iterations", "4")
    assert epochs_of(run, "dense") + epochs_of(run, "search") == [0, 1, 2, 3]
    assert 20 - len(prunings) < prunings[-1] <= 20
    assert prunings[-1] / 5 == pytest.approx(run.results[0]["search_epochs"])


def test_cycles_longer_than_a_training_leave_its_schedule_alone(run):
    """Two cycles of five epochs, where a training has three; each ticket is pruned from what the one before became."""
    flags = [*SMALL, "--train_samples", "8", "--rewinding_epoch", "1", "--end_iter", "3"]
    long = run("shortcycle", *flags, "--cycle_epochs", "5", *ALL)
    short = run("shortcycle", *flags, "--cycle_epochs", "1", *ALL, "--exp_name", "short")
    assert epochs_of(long, "search") == list(range(1, 11))
    assert len({row["lr"] for row in long.stage("search")}) == 1
    assert [row["search_epochs"] for row in long.results] == [0, 6, 11]
    without = {"seconds"}
    for phase, level in (("dense", 0), ("train", 0)):
        a, b = (
            [{k: v for k, v in row.items() if k not in without} for row in r.stage(phase, level)] for r in (long, short)
        )
        assert a == b
    assert epochs_of(long, "train", 2) == epochs_of(short, "train", 2) == [1, 2]
    assert [row["lr"] for row in long.stage("train", 2)] == [row["lr"] for row in short.stage("train", 2)]
    assert any(not torch.equal(m, short.ticket("level_01")[0][n]) for n, m in long.ticket("level_01")[0].items())


def test_with_early_time_the_search_runs_with_fewer_timesteps_and_costs_less(run):
    flags = "--early_time --early_time_epoch 2 --early_time_threshold 1.5 --early_time_samples 20 --cycle_epochs 1"
    early = run("shortcycle", *flags.split(), *ALL)
    (chosen,) = [row["early_time"] for row in early.stage("search") if "early_time" in row]
    assert chosen < 4
    assert [row["timesteps"] for row in early.stage("dense") + early.stage("search")] == [4, 4, chosen]
    assert {row["timesteps"] for level in range(3) for row in early.stage("train", level)} == {4}
    assert [row["search_timestep_epochs"] for row in early.results] == [0, 8, 8 + chosen]
    assert [row["search_timesteps"] for row in early.results] == [4, 4, chosen]
    assert early.args["method"] == "earlyT_shortcycle"


def test_levels_stay_nested_where_a_training_cannot_be_repeated(run, monkeypatch):
    """Killed after a ticket was written, in the middle of an epoch; on a GPU the epoch comes out differently again."""
    calls = []

    def prune(model, mask, *more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        if len(calls) == 3:  # the first pruning again
            with torch.no_grad():
                model.get_parameter("stem.weight").mul_(0.01)
                model.classifier.weight.mul_(100)
        return prune_by_magnitude(model, mask, *more)

    monkeypatch.setattr(train_snn_shortcycle, "prune_by_magnitude", prune)
    flags = [*SMALL, "--cycle_epochs", "0.4", "--checkpoint_minutes", "0"]
    with pytest.raises(SystemExit):
        run("shortcycle", *flags)
    short = run("shortcycle", *flags)
    masks = [short.ticket(f"level_{level:02d}")[0] for level in range(3)]
    for larger, smaller in itertools.pairwise(masks):
        assert all((m <= larger[name]).all() for name, m in smaller.items())
