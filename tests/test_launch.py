"""Working through a list: the order, what is tried again, put aside or given up; on this machine and on Ray."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import launch, reproduce
from utils.files import InputError

# does what its first argument says, and writes down when
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
what, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
def note(word):
    with open(folder / "notes", "a") as file:
        print(name, word, file=file)
note("begins")
print("threads", os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"], flush=True)
again = (folder / f"{name}.tried").exists()
(folder / f"{name}.tried").touch()
if what == "wrong" or (what == "wrong once" and not again):
    sys.exit("error: wrong")
if what == "killed once" and not again:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "used once" and not again:
    sys.exit(75)
if what in ("long", "deaf"):
    def end(*_):
        note("saves")
        sys.exit(143)
    signal.signal(signal.SIGTERM, end if what == "long" else signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: note("is interrupted"))
    note(f"is {os.getpid()}")
    time.sleep(60)
note("ends")
"""


@dataclass(frozen=True)
class Stub:
    """A command of the list."""

    name: str
    words: tuple[str, ...]
    needs: str | None = None


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Makes commands that do what they are told."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(launch, "ASK_AGAIN", 0.0)

    def make(name, what="fine", needs=None):
        return Stub(name, (str(script), what, str(tmp_path), Path(name).name), needs)

    return make


def here(commands, folder, jobs=1):
    return launch.run_here(commands, folder / "logs", jobs, 1)


def on_ray(commands, folder, jobs=1):
    pytest.importorskip("ray")
    return launch.run_on_ray(commands, folder / "logs", None, 1, None)


BOTH = pytest.mark.parametrize("run", [here, pytest.param(on_ray, marks=pytest.mark.slow)])


def notes(folder):
    return (folder / "notes").read_text().splitlines()


def begun(folder):
    return [line.removesuffix(" begins") for line in notes(folder) if line.endswith("begins")]


@BOTH
def test_a_run_starts_once_its_ticket_is_there(run, stub, tmp_path, capsys):
    assert run([stub("a"), stub("of-a", needs="a"), stub("b"), stub("of-b", needs="b")], tmp_path, 2) == []
    lines = notes(tmp_path)
    for name in "ab":
        assert lines.index(f"{name} ends") < lines.index(f"of-{name} begins")
    assert "done 4 of 4" in capsys.readouterr().out.splitlines()[-1]


@BOTH
@pytest.mark.parametrize("what", ["wrong once", "killed once", "used once"])
def test_what_fails_once_is_tried_again(run, what, stub, tmp_path):
    assert run([stub("a", what), stub("of-a", needs="a"), stub("b")], tmp_path) == []
    assert sorted(begun(tmp_path)) == ["a", "a", "b", "of-a"]
    lines = notes(tmp_path)
    assert lines.index("a ends") < lines.index("of-a begins")


@BOTH
def test_what_fails_twice_is_given_up_with_those_that_need_it(run, stub, tmp_path, capsys):
    stubs = [stub("exp/a", "wrong"), stub("of-a", needs="exp/a"), stub("b")]
    assert set(run(stubs, tmp_path)) == set(stubs[:2])
    assert sorted(begun(tmp_path)) == ["a", "a", "b"]
    shown = capsys.readouterr()
    assert "exp/a" in shown.err
    assert "error: wrong" in shown.err
    assert "done 1 of 3" in shown.out
    log = (tmp_path / "logs" / "exp-a.log").read_text()
    assert log.count("error: wrong") == log.count("$ ") == 2


def test_a_run_in_use_elsewhere_holds_up_no_other(stub, tmp_path):
    assert here([stub("a", "used once"), stub("b"), stub("c")], tmp_path) == []
    assert begun(tmp_path) == ["a", "b", "c", "a"]


def test_jobs_and_threads(stub, tmp_path, monkeypatch):
    most, start = [], launch._start

    def counted(*arguments):
        most.append(1 + sum(process.poll() is None for process in processes))
        processes.append(start(*arguments))
        return processes[-1]

    processes = []
    monkeypatch.setattr(launch, "_start", counted)
    assert launch.run_here([stub(name) for name in "abcde"], tmp_path / "logs", 2, 3) == []
    assert max(most) == 2
    assert "threads 3 PASSIVE" in (tmp_path / "logs" / "a.log").read_text()


LAUNCHER = """
import sys
from collections import namedtuple
from pathlib import Path
from benchmarks.launch import run_here, run_on_ray
folder, what, where = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
Stub = namedtuple("Stub", "name words needs")  # not imported from here, which would take torch along
commands = [Stub(name, (str(folder / "script.py"), what, str(folder), name), None) for name in ("a", "b")]
if where == "ray":
    run_on_ray(commands, folder / "logs", None, 1, None)
else:
    run_here(commands, folder / "logs", 1, 1)
"""


@pytest.mark.parametrize(
    ("what", "where", "signals", "code"),
    [
        ("long", "here", [signal.SIGTERM], 143),
        ("long", "here", [signal.SIGINT], 130),
        ("deaf", "here", [signal.SIGINT] * 2, 130),
        pytest.param("long", "ray", [signal.SIGTERM], 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_lets_runs_save_and_leaves_no_process_behind(what, where, signals, code, stub, tmp_path):
    if where == "ray":
        pytest.importorskip("ray")
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, tmp_path, what, where],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "notes").exists() or "a is " not in (tmp_path / "notes").read_text():
        assert launcher.poll() is None
        time.sleep(0.05)
    process = int(next(line.split()[-1] for line in notes(tmp_path) if line.startswith("a is ") and line[-1].isdigit()))
    for place, number in enumerate(signals):
        if place > 0:
            next(line for line in launcher.stdout if line.startswith("stopping"))
        if where == "here":
            os.killpg(launcher.pid, number)  # as a terminal does with Ctrl-C
        else:
            launcher.send_signal(number)
    launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert ("a saves" in notes(tmp_path)) == (what == "long")
    assert "a is interrupted" not in notes(tmp_path)
    if where == "here":
        assert begun(tmp_path) == ["a"]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_without_ray_one_line_names_the_flag(monkeypatch, refused, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused(reproduce.main, "--launcher", "ray", "--scale", "small", "--output_dir", tmp_path)
    assert "--launcher" in line
    assert "requirements-cluster.txt" in line


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:1"])
def test_an_address_where_no_ray_is_answers_at_once(address, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="--address"):
        launch.run_on_ray([], Path(tmp_path), address, 1, None)


@pytest.mark.slow
def test_a_run_that_no_machine_has_room_for_is_refused(stub, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="100000 CPUs"):
        launch.run_on_ray([stub("a")], tmp_path / "logs", None, 100_000, 0)
