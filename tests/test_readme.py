"""What the README, the docs and the scripts promise can be typed."""

import re
import shlex

import pytest
from conftest import ROOT

from benchmarks import reproduce

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "Makefile",
    *sorted(ROOT.glob("train_snn_*.py")),
]
WITH_COMMANDS = [path for path in PAGES if path.name != "extending.md"]  # test_extending.py runs those
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in WITH_COMMANDS).replace("\\\n", " ")
TEXT = TEXT.replace("$(DEMO)", re.search(r"^DEMO := (.*)", TEXT, re.MULTILINE)[1])
# in a line for Slurm, a command ends before its quotation mark or semicolon
COMMANDS = re.findall(r"python (train_snn_\w+)\.py *([^';\n]*)", TEXT)


def test_every_script_is_shown():
    assert {name for name, _ in COMMANDS} == {path.stem for path in ROOT.glob("train_snn_*.py")}


@pytest.mark.parametrize(("name", "flags"), sorted(set(COMMANDS)))
def test_commands_parse(name, flags, monkeypatch, finished, started, tmp_path):
    saved = finished("earlybird").folder / "tickets" / "level_02.safetensors"
    words = [str(saved) if word.endswith(".safetensors") else word for word in shlex.split(flags)]
    (tmp_path / "DIR" / "NAME").mkdir(parents=True)  # where the page says that images are
    monkeypatch.chdir(tmp_path)
    started(name, [word.replace("$SLURM_ARRAY_TASK_ID", "1") for word in words])


@pytest.mark.parametrize("flags", re.findall(r"python benchmarks/reproduce\.py *([^';#\n]*)", TEXT + reproduce.__doc__))
def test_lists_of_commands_parse(flags):
    reproduce.make_parser().parse_args(shlex.split(flags))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#: ]+)\)", page.read_text(encoding="utf-8")) if page.suffix == ".md" else []:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_targets_exist():
    targets = re.findall(r"^ +make ([\w-]+)", TEXT, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_its_code_runs(finished, monkeypatch):
    """The snippet that rebuilds a network, on a network of a test."""
    import torch

    (code,) = [
        part
        for part in (ROOT / "README.md").read_text().split("\n\n")
        if "load_ticket_network(" in part and "images" in part
    ]
    run = finished("earlybird")
    code = re.sub(r'"runs/[^"]+"', repr(str(run.folder / "networks" / "level_02.safetensors")), code)
    names = {"images": torch.zeros(2, 3, 32, 32)}
    exec("from utils.tickets import load_ticket_network\n" + code.replace("    ", ""), names)
    assert names["logits"].shape == (5, 2, 10)
