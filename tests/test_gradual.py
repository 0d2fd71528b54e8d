"""Gradual pruning: how the sparsity rises, its two networks, and what they cost."""

import pytest
import torch
from conftest import same

from utils import stages

SIX = "--sparsity 90 --end_iter 6 --dense_epochs 1 --prune_until 5".split()
REGROW = [*SIX, *"--regrow 0.5 --sparsity 50 --train_samples 40".split()]
EARLY = [*SIX, *"--early_time --early_time_epoch 2 --early_time_threshold 1.5 --early_time_samples 16".split()]


@pytest.fixture
def watched(run, monkeypatch):
    """Runs the script; also returns the network's state and mask at the end of every epoch, by phase."""

    def go(*more):
        seen, commit = {"search": [], "in_place": [], "train": []}, stages.Stage.commit

        def look(self, epoch, row, last=False):
            copies = ({n: t.clone() for n, t in self.state[key].items()} for key in ("mask",) if key in self.state)
            state = {n: t.clone() for n, t in self.state["model"].state_dict().items()}
            seen[self.phase].append((state, next(copies, None)))
            commit(self, epoch, row, last)

        monkeypatch.setattr(stages.Stage, "commit", look)
        return run("gradual", *more), seen

    return go


def kept(mask):
    return sum(int(m.sum()) for m in mask.values())


@pytest.mark.parametrize("more", [SIX, REGROW], ids=["plain", "regrow"])
def test_the_sparsity_follows_the_cubic_to_the_weight(watched, more):
    run, seen = watched(*more)
    share, rows, total = (
        run.args["sparsity"] / 100,
        run.stage("search", None),
        sum(m.numel() for m in seen["search"][0][1].values()),
    )
    for row, (state, mask) in zip(rows, seen["search"], strict=True):
        time = max(0, row["epoch"] / 4)
        wanted = total - round(share * (1 - (1 - time) ** 3) * total)
        assert kept(mask) == wanted
        assert row["sparsity"] == pytest.approx(100 * (total - wanted) / total, abs=1e-9)
        assert all((state[name][~m] == 0).all() for name, m in mask.items())
    assert kept(seen["search"][-1][1]) == total - round(share * total)
    once_gone = {name: torch.zeros_like(m) for name, m in seen["search"][0][1].items()}
    for _, mask in seen["search"]:
        for name, m in mask.items():
            once_gone[name] |= ~m
    came_back = any((once_gone[name] & m).any() for name, m in seen["search"][-1][1].items())
    assert came_back == (more is REGROW)


@pytest.mark.parametrize("dense_epochs", [0, 2])
def test_both_networks_have_the_mask_and_the_ticket_the_weights_after_the_dense_epochs(watched, dense_epochs):
    run, seen = watched("--end_iter", "4", "--dense_epochs", str(dense_epochs))
    mask = seen["search"][-1][1]
    for name in ("level_02", "level_02_in_place"):
        assert same(run.ticket(name)[0], mask)
        assert same(run.network(name)[0], mask)
        weights = run.network(name)[1]
        assert all((weights[layer] != 0).equal(m) for layer, m in mask.items())
    start = seen["search"][dense_epochs - 1][0] if dense_epochs else run.ticket("initial")[1]
    pruned = {name: value * mask[name] if name in mask else value for name, value in start.items()}
    assert same(run.ticket("level_02")[1], pruned)
    assert same(run.ticket("level_02_in_place")[1], seen["search"][-1][0])
    assert run.ticket("level_02")[2]["epoch"] == dense_epochs
    assert [row["epoch"] for row in run.stage("search", 2)] == [0, 1, 2]
    assert [row["epoch"] for row in run.stage("in_place", 2)] == [3]
    assert [row["epoch"] for row in run.stage("train", 2)] == list(range(dense_epochs, 4))


@pytest.mark.parametrize("more", [pytest.param(SIX, marks=pytest.mark.slow), EARLY], ids=["T", "early time"])
def test_costs_of_both_networks(run, more):
    gradual = run("gradual", *more)
    search, rest, train = (gradual.stage(phase, None) for phase in ("search", "in_place", "train"))
    timesteps = [row["timesteps"] for row in search]
    if more is EARLY:
        assert timesteps == [4, 4] + [search[1]["early_time"]] * 3
        assert timesteps[-1] < 4
    else:
        assert timesteps == [4] * 5
        assert not any("divergences" in row for row in search)
    assert {row["timesteps"] for row in rest + train} == {4}
    in_place, ticket = gradual.results
    first = "earlyT_gradual" if more is EARLY else "gradual"
    assert (in_place["method"], ticket["method"]) == (f"{first}-in_place", first)
    assert (in_place["ticket"], ticket["ticket"]) == ("sparsity_90_in_place", "sparsity_90")
    assert in_place["label"] != ticket["label"] == gradual.args["label"]
    for row, found, own in ((in_place, search + rest, rest), (ticket, search, train)):
        assert row["search_epochs"] == len(found)
        assert row["search_timestep_epochs"] == sum(one["timesteps"] for one in found)
        assert row["search_seconds"] == pytest.approx(sum(one["seconds"] for one in found))
        assert row["search_timesteps"] == timesteps[-1]
        assert (row["timesteps"], row["test_accuracy"]) == (4, own[-1]["test_accuracy"])
    assert in_place["train_seconds"] == 0
    assert ticket["train_seconds"] == pytest.approx(sum(row["seconds"] for row in train))
