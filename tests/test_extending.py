"""The changes of docs/extending.md, applied to a copy of the repository and run."""

import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from utils import experiment
from utils.files import read_json

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
FOLDERS = ("models", "utils")


def code(title, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", SECTIONS[title], re.MULTILINE | re.DOTALL)


@pytest.fixture
def copy(tmp_path):
    """A copy of what the scripts need."""
    root = tmp_path / "copy"
    for path in [*ROOT.glob("train_snn_*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))]:
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root


def words_of(command, dataset="synthetic"):
    """The script of a command of the page and its flags, with those of the smallest runs after its own."""
    script, *flags = command.split()[1:]
    tiny = TINY.replace("--dataset synthetic", f"--dataset {dataset}").split()
    arch = ["--arch", flags[flags.index("--arch") + 1]] if "--arch" in flags else []
    return [script, *flags, *tiny, *arch, "--output_dir", "runs"]


def result_in(root):
    (results,) = (root / "runs").rglob("results.json")
    (row,) = read_json(results)
    return row


def ran(root, command, dataset="synthetic"):
    """The results of a command in a process of its own."""
    words = [sys.executable, *words_of(command, dataset)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return result_in(root)


def command(title):
    """The command of a section."""
    return re.findall(r"^ +(python train_snn_.*)", SECTIONS[title], re.MULTILINE)[0]


def test_method(tmp_path, monkeypatch):
    """In this process: the script needs no change of what is here."""
    (script,) = code("A method", "python")
    words = words_of(command("A method"))
    (tmp_path / "train_snn_once.py").write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(experiment, "ROOT", tmp_path)  # where the script lies
    runpy.run_path(words[0], run_name="__main__")
    row = result_in(tmp_path)
    assert row["method"] == "once"
    assert abs(row["sparsity"] - 90) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "field", "value"),
    [("A score", "method", "oneshot-lamp"), ("A network", "arch", "two"), ("A neuron", "method", "oneshot-random")],
)
def test_patch(copy, title, field, value):
    (patch,) = code(title, "diff")
    subprocess.run(["git", "apply", "-C1", "-"], cwd=copy, input=patch, text=True, check=True)
    row = ran(copy, command(title))
    assert row[field] == value
    assert abs(row["sparsity"] - 90) < 0.5


@pytest.mark.slow
def test_data_set_with_and_without_its_line(copy):
    from PIL import Image

    for split in ("train", "test"):
        for name, colour in (("ant", "black"), ("bee", "white")):
            folder = copy / "my_images" / "bugs" / split / name
            folder.mkdir(parents=True)
            for i in range(30):
                Image.new("RGB", (40, 32), colour).save(folder / f"{i}.png")
    (patch,) = code("A data set", "diff")
    row = ran(copy, command("A data set"), "bugs")
    assert row["dataset"] == "bugs"
    subprocess.run(["git", "apply", "-C1", "-"], cwd=copy, input=patch, text=True, check=True)
    assert "bugs" in (copy / "utils" / "datasets.py").read_text(encoding="utf-8")
    ran(copy, f"{command('A data set')} --restart", "bugs")
