import importlib
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.files import read_tensors
from utils.flags import METHODS, get_args
from utils.records import identity, read_args, read_results, read_rows
from utils.tickets import load_ticket

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on the CPU")
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # small tensors; CI has two cores and subprocesses to run

# the smallest runs that go through everything: a few seconds for the longest script
TINY = (
    "--dataset synthetic --train_samples 40 --test_samples 20 --width 0.0625 --batch_size 16 --timestep 3 --end_iter 4 "
    "--rewinding_epoch 2 --prune_iterations 3 --valid_freq 2 --learning_rate 0.1 --device cpu "
    "--eb_window 1 --eb_tolerance 0.2 --early_time_epoch 1 --early_time_threshold 1.5 --early_time_samples 20"
).split()


def pytest_addoption(parser):
    parser.addoption("--torture", action="store_true", help="the long form of tests/test_torture.py, 8 minutes")


@pytest.fixture(scope="session")
def torture(pytestconfig):
    """Whether the long form was asked for."""
    return pytestconfig.getoption("--torture")


@pytest.fixture
def tiny(tmp_path):
    """Flags of a tiny run that writes below the test's folder."""
    return [*TINY, "--output_dir", str(tmp_path / "runs")]


@pytest.fixture
def tiny_args(tiny):
    def make(method="laterewindlth", *more):
        return get_args(method, None, [*tiny, *more])

    return make


def script(method):
    """The main function of a script."""
    assert method in METHODS
    return importlib.import_module(f"train_snn_{method}").main


def folder_of(tmp_path, method, round=1, arch="vgg16"):
    method = "oneshot-random" if method == "oneshot" else method
    return tmp_path / "runs" / method / f"synthetic-{arch}-round{round}"


def lively(model, images):
    """Bring the running statistics close to the data's, so that an untrained network fires in eval mode, up to the
    hidden layers of ResNet19 and AlexNet, which no batch norm feeds."""
    *hidden, _ = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for layer in hidden:
        layer.weight.data.mul_(20)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.5
    with torch.no_grad():
        for _ in range(10):
            model.train()(images, 3)
    for norm in norms:
        norm.momentum = 0.1
    return model


def make_tree(root, splits=("train", "test"), classes=("ant", "bee"), count=3, size=32, mode="RGB"):
    """A tree of image files, as a user would lay it out."""
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (size, size, 3) if mode == "RGB" else (size, size)
                Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(
                    root / split / name / f"{i}.png"
                )


def kernels():
    """How many graphs torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Finished:
    """What a run left behind."""

    def __init__(self, folder):
        self.folder = folder
        self.args = read_args(folder / "args.json", "")
        self.rows = read_rows(folder / "metrics.jsonl", "", identity(self.args))
        self.results = read_results(folder / "results.json", "", identity(self.args))

    def stage(self, phase, level):
        return [row for row in self.rows if (row["phase"], row["level"]) == (phase, level)]

    def ticket(self, level):
        return load_ticket(self.folder / "tickets" / f"level_{level:02d}.safetensors")

    def network(self, stage):
        tensors, _ = read_tensors(self.folder / "checkpoints" / f"{stage}.safetensors", "")
        return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


@pytest.fixture
def run(tmp_path, tiny):
    def go(method, *more, arch="vgg16"):
        script(method)([*tiny, *more, "--arch", arch])
        name = get_args(method, None, [*tiny, *more]).exp_name
        return Finished(tmp_path / "runs" / name / f"synthetic-{arch}-round1")

    return go
