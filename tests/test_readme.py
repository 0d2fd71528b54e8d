"""What the README promises can be typed."""

import re
import shlex

import pytest
from conftest import ROOT, script

from benchmarks import reproduce
from utils.flags import METHODS, get_args, make_parser
from utils.records import RESULT_FIELDS

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCSTRINGS = [(ROOT / f"train_snn_{method}.py").read_text(encoding="utf-8").split('"""')[1] for method in METHODS]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
# in a line for Slurm, a command ends before its quotation mark or semicolon
COMMANDS = re.findall(r"python (train_snn_\w+)\.py *([^';\n]*)", "\n".join([TEXT, *DOCSTRINGS, MAKEFILE]))
LAUNCHES = re.findall(r"python benchmarks/reproduce\.py *([^';#\n]*)", "\n".join([TEXT, reproduce.__doc__]))


def test_commands_are_there():
    assert len(COMMANDS) >= 9
    assert {name.removeprefix("train_snn_") for name, _ in COMMANDS} == set(METHODS)


@pytest.mark.parametrize(("name", "flags"), COMMANDS)
def test_commands_parse(name, flags, capsys, monkeypatch):
    assert (ROOT / f"{name}.py").exists()
    # a saved ticket is one that an earlier command writes
    monkeypatch.setattr("utils.flags.Path.is_file", lambda path: True)
    monkeypatch.setattr("utils.flags.load_ticket", lambda path, remedy: ({}, {}, {"level": 8, "epoch": 20}))
    get_args(name.removeprefix("train_snn_"), None, shlex.split(flags.replace("$SLURM_ARRAY_TASK_ID", "1")))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flags", LAUNCHES)
def test_launches_parse(flags):
    reproduce.make_parser().parse_args(shlex.split(flags))


def test_make_targets_exist():
    for target in re.findall(r"^    make (\w+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), target


def test_every_flag_and_result_field_is_documented():
    for action in make_parser("oneshot")._actions:
        if action.dest != "help":
            assert f"`{action.option_strings[0]}" in TEXT, action.dest
    for action in reproduce.make_parser()._actions:
        if action.dest != "help":
            assert f"| `{action.option_strings[0]}" in TEXT, action.dest
    assert all(f"`{field}`" in TEXT for field in RESULT_FIELDS)


@pytest.mark.parametrize("method", METHODS)
def test_help(method, capsys):
    with pytest.raises(SystemExit) as stop:
        script(method)(["--help"])
    assert stop.value.code == 0
    assert f"python train_snn_{method}.py" in capsys.readouterr().out
