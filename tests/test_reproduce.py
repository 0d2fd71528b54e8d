"""The list of runs: every command parses, what is done is skipped, what fails is named and stops nothing."""

import json

import pytest
from conftest import TINY, Finished

from benchmarks import reproduce
from models import ARCHITECTURES
from utils.flags import METHODS, get_args

# of the list's own flags, the data set is the network's
FLAGS = " ".join(TINY).replace("--dataset synthetic", "")


@pytest.fixture
def tiny_scale(monkeypatch):
    scale = reproduce.Scale(
        flags=FLAGS,
        networks=(("synthetic", "vgg16"),),
        early_networks=(),
        deeper_networks=(),
        levels=(1,),
        rewinding_epochs=(0,),
        rounds=1,
    )
    monkeypatch.setitem(reproduce.SCALES, "small", scale)


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_every_command_parses_and_has_a_folder_of_its_own(scale, monkeypatch, capsys):
    # a saved ticket is one that an earlier command writes
    monkeypatch.setattr("utils.flags.Path.is_file", lambda path: True)
    monkeypatch.setattr("utils.flags.load_ticket", lambda path, remedy: ({}, {}, {"level": 1, "epoch": 2}))
    commands = list(reproduce.commands(reproduce.SCALES[scale], "runs/list"))
    folders = set()
    for command in commands:
        args = get_args(command.method, None, list(command.flags))
        folders.add((args.exp_name, args.dataset, args.arch, args.round))
    assert len(folders) == len(commands)
    assert {command.method for command in commands} == set(METHODS)
    assert {number for *_, number in folders} == set(range(1, reproduce.SCALES[scale].rounds + 1))
    if scale == "full":
        assert {arch for _, _, arch, _ in folders} == set(ARCHITECTURES)
    shows = {name for command in commands for name in command.shows}
    figures = {f"Fig. {name}" for name in "1 3 4 5 6 7a 7b 7c 8a 8b 8c 9 10 11".split()}
    assert figures | {"Table 1", "Table 2", "supplement C", "supplement F"} <= shows


def test_table_1_and_fig_9_are_there_for_all_their_networks():
    found = {}
    for command in reproduce.commands(reproduce.SCALES["full"], "runs/list"):
        for name in command.shows:
            network = command.value("--dataset"), command.value("--arch")
            found.setdefault(name, {}).setdefault(network, set()).add(command.value("--exp_name"))
    data_sets = ("cifar10", "cifar100", "svhn", "fmnist")
    assert set(found["Table 1"]) == {(data, arch) for data in data_sets for arch in ("vgg16", "resnet19")}
    each = {"imp", "imp-et"} | {f"{name}-{level}" for name in ("eb", "eb-et", "random") for level in (4, 8, 11, 14)}
    assert all(names == each for names in found["Table 1"].values())
    assert set(found["Fig. 9"]) == {(data, "vgg16") for data in data_sets}
    assert set(found["supplement G"]) == {("tinyimagenet", "resnet34"), ("cifar10", "alexnet")}


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_tickets_are_of_runs_in_the_list(scale):
    commands = list(reproduce.commands(reproduce.SCALES[scale], "runs/list"))
    sources = {command.source for command in commands} - {None}
    assert sources
    assert sources <= {command.name for command in commands}


def test_list_runs_what_is_missing_and_skips_what_is_done(tiny_scale, tmp_path, capfd):
    call = ["--scale", "small", "--only", "Fig. 9", "--jobs", "2", "--output_dir", str(tmp_path / "runs")]
    reproduce.main([*call, "--dry_run"])
    before = capfd.readouterr().out
    assert before.count("missing, about") == 1
    assert before.count("waits, about") == 1
    assert not (tmp_path / "runs").exists()

    with pytest.raises(SystemExit) as stop:
        reproduce.main(call)
    assert stop.value.code == 0
    out = capfd.readouterr().out
    assert out.index("--exp_name ann") < out.index("--exp_name transfer-1")  # the ticket comes first
    assert Finished(tmp_path / "runs" / "transfer-1" / "synthetic-vgg16-round1").results
    assert (tmp_path / "runs-report" / "report.html").exists()

    with pytest.raises(SystemExit) as stop:
        reproduce.main(call)
    assert stop.value.code == 0
    assert "done in" not in capfd.readouterr().out


def test_run_that_fails_is_named_and_stops_nothing(tiny_scale, tmp_path, capfd):
    runs = tmp_path / "runs"
    broken = runs / "random-1" / "synthetic-vgg16-round1"
    broken.mkdir(parents=True)
    (broken / "metrics.jsonl").write_text("")  # a run without args.json is refused
    call = ["--scale", "small", "--only", "--ticket random --sparsity_round 1", "--output_dir", str(runs)]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(call)
    assert stop.value.code == 1
    error = capfd.readouterr().err
    assert error.count("failed:") == 1
    assert "holds a run without args.json" in error
    assert json.loads((runs / "ann-random-1" / "synthetic-vgg16-round1" / "results.json").read_text())


def test_part_of_the_list_brings_the_tickets_that_it_needs(tiny_scale, tmp_path, capsys):
    reproduce.main(["--scale", "small", "--only", "controls", "--dry_run", "--output_dir", str(tmp_path)])
    names = [line.split("--exp_name ")[1].split()[0] for line in capsys.readouterr().out.splitlines() if line[0] == "p"]
    assert {"imp", "eb-1", "eb-et-1", "imp-shuffle-1", "eb-shuffle-1", "eb-et-shuffle-1", "imp-reinit-1"} == set(names)


def test_part_is_not_looked_for_in_paths(tiny_scale, tmp_path, capsys):
    paths = ["--output_dir", str(tmp_path / "snip"), "--data_dir", str(tmp_path / "snip")]
    reproduce.main(["--scale", "small", "--only", "snip", "--dry_run", *paths])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert lines
    assert all("--ticket snip" in line for line in lines)


def test_nothing_to_do_names_what_there_is(tiny_scale, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--scale", "small", "--only", "Fig. 99"])
    assert stop.value.code == 2
    assert "Table 1; Table 2; Fig. 1" in capsys.readouterr().err.strip().splitlines()[-1]
