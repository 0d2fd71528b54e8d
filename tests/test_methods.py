"""The methods against plain loops of them, against each other, and what is written of them."""

import difflib
import itertools
import re
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, same
from plain import eb, gradual, imp, short_cycles
from plain_rewiring import admm, deep_r, grad_r, rigl

from utils.data import balanced_part, load_data
from utils.masks import sparsity_after
from utils.training import Trainer

PLAIN = {"laterewindlth": imp, "earlyT_laterewindlth": imp, "earlybird": eb, "earlyT_earlybird": eb}
PLAIN |= {"gradual": gradual, "shortcycle": short_cycles, "deeprewiring": deep_r, "gradrewiring": grad_r, "admm": admm}
PLAIN |= {"rigl": rigl}
# every line changes one thing that the loops must agree about
CASES = [
    ("laterewindlth", "--rewinding_epoch 0 --pruning_scope local --valid_freq 50 --end_iter 3"),
    ("laterewindlth", "--rewind none --rewinding_epoch 1 --end_iter 3 --prune_percent 40"),
    ("earlyT_laterewindlth", "--evaluate_levels 0 2"),
    (
        "earlyT_laterewindlth",
        "--rewinding_epoch 0 --early_time_epoch 2 --early_time_threshold 0.9 --pruning_scope local --end_iter 3",
    ),
    (
        "earlyT_laterewindlth",
        "--rewinding_epoch 1 --early_time_epoch 2 --early_time_threshold 0.001 --rewind lr --end_iter 3",
    ),
    ("earlybird", "--eb_window 2 --eb_tolerance 0.15"),
    (
        "earlybird",
        "--eb_distance jaccard --eb_tolerance 0.05 --prune_percent 80 --learning_rate 0.3 --pruning_scope local",
    ),
    ("earlyT_earlybird", "--eb_window 9 --early_time_threshold 0.9 --early_time_epoch 2"),
    pytest.param("gradual", "--dense_epochs 1 --sparsity 90", marks=pytest.mark.slow),
    pytest.param("gradual", "--regrow 0.5 --dense_epochs 0 --pruning_scope local", marks=pytest.mark.slow),
    ("gradual", "--regrow 0.5 --dense_epochs 1 --early_time --early_time_epoch 1 --early_time_threshold 1.5"),
    ("rigl", "--sparsity 80 --update_every 2 --update_until 0.7 --drop_fraction 0.5"),
    ("rigl", "--grow random --update_every 1 --end_iter 3 --distribution global"),
    ("deeprewiring", "--l1 0.1 --noise 0.1 --sparsity 80"),
    pytest.param("deeprewiring", "--l1 0.3 --from_dense", marks=pytest.mark.slow),
    ("gradrewiring", "--trials 2 --trial_epochs 2 --sparsity 80 --end_iter 3"),
    ("admm", "--admm_epochs 2 --rho 0.1 --pruning_scope local --end_iter 2"),
    ("shortcycle", "--cycle_epochs 1.5 --evaluate_levels 0 1 2 --prune_percent 40"),
    pytest.param("shortcycle", "--cycle_epochs 0.5 --rewinding_epoch 0 --pruning_scope local", marks=pytest.mark.slow),
    ("shortcycle", "--train_samples 8 --rewinding_epoch 1 --end_iter 3 --cycle_epochs 5 --evaluate_levels 0 1 2"),
    (
        "shortcycle",
        "--rewinding_epoch 2 --early_time --early_time_epoch 1 --early_time_threshold 1.5 --evaluate_levels 0 1 2",
    ),
]


@pytest.mark.parametrize(("method", "more"), CASES)
def test_script_is_the_plain_loop(finished, method, more):
    script = finished(method, *more.split())
    data = load_data(Namespace(**script.args))
    probe = (
        balanced_part(data.train, script.args["early_time_samples"])
        if script.args.get("early_time", "early_time_epoch" in script.args)
        else None
    )
    found, early_time = PLAIN[method](script.args, data, probe)
    assert [row["ticket"] for row in script.results] == list(found)
    for row, (name, one) in zip(script.results, found.items(), strict=True):
        (ours, trained, _), (cut, start, origin) = script.network(name), script.ticket(name)
        assert same(ours, one.mask)
        assert same(cut, one.mask)
        assert same(trained, one.weights)
        assert same(start, {n: value * one.mask[n] if n in one.mask else value for n, value in one.start.items()})
        assert origin["epoch"] == one.first
        assert (origin["dense"] is not None) == one.unpruned
        if one.unpruned:
            assert same(script.ticket(origin["dense"].removesuffix(".safetensors"))[1], one.start)
        assert row["test_accuracy"] == pytest.approx(one.accuracy)
        assert of(row) == pytest.approx(list(one.search))
        shares = [min(1, max(0, one.search[0] - index)) for index in range(len(script.rows))]  # searches come first
        spent = sum(share * epoch["seconds"] for share, epoch in zip(shares, script.rows, strict=True))
        assert row["search_seconds"] == pytest.approx(spent)
        counted = [epoch["timesteps"] for share, epoch in zip(shares, script.rows, strict=True) if share]
        if "in_place" not in name:
            assert row["search_timesteps"] == (counted or [script.args["timestep"]])[-1]
    if "jaccard" in more:  # at this sparsity hamming would be below the tolerance, whatever the masks
        assert any(row["hamming"] < 0.05 <= row["jaccard"] for row in script.rows[1:] if "jaccard" in row)
    assert [row["early_time"] for row in script.rows if "early_time" in row] == ([early_time] if probe else [])


# --- twins -------------------------------------------------------------------------------------------------------


def of_both(rows):
    """The columns of a log that a method and its Early-Time variant share, but for the seconds."""
    extra = {"seconds", "divergences", "early_time"}
    return [{name: value for name, value in row.items() if name not in extra} for row in rows]


def test_early_bird_that_keeps_t_is_early_bird(finished, run):
    """The probe changes nothing: no statistic, no draw."""
    base = finished("earlybird")
    timed = run("earlyT_earlybird", "--early_time_threshold", "0")
    assert of_both(base.rows) == of_both(timed.rows)
    for a, b in (
        (base.ticket("level_02"), timed.ticket("level_02")),
        (base.network("level_02"), timed.network("level_02")),
    ):
        assert all(torch.equal(value, b[0][name]) for name, value in a[0].items())
        assert all(torch.equal(value, b[1][name]) for name, value in a[1].items())


def test_imp_that_keeps_t_is_imp(finished, run):
    base = finished("laterewindlth")
    timed = run("earlyT_laterewindlth", "--early_time_threshold", "0", "--evaluate_levels", "1", "2")
    for level in (1, 2):
        a, b = base.network(f"level_{level:02d}"), timed.network(f"level_{level:02d}")
        assert all(torch.equal(value, b[0][name]) for name, value in a[0].items())
        assert all(torch.equal(value, b[1][name]) for name, value in a[1].items())
        rows = [{**row, "phase": "search"} for row in of_both(timed.stage("train", level))]
        assert rows == of_both(base.stage("search", level))
    assert of_both(timed.stage("dense")) == of_both(base.stage("dense"))


def test_early_bird_scripts_differ_by_early_time_alone():
    def lines(script):
        return (ROOT / f"train_snn_{script}.py").read_text().split('"""')[2].splitlines()

    about_time = re.compile("clock|probe|early_time|EarlyTime|EB")
    differing = [line for line in difflib.ndiff(lines("earlybird"), lines("earlyT_earlybird")) if line[0] in "+-"]
    assert [line for line in differing if line[0] == "+" and not about_time.search(line)] == [
        "+ from utils.data import balanced_part"
    ]
    removed = [line for line in differing if line[0] == "-"]
    assert [line.split("(")[0].split()[-1] for line in removed] == ["get_args", "run.stage", "trainer.epoch"]


# --- what is written ---------------------------------------------------------------------------------------------


def test_accuracy_is_the_last_and_the_best_stands_beside_it(run, monkeypatch):
    accuracies = itertools.cycle([50.0, 90.0, 10.0, 40.0])
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: next(accuracies))
    (row,) = run("oneshot", "--valid_freq", "1").results
    assert (row["test_accuracy"], row["best_test_accuracy"]) == (40.0, 90.0)


def costs(rows):
    """Epochs, and epochs x timesteps."""
    return [len(rows), sum(row["timesteps"] for row in rows)]


def of(row):
    return [row["search_epochs"], row["search_timestep_epochs"]]


def check_row(run, row, level, name, search, train):
    assert (row["ticket"], row["level"]) == (name, level)
    assert of(row) == costs(search)
    assert row["search_seconds"] == pytest.approx(sum(r["seconds"] for r in search))
    assert row["train_seconds"] == pytest.approx(sum(r["seconds"] for r in train))
    tested = [r["test_accuracy"] for r in train if r["test_accuracy"] is not None]
    assert (row["test_accuracy"], row["best_test_accuracy"]) == (train[-1]["test_accuracy"], max(tested))
    assert row["timesteps"] == train[-1]["timesteps"] == run.args["timestep"]
    assert row["search_timesteps"] == (search[-1]["timesteps"] if search else run.args["timestep"])
    mask, weights, _ = run.network(name)
    total, kept = sum(m.numel() for m in mask.values()), sum(m.sum().item() for m in mask.values())
    parameters = sum(w.numel() for n, w in weights.items() if "running" not in n and "num_batches" not in n)
    assert parameters > total
    assert row["sparsity"] == pytest.approx(100 * (total - kept) / total)
    assert row["sparsity_all_parameters"] == pytest.approx(100 * (total - kept) / parameters)
    assert list(row["layers"]) == [n for n, w in weights.items() if w.dim() > 1]
    assert row["layers"] == pytest.approx({n: 100 * (~m).double().mean().item() for n, m in mask.items()})
    assert (weights[next(iter(mask))][~mask[next(iter(mask))]] == 0).all()


def test_results_of_imp(finished):
    run = finished("laterewindlth")
    rows = [run.stage("dense"), *(run.stage("search", level) for level in range(3))]
    for level, row in enumerate(run.results):
        check_row(
            run,
            row,
            level,
            f"level_{level:02d}",
            [*itertools.chain(*rows[: level + 1])] if level else [],
            rows[level + 1],
        )
    assert [row["sparsity"] for row in run.results] == pytest.approx([0, 25, 43.75], abs=0.01)
    assert [row["label"] for row in run.results] == ["IMP"] * 3


def test_results_of_imp_with_early_time(finished):
    run = finished("earlyT_laterewindlth", "--evaluate_levels", "0", "1")
    assert run.stage("search", 1)  # was trained, but no ticket that is reported was found by it
    assert not run.stage("search", 2)
    check_row(run, run.results[0], 0, "level_00", [], run.stage("train", 0))
    check_row(run, run.results[1], 1, "level_01", run.stage("dense") + run.stage("search", 0), run.stage("train", 1))


@pytest.mark.parametrize("method", ["earlybird", "earlyT_earlybird"])
def test_results_of_early_bird(finished, method):
    run = finished(method)
    (row,) = run.results
    check_row(run, row, 2, "level_02", run.stage("search"), run.stage("train", 2))
    assert row["settled"] == run.stage("search")[-1]["settled"]


def test_sparsity_in_percent_has_no_level(run):
    eb = run("earlybird", "--sparsity", "60", "--eb_window", "9")
    check_row(eb, eb.results[0], None, "sparsity_60", eb.stage("search"), eb.stage("train", None))
    assert eb.results[0]["sparsity"] == pytest.approx(60, abs=0.01)
    assert eb.results[0]["settled"] is False
    assert len(eb.stage("search")) == 4
    imp = run("laterewindlth", "--sparsity", "40", "--rewinding_epoch", "3")
    assert [row["sparsity"] for row in imp.results] == pytest.approx([0, 25, 40], abs=0.01)


def test_tickets_name_what_they_were_cut_from(finished):
    run = finished("laterewindlth")
    mask, weights, origin = run.ticket("level_02")
    assert {name: origin[name] for name in ("method", "level", "epoch", "ticket", "dense", "rewind")} == {
        **{"method": "laterewindlth", "level": 2, "epoch": 2, "ticket": "level_02"},
        **{"dense": "level_00.safetensors", "rewind": "weights"},
    }
    assert origin["sparsity"] == pytest.approx(100 * sparsity_after(2, 0.25), abs=0.01)
    dense = run.ticket("level_00")[1]
    assert all(torch.equal(weights[name][kept], dense[name][kept]) for name, kept in mask.items())
