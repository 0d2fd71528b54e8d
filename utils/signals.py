"""SIGTERM, Ctrl-C and a closed terminal: a run stops between two steps, where it can be gone on with."""

import os
import signal
import stat
import threading
from contextlib import contextmanager

from . import distributed

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """The user, or the machine, asked the program to stop, and it stands where it may.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


class _Noted(list):
    """A handler that writes down what signals came."""

    def __call__(self, number, frame):
        _leave_terminal(number)
        self.append(number)


@contextmanager
def stopping():
    """Within, each of the signals raises ``Stopped``, wherever the program is. On several ranks it is only noted: they
    stop together, where they agree to."""

    def stop(number, frame):
        _leave_terminal(number)
        raise Stopped(number)

    with _handled_by(stop if distributed.ranks() == 1 else _Noted()):
        yield


@contextmanager
def stop_deferred():
    """Within, a signal waits: it is put into the list that is yielded, for the program to look at, and ``Stopped`` is
    raised at the end. A second Ctrl-C interrupts at once, wherever the program is; a second SIGTERM does not, a
    scheduler may send it to the launcher and to the run. On several ranks the list is that of all signals so far, and
    nothing is raised."""
    noted = signal.getsignal(signal.SIGTERM)
    if isinstance(noted, _Noted):
        yield noted
        return
    asked = []

    def note(number, frame):
        _leave_terminal(number)
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    with _handled_by(note):
        yield asked
    if asked:
        raise Stopped(asked[0])


def _leave_terminal(number: int) -> None:
    """Print nowhere once the terminal is closed: a progress bar would end the step with an error."""
    if number == getattr(signal, "SIGHUP", None):
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream)


@contextmanager
def _handled_by(handler):
    """Only the main thread is told of signals; one that is ignored (``nohup``) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: action for number, action in before.items() if action not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
