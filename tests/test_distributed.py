"""Two ranks do what one process does, and end together. They are started as a user starts them, by torchrun."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Finished, script
from on_two_ranks import CHECKS, FIVE_STEPS, METHODS
from test_resume import Killed, contents, kill_at

from utils.flags import get_args
from utils.masks import distance

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LONG = "--train_samples 240 --batch_size 4 --end_iter 2".split()  # 60 steps an epoch


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(
        [*TORCHRUN, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def lines_of(process, seconds=60):
    """The exit code, what it printed to stdout, and its own lines on stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its ranks, too
    return (
        process.returncode,
        out,
        [line for line in err.splitlines() if re.search("train_snn_.*error:|stopped and saved", line)],
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two ranks did all checks, and what came of them."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:  # a run to go on with
        kill_at(patch, 12, True)
        with pytest.raises(Killed):
            script("laterewindlth")([*TINY, "--output_dir", str(folder / "two"), "--exp_name", "begun"])
    lines_of(start(ROOT / "tests" / "on_two_ranks.py", folder), seconds=400)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two, name):
    for rank in two[1]:
        assert rank.get(name, "not reached") == "passed", rank.get(name)


def on_one(tmp_path, method, *more):
    """The same run in this process."""
    flags = [*TINY, "--output_dir", str(tmp_path), *more]
    script(method)(flags)
    return Finished(tmp_path / get_args(method, None, flags).exp_name / "synthetic-vgg16-round1")


@pytest.mark.parametrize("method", METHODS)
def test_run_on_two_ranks_is_the_run_on_one(two, tmp_path, method):
    one = on_one(tmp_path, method)
    both = Finished(two[0] / "two" / one.folder.parent.name / one.folder.name)
    assert (one.args["ranks"], both.args["ranks"]) == (1, 2)
    for row, expected in zip(both.rows, one.rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert row.get("early_time") == expected.get("early_time")
        assert row["test_accuracy"] == expected["test_accuracy"]
    (result,), (expected) = both.results, one.results[0]
    assert result.keys() == expected.keys()
    assert result["spikes_per_image"] == pytest.approx(expected["spikes_per_image"], rel=1e-2)
    assert distance(both.ticket(2)[0], one.ticket(2)[0]) < 1e-3


def test_first_five_losses_are_those_of_one_process(two, tmp_path):
    one = on_one(tmp_path, "laterewindlth", *FIVE_STEPS)
    both = Finished(two[0] / "two" / "steps" / one.folder.name)
    losses = [[row["loss"] for row in run.rows][:5] for run in (one, both)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len({round(loss, 3) for loss in losses[0]}) == 5  # it learns
    assert abs(losses[0][0] - math.log(10)) > 1e-3  # and its last neurons fire


def test_run_begun_by_one_process_is_ended_by_two_ranks(two, tmp_path):
    one = on_one(tmp_path, "laterewindlth")
    both = Finished(two[0] / "two" / "begun" / one.folder.name)
    assert both.args["ranks"] == 1  # which began it
    assert [row["level"] for row in both.results] == [0, 1, 2]
    assert [row["loss"] for row in both.rows] == pytest.approx([row["loss"] for row in one.rows], abs=1e-3)


def begun(tmp_path, method):
    """A long run on two ranks that has come some steps into its second epoch."""
    flags = [*TINY, *LONG, "--output_dir", str(tmp_path / "two")]
    process = start(ROOT / f"train_snn_{method}.py", *flags)
    first = next(line for line in process.stdout if "images/s" in line)
    assert "epoch 1/2" in first
    time.sleep(0.3)
    return process, flags


def test_stopped_on_two_ranks_goes_on_on_one_and_on_two(tmp_path):
    process, flags = begun(tmp_path, "oneshot")
    process.send_signal(signal.SIGTERM)
    code, _, errors = lines_of(process)
    assert code != 0
    assert errors[0].startswith("train level 2 epoch 2/2 T=3: stopped and saved after step")
    folder = tmp_path / "two" / "oneshot-random" / "synthetic-vgg16-round1"
    assert (folder / "checkpoints" / "interrupted.safetensors").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    script("oneshot")(flags)
    code, _, _ = lines_of(start(ROOT / "train_snn_oneshot.py", *flags[:-1], tmp_path / "again"))
    assert code == 0
    one = on_one(tmp_path / "one", "oneshot", *LONG)
    for goes_on in (folder, tmp_path / "again" / "oneshot-random" / folder.name):
        ended = Finished(goes_on)
        assert ended.rows[0]["loss"] == pytest.approx(one.rows[0]["loss"], abs=1e-4)
        assert ended.rows[1]["loss"] == pytest.approx(one.rows[1]["loss"], rel=0.05)  # spikes have flipped by then
        assert len(ended.results) == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_the_checkpoint_stands(tmp_path, rank):
    process, flags = begun(tmp_path, "oneshot")
    folder = tmp_path / "two" / "oneshot-random" / "synthetic-vgg16-round1"
    before = contents(folder)
    assert "checkpoints/train.safetensors" in before
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {Path(f"/proc/{pid}/environ").read_text().split("\0RANK=")[1][0]: int(pid) for pid in children
             if "\0RANK=" in Path(f"/proc/{pid}/environ").read_text()}  # fmt: skip
    os.kill(ranks[str(rank)], signal.SIGKILL)
    code, _, errors = lines_of(process)
    assert code != 0
    (error,) = errors
    assert "contact to another rank is lost" in error
    assert "the same command goes on from the last checkpoint" in error
    assert torch.equal(
        contents(folder)["checkpoints/train.safetensors"][0]["model.stem.weight"],
        before["checkpoints/train.safetensors"][0]["model.stem.weight"],
    )
    script("oneshot")(flags)
    assert len(Finished(folder).results) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 1", "--batch_size: must be at least 2, the number of ranks, got 1"),
        ("--test_samples 9999", "--test_samples must be from 1 to 200"),
    ],
)
def test_bad_input_is_one_line_of_one_rank(tmp_path, flags, message):
    flags = [*TINY, *flags.split(), "--output_dir", tmp_path]
    code, _, errors = lines_of(start(ROOT / "train_snn_earlybird.py", *flags))
    assert code != 0
    (error,) = errors
    assert message in error


def test_more_ranks_than_cards(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("utils.distributed.ranks", lambda: 4)
    monkeypatch.setattr("utils.distributed.ranks_here", lambda: 4)
    for device, message in (("cuda", "4 ranks were started on a machine with 2 GPU"), ("cuda:1", "cuda instead of")):
        with pytest.raises(SystemExit) as stop:
            get_args("earlybird", None, ["--device", device])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
