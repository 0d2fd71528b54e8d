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
    shows = " ".join(command.shows for command in commands)
    figures = ["Table 1", *(f"Fig. {n}" for n in (3, 4, 9, 10))]
    assert all(name in shows for name in figures)


def test_tickets_are_of_runs_in_the_list():
    commands = list(reproduce.commands(reproduce.SCALES["small"], "runs/list"))
    made = {(c.flags[c.flags.index("--exp_name") + 1], c.flags[c.flags.index("--round") + 1]) for c in commands}
    given = [c.flags[c.flags.index("--ticket") + 1] for c in commands if "--ticket" in c.flags]
    saved = [path.split("/") for path in given if path.endswith(".safetensors")]
    assert saved
    assert all((parts[2], parts[3].split("round")[1]) in made for parts in saved)


def test_list_runs_what_is_missing_and_skips_what_is_done(tiny_scale, tmp_path, capfd):
    call = ["--scale", "small", "--only", "Fig. 9", "--jobs", "2", "--output_dir", str(tmp_path / "runs")]
    reproduce.main([*call, "--dry_run"])
    before = capfd.readouterr().out
    assert before.count("missing, at most") == 1
    assert before.count("waits, at most") == 1
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
    call = ["--scale", "small", "--only", "--ticket random", "--output_dir", str(runs)]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(call)
    assert stop.value.code == 1
    error = capfd.readouterr().err
    assert error.count("failed:") == 1
    assert "holds a run without args.json" in error
    assert json.loads((runs / "ann-random-1" / "synthetic-vgg16-round1" / "results.json").read_text())


def test_nothing_to_do_names_what_there_is(tiny_scale, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--scale", "small", "--only", "Fig. 99"])
    assert stop.value.code == 2
    assert "Table 1, Figs. 1" in capsys.readouterr().err.strip().splitlines()[-1]
