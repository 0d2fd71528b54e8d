"""How a list of runs is worked through: by processes on this machine, or by Ray on one or many.

Other launchers may work on the same list: a run that is in use elsewhere is tried again until it is free. It is then
finished, which its script sees at once, or it resumes.

A command has a ``name``, its ``words`` (the script's file and its flags), and the name of the run whose ticket it
``needs``, or None. Those that are needed stand before those that need them.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from utils.files import InputError

ROOT = Path(__file__).resolve().parent.parent
IN_USE = os.EX_TEMPFAIL  # exit code of a script whose run another process is at
RETRIES = 1
ASK_AGAIN = 30.0  # seconds until a run that is in use elsewhere is tried again
POLL = 0.2  # seconds
LAST_LINES = 5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_here(commands: list, logs: Path, jobs: int, cpus: int) -> list:
    """Run commands as processes of this machine. One that fails is tried once more, then given up with those that need
    its ticket.

    Args:
        commands: in the order to start them.
        logs: folder of their output, a file for each.
        jobs: processes at a time.
        cpus: threads of each.

    Returns:
        The commands that were given up.

    Raises:
        SystemExit: a signal came; every run has saved and ended. The code is 128 + the signal's number.
    """
    waiting, running, given_up = list(commands), {}, []
    not_before, tries = Counter(), Counter()
    with _caught_signals() as received:
        try:
            while (waiting or running) and not received:
                unfinished = {command.name for command in (*waiting, *running)}
                now = time.monotonic()
                ready = [c for c in waiting if c.needs not in unfinished and not_before[c] <= now]
                for command in ready[: jobs - len(running)]:
                    running[command] = _start(command.words, _log(logs, command), cpus)
                    waiting.remove(command)
                time.sleep(POLL)
                for command in [command for command, process in running.items() if process.poll() is not None]:
                    code = running.pop(command).returncode
                    if code == IN_USE or (code != 0 and tries[command] < RETRIES):
                        tries[command] += code != IN_USE
                        not_before[command] = time.monotonic() + (ASK_AGAIN if code == IN_USE else 0)
                        waiting.append(command)
                        continue
                    if code != 0:
                        lost = [command, *(other for other in waiting if other.needs == command.name)]
                        waiting = [other for other in waiting if other not in lost]
                        given_up += lost
                    left = len(waiting) + len(running) + len(given_up)
                    _report(command, logs, code == 0, len(commands) - left, len(commands))
        finally:
            _stop(list(running.values()), received)
    return given_up


def run_on_ray(commands: list, logs: Path, address: str | None, cpus: int, gpus: float | None) -> list:
    """Run commands as tasks of Ray, which starts them in order where there is room, each after the run whose ticket it
    needs. One that fails, or whose worker dies, is tried once more.

    Args:
        commands: in the order to start them.
        logs: folder of their output, a file for each.
        address: of the cluster, ``auto`` for the one that this machine is part of, None to start one here.
        cpus: cores and threads of each run.
        gpus: share or number of GPUs of each run; None for one if the cluster has any.

    Returns:
        The commands that failed, and those that need their tickets.

    Raises:
        InputError: Ray is not installed or does not answer; or no machine has room for a run.
        SystemExit: as in ``run_here``.
    """
    try:
        import ray  # optional
    except ImportError as error:
        raise InputError("argument --launcher: ray is missing, pip install -r requirements-cluster.txt") from error
    _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody else is told
    ray.init(address or "local", log_to_driver=False, logging_level="error")
    failed, pending = [], {}
    try:
        if gpus is None:
            gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in machines):
            raise InputError(f"no machine of the cluster has room for a run of {cpus} CPUs and {gpus:g} GPUs")
        # workers need not find this file; the scripts they do, at the same path as here
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        errors = [subprocess.CalledProcessError]
        resources = {"num_cpus": cpus, "num_gpus": gpus}
        task = ray.remote(**resources, max_calls=1, max_retries=RETRIES, retry_exceptions=errors)(_run)
        refs = {}
        with _caught_signals() as received:
            for command in commands:
                words, log = command.words, _log(logs, command).absolute()
                refs[command.name] = task.remote(words, log, cpus, os.getcwd(), refs.get(command.needs))
                pending[refs[command.name]] = command
            while pending and not received:
                for ref in ray.wait(list(pending), timeout=POLL)[0]:
                    command, error = pending.pop(ref), _error(ray, ref)
                    failed += [command] if error else []
                    left = len(pending) + len(failed)
                    _report(command, logs, error is None, len(commands) - left, len(commands))
            for ref in pending:
                ray.cancel(ref)
            while pending and len(received) == 1:
                for ref in ray.wait(list(pending), timeout=POLL)[0]:
                    del pending[ref]
    finally:
        ray.shutdown()
    return failed


def _error(ray, ref) -> Exception | None:
    """What a task failed with."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return error
    return None


def _run(words: tuple[str, ...], log: Path, cpus: int, folder: str, _ticket: None) -> None:
    """The task of Ray: a run as a process, in the launcher's folder, so that relative paths lead to the same files.
    ``_ticket`` is the result of the run that this one needs; Ray waits for it."""
    os.chdir(folder)
    code = IN_USE
    while code == IN_USE:
        process = _start(words, log, cpus)
        try:
            while process.poll() is None:  # Ray interrupts Python, not a system call
                time.sleep(POLL)
        finally:
            process.terminate()
            code = process.wait()
        if code == IN_USE:
            time.sleep(ASK_AGAIN)
    if code != 0:
        raise subprocess.CalledProcessError(code, words)


def _start(words: tuple[str, ...], log: Path, cpus: int) -> subprocess.Popen:
    """Start a script, in a process group of its own: a terminal's Ctrl-C comes to the launcher alone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # threads that wait spin by default, and take the cores that the other runs need
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"OMP_NUM_THREADS": str(cpus)}
    call = [sys.executable, ROOT / words[0], *words[1:]]
    with log.open("a", encoding="utf-8") as file:
        print(f"$ {shlex.join(words)}", file=file, flush=True)
        null = subprocess.DEVNULL
        return subprocess.Popen(call, env=environment, stdin=null, stdout=file, stderr=file, process_group=0)


def _stop(processes: list[subprocess.Popen], received: list[int]) -> None:
    """Have runs save and end; after one more signal they end at once."""
    signals = len(received)
    for process in processes:
        process.terminate()
    if processes:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"stopping {len(processes)} runs at the end of their epochs; once more ends them at once", flush=True)
    while any(process.poll() is None for process in processes):
        time.sleep(POLL)
        if len(received) > signals:
            for process in processes:
                process.kill()


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """The signals that come, in a list that grows. They end the program after the block.

    Raises:
        SystemExit: 128 + the number of the first.
    """
    received: list[int] = []
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(128 + received[0])


def _log(logs: Path, command) -> Path:
    return logs / f"{command.name.replace('/', '-')}.log"


def _report(command, logs: Path, well: bool, done: int, total: int) -> None:
    """Print how a run has ended, and how far the list is."""
    if not well:
        log = _log(logs, command)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ["never started"]
        print("\n".join([f"failed: {command.name}, see {log}", *lines[-LAST_LINES:]]), file=sys.stderr, flush=True)
    print(f"{'ended' if well else 'failed'}: {command.name}; done {done} of {total}", flush=True)


def _check_address(address: str | None) -> None:
    """Ray itself tries for minutes to reach a cluster, and then ends the program."""
    if address in (None, "auto"):
        return
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"argument --address: no Ray answers at {address!r} ({error})") from error
