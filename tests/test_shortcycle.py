"""Short cycles: tickets of all levels from one training."""

import itertools

import pytest
import torch

import train_snn_shortcycle
from utils.scores import prune_by_magnitude

SMALL = "--train_samples 36 --timestep 2".split()  # 5 steps an epoch


def epochs_of(run, phase):
    return [row["epoch"] for row in run.stage(phase, 0)]


@pytest.mark.parametrize("first", [0, *(pytest.param(epoch, marks=pytest.mark.slow) for epoch in (1, 2))])
def test_the_default_is_one_training_in_all(run, first):
    """Also where the cycles are not whole numbers of steps."""
    run = run("shortcycle", *SMALL, "--rewinding_epoch", str(first), "--prune_iterations", "4")
    assert epochs_of(run, "dense") + epochs_of(run, "search") == [0, 1, 2, 3]
    assert 20 - 3 < 5 * run.results[0]["search_epochs"] <= 20


def test_the_last_pruning_ends_at_the_wanted_sparsity(run):
    run = run("shortcycle", *SMALL, "--sparsity", "65", "--cycle_epochs", "0.6")
    assert [row["ticket"] for row in run.results] == ["level_04"]
    assert run.results[0]["sparsity"] == pytest.approx(65, abs=0.01)


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
