"""What a user sees when something is wrong: one line, and an exit code."""

import functools
import os
import signal
import sys
from pathlib import Path

import torch

from . import distributed
from .signals import Stopped, stopping


class InputError(Exception):
    """Something the user gave (a flag, a file, a folder) cannot be used; the message says what to do. Exit code 2."""


class DamagedError(InputError):
    """A file does not hold what was once written to it."""


class InUseError(Exception):
    """Another process is at the run. Exit code 75 (EX_TEMPFAIL): the same command can be tried again later."""


class DivergedError(Exception):
    """The training loss is no longer finite. Exit code 1."""


def one_line_errors(main):
    """Let a script's ``main(argv)`` end with one line instead of a traceback for what is not a fault of the program,
    and with 128 + its number for a signal."""

    @functools.wraps(main)
    def wrapped(argv=None):
        with distributed.group() as complain:
            try:
                with stopping():
                    return main(argv)
            except (InputError, OSError) as error:
                code, line = 2, f"error: {error}"
            except RuntimeError as error:  # torch has no class of its own for memory of the CPU
                code, line = 1, _what_to_do(error)
                if line is None:
                    raise
            except (DivergedError, distributed.RanksDifferError) as error:
                code, line = 1, f"error: {error}"
            except InUseError as error:
                code, line = os.EX_TEMPFAIL, f"{error}: wait for it, or use another --exp_name"
            except KeyboardInterrupt as stop:
                code = 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
                line = "stopped: the same command, without --restart, goes on from the last checkpoint"
            complain(f"{Path(sys.argv[0]).name}: {line}")
            raise SystemExit(code)

    return wrapped


def _what_to_do(error: RuntimeError) -> str | None:
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return (
            "error: out of memory: try a smaller --batch_size, --width or --timestep (and another --exp_name), "
            "or leave out --cuda_graph"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).split("\n")[0]
        return f"error: torch.compile does not work here ({reason}): leave out --compile (and use another --exp_name)"
    if distributed.lost_contact(error):
        reason = str(error).split("\n")[0]
        return f"error: contact to another rank is lost ({reason}): the same command goes on from the last checkpoint"
    return None
