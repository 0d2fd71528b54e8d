"""Two ranks do what one process does, and end together. They are started as a user starts them, by torchrun."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import FLAGS, ROOT, Finished, script
from on_two_ranks import CHECKS

from utils import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
METHOD = "earlyT_earlybird"


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*TORCHRUN, *map(str, command)], env=environment, start_new_session=True, **streams)


def ended(process, seconds=240):
    """The exit code, what it printed, and the lines on stderr that are the scripts' own."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its ranks, too
    return process.returncode, out, [line for line in err.splitlines() if f"train_snn_{METHOD}.py: " in line]


def command(root, *more):
    return [*shlex.split(FLAGS[METHOD]), *more, "--output_dir", str(root)]


def on_two(root, *more):
    return ended(start(ROOT / f"train_snn_{METHOD}.py", *command(root, *more)))


def folder_of(root):
    (path,) = root.rglob("args.json")
    return path.parent


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parts_cover_all_images_once(monkeypatch, ranks):
    monkeypatch.setattr(distributed, "ranks", lambda: ranks)
    for count, together in ((1, 1), (7, 1), (8, 1), (20, 7), (3, 100)):
        seen = []
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            own = distributed.part_of(count, together)
            assert own.start % together == 0 or own.start == count
            seen += range(count)[own]
        assert seen == list(range(count))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What came of all checks on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    ended(start(ROOT / "tests" / "on_two_ranks.py", folder))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(two, name):
    for rank in two:
        assert rank.get(name, "not reached") == "passed", rank.get(name)


@pytest.mark.slow
def test_run_on_two_ranks_that_is_stopped_and_resumed(tmp_path):
    """SIGTERM ends both at the end of one epoch; resumed on two ranks, the run ends as one that nobody stopped."""
    more = ["--checkpoint_minutes", "1000", "--train_samples", "80", "--end_iter", "8", "--eb_window", "7"]
    process = start(ROOT / f"train_snn_{METHOD}.py", *command(tmp_path / "stopped", *more))
    assert any("search_00 epoch 2/8" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    code, _, lines = ended(process)
    assert code != 0
    assert any("stopped" in line for line in lines), lines
    folder = folder_of(tmp_path / "stopped")
    assert not (folder / "summary.txt").exists()
    saved = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 2 <= saved < 16
    code, out, _ = on_two(tmp_path / "stopped", *more)
    assert code == 0
    assert "epoch 1/8" not in out.split("train_02")[0]  # no epoch of the search was lost
    assert on_two(tmp_path / "whole", *more)[0] == 0
    both = [Finished(folder), Finished(folder_of(tmp_path / "whole"))]
    assert both[0].args["circumstances"]["ranks"] == 2
    rows = [[{n: v for n, v in row.items() if n != "seconds"} for row in run.rows] for run in both]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 16  # every row was written once
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    assert all((folder / name).read_bytes() == (both[1].folder / name).read_bytes() for name in names)
    assert len(both[0].results) == 1


@pytest.mark.slow
def test_run_begun_by_one_process_is_ended_by_two_ranks(tmp_path, monkeypatch):
    from test_resume import exit_code, send

    with monkeypatch.context() as patch:
        send(patch, signal.SIGTERM)
        assert exit_code(METHOD, command(tmp_path)) == 128 + signal.SIGTERM
    code, out, _ = on_two(tmp_path)
    assert code == 0
    assert "with ranks 1, now 2" in out
    run = Finished(folder_of(tmp_path))
    assert (run.args["circumstances"]["ranks"], run.args["resumed_with"][0]["ranks"]) == (1, 2)
    assert len(run.results) == 1
    assert script(METHOD)(command(tmp_path)) is None  # it is finished


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "named"), [("--batch_size 1", "--batch_size"), ("--test_samples 9999", "--test_samples")]
)
def test_bad_input_is_one_line_of_a_rank(tmp_path, more, named):
    code, _, lines = on_two(tmp_path, *more.split())
    assert code != 0
    assert lines
    assert all(named in line for line in lines)
    assert not list(tmp_path.rglob("args.json"))
