import copy
import functools
import importlib
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from utils import datasets
from utils.files import read_json
from utils.stages import read_rows
from utils.tickets import load_ticket

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # small tensors, and a worker for each core

# the smallest runs that go through everything; at this threshold every layer of the network fires
TINY = (
    "--dataset synthetic --train_samples 16 --test_samples 10 --arch alexnet --width 0.05 --v_threshold 0.5 "
    "--batch_size 8 --timestep 4 --end_iter 4 --valid_freq 2 --learning_rate 0.1 --device cpu"
)
ROUNDS = " --prune_iterations 3"
REWINDING = f"{ROUNDS} --rewinding_epoch 2"
BIRD = f"{ROUNDS} --eb_window 1 --eb_tolerance 0.2"
TIME = " --early_time_epoch 1 --early_time_threshold 1.5 --early_time_samples 20"
FLAGS = {
    "laterewindlth": TINY + REWINDING,
    "earlyT_laterewindlth": TINY + REWINDING + TIME,
    "earlybird": TINY + BIRD,
    "earlyT_earlybird": TINY + BIRD + TIME,
    "oneshot": TINY + ROUNDS,
    "rigl": TINY + ROUNDS,
    "deeprewiring": TINY + ROUNDS,
    "gradrewiring": TINY + ROUNDS,
    "admm": TINY + ROUNDS,
    "gradual": TINY + ROUNDS,
    "shortcycle": f"{TINY}{ROUNDS} --rewinding_epoch 1",
}


def words_of(method, *more):
    """The tiny flags of a method and more; a sparsity takes the place of prunings."""
    own = FLAGS[method].replace(ROUNDS, "") if "--sparsity" in more else FLAGS[method]
    return [*shlex.split(own), *more]


def script(method):
    """The main function of a script."""
    return importlib.import_module(f"train_snn_{method}").main


def same(a, b):
    """Whether two dicts hold the same tensors, bit for bit, in the same order."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


class Started(Exception):
    """A script has accepted its command line; the arguments are those of ``start``."""


@pytest.fixture
def started(monkeypatch):
    """The flags and the sparsity that a script begins a run with; it goes no further."""

    def stop(args, sparsity=None, check=None):
        raise Started(args, sparsity)

    def begin(name, words):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "start", stop)
        with pytest.raises(Started) as found:
            module.main(words)
        return found.value.args

    return begin


@pytest.fixture
def refused(capsys):
    """Calls a program that must end with one line of complaint; returns the line."""

    def refuse(main, *words, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        lines = capsys.readouterr().err.splitlines()
        assert (end.value.code, len(lines)) == (code, 1), lines
        return lines[0]

    return refuse


@pytest.fixture(scope="session", autouse=True)
def synthetic_images():
    """The synthetic images are drawn once a process, not for every run: that takes as long as a run's training."""
    drawn = functools.cache(datasets._synthetic)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "_synthetic", lambda: copy.deepcopy(drawn()))
        yield


@pytest.fixture(scope="module")
def no_pictures():
    """The report's figures are drawn and looked at, but not turned into SVG and PNG, which takes the longest."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: None)
        yield


class Finished:
    """What a run left behind."""

    def __init__(self, folder):
        self.folder = folder
        self.args = read_json(folder / "args.json")
        self.rows = read_rows(folder / "metrics.jsonl")
        self.results = read_json(folder / "results.json")

    def stage(self, phase, level=0):
        return [row for row in self.rows if (row["phase"], row["level"]) == (phase, level)]

    def ticket(self, name):
        return load_ticket(self.folder / "tickets" / f"{name}.safetensors")

    def network(self, name):
        return load_ticket(self.folder / "networks" / f"{name}.safetensors")


def go(root, method, *more):
    """Run a script in this process, and read what it left; ``root`` takes the run."""
    flags = [*words_of(method, *more), "--output_dir", str(root)]
    before = set(root.rglob("summary.txt")) if root.exists() else set()
    script(method)(flags)
    new = set(root.rglob("summary.txt")) - before
    assert len(new) == 1, "one run was finished"
    return Finished(new.pop().parent)


@pytest.fixture
def run(tmp_path):
    """Runs a script with the tiny flags of its method and more, below the test's folder."""
    return lambda method, *more: go(tmp_path / "runs", method, *more)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """The finished tiny run of a method, made once for all workers; not to be written to."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "finished"

    def find(method, *more):
        place = root / "-".join([method, *more]).replace("/", "_")
        with FileLock(f"{place}.lock"):
            done = [path.parent for path in place.rglob("summary.txt")]
            return Finished(done[0]) if done else go(place, method, *more)

    root.mkdir(exist_ok=True)
    return find
