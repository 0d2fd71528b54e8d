"""The command line: a parser for scripts and the flags that all share. A method's own flags stand with the method; a
group of flags is a function that adds them to a parser."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from models import ARCHITECTURES, BATCH_NORMS, NEURONS
from models.layers import MOST_FUSED_TIMESTEPS

from . import machine
from .datasets import DATASETS, DEFAULT_DIR


def between(low=-math.inf, high=math.inf, kind=float, open_low=False, open_high=False) -> Callable[[str], float]:
    """A type for argparse: a number in a range, with a message that names the range."""
    words = "a whole number" if kind is int else "a number"
    if low > -math.inf:
        words += f" {'more than' if open_low else 'at least'} {low}"
    if high < math.inf:
        words += f"{' and' * (low > -math.inf)} {'less than' if open_high else 'at most'} {high}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
            float(value)
        except (ValueError, OverflowError):
            value = math.nan
        inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        if not inside or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")
        return value

    return convert


whole = between(0, kind=int)
positive_int = between(1, kind=int)
count = between(1, 1000, kind=int)
positive = between(0, open_low=True)
not_negative = between(0)
percent = between(0, 100, open_low=True, open_high=True)


SYNONYMS = {  # what others call a flag
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs", "n_epochs"), "end_iter"),
    **dict.fromkeys(("data", "data_path", "dataset_dir", "root"), "data_dir"),
    **dict.fromkeys(("model", "network", "net"), "arch"),
    **dict.fromkeys(("T", "timesteps", "time_steps", "num_steps"), "timestep"),
    **dict.fromkeys(("gpu", "cuda", "cpu"), "device"),
    **dict.fromkeys(("out", "save_dir", "output", "log_dir"), "output_dir"),
    "overwrite": "restart",
}


class Parser(argparse.ArgumentParser):
    """An argument parser of a script: errors are one line, and defaults may depend on other flags.

    Attributes:
        given: the flags that stand on the command line, once it is parsed.
    """

    def __init__(self, script: str, description: str | None):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=script, description=description, formatter_class=raw, allow_abbrev=False)
        self.given: set[str] = set()
        self._computed: dict[str, Callable] = {}
        self._checks: list[Callable] = []

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def section(self, title: str, text: str | None = None) -> Callable[..., None]:
        """A titled group in ``--help``, with a text; returns the function that adds a flag to it.

        The function takes the flag's name, what its value is (a function of the text; a tuple or dict of choices; or
        ``bool`` for a switch), its default (or a function of the parsed flags), the name of the value, and the help.
        ``below`` names another flag that the value must be less than; ``shown`` is the default as ``--help`` shows it.
        A switch that is not always off by default has a ``--no-`` form.
        """
        group = self.add_argument_group(title, text)

        def flag(name, kind, default, metavar, text, *more_names, below=None, shown=None, nargs=None):
            field = name.removeprefix("--")
            if shown is None:
                shown = "off" if kind is bool else default
            options = {"help": f"{text} (default: {shown})".replace("%", "%%"), "default": default}
            if callable(default):
                self._computed[field] = default
                options["default"] = None
            if kind is bool:
                action = "store_true" if default is False else argparse.BooleanOptionalAction
                group.add_argument(name, action=action, **options)
            elif callable(kind):
                group.add_argument(name, *more_names, type=kind, metavar=metavar, nargs=nargs, **options)
            else:
                group.add_argument(name, choices=tuple(kind), **options)
            if below:
                self.check(lambda flags: self.require_below(flags, field, below))

        return flag

    def check(self, function: Callable[[argparse.Namespace], None]) -> None:
        """Have a function look at the parsed flags; it may fill in more, or call ``error``."""
        self._checks.append(function)

    def require_below(self, flags: argparse.Namespace, field: str, other: str) -> None:
        """Refuse a value that is not less than another flag's."""
        value, limit = getattr(flags, field), getattr(flags, other)
        if value >= limit:
            if f"--{other}" in self.given and f"--{field}" not in self.given:
                self.error(f"argument --{other}: must be more than --{field}, which is {value} by default; got {limit}")
            default = "" if f"--{other}" in self.given else " by default"
            self.error(f"argument --{field}: must be less than --{other}, which is {limit}{default}; got {value}")

    def only_with(self, flag: str, other: str, value: str) -> None:
        """Refuse a flag where another one has not this value: nothing is ignored in silence."""

        def look(flags):
            if flag in self.given and getattr(flags, other.removeprefix("--")) != value:
                self.error(f"argument {flag}: only with {other} {value}")

        self.check(look)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """Parse a command line, fill in the defaults that depend on other flags, and check."""
        argv = sys.argv[1:] if argv is None else argv
        self.given = {word.split("=")[0] for word in argv}
        flags, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0].split("=")[0]
            wanted = word.lstrip("-").replace("-", "_")
            initials = [
                action.dest for action in self._actions if wanted == "".join(w[0] for w in action.dest.split("_"))
            ]
            similar = (
                [SYNONYMS[wanted]]
                if wanted in SYNONYMS
                else initials or difflib.get_close_matches(wanted, [action.dest for action in self._actions], 1)
            )
            self.error(f"unrecognized argument {word}" + "".join(f", did you mean --{name}?" for name in similar[:1]))
        for field, compute in self._computed.items():
            if getattr(flags, field) is None:
                setattr(flags, field, compute(flags))
        for look in self._checks:
            look(flags)
        return flags


def shared_flags(parser: Parser) -> None:
    """The flags of all scripts."""
    flag = parser.section("data")
    text = "data set, or the name of a tree DATA_DIR/NAME/{train,test}/<class>/* of your own"
    flag("--dataset", str, "cifar10", f"{{{','.join(DATASETS)},NAME}}", text)
    flag("--data_dir", str, DEFAULT_DIR, "DIR", "folder that holds or receives the data sets")
    parser.check(partial(_check_dataset, parser))
    flag("--train_samples", positive_int, None, "N", "train on a fixed, class-balanced part of so many", shown="all")
    flag("--test_samples", positive_int, None, "N", "test on a fixed, class-balanced part of so many", shown="all")
    flag(
        "--valid_samples", whole, 0, "N", "hold out so many training images, evenly over classes, to choose settings on"
    )

    flag = parser.section("network")
    flag("--arch", ARCHITECTURES, "vgg16", None, "network")
    flag("--width", between(0, 100, open_low=True), 1.0, "FACTOR", "factor on the channels of every hidden layer")
    flag("--neuron", NEURONS, "lif", None, "lif, or relu for the ANN of the same shape, which has no time")
    flag("--tau", between(1), 4 / 3, "TAU", "lif: membrane time constant in timesteps", shown="4/3")
    flag("--v_threshold", positive, 1.0, "V", "lif: firing threshold of the membrane potential")
    flag("--surrogate_alpha", positive, 2.0, "ALPHA", "lif: slope of the ATan surrogate gradient")
    text = "timesteps an image is shown for"
    flag("--timestep", count, lambda f: 1 if f.neuron == "relu" else 5, "T", text, shown="5, or 1 with --neuron relu")
    parser.check(partial(_check_timestep, parser))
    flag("--batch_norm", BATCH_NORMS, "per_timestep", None, "where batch norm takes its training statistics from")

    flag = parser.section("training")
    epochs = ", ".join(f"{name} {spec.epochs}" for name, spec in DATASETS.items())
    flag("--optimizer", ("sgd", "adam"), "sgd", None, "optimizer")
    text = "of the learning rate: cosine to 0, or a tenth after 1/2 and 3/4 of the epochs"
    flag("--scheduler", ("cosine", "step"), "cosine", None, text)
    flag("--batch_size", positive_int, 128, "N", "images per step, of all ranks together")
    flag("--learning_rate", positive, 0.3, "RATE", "learning rate of epoch 0")
    flag("--momentum", between(0, 1, open_high=True), 0.9, "M", "momentum of sgd")
    text = "L2 penalty on all parameters, if not --decay_kernels_only"
    flag("--weight_decay", not_negative, 5e-4, "W", text, "--weight-decay")
    flag("--decay_kernels_only", bool, False, None, "no L2 penalty on biases and batch norm, unlike the official code")
    usual = partial(_usual_epochs, parser)
    flag("--end_iter", positive_int, usual, "EPOCHS", "epochs of a training", shown=epochs)
    text = "evaluate test and held-out images every so many epochs, and after the last"
    flag("--valid_freq", positive_int, 50, "EPOCHS", text)
    parser.only_with("--momentum", "--optimizer", "sgd")

    flag = parser.section("run")
    flag("--seed", whole, 1234, "N", "fixes all that is random, together with --round")
    flag("--round", positive_int, 1, "N", "number of the repetition: it changes the random seed")
    flag("--device", str, "auto", "NAME", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    parser.check(partial(_choose_device, parser))
    text = "of the forward pass; fp32 is without TF32"
    flag("--precision", ("fp32", "bf16"), None, None, text, shown="bf16 on a GPU that has units for it, else fp32")
    text = "on a CPU: fuse what lies between convolutions with torch.compile"
    flag("--compile", bool, False, None, text)
    few = f"a strided 1x1 convolution has fewer than {machine.VECTOR} channels"
    text = f"channels innermost in memory; refused on a CPU if {few}"
    flag("--channels_last", bool, None, None, text, shown="on where possible")
    text = "launch a training step as one CUDA graph; for a single GPU"
    flag("--cuda_graph", bool, None, None, text, shown="on a single GPU")
    flag("--fused", bool, False, None, "Triton kernels for what lies between convolutions; untried on a GPU")
    parser.check(partial(_check_fused, parser))
    flag("--output_dir", str, "runs", "DIR", "folder that holds all runs")
    flag(
        "--exp_name",
        str,
        None,
        "NAME",
        "experiment: the run is OUTPUT_DIR/NAME/DATASET-ARCH...-roundN",
        shown="the method",
    )
    flag("--checkpoint_minutes", not_negative, 1.0, "MINUTES", "time between checkpoints; 0 is every epoch")
    flag("--tensorboard", bool, False, None, "write the curves of metrics.jsonl for TensorBoard, too")
    flag("--restart", bool, False, None, "delete what an earlier run left in the folder, start over")


def get_args(script: str, label: str, description: str | None, argv: list[str] | None, *groups) -> argparse.Namespace:
    """Parse and check the command line of a script.

    Args:
        script: the script's file; its name without ``train_snn_`` is the method's.
        label: what the report calls the method.
        description: of the script.
        argv: the command line without the program's name; None for ``sys.argv``.
        groups: the functions that add the script's own flags.

    Returns:
        All flags, with the fields ``script``, ``method`` and ``label``. Ends the program with one line and exit code 2
        where a flag is wrong.
    """
    parser = Parser(Path(script).name, description)
    parser.set_defaults(script=parser.prog, method=Path(script).stem.removeprefix("train_snn_"), label=label)
    shared_flags(parser)
    for add in groups:
        add(parser)
    args = parser.parse(argv)
    args.exp_name = args.method if args.exp_name is None else args.exp_name
    if args.exp_name in ("", ".", "..") or Path(args.exp_name).name != args.exp_name:
        parser.error(f"argument --exp_name: must be a name without a path, got {args.exp_name!r}")
    return args


def _usual_epochs(parser: Parser, flags: argparse.Namespace) -> int:
    _check_dataset(parser, flags)
    return DATASETS[flags.dataset].epochs


def _check_dataset(parser: Parser, flags: argparse.Namespace) -> None:
    name = flags.dataset
    if name in DATASETS:
        return
    tree = Path(flags.data_dir) / name
    if Path(name).name != name or not tree.is_dir():
        similar = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {similar[0]}? " if similar else ""
        parser.error(
            f"argument --dataset: {hint}choose from {', '.join(DATASETS)}, or name a tree of your own: there is no "
            f"folder {tree}"
        )
    if flags.end_iter is None:
        parser.error(
            f"argument --end_iter: is needed with --dataset {name}: only the paper's data sets have a usual one"
        )


def _check_timestep(parser: Parser, flags: argparse.Namespace) -> None:
    if flags.neuron == "relu" and flags.timestep != 1:
        parser.error(f"argument --timestep: must be 1 with --neuron relu, which has no time; got {flags.timestep}")


def _choose_device(parser: Parser, flags: argparse.Namespace) -> None:
    name = flags.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        parser.error(f"argument --device: choose from auto, cpu, cuda, cuda:N; got {name!r}")
    if not flags.device.startswith("cpu") and (reason := machine.unused_gpu()):
        parser.error(f"argument --device: {reason}, or use --device cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = f"torch {torch.__version__} finds {torch.cuda.device_count()} GPUs here"
        parser.error(f"argument --device: {name} was asked for, but {found}")
    if flags.cuda_graph and kind != "cuda":
        parser.error(f"argument --cuda_graph: is for a GPU, got --device {name}")
    flags.device = "cpu" if kind == "cpu" else name
    gpu = kind == "cuda"
    if flags.precision is None:
        flags.precision = "bf16" if gpu and machine.has_bf16_units(name) else "fp32"
    if flags.cuda_graph is None:
        flags.cuda_graph = gpu and os.environ.get("WORLD_SIZE", "1") == "1"
    if flags.compile and gpu:
        print("note: --compile is left out on a GPU: it would not fuse the neuron, which has a kernel of its own")
        flags.compile = False


def _check_fused(parser: Parser, flags: argparse.Namespace) -> None:
    needs = {
        "--device cuda": flags.device != "cpu",
        "--channels_last": flags.channels_last is not False,
        "--neuron lif": flags.neuron == "lif",
        f"--timestep at most {MOST_FUSED_TIMESTEPS}": flags.timestep <= MOST_FUSED_TIMESTEPS,
        "the package triton": find_spec("triton") is not None,
    }
    missing = [need for need, met in needs.items() if not met]
    if flags.fused and missing:
        parser.error(f"argument --fused: needs {', '.join(missing)}")
