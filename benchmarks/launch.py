"""How a list of runs is worked through, on this machine or on a Ray cluster, beside other launchers of the same list.

``Work`` decides what is started, tried again, put aside or given up. ``Local`` and ``OnRay`` start a command and say
how it ended, no more, so both ways follow the same rules.
"""

import contextlib
import datetime
import importlib
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import torch

from utils.errors import InputError
from utils.runs import clock
from utils.signals import stop_deferred

ROOT = Path(__file__).resolve().parent.parent
IN_USE = os.EX_TEMPFAIL  # exit code of a script that found its run in use by another process
DIED = -signal.SIGKILL  # of a worker that is gone; as Popen has it
INTERRUPTED = 128 + signal.SIGINT
RETRIES = 3  # of a run that was killed
ASK_AGAIN = 30.0  # seconds after which a run that is in use elsewhere is looked at again
POLL = 1.0  # seconds; a signal waits for as long
LAST_LINES = 5


class Work:
    """A list of runs: what is done, running, failed, waiting.

    A run starts when the one whose ticket it needs is done. One that was killed goes on from its checkpoint, up to
    ``RETRIES`` times; one that ends with an error stops none but those that need its ticket; one that another process
    is working on is put aside, and taken up if that process does not finish it.

    Args:
        commands: the runs, in the order to start them: each with a ``name``, a ``method`` and its ``flags``, and with
            the name of the run that it needs, or None, as its ``source``.
        executor: where they run, ``Local`` or ``OnRay``.
        logs: the folder of their output, one file for each; made if it is not there.
        state: looks whether a command is ``done``.
        cost: what a command takes, in any unit; the time left is reckoned from it.

    Attributes:
        failed: the last lines of each command that failed, or why it was not run.
    """

    def __init__(self, commands: list, executor, logs: Path, state: Callable, cost: Callable):
        self.executor, self.logs, self.state = executor, logs, state
        self.total = len(commands)
        self.waiting = [command for command in commands if state(command) != "done"]
        self.costs = {command: cost(command) for command in self.waiting}
        self.running: dict = {}  # since when
        self.aside: dict = {}  # in use elsewhere; when to look again
        self.told: set = set()  # which were
        self.failed: dict = {}
        self.log_starts: dict = {}  # bytes that were in the log before
        self.deaths: Counter = Counter()
        self.seconds: Counter = Counter()  # of each run, all tries
        self.finished: list = []  # in this call, here
        self.changed = False

    def run(self) -> None:
        """Work until nothing is left.

        Raises:
            Stopped: a signal came; what was running has been stopped, each at its checkpoint.
            KeyboardInterrupt: a second one came; runs may still be going until the executor is closed.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        print(f"{len(self.waiting)} of {self.total} runs, output in {self.logs}", flush=True)
        told = False
        with stop_deferred() as asked:
            while self.running or (not asked and (self.waiting or self.aside)):
                if not asked:
                    self._start()
                elif not told:
                    print(f"stopping {len(self.running)} runs; once more ends them at once", flush=True)
                    self.executor.stop()
                    told = True
                if self.changed:
                    print(self.progress(), flush=True)
                self.changed = False
                for command, code in self.executor.wait(POLL):
                    self._settle(command, code, bool(asked))
            if self.changed:
                print(self.progress(), flush=True)

    def _start(self) -> None:
        """Start what is ready while there is room; then look at what is in use elsewhere."""
        unfinished = {command.name for command in (*self.waiting, *self.aside, *self.running)}
        ready = [command for command in self.waiting if command.source not in unfinished]
        due = [command for command, at in self.aside.items() if at <= time.monotonic()]
        room = self.executor.slots
        for command in ready + due:
            if len(self.running) >= room:
                return
            if self.state(command) == "done":
                self._forget(command)
                self._say(f"done elsewhere: {command}")
                continue
            if command not in self.told:
                self._say(f"started: {command}")
            self._forget(command)
            log = self._log(command)
            self.log_starts[command] = log.stat().st_size if log.exists() else 0
            try:
                self.executor.start(command, log)
            except OSError as error:  # a full disk
                self._fail(command, str(error))
            else:
                self.running[command] = time.monotonic()

    def _forget(self, command) -> None:
        """Neither waiting nor put aside any more."""
        if self.aside.pop(command, None) is None:
            self.waiting.remove(command)

    def _settle(self, command, code: int, stopping: bool) -> None:
        """What follows from an exit code; a negative one is a signal's, as is one above 128."""
        self.seconds[command] += time.monotonic() - self.running.pop(command)
        killed = code < 0 or code > 128
        if code == 0:
            self.finished.append(command)
            self._say(f"done in {clock(self.seconds[command])}: {command}")
        elif code == IN_USE:
            self.aside[command] = time.monotonic() + ASK_AGAIN
            if command not in self.told:
                self._say(f"in use by another process, put aside: {command}")
            self.told.add(command)
        elif killed and stopping:
            self.waiting.insert(0, command)
            self._say(f"stopped: {command}")
        elif killed and self.deaths[command] < RETRIES:
            self.deaths[command] += 1
            self.waiting.insert(0, command)
            tries = f"try {self.deaths[command] + 1} of {RETRIES + 1}"
            self._say(f"killed, goes on from its checkpoint, {tries}: {command}")
        else:
            self._fail(command, self._last_lines(command))

    def _fail(self, command, why: str) -> None:
        """Give up a run, and those that need its ticket."""
        self.failed[command] = why
        self._say(f"failed: {command}")
        for other in [other for other in self.waiting if other.source == command.name]:
            self.waiting.remove(other)
            self.failed[other] = f"not run: it needs the ticket of {command.name}, which failed"

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self.changed = True

    def _log(self, command) -> Path:
        return self.logs / f"{command.name.replace('/', '-')}.log"

    def _last_lines(self, command) -> str:
        """Of its last try."""
        with self._log(command).open("rb") as file:
            file.seek(self.log_starts[command])
            return "\n".join(file.read().decode(errors="replace").splitlines()[-LAST_LINES:])

    def progress(self) -> str:
        """One line on the whole list."""
        counts = {"running": len(self.running), "failed": len(self.failed), "waiting": len(self.waiting)}
        if self.aside:
            counts["in use elsewhere"] = len(self.aside)
        counts = {"done": self.total - sum(counts.values())} | counts
        left = self.seconds_left()
        shown = ", ".join(f"{number} {name}" for name, number in counts.items())
        return shown if left is None else f"{shown}; about {clock(left)} left"

    def seconds_left(self) -> float | None:
        """At the pace of the runs that were done in this call; None before the first of them."""
        worked = sum(self.costs[command] for command in self.finished)
        if not worked:
            return None
        pace = sum(self.seconds[command] for command in self.finished) / worked
        now = time.monotonic()
        left = [pace * self.costs[command] for command in (*self.waiting, *self.aside)]
        left += [max(0.0, pace * self.costs[command] - (now - since)) for command, since in self.running.items()]
        # those who have what is in use elsewhere work on the list, too
        hands = max(1, self.executor.slots + len(self.aside))
        return max(sum(left) / hands, max(left, default=0.0))


class Local:
    """Runs on this machine, each a process of its own.

    Args:
        slots: runs at a time.
        cpus: threads of each.
    """

    def __init__(self, slots: int, cpus: int):
        self.slots = slots
        self.environment = os.environ | {"OMP_NUM_THREADS": str(cpus)}
        self.running: dict = {}

    def start(self, command, log: Path) -> None:
        call = [sys.executable, ROOT / f"train_snn_{command.method}.py", *command.flags]
        with log.open("a", encoding="utf-8") as file:
            # in a group of its own: Ctrl-C comes to the launcher alone, which passes it on once
            self.running[command] = subprocess.Popen(
                call, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
            )
            with contextlib.suppress(OSError):  # the run has begun, whatever its log takes
                os.write(file.fileno(), _heading(self.running[command].pid, command.method, command.flags).encode())

    def wait(self, seconds: float) -> list[tuple]:
        """The commands that have ended, each with its exit code; waits so long for a first one."""
        until = time.monotonic() + seconds
        while True:
            codes = {command: process.poll() for command, process in self.running.items()}
            ended = [(command, code) for command, code in codes.items() if code is not None]
            if ended or time.monotonic() > until:
                break
            time.sleep(0.1)
        for command, _ in ended:
            del self.running[command]
        return ended

    def stop(self) -> None:
        """Let every run write a checkpoint and end."""
        for process in self.running.values():
            process.terminate()

    def close(self) -> None:
        """End what is still running, at once."""
        for process in self.running.values():
            process.kill()
        for process in self.running.values():
            process.wait()


class OnRay:
    """Runs on a Ray cluster, each a task in a fresh worker.

    Retries are not Ray's: a dead worker is an exit code like any other.

    Args:
        address: of the cluster, ``auto`` for the one that this machine is part of, None to start one here.
        slots: runs at a time; None for as many as the cluster has room for, now.
        cpus: cores and threads of each.
        gpus: share or number of GPUs of each; None for one if the cluster has any.

    Raises:
        InputError: Ray is not installed or does not answer; or no machine has room for a run.
    """

    def __init__(self, address: str | None, slots: int | None, cpus: int, gpus: float | None):
        try:
            import ray
        except ImportError as error:
            raise InputError("--launcher ray needs Ray: pip install -r requirements-cluster.txt") from error
        self.ray, self.fixed_slots, self.cpus = ray, slots, cpus
        self.running: dict = {}  # by the reference to the task's result
        quiet = {"log_to_driver": False, "logging_level": "error"}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody else is told
        if address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            _look_for_ray(address)
            ray.init(address, **quiet)
        self.gpus = gpus if gpus is not None else int(ray.cluster_resources().get("GPU", 0) > 0)
        if not self._room():
            self.close()
            raise InputError(f"no machine of the cluster has room for a run of {cpus} CPUs and {self.gpus:g} GPUs")
        # workers need not find this file; the scripts they do, at the same path as here
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.task = ray.remote(max_calls=1, max_retries=0, num_cpus=cpus, num_gpus=self.gpus)(_run)

    @property
    def slots(self) -> int:
        return self._room() if self.fixed_slots is None else min(self.fixed_slots, self._room())

    def _room(self) -> int:
        return sum(_room(node["Resources"], self.cpus, self.gpus) for node in self.ray.nodes() if node["Alive"])

    def start(self, command, log: Path) -> None:
        # from the same folder, so that relative paths lead to the same files
        ref = self.task.remote(command.method, command.flags, self.cpus, os.getcwd(), str(log.absolute()))
        self.running[ref] = command, log

    def wait(self, seconds: float) -> list[tuple]:
        """The commands that have ended, each with its exit code; waits so long for a first one."""
        if not self.running:
            time.sleep(seconds)
            return []
        ended, _ = self.ray.wait(list(self.running), timeout=seconds)
        return [(self.running[ref][0], self._code(ref, *self.running.pop(ref)[1:])) for ref in ended]

    def _code(self, ref, log: Path) -> int:
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.TaskCancelledError:
            return INTERRUPTED
        except self.ray.exceptions.RayError as error:
            with log.open("a", encoding="utf-8") as file:
                print(error, file=file)
            return 1 if isinstance(error, self.ray.exceptions.RayTaskError) else DIED

    def stop(self) -> None:
        """Let every run write a checkpoint and end."""
        for ref in self.running:
            self.ray.cancel(ref)

    def close(self) -> None:
        """End what is still running, at once."""
        for ref in self.running:
            self.ray.cancel(ref, force=True)
        self.ray.shutdown()


def _look_for_ray(address: str) -> None:
    """Ray itself tries for two minutes, and ends the program."""
    if address == "auto":
        return
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"argument --address: no Ray answers at {address!r} ({error})") from error


def _room(resources: dict[str, float], cpus: int, gpus: float) -> int:
    """Runs that a machine has room for; a share of a GPU is one of a single GPU."""
    room = int(resources.get("CPU", 0) // cpus)
    if gpus:
        cards = int(resources.get("GPU", 0))
        room = min(room, int(cards // gpus) if gpus >= 1 else cards * int(1 / gpus))
    return room


def _run(method: str, flags: tuple[str, ...], cpus: int, folder: str, log: str) -> int:
    """The Ray task: the script's ``main`` in the worker itself, so that all that the run holds dies with the worker.

    Returns:
        The exit code.
    """
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(cpus)
    sys.argv = [f"train_snn_{method}.py", *flags]
    with (
        open(log, "a", buffering=1, encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        file.write(_heading(os.getpid(), method, flags))
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)  # what libraries write
        try:
            importlib.import_module(f"train_snn_{method}").main(list(flags))
        except SystemExit as end:
            return end.code or 0
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def _heading(pid: int, method: str, flags: tuple[str, ...]) -> str:
    """A line of the log: when and where this try began."""
    now = datetime.datetime.now().isoformat(" ", "seconds")
    return f"# {now} {platform.node()} process {pid}: python train_snn_{method}.py {shlex.join(flags)}\n"
