"""How far runs are, from folders written by hand, one of them locked."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_report import epochs, result, write

from report import main
from utils.files import hold


def unfinished(root, name, rows, **flags):
    folder = write(root, name, "laterewindlth", 1, [], rows, **flags)
    (folder / "summary.txt").unlink()
    return folder


def lock_of(folder):
    return folder.with_name(f".{folder.name}.lock")


def write_some(root):
    """A run that is done, one that is at work, one that was stopped, one that has not begun, and a damaged folder."""
    write(root, "done", "earlybird", 1, [result(8, 90.0)], epochs("train", 8, 300, test_accuracy=90.0))
    rows = epochs("dense", 0, 20) + epochs("search", 3, 60, seconds=5.0, test_accuracy=71.25)
    rows += [row | {"epoch": 60, "test_accuracy": None} for row in epochs("search", 3, 1, seconds=30.0)]
    running = unfinished(root, "running", rows)
    rows = epochs("dense", 0, 7, stop=20, test_accuracy=33.0)
    stopped = unfinished(root, "stopped", rows, device="another")
    lock_of(stopped).write_text("")
    unfinished(root, "new", [])
    damaged = unfinished(root, "damaged", [])
    (damaged / "args.json").write_text("{")
    (unfinished(root, "gone", []) / "args.json").unlink()
    return running


def files(root):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def test_a_line_says_how_far_each_run_is_and_nothing_is_written(tmp_path, capsys):
    lock = hold(lock_of(write_some(tmp_path)), "in use")
    before = files(tmp_path)
    main([str(tmp_path), "--status"])
    lock.release()
    assert files(tmp_path) == before
    title, *lines = capsys.readouterr().out.splitlines()
    by_name = {line.split("/")[0]: line for line in lines}
    assert len(by_name) == len(lines) == 6
    states = {name: by_name[name].split()[1] for name in ("done", "running", "stopped", "new")}
    assert states == {"done": "done", "running": "running", "stopped": "stopped", "new": "stopped"}
    for name, shown in {
        "done": ("train_08", "300 of 300", "90.00"),
        "running": ("search_03", "61 of 300", "71.25", "1:59:30"),  # 239 epochs of 30 s
        "stopped": ("dense_00", "7 of 20", "33.00"),
    }.items():
        assert all(part in by_name[name] for part in shown), name
    assert not any("0:" in by_name[name] for name in ("done", "stopped"))
    places = [title.index(column) for column in ("state", "stage", "epoch", "test accuracy")]
    for name in ("done", "running", "stopped"):  # aligned
        assert all(by_name[name][place - 1] == " " != by_name[name][place] for place in places)
    assert all("args.json" in by_name[name] for name in ("damaged", "gone"))


def test_it_does_without_torch(tmp_path):
    write_some(tmp_path)
    (tmp_path / "torch.py").write_text("raise ImportError('torch')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "report.py"), str(tmp_path), "--status"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 7


@pytest.mark.parametrize("exists", [True, False])
def test_no_run_is_one_line(tmp_path, capsys, exists):
    main([str(tmp_path if exists else tmp_path / "no"), "--status"])
    assert str(tmp_path) in capsys.readouterr().out.strip("\n")


def test_a_wrong_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--statos"])
    lines = capsys.readouterr().err.splitlines()
    assert (stop.value.code, len(lines)) == (2, 1)
    assert "--statos" in lines[0]
