"""Gradual pruning: what its two networks cost."""

import pytest

EARLY = (
    "--sparsity 90 --end_iter 6 --dense_epochs 1 --prune_until 5 "
    "--early_time --early_time_epoch 2 --early_time_threshold 1.5 --early_time_samples 16"
).split()


def test_costs_of_both_networks(run):
    gradual = run("gradual", *EARLY)
    search, rest, train = (gradual.stage(phase, None) for phase in ("search", "in_place", "train"))
    timesteps = [row["timesteps"] for row in search]
    assert timesteps == [4, 4] + [search[1]["early_time"]] * 3
    assert timesteps[-1] < 4
    assert {row["timesteps"] for row in rest + train} == {4}
    in_place, ticket = gradual.results
    assert (in_place["method"], ticket["method"]) == ("earlyT_gradual-in_place", "earlyT_gradual")
    assert (in_place["ticket"], ticket["ticket"]) == ("sparsity_90_in_place", "sparsity_90")
    assert in_place["label"] != ticket["label"] == gradual.args["label"]
    for row, found, own in ((in_place, search + rest, rest), (ticket, search, train)):
        assert row["search_epochs"] == len(found)
        assert row["search_timestep_epochs"] == sum(one["timesteps"] for one in found)
        assert row["search_seconds"] == pytest.approx(sum(one["seconds"] for one in found))
        assert row["search_timesteps"] == timesteps[-1]
        assert (row["timesteps"], row["test_accuracy"]) == (4, own[-1]["test_accuracy"])
    assert search[-1]["sparsity"] == pytest.approx(ticket["sparsity"])
    assert in_place["train_seconds"] == 0
    assert ticket["train_seconds"] == pytest.approx(sum(row["seconds"] for row in train))
