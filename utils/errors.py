"""What a user sees when something is wrong: one line, and an exit code."""

import functools
import sys
from pathlib import Path

import torch


class InputError(Exception):
    """Something the user gave (a flag, a file, a folder) cannot be used; the message says what to do. Exit code 2."""


class DivergedError(Exception):
    """The training loss is no longer finite. Exit code 1."""


def one_line_errors(main):
    """Let a script's ``main(argv)`` end with one line instead of a traceback for what is not a fault of the program."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (InputError, OSError) as error:
            code, line = 2, f"error: {error}"
        except RuntimeError as error:  # torch has no class of its own for memory of the CPU
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            code = 1
            line = "error: out of memory: try a smaller --batch_size, --width or --timestep (and another --exp_name)"
        except DivergedError as error:
            code, line = 1, f"error: {error}"
        except KeyboardInterrupt:
            code, line = 130, "stopped: the same command, without --restart, goes on from the last finished epoch"
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        raise SystemExit(code)

    return wrapped
