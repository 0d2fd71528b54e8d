"""The list of runs: its commands are accepted by their scripts, what is done is skipped, what fails is named."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY, Finished

from benchmarks import reproduce
from models import ARCHITECTURES
from utils.runs import Run
from utils.tickets import write_ticket

MASK = {"conv.weight": torch.tensor([[True, False]])}


@pytest.fixture
def tiny_scale(monkeypatch):
    tiny = TINY.replace("--dataset synthetic", "").replace("--arch alexnet", "")
    scale = reproduce.Scale(
        flags={
            "all": tiny,
            "sparsity": "--prune_iterations 3 --prune_percent 50",
            "rewinding": "--rewinding_epoch 2",
            "early_bird": "--eb_window 1 --eb_tolerance 0.2",
        },
        networks=(("synthetic", "alexnet"),),
        early_networks=(),
        deeper_networks=(),
        levels=(1,),
        prune_percent=50,
        rewinding_epochs=(0,),
        rounds=1,
    )
    monkeypatch.setitem(reproduce.SCALES, "small", scale)


def commands_of(scale, output_dir=Path("runs/list")):
    return list(reproduce.commands(reproduce.SCALES[scale], output_dir))


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_scripts_accept_their_commands_and_write_where_the_list_looks(scale, started, tmp_path):
    one_round = dataclasses.replace(reproduce.SCALES[scale], rounds=1)
    folders, places = {}, set()
    for command in reproduce.commands(one_round, tmp_path):
        if command.ticket:
            assert command.ticket.parent.parent == folders[command.needs], "a run's own ticket, and the run comes first"
            assert command.state(tmp_path) == ("missing" if command.ticket.exists() else "waits")
            command.ticket.parent.mkdir(parents=True, exist_ok=True)
            origin = {"network": {}, "level": 1, "epoch": 2, "ticket": "level_01"}
            write_ticket(command.ticket, MASK, {"conv.weight": torch.ones(1, 2)}, origin)
        assert command.state(tmp_path) == "missing"
        found = started(command.script.removesuffix(".py"), list(command.words[1:]))
        folder = folders[command.name] = Run(*found).folder
        places.add(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.txt").touch()
        assert command.state(tmp_path) == "done"
    assert len(places) == len(folders) == len(list(reproduce.commands(one_round, tmp_path)))


def test_flags_for_all_runs_come_before_what_makes_a_run_itself(capsys, refused, tmp_path):
    call = ["--scale", "small", "--flags=--timestep 4 --decay_kernels_only", "--dry_run", "--only", "Fig. 10"]
    assert "--output_dir" in refused(reproduce.main, *call)
    assert "--flags" in refused(reproduce.main, "--flags=--seed '1", "--output_dir", tmp_path)
    reproduce.main([*call, "--output_dir", str(tmp_path)])
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert all("--decay_kernels_only" in words for words in printed)
    last = [words[-words[::-1].index("--timestep")] for words in printed]
    assert all((time == "1") == ("relu" in words) for time, words in zip(last, printed, strict=True))


def test_a_scale_has_flags_for_one_experiment_and_for_those_that_its_name_begins():
    flags = {"set-4": "--drop_fraction 0.1", "admm": "--rho 0.5"}
    size = dataclasses.replace(reproduce.SCALES["cifar10"], flags=flags, rounds=1)
    words = {command.name.split("/")[0]: command.words for command in reproduce.commands(size, Path("runs"))}
    assert [name for name in words if "--drop_fraction" in words[name]] == ["set-4"]
    assert [name for name in words if "--rho" in words[name]] == ["admm-4", "admm-6"]


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_figures_and_rounds_are_all_there(scale):
    commands = commands_of(scale)
    figures = {f"Fig. {name}" for name in "1 3 4 5 6 7a 7b 7c 8a 8b 8c 9 10 11".split()}
    assert figures | {"Table 1", "Table 2", "supplement C", "supplement F"} <= {n for c in commands for n in c.shows}
    assert len({command.name for command in commands}) == len(commands)
    per_round = [[c for c in commands if c.name.endswith(f"-round{n + 1}")] for n in range(len(commands))]
    rounds = [runs for runs in per_round if runs]
    assert len(rounds) == reproduce.SCALES[scale].rounds
    assert len({len(runs) for runs in rounds}) == 1


def test_tables_are_there_for_all_their_networks():
    found = {}
    for command in commands_of("full"):
        experiment, run = command.name.split("/")
        for shown in command.shows:
            found.setdefault(shown, {}).setdefault(tuple(run.split("-")[:2]), set()).add(experiment)
    data_sets = ("cifar10", "cifar100", "svhn", "fmnist")
    assert set(found["Table 1"]) == {(data, arch) for data in data_sets for arch in ("vgg16", "resnet19")}
    each = {"imp", "imp-et"} | {f"{name}-{level}" for name in ("eb", "eb-et", "random") for level in (4, 8, 11, 14)}
    assert all(experiments == each for experiments in found["Table 1"].values())
    assert set(found["Fig. 9"]) == {(data, "vgg16") for data in data_sets}
    assert set(found["supplement G"]) == {("tinyimagenet", "resnet34"), ("cifar10", "alexnet")}
    assert {arch for networks in found.values() for _, arch in networks} == set(ARCHITECTURES)


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_every_method_is_compared_at_every_level_of_the_first_network(scale):
    size = reproduce.SCALES[scale]
    compared = [c for c in commands_of(scale) if {"Table 2", "Fig. search cost"} <= set(c.shows)]
    first = [c for c in compared if c.name.endswith(f"/{'-'.join(size.networks[0])}-round1")]
    assert {c.script for c in first} == {path.name for path in reproduce.ROOT.glob("train_snn_*.py")}
    levels = [str(level) for level in size.levels]
    variants = Counter()
    for command in first:
        words = [*command.flags, None]
        if "--sparsity_round" in words:
            at = words.index("--sparsity_round") + 1
            own = {"--grow", "--from_dense", "--early_time", "--ticket"}.intersection(words)
            kind = words[words.index("--ticket") + 1] if "--ticket" in words else None
            variants[command.script, *sorted(own), kind, words[at]] += 1
        elif "--evaluate_levels" in words:
            at = words.index("--evaluate_levels") + 1
            assert words[at : at + len(levels)] == levels  # one search for all of them
    assert set(variants.values()) == {1}, "nothing is run twice"
    kinds = {key[:-1] for key in variants}
    assert len(kinds) == 2 + 2 + 1 + 2 + 2 + 1 + 4  # EB, gradual, ADMM, RigL, Deep R, Grad R, one-shot
    assert set(variants) == {(*kind, level) for kind in kinds for level in levels}


def run_list(*flags):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--scale", "small", *map(str, flags)])
    return stop.value.code


@pytest.mark.slow
def test_list_runs_what_is_missing_and_skips_what_is_done(tiny_scale, tmp_path, capfd):
    call = ["--scale", "small", "--only", "Fig. 9", "--output_dir", str(tmp_path / "runs")]
    reproduce.main([*call, "--dry_run"])
    states = [line.split()[-1] for line in capfd.readouterr().out.splitlines() if line.startswith("# Fig")]
    assert states == ["missing", "waits"]
    assert not (tmp_path / "runs").exists()

    reproduce.main(call)
    (summary,) = (tmp_path / "runs" / "transfer-1").rglob("summary.txt")
    run = Finished(summary.parent)
    assert run.args["method"] == "oneshot-transfer"
    assert run.results[0]["sparsity"] == pytest.approx(50, abs=0.1)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    reproduce.main(call)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path for path in (tmp_path / "runs").rglob("*") if path.is_file()} == set(before), "nothing was started"


@pytest.mark.slow
def test_run_that_fails_is_named_and_ends_with_1(tiny_scale, tmp_path, capfd):
    broken = tmp_path / "random-1" / "synthetic-alexnet-50-round1"
    broken.mkdir(parents=True)
    (broken / "args.json").write_text("{")
    assert run_list("--only", "exp_name random-1", "--output_dir", tmp_path) == 1
    error = capfd.readouterr().err
    assert "random-1/synthetic-alexnet-round1" in error.splitlines()[-1]
    assert "args.json" in error


def test_part_of_the_list_brings_the_tickets_that_it_needs(tmp_path, capsys):
    reproduce.main(["--scale", "small", "--only", "controls", "--dry_run", "--output_dir", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    names = {line.split("--exp_name ")[1].split()[0] for line in lines}
    made = {
        f"{name}-{level}" for name in ("imp-shuffle", "imp-reinit", "eb-shuffle", "eb-et-shuffle") for level in "246"
    }
    assert names == made | {"imp"} | {f"{name}-{level}" for name in ("eb", "eb-et") for level in "246"}


def test_part_is_not_looked_for_in_paths(tmp_path, capsys):
    paths = ["--output_dir", str(tmp_path / "snip"), "--data_dir", str(tmp_path / "snip")]
    reproduce.main(["--scale", "small", "--only", "snip", "--dry_run", *paths])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert lines
    assert all("--ticket snip" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--only Fig.99", "supplement F"),
        ("--jobs 0", "--jobs"),
        ("--cpus_per_run x", "--cpus_per_run"),
        ("--launcher ray --gpus_per_run 1.5", "--gpus_per_run"),
        ("--launcher ray --jobs 2", "--jobs"),
        ("--gpus_per_run 1", "--gpus_per_run"),
        ("--address auto", "--address"),
        ("--launcher slurm", "--launcher"),
    ],
)
def test_wrong_flags_are_one_line(flags, named, capsys):
    assert run_list(*flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
