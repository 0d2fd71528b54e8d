"""Working through a list: the order, what is tried again, put aside or given up; and on Ray, with a worker killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT, TINY, script

from benchmarks import launch, reproduce
from benchmarks.launch import DIED, IN_USE, INTERRUPTED, RETRIES, Local, OnRay, Work
from utils.errors import InputError
from utils.signals import Stopped


class Played:
    """Runs that end as written down, in the order they were started, one at a time; the last code is the later ones',
    too."""

    def __init__(self, codes, slots=1):
        self.codes, self.slots = {name: list(codes) for name, codes in codes.items()}, slots
        self.running, self.log, self.most = [], [], 0
        self.done = set()

    def start(self, command, log):
        assert len(self.log) < 20, "for ever"
        self.running.append(command)
        self.log.append(command.name)
        self.most = max(self.most, len(self.running))
        with log.open("a") as file:
            file.write(f"line {len(self.log)} of {command.name}\n")

    def wait(self, seconds):
        if not self.running:
            return []
        command = self.running.pop(0)
        codes = self.codes.get(command.name, [0])
        code = codes.pop(0) if len(codes) > 1 else codes[0]
        if callable(code):
            code = code()
        if code == 0:
            self.done.add(command.name)
        return [(command, code)]

    def stop(self):
        self.log.append("stop")
        for command in self.running:
            self.codes[command.name] = [INTERRUPTED]

    def state(self, command):
        return "done" if command.name in self.done else "missing"


def run_of(name, *flags, ticket=None):
    """A command whose run is called NAME/synthetic-vgg16-round1."""
    flags = ("--dataset", "synthetic", "--arch", "vgg16", "--round", "1", "--exp_name", name, *flags)
    if ticket:
        flags += ("--ticket", f"runs/{ticket}/tickets/level_01.safetensors")
    return reproduce.Command((), "oneshot", flags)


A, B, C, D = (run_of(letter) for letter in "abcd")
OF_A = run_of("of-a", ticket=A.name)


def short(names):
    return [name.split("/")[0] for name in names]


@pytest.fixture
def work(tmp_path):
    def make(commands, executor, cost=lambda command: 1.0):
        return Work(commands, executor, tmp_path / "logs", executor.state, cost)

    return make


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(launch, "ASK_AGAIN", 0.0)


def test_a_run_starts_once_its_ticket_is_there_and_no_slot_waits_for_it(work):
    executor = Played({}, slots=2)
    work([OF_A, A, B, C], executor).run()
    assert short(executor.log) == ["a", "b", "of-a", "c"]
    assert executor.most == 2


def test_what_is_done_is_not_started(work, capsys):
    executor = Played({})
    executor.done = {A.name}
    work([A, OF_A, B], executor).run()
    assert short(executor.log) == ["of-a", "b"]
    out = capsys.readouterr().out
    assert out.startswith("2 of 3 runs")
    assert "1 done, 1 running, 0 failed, 1 waiting\n" in out  # nothing is claimed before the first is done
    assert "3 done, 0 running, 0 failed, 0 waiting; about 0:00:00 left\n" in out


@pytest.mark.parametrize("code", [DIED, 128 + signal.SIGTERM])
def test_a_killed_run_goes_on_next(work, code):
    executor = Played({A.name: [code] * RETRIES + [0]})
    tried = work([A, B], executor)
    tried.run()
    assert short(executor.log) == ["a"] * (RETRIES + 1) + ["b"]
    assert not tried.failed


def test_a_run_that_is_killed_each_time_is_given_up(work):
    executor = Played({A.name: [DIED]})
    tried = work([A, B], executor)
    tried.run()
    assert short(executor.log) == ["a"] * (RETRIES + 1) + ["b"]
    assert tried.failed == {A: f"line {RETRIES + 1} of {A.name}"}  # of the last try alone


def test_a_run_that_cannot_be_started_stops_only_the_runs_that_need_its_ticket(work, monkeypatch):
    executor = Played({})
    start = executor.start

    def full(command, log):
        if command == A:
            raise OSError(28, "No space left on device", str(log))
        start(command, log)

    monkeypatch.setattr(executor, "start", full)
    tried = work([A, OF_A, B], executor)
    tried.run()
    assert short(executor.log) == ["b"]
    assert "No space left on device" in tried.failed[A]
    assert "needs the ticket" in tried.failed[OF_A]


def test_an_error_stops_only_the_runs_that_need_the_ticket(work, capsys):
    executor = Played({A.name: [1], B.name: [2]})
    tried = work([A, B, OF_A, C], executor)
    tried.run()
    assert short(executor.log) == ["a", "b", "c"]
    assert set(tried.failed) == {A, B, OF_A}
    assert f"needs the ticket of {A.name}, which failed" in tried.failed[OF_A]
    assert "1 done, 0 running, 3 failed, 0 waiting" in capsys.readouterr().out


def test_a_run_in_use_is_asked_for_again_after_all_others_and_done_elsewhere(work, capsys):
    executor = Played({A.name: [IN_USE], C.name: [lambda: executor.done.add(A.name) or 0]})
    tried = work([A, OF_A, B, C], executor)
    tried.run()
    # put aside while there is other work; then finished by its holder, and its ticket is used
    assert short(executor.log) == ["a", "b", "c", "of-a"]
    assert not tried.failed
    out = capsys.readouterr().out
    assert f"done elsewhere: {A}" in out
    assert "4 done, 0 running, 0 failed, 0 waiting" in out
    assert "1 in use elsewhere" in out


def test_a_run_whose_holder_died_is_taken_over(work):
    executor = Played({A.name: [IN_USE, IN_USE, 0]})
    tried = work([A, B], executor)
    tried.run()
    assert short(executor.log) == ["a", "b", "a", "a"]
    assert executor.done == {A.name, B.name}


def test_a_run_finished_by_another_since_the_list_was_read_is_not_started(work):
    executor = Played({A.name: [lambda: executor.done.add(B.name) or 0]})
    work([A, B, C], executor).run()
    assert short(executor.log) == ["a", "c"]


def test_a_signal_stops_what_runs_and_starts_nothing(work, capsys):
    executor = Played({A.name: [lambda: signal.raise_signal(signal.SIGTERM) or 0]}, slots=2)
    tried = work([A, B, C], executor)
    with pytest.raises(Stopped) as stop:
        tried.run()
    assert stop.value.number == signal.SIGTERM
    assert short(executor.log) == ["a", "b", "stop"]
    assert not tried.failed
    assert not tried.deaths
    assert "1 done, 0 running, 0 failed, 2 waiting" in capsys.readouterr().out


def test_a_signal_while_all_is_in_use_elsewhere_ends_the_waiting(work):
    executor = Played({A.name: [IN_USE, lambda: signal.raise_signal(signal.SIGINT) or IN_USE]})
    with pytest.raises(Stopped):
        work([A], executor).run()


def test_time_left_goes_by_cost_and_hands(work, monkeypatch):
    executor = Played({}, slots=2)
    tried = work([A, B, C, D], executor, {A: 1.0, B: 2.0, C: 3.0, D: 4.0}.get)
    assert tried.seconds_left() is None
    tried.waiting, tried.finished, tried.seconds = [C, D], [A], Counter({A: 10.0})
    monkeypatch.setattr(launch.time, "monotonic", lambda: 105.0)
    tried.running = {B: 100.0}  # 10 s a unit: 20 s, 5 of them gone
    assert tried.seconds_left() == pytest.approx((15 + 30 + 40) / 2)
    tried.running, tried.waiting = {}, [D]
    assert tried.seconds_left() == pytest.approx(40)  # one run is not made faster by two hands


def test_cost_goes_with_network_images_timesteps_and_epochs():
    flags = "--dataset cifar10 --arch vgg16 --round 1 --exp_name x --sparsity_round 1"

    def cost(more="", method="oneshot"):
        return reproduce.cost(reproduce.Command((), method, tuple(f"{flags} {more}".split())))

    assert cost("--timestep 10") == 2 * cost("--timestep 5")
    assert cost("--end_iter 100") == cost() / 3
    assert cost("--train_samples 5000") == cost() / 10
    # 313.2 million multiply-accumulates of VGG16 on 32x32 pixels, two operations each
    assert cost("--timestep 1 --end_iter 1 --train_samples 100") == pytest.approx(100 * 2 * 313.2e6, rel=1e-3)
    assert cost("--arch resnet19") > cost()


# --- this machine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A script that does what its --exp_name says."""
    (tmp_path / "train_snn_oneshot.py").write_text(
        "import os, signal, sys, time\n"
        "name = sys.argv[sys.argv.index('--exp_name') + 1]\n"
        "print(name, 'with', os.environ['OMP_NUM_THREADS'], 'threads', flush=True)\n"
        "if name == 'killed': os.kill(os.getpid(), 9)\n"
        "if name == 'wrong': sys.exit('error: wrong')\n"
        "if name == 'used': sys.exit(75)\n"
        "if name.startswith('shared'):\n"
        "    import fcntl, pathlib\n"
        "    lock = open(f'{name}.lock', 'w')\n"
        "    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except OSError: sys.exit(75)\n"
        "    if pathlib.Path(f'{name}.done').exists(): sys.exit(0)\n"
        "    time.sleep(0.3)\n"
        "    open(f'{name}.begun', 'a').write('once ')\n"
        "    if name == 'shared-3' and pathlib.Path(f'{name}.begun').read_text() == 'once ': os.kill(os.getpid(), 9)\n"
        "    pathlib.Path(f'{name}.done').touch()\n"
        "if name in ('slow', 'deaf'):\n"
        "    signal.signal(signal.SIGTERM, (lambda *_: sys.exit(143)) if name == 'slow' else signal.SIG_IGN)\n"
        "    signal.signal(signal.SIGINT, lambda *_: sys.exit('error: not from the launcher'))\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    monkeypatch.setattr(launch, "ROOT", tmp_path)


def test_exit_codes_and_logs_of_this_machine(stand_in, tmp_path):
    names = ("fine", "wrong", "used", "killed")
    codes = {}
    (tmp_path / "wrong.log").write_text("!an earlier try\n")
    with closing(Local(slots=4, cpus=3)) as executor:
        for name in names:
            executor.start(run_of(name), tmp_path / f"{name}.log")
        while len(codes) < len(names):
            codes |= {command.value("--exp_name"): code for command, code in executor.wait(1.0)}
        assert executor.wait(0.0) == []
    assert codes == {"fine": 0, "wrong": 1, "used": IN_USE, "killed": DIED}
    earlier, heading, *lines = sorted((tmp_path / "wrong.log").read_text().splitlines())
    assert earlier == "!an earlier try"
    assert heading.startswith("# ")
    assert heading.endswith(str(run_of("wrong")))
    assert lines == ["error: wrong", "wrong with 3 threads"]


LAUNCHER = """
import sys
from contextlib import closing
from pathlib import Path
from test_launch import run_of
from benchmarks import launch
from utils.errors import one_line_errors
folder, names = Path(sys.argv[1]), sys.argv[2:]
launch.ROOT, launch.ASK_AGAIN, launch.POLL = folder, 0.1, 0.1
state = lambda command: "done" if (folder / f"{command.value('--exp_name')}.done").exists() else "missing"
@one_line_errors
def main(argv=None):
    with closing(launch.Local(1, 1)) as executor:
        launch.Work([run_of(name) for name in names], executor, folder, state, lambda command: 1.0).run()
main()
"""


def launcher(folder, *names):
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, folder, *names],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_launchers_share_a_list_and_run_nothing_twice(stand_in, tmp_path):
    names = [f"shared-{number}" for number in range(6)]
    launchers = [launcher(tmp_path, *names) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in launchers]
    assert [process.returncode for process in launchers] == [0, 0], outputs
    begun = {name: (tmp_path / f"{name}.begun").read_text().split() for name in names}
    assert all(len(begun[name]) == (2 if name == "shared-3" else 1) for name in names), begun  # one is killed once
    assert all("6 done, 0 running, 0 failed, 0 waiting" in output for output in outputs)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "signals", "code"),
    [("slow", [signal.SIGTERM], 143), ("slow", [signal.SIGINT], 130), ("deaf", [signal.SIGINT] * 2, 130)],
)
def test_signals_leave_no_process_behind(stand_in, tmp_path, name, signals, code):
    process = launcher(tmp_path, name)
    log = tmp_path / f"{name}-synthetic-vgg16-round1.log"
    while not (log.exists() and "ready" in log.read_text() and "#" in log.read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    child = int(log.read_text().split("process ")[1].split(":")[0])
    first, *again = signals
    os.killpg(process.pid, first)  # as a terminal does with Ctrl-C
    next(line for line in process.stdout if line.startswith("stopping"))
    for number in again:
        os.killpg(process.pid, number)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == code, out
    assert "goes on" in out
    assert not _alive(child)
    assert "not from the launcher" not in log.read_text()


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_without_ray_one_line_names_the_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--launcher", "ray", "--scale", "small", "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "pip install -r requirements-cluster.txt" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--jobs 0", "--jobs: must be a whole number and at least 1"),
        ("--cpus_per_run x", "--cpus_per_run: must be a whole number"),
        ("--launcher ray --gpus_per_run 1.5", "--gpus_per_run: must be from 0 to 1 or a whole number"),
        ("--gpus_per_run 1", "--gpus_per_run: only with --launcher ray"),
        ("--address auto", "--address: only with --launcher ray"),
        ("--launcher slurm", "choose from"),
    ],
)
def test_wrong_flags_are_one_line(flags, named, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(flags.split())
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "room"),
    [
        ({"CPU": 5.0}, 2, 0, 2),
        ({"CPU": 5.0}, 1, 1, 0),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 0.5, 4),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 0.6, 2),  # two shares of 0.6 do not fit one card
        ({"CPU": 8.0, "GPU": 3.0}, 1, 2, 1),
        ({"CPU": 3.0, "GPU": 8.0}, 1, 1, 3),
    ],
)
def test_room_of_a_machine(resources, cpus, gpus, room):
    assert launch._room(resources, cpus, gpus) == room


def test_address_where_no_ray_is_answers_at_once(tmp_path):
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "nowhere"):
        with pytest.raises(InputError, match="no Ray answers"):
            OnRay(address, None, 1, None)


def _without_times(folder):
    """What a run found and how it got there; a checksum is of the times, too."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    for row in [*rows, *results]:
        for name in ("seconds", "search_seconds", "train_seconds", "checksum"):
            row.pop(name, None)
    return rows, results


def test_six_runs_on_ray_with_a_worker_killed_midway_are_those_run_in_sequence(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)  # relative paths mean the same to workers
    flags = [*TINY, "--arch", "vgg16", "--round", "1", "--output_dir"]

    def commands(folder):
        ticket = f"{folder}/imp/synthetic-vgg16-round1/tickets/level_01.safetensors"
        long = ["--end_iter", "12"]
        for method, name, more in (
            ("oneshot", "from-imp", ["--ticket", ticket]),
            ("oneshot", "long", long),
            ("laterewindlth", "imp", []),
            ("earlybird", "eb", ["--sparsity_round", "1"]),
            ("oneshot", "snip", ["--ticket", "snip", "--sparsity_round", "1"]),
            ("oneshot", "random", ["--sparsity_round", "1"]),
        ):
            yield reproduce.Command((), method, (*flags, folder, "--exp_name", name, *more))

    on_ray, logs = list(commands("ray")), Path("logs")
    victim = on_ray[1]
    log, metrics = logs / "long-synthetic-vgg16-round1.log", Path("ray") / victim.name / "metrics.jsonl"

    def kill():
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
            time.sleep(0.01)
        os.kill(int(log.read_text().split("process ")[1].split(":")[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with closing(OnRay(None, 2, 1, None)) as executor:
        work = Work(on_ray, executor, logs, reproduce.state, reproduce.cost)
        work.run()
    assert not work.failed
    assert work.deaths == {victim: 1}

    in_sequence = list(commands("sequence"))
    for command in [*in_sequence[1:], in_sequence[0]]:
        script(command.method)(list(command.flags))
    for here, there in zip(on_ray, in_sequence, strict=True):
        assert _without_times(Path("ray") / here.name) == _without_times(Path("sequence") / there.name)

    # none twice: each run was begun once, and trained each epoch once, but for the one that the kill cut off
    for command in on_ray:
        lines = (logs / f"{command.name.replace('/', '-')}.log").read_text().splitlines()
        assert sum(line.startswith("# ") for line in lines) == (2 if command == victim else 1)
        epochs = Counter(" ".join(line.split()[:5]) for line in lines if " images/s " in line)
        rows, _ = _without_times(Path("ray") / command.name)
        assert len(epochs) == len(rows)
        assert epochs.total() - len(epochs) <= (command == victim)
