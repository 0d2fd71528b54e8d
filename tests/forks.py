"""Scripts in processes of their own that start in milliseconds: forked from one that has imported them and has not yet
computed anything. They can be killed, they count their steps, and they die if anything is unpickled."""

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import tqdm
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("earlyT_laterewindlth", "earlybird", "oneshot")
TRACEBACK, UNPICKLED = 70, 71  # exit codes that no script has
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT  # look whether a process has, leave it
HUNG = 300  # seconds


class Ended(NamedTuple):
    """How a process ended: exit code, or minus the number of the signal that killed it; what it wrote to stderr; the
    training steps that it took; seconds from its start, and from the signal that it was sent."""

    code: int
    errors: str
    steps: int
    seconds: float
    seconds_after_signal: float


@contextlib.contextmanager
def workers():
    """A pool of processes, one a core, that have imported the scripts; what they call is ``run_script`` alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_torture", "torch._dynamo", "torchvision.datasets", *(f"train_snn_{method}" for method in SCRIPTS)]
    )
    inherited = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in inherited}
    os.environ.update(inherited)
    try:
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            yield pool
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run_script(method, flags, log, moment=None, until=None, event=None, sent=signal.SIGKILL):
    """Run a script in a fork of this process.

    Args:
        method: the script's name without train_snn_.
        flags: its command line.
        log: file for what it prints; its steps are counted in another beside it.
        moment: seconds after which it is sent a signal; None leaves it alone.
        until: put off from then on until this is true.
        event: or what it gets the signal after: a file's name (or ``step``, of training), and at which time.
        sent: the signal.
    """
    log = Path(log)
    counter = log.with_suffix(".steps")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_call(method, flags, log, counter, event, sent))
    signalled = started
    if moment is not None:
        time.sleep(moment)
        while until is not None and not until() and os.waitid(os.P_PID, child, ENDED) is None:
            pass
        os.kill(child, sent)  # no error if it has ended: nobody has waited for it
        signalled = time.monotonic()
    _, status = os.waitpid(child, 0)
    ended = time.monotonic()
    errors = log.read_text(errors="replace") if log.exists() else ""
    steps = counter.stat().st_size if counter.exists() else 0
    return Ended(os.waitstatus_to_exitcode(status), errors, steps, ended - started, ended - signalled)


def _call(method, flags, log, counter, event, sent):
    """What the fork does; its exit code."""
    awaited, left = event or ("", 0)
    replace = os.replace

    def happened(what):
        nonlocal left
        left -= what == awaited
        if what == awaited and left == 0:
            os.kill(os.getpid(), sent)

    def step(*_):
        os.write(steps, b".")
        happened("step")

    def placed(source, target):
        replace(source, target)
        happened(Path(target).name)

    try:
        signal.alarm(HUNG)
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        steps = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        register_optimizer_step_post_hook(step)
        os.replace = placed
        tqdm.tqdm.set_lock(threading.RLock())  # its own is shared by processes, and outlives a killed one
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            setattr(module, name, lambda *_, **__: os._exit(UNPICKLED))
        importlib.import_module(f"train_snn_{method}").main([str(flag) for flag in flags])
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return TRACEBACK
    finally:
        for thread in threading.enumerate():  # os._exit would not wait for the checkpoint
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
