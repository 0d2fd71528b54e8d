"""What surrounds a script's algorithm: its data, network and run folder, signals, and errors of one line."""

import functools
import hashlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from models import build_model
from models.layers import compile_blocks, fuse_blocks

from . import distributed, machine
from .activity import check_countable
from .data import Data, load_data
from .files import Finished, InputError, InUseError
from .runs import Run
from .stages import Stopped
from .training import DivergedError, effective_seed, place

PACKAGES = ("torch", "torchvision", "spikingjelly", "numpy", "safetensors")
ROOT = Path(__file__).resolve().parent.parent
SIGNALS = ("SIGINT", "SIGTERM")


def start(
    args, sparsity: float | None = None, check: Callable[[nn.Module], object] | None = None
) -> tuple[Run, Data, nn.Module]:
    """Begin a run, or resume it: its folder, its data, and its network with the weights that the run starts from.

    Args:
        args: the checked flags.
        sparsity: that of the one ticket that the run is to find, 0 to 1; None if it finds several.
        check: looks at the network and raises ``InputError`` where what the user gave does not fit it; nothing has been
            written then.

    Raises:
        Finished: nothing is left to do; what the run found is printed again.
        InputError: see ``load_data``, ``Run``, ``place``, ``check_compiler`` and ``check_countable``; or a flag does
            not go with the ranks.
        InUseError: another process is at this run.
    """
    _check_ranks(args)
    if ":" in args.device:  # kernels are launched on the current device
        torch.cuda.set_device(args.device)
    machine.check_compiler(args)
    args.effective_seed = effective_seed(args)
    run = Run(args, sparsity)
    if run.finished:
        run.show()
        raise Finished
    with distributed.first_rank_first():
        data = load_data(args)
    network = {name: getattr(args, name) for name in ("arch", "neuron", "width", "batch_norm")}
    network |= {name: getattr(args, name) for name in ("tau", "v_threshold", "surrogate_alpha")}
    network |= {"channels": data.channels, "classes": data.classes}
    torch.manual_seed(args.effective_seed)
    model = place(build_model(**network), args)
    check_countable(model)
    if check is not None:
        check(model)
    if args.compile:
        compile_blocks(model)
    if args.fused:
        fuse_blocks(model)
    run.begin(model, network, data.checksum(), _circumstances(args))
    print(machine.describe(args))
    for name in SIGNALS:
        _stop_at_the_end_of_an_epoch(run, getattr(signal, name))
    return run, data, model


def script(main):
    """Have the process of a script's ``main(argv)`` keep its memory (``machine.keep_memory``), and end with one line
    instead of a traceback for what is not a fault of the program.

    Exit codes: 2 for what the user gave, 75 if the run is in use, 1 for a training that diverged or ran out of memory,
    128 + its number for a signal.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        machine.keep_memory()
        handlers = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, SIGNALS)}
        code, line = 0, ""
        try:
            with distributed.group():
                return main(argv)
        except Finished:
            return None
        except (InputError, OSError) as error:
            code, line = 2, f"error: {error}"
        except InUseError as error:
            code, line = os.EX_TEMPFAIL, f"{error}: wait for it, or use another --exp_name"
        except DivergedError as error:
            code, line = 1, f"error: {error}"
        except RuntimeError as error:  # torch has no class of its own for memory of the CPU
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            code, line = 1, "error: out of memory: try a smaller --batch_size, --width or --timestep"
        except Stopped as stop:
            code, line = 128 + stop.number, "stopped and saved; the same command, without --restart, resumes"
        except KeyboardInterrupt:
            begun = signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT]
            resumes = "; the same command, without --restart, resumes at the checkpoint"
            code, line = 128 + signal.SIGINT, "stopped" + resumes * begun
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        prefix = f"rank {os.environ['RANK']}: " if distributed.ranks() > 1 else ""
        print(f"{prefix}{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        raise SystemExit(code)

    return wrapped


def _stop_at_the_end_of_an_epoch(run: Run, number: int) -> None:
    """A signal ends the run at the end of the epoch; a second Ctrl-C at once."""

    def ask(number, frame):
        if number == signal.SIGINT and run.stop is not None:
            raise KeyboardInterrupt
        run.stop = number
        os.write(2, b"\nstopping at the end of this epoch; Ctrl-C stops at once\n")  # a print may be interrupted

    if signal.getsignal(number) != signal.SIG_IGN:  # as a shell leaves Ctrl-C for what runs in the background
        signal.signal(number, ask)


def _check_ranks(args) -> None:
    ranks = distributed.ranks()
    if args.batch_size < ranks:
        raise InputError(f"argument --batch_size: must be at least {ranks}, the number of ranks, got {args.batch_size}")
    if args.cuda_graph and ranks > 1:
        raise InputError(f"argument --cuda_graph: is for a single GPU, got {ranks} ranks")
    if ranks > 1 and ":" in args.device:
        raise InputError(f"argument --device: every rank takes a GPU of its own: cuda instead of {args.device}")
    if ranks > 1 and args.device == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise InputError(f"argument --device: this machine has {torch.cuda.device_count()} GPUs: start fewer ranks")
    if args.tensorboard and find_spec("tensorboard") is None:
        raise InputError("argument --tensorboard: needs the package tensorboard (pip install tensorboard)")


def _circumstances(args) -> dict:
    """What numbers and times depend on beside flags and images."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device_name": machine.device_name(args.device),
        "channels_last": args.channels_last,
        "ranks": distributed.ranks(),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "source": _source_checksum(args.script),
    }


def git_commit() -> str | None:
    """The commit of this checkout, with ``-dirty`` if files differ from it; None without git or outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def _source_checksum(script: str) -> str:
    """Checksum of the script and of what it imports from ``models`` and ``utils``: two runs of different code are no
    repetitions."""
    digest = hashlib.sha256()
    folders = {str(ROOT / name) for name in ("models", "utils")}
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    ours = [Path(file) for file in files if os.path.dirname(file) in folders]
    for path in [ROOT / script, *sorted(ours)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
