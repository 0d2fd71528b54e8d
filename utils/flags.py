"""The command line of all scripts: the authors' flags, ours, and what is refused."""

import argparse
import math
import sys
from pathlib import Path

import torch

from models import ARCHITECTURES, BATCH_NORMS, NEURONS

from . import distributed
from .data import DATASETS
from .early_time import DIVERGENCES
from .engine import use_huge_pages
from .files import checksum
from .masks import DISTANCES, REWINDS, SCOPES
from .tickets import WRONG_TICKET, load_ticket

# a script's name without train_snn_ and .py; the name says what it searches with
METHODS = ("laterewindlth", "earlybird", "earlyT_laterewindlth", "earlyT_earlybird", "oneshot")
TICKETS = ("random", "snip", "magnitude")  # or a file's path
TOLERANCES = {"hamming": 0.02, "jaccard": 0.5}
DEFAULT_ROUND = 4


def uses_early_time(method: str) -> bool:
    return method.startswith("earlyT_")


def uses_early_bird(method: str) -> bool:
    return method.endswith("earlybird")


def uses_rewinding(method: str) -> bool:
    return method.endswith("laterewindlth")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _number(kind, low=-math.inf, high=math.inf, low_open=False, high_open=False):
    """A type for argparse: a number in a range, with a message that names the range."""
    bounds = []
    if low > -math.inf:
        bounds.append(f"{'more than' if low_open else 'at least'} {low}")
    if high < math.inf:
        bounds.append(f"{'less than' if high_open else 'at most'} {high}")
    wanted = f"{'a whole number' if kind is int else 'a number'} {' and '.join(bounds)}".strip()

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
        if not inside or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return convert


_positive_int = _number(int, low=1)
_count = _number(int, low=1, high=1000)
_whole = _number(int, low=0)
_positive = _number(float, low=0, low_open=True)
_factor = _number(float, low=0, high=100, low_open=True)
_not_negative = _number(float, low=0)


def make_parser(method: str, description: str | None = None) -> argparse.ArgumentParser:
    """The parser of one script. All scripts take all flags but the one-shot script's own, so that one command line
    serves them all; what a flag belongs to stands in its group's title."""
    parser = _Parser(
        prog=f"train_snn_{method}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(group, *names, help, default=None, shown=None, **options):
        shown = default if shown is None else shown
        group.add_argument(*names, default=default, help=f"{help} (default: {shown})".replace("%", "%%"), **options)

    data = parser.add_argument_group("data")
    add(data, "--dataset", choices=DATASETS, default="cifar10", help="data set")
    add(data, "--data_dir", default="dataset/", metavar="DIR", help="folder that holds or receives the data sets")
    add(
        data,
        "--train_samples",
        type=_positive_int,
        metavar="N",
        shown="all",
        help="train on a fixed, class-balanced part of this many images",
    )
    add(
        data,
        "--test_samples",
        type=_positive_int,
        metavar="N",
        shown="all",
        help="test on a fixed, class-balanced part of this many images",
    )

    network = parser.add_argument_group("network")
    add(network, "--arch", choices=ARCHITECTURES, default="vgg16", help="network")
    add(
        network,
        "--width",
        type=_factor,
        default=1.0,
        metavar="FACTOR",
        help="factor on the channels of every hidden layer",
    )
    add(
        network,
        "--neuron",
        choices=NEURONS,
        default="lif",
        help="lif, or relu for the ANN of the same shape (which needs only --timestep 1)",
    )
    add(network, "--timestep", type=_count, default=5, metavar="T", help="timesteps an image is shown for")
    add(
        network,
        "--batch_norm",
        choices=BATCH_NORMS,
        default="per_timestep",
        help="where batch norm takes its training statistics from",
    )
    add(
        network,
        "--sync_batch_norm",
        action="store_true",
        default=True,
        shown="on",
        help="on several ranks: training statistics of the whole batch, not of each rank's part",
    )
    network.add_argument(
        "--no_sync_batch_norm", dest="sync_batch_norm", action="store_false", default=True, help="of each rank's part"
    )

    training = parser.add_argument_group("training")
    add(training, "--optimizer", choices=("sgd", "adam"), default="sgd", help="optimizer")
    add(
        training,
        "--scheduler",
        choices=("cosine", "step"),
        default="cosine",
        help="learning rate over the epochs: cosine to 0, or a tenth after 1/2 and again after 3/4 of them",
    )
    add(
        training,
        "--batch_size",
        type=_positive_int,
        default=128,
        metavar="N",
        help="images per step, of all ranks together",
    )
    add(training, "--learning_rate", type=_positive, default=0.3, metavar="RATE", help="learning rate of epoch 0")
    add(
        training,
        "--momentum",
        type=_number(float, low=0, high=1, high_open=True),
        default=0.9,
        metavar="M",
        help="momentum of sgd",
    )
    add(
        training,
        "--weight_decay",
        "--weight-decay",
        type=_not_negative,
        default=5e-4,
        metavar="W",
        help="L2 penalty on all parameters",
    )
    add(
        training,
        "--end_iter",
        type=_positive_int,
        metavar="EPOCHS",
        shown=", ".join(f"{name} {spec.epochs}" for name, spec in DATASETS.items()),
        help="epochs of one training from the first to the last",
    )
    add(
        training,
        "--valid_freq",
        type=_positive_int,
        default=50,
        metavar="EPOCHS",
        help="test every so many epochs, and after the last",
    )

    pruning = parser.add_argument_group("pruning")
    add(
        pruning,
        "--prune_percent",
        type=_number(float, low=0, high=100, low_open=True, high_open=True),
        default=25.0,
        metavar="PERCENT",
        help="share of the surviving weights that one pruning takes",
    )
    add(
        pruning,
        "--prune_iterations",
        type=_count,
        default=15,
        metavar="K",
        help="trainings of a whole IMP search; K - 1 prunings lie between them",
    )
    add(pruning, "--pruning_scope", choices=SCOPES, default="global", help="rank weights in the network or per layer")
    add(
        pruning,
        "--sparsity_round",
        type=_whole,
        metavar="R",
        shown=f"K - 1 for IMP; else {DEFAULT_ROUND}, or K - 1 if that is less",
        help="prune to the sparsity that R prunings reach",
    )
    add(
        pruning,
        "--rewinding_epoch",
        type=_whole,
        default=20,
        metavar="EPOCHS",
        help="IMP: epochs of training that a rewound network keeps, 0 for its initial weights",
    )
    add(
        pruning,
        "--rewind",
        choices=REWINDS,
        default="weights",
        help="IMP: where a pruned network goes back to the rewind epoch: weights and learning rate; only the learning "
        "rate (lr); or neither, fine-tuning at the schedule's last rate (none)",
    )

    early_bird = parser.add_argument_group("Early-Bird (EB scripts)")
    add(
        early_bird,
        "--eb_window",
        type=_count,
        default=5,
        metavar="Q",
        help="masks of earlier epochs that the current one is compared with",
    )
    add(
        early_bird,
        "--eb_tolerance",
        type=_number(float, low=0, high=1),
        metavar="TAU",
        shown=", ".join(f"{tolerance} for {kind}" for kind, tolerance in TOLERANCES.items()),
        help="a mask has settled when all distances in the window are below this fraction",
    )
    add(
        early_bird,
        "--eb_distance",
        choices=DISTANCES,
        default="hamming",
        help="differing entries over all entries, or over those that either mask keeps",
    )

    early_time = parser.add_argument_group("Early-Time (ET scripts)")
    add(
        early_time,
        "--early_time_epoch",
        type=_positive_int,
        default=2,
        metavar="EPOCHS",
        help="epochs of training at T before the timesteps of the search are chosen",
    )
    add(
        early_time,
        "--early_time_threshold",
        type=_not_negative,
        default=0.6,
        metavar="LAMBDA",
        help="search with the fewest timesteps whose normalised divergence is below this; 0 keeps T",
    )
    add(
        early_time,
        "--early_time_samples",
        type=_positive_int,
        default=1000,
        metavar="N",
        help="training images that the divergence is measured on; all, if there are fewer",
    )
    add(
        early_time,
        "--divergence",
        choices=DIVERGENCES,
        default="kl",
        help="how predictions of fewer timesteps are compared with those of T: Kullback-Leibler or Jensen-Shannon",
    )
    add(
        early_time,
        "--evaluate_levels",
        type=_whole,
        nargs="+",
        metavar="R",
        shown="the last",
        help="IMP + ET: levels, as numbers of prunings, whose tickets are trained at T",
    )

    if method == "oneshot":
        oneshot = parser.add_argument_group("one-shot ticket")
        add(
            oneshot,
            "--ticket",
            default="random",
            metavar="{random,snip,magnitude,PATH}",
            help="what the mask comes from; PATH is a saved ticket",
        )
        add(
            oneshot,
            "--control",
            choices=("none", "reinit", "shuffle"),
            default="none",
            help="keep the mask and draw fresh weights, or keep the weights and shuffle the mask within each layer",
        )
        add(
            oneshot,
            "--random_scope",
            choices=("global", "layer"),
            default="global",
            help="random: prune anywhere in the network, or every layer alike",
        )
        add(
            oneshot,
            "--snip_samples",
            type=_positive_int,
            default=1000,
            metavar="N",
            help="snip: class-balanced training images for the gradient; all, if there are fewer",
        )
        add(
            oneshot,
            "--search_timestep",
            type=_count,
            metavar="T_PRE",
            shown="T",
            help="magnitude: timesteps of the dense training before the pruning",
        )

    run = parser.add_argument_group("run")
    add(run, "--seed", type=_whole, default=1234, metavar="N", help="fixes all that is random, together with --round")
    add(run, "--round", type=_positive_int, default=1, metavar="N", help="repetition, for mean and deviation")
    add(
        run,
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one; on several ranks each takes its own",
    )
    add(
        run,
        "--precision",
        choices=("fp32", "bf16"),
        shown="bf16 on CUDA, fp32 on the CPU",
        help="arithmetic of the forward pass (bf16: autocast; membranes and weights stay fp32)",
    )
    add(
        run,
        "--compile",
        action="store_true",
        default=False,
        shown="off",
        help="fuse what lies between convolutions with torch.compile: the first steps take longer, all others less",
    )
    run.add_argument("--no_compile", dest="compile", action="store_false", default=False, help="do not (default)")
    add(
        run,
        "--channels_last",
        action="store_true",
        default=False,
        shown="off",
        help="train with channels innermost in memory",
    )
    add(
        run,
        "--cuda_graph",
        action="store_true",
        default=False,
        shown="off",
        help="launch a training step as one CUDA graph instead of kernel by kernel; on one GPU",
    )
    add(run, "--output_dir", default="runs", metavar="DIR", help="folder that holds all runs")
    add(
        run,
        "--exp_name",
        shown="the method: the script's name without train_snn_, with the kind of ticket for oneshot",
        metavar="NAME",
        help="name of the experiment: the run is OUTPUT_DIR/NAME/DATASET-ARCH-roundN",
    )
    add(
        run,
        "--tensorboard",
        action="store_true",
        default=False,
        shown="off",
        help="write the curves of metrics.jsonl for TensorBoard, too; also of a run that goes on or is finished",
    )
    run.add_argument("--restart", action="store_true", help="delete what an earlier run left in the folder, start over")
    return parser


def get_args(method: str, description: str | None = None, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line of ``train_snn_<method>.py``; defaults that depend on other flags are filled in.

    Ends the program with one line and exit code 2 where a flag is wrong.
    """
    use_huge_pages()  # before a ticket is looked at
    parser = make_parser(method, description)
    args = parser.parse_args(argv)
    args.method = method
    if method == "oneshot":
        args.method += f"-{args.ticket if args.ticket in TICKETS else 'transfer'}"
        args.method += "" if args.control == "none" else f"-{args.control}"
        args.search_timestep = args.search_timestep or args.timestep
    if args.end_iter is None:
        args.end_iter = DATASETS[args.dataset].epochs
    if args.exp_name is None:
        args.exp_name = args.method
    if args.eb_tolerance is None:
        args.eb_tolerance = TOLERANCES[args.eb_distance]
    if not uses_rewinding(method):
        args.rewind = "weights"
    if method == "oneshot":
        _look_at_ticket(parser, args)
    _check_folder(parser, args)
    _check_sparsity(parser, args)
    if uses_rewinding(method) and args.rewinding_epoch >= args.end_iter:
        parser.error(
            f"argument --rewinding_epoch: must be from 0 to {args.end_iter - 1}, before --end_iter {args.end_iter}, "
            f"got {args.rewinding_epoch}"
        )
    if uses_early_time(method):
        if args.timestep < 3:
            parser.error(f"argument --timestep: early time needs at least 3 timesteps, got {args.timestep}")
        if args.early_time_epoch >= args.end_iter:
            parser.error(
                f"argument --early_time_epoch: must be from 1 to {args.end_iter - 1}, before --end_iter "
                f"{args.end_iter}, got {args.early_time_epoch}"
            )
    if args.batch_size < distributed.ranks():
        parser.error(
            f"argument --batch_size: must be at least {distributed.ranks()}, the number of ranks, got {args.batch_size}"
        )
    args.device = _device(parser, args.device)
    if args.cuda_graph and (not args.device.startswith("cuda") or distributed.ranks() > 1):
        here = f"{args.device} with {distributed.ranks()} rank{'s' * (distributed.ranks() > 1)}"
        parser.error(f"argument --cuda_graph: is for a single GPU, got {here}")
    if args.precision is None:
        args.precision = "bf16" if args.device.startswith("cuda") else "fp32"
    _note_unused(args, parser, sys.argv[1:] if argv is None else argv)
    return args


def _check_folder(parser, args) -> None:
    if not args.exp_name or args.exp_name in (".", "..") or Path(args.exp_name).name != args.exp_name:
        parser.error(f"argument --exp_name: must be a name without a path, got {args.exp_name!r}")


def _look_at_ticket(parser, args) -> None:
    """What has to be known of a saved ticket beforehand: its level, the epoch and the learning rate that it starts
    with, and a checksum to know it again."""
    args.ticket_checksum, args.ticket_level, args.ticket_epoch = None, None, 0
    if args.ticket in TICKETS:
        return
    if not Path(args.ticket).is_file():
        parser.error(f"argument --ticket: choose from {', '.join(TICKETS)}, or name a ticket; got {args.ticket!r}")
    mask, weights, origin = load_ticket(args.ticket, WRONG_TICKET)
    args.ticket_checksum = f"{checksum(mask)} {checksum(weights)}"
    args.ticket_level, args.ticket_epoch = origin["level"], origin["epoch"]
    if args.control != "reinit":  # fresh weights are trained, not fine-tuned
        args.rewind = origin.get("rewind", "weights")
    if args.ticket_epoch >= args.end_iter:
        parser.error(
            f"argument --end_iter: must be more than {args.ticket_epoch}, the epoch that the ticket starts with, "
            f"got {args.end_iter}"
        )


def _check_sparsity(parser, args) -> None:
    prunes = uses_early_bird(args.method) or args.method.startswith(("oneshot-snip", "oneshot-magnitude"))
    highest, lowest = args.prune_iterations - 1, 1 if prunes else 0
    if highest < lowest:
        parser.error(f"argument --prune_iterations: must be at least {lowest + 1}, got {args.prune_iterations}")
    if args.sparsity_round is None:
        args.sparsity_round = highest if uses_rewinding(args.method) else min(highest, DEFAULT_ROUND)
    if not lowest <= args.sparsity_round <= highest:
        parser.error(
            f"argument --sparsity_round: must be from {lowest} to {highest} "
            f"(--prune_iterations {args.prune_iterations} has {highest} prunings), got {args.sparsity_round}"
        )
    if args.evaluate_levels is None:
        args.evaluate_levels = [args.sparsity_round]
    args.evaluate_levels = sorted(set(args.evaluate_levels))
    if args.method == "earlyT_laterewindlth" and args.evaluate_levels[-1] > args.sparsity_round:
        parser.error(
            f"argument --evaluate_levels: must be from 0 to {args.sparsity_round} (--sparsity_round), "
            f"got {args.evaluate_levels[-1]}"
        )


def _device(parser, name: str) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: choose from auto, cpu, cuda, cuda:N; got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"argument --device: {name} was asked for, but torch {torch.__version__} finds no GPU here")
        if (device.index or 0) >= torch.cuda.device_count():
            parser.error(f"argument --device: {name} was asked for, this machine has {torch.cuda.device_count()} GPU")
        if distributed.ranks() > 1 and device.index is not None:
            parser.error(f"argument --device: every rank takes a GPU of its own: cuda instead of {name}")
        if distributed.ranks_here() > torch.cuda.device_count():
            parser.error(
                f"argument --device: {distributed.ranks_here()} ranks were started on a machine with "
                f"{torch.cuda.device_count()} GPU: start fewer, or use cpu"
            )
        distributed.take_card()
        if device.index is not None:
            torch.cuda.set_device(device)
    return str(device) if device.type == "cuda" else "cpu"


def _note_unused(args, parser, argv: list[str]) -> None:
    """Say which of the given flags have no effect here: nothing is ignored in silence."""
    unused = without_effect(args)
    if distributed.ranks() == 1:
        unused |= {"--sync_batch_norm", "--no_sync_batch_norm"}
    given = sorted(unused & {word.split("=")[0] for word in argv})
    if given:
        print(f"note: {', '.join(given)} without effect in this run")


def without_effect(args) -> set[str]:
    """The flags that a run of this method, ticket and optimizer does not look at."""
    early_bird = {"--eb_window", "--eb_tolerance", "--eb_distance"}
    early_time = {"--early_time_epoch", "--early_time_threshold", "--early_time_samples", "--divergence"}
    unused = set() if uses_rewinding(args.method) else {"--rewinding_epoch", "--rewind"}
    if not uses_early_bird(args.method):
        unused |= early_bird
    if not uses_early_time(args.method):
        unused |= early_time
    if args.method != "earlyT_laterewindlth":
        unused |= {"--evaluate_levels"}
    if args.method.startswith("oneshot"):
        unused |= _unused_by_ticket(args.ticket)
    if args.optimizer == "adam":
        unused |= {"--momentum"}
    return unused


def _unused_by_ticket(ticket: str) -> set[str]:
    sparsity = {"--sparsity_round", "--prune_percent", "--prune_iterations"}
    read_by = {
        "random": sparsity | {"--random_scope"},
        "snip": sparsity | {"--pruning_scope", "--snip_samples"},
        "magnitude": sparsity | {"--pruning_scope", "--search_timestep"},
    }
    return set.union(*read_by.values()) - read_by.get(ticket, set())


def reported_levels(args) -> list[int]:
    """The levels, as numbers of prunings, whose tickets the run trains at T and reports."""
    if args.method.startswith("oneshot-transfer"):
        return [args.ticket_level]
    if args.method.startswith("oneshot"):
        return [args.sparsity_round]
    if uses_early_bird(args.method):
        return [args.sparsity_round]
    if uses_early_time(args.method):
        return args.evaluate_levels
    return list(range(args.sparsity_round + 1))


def planned_epochs(args) -> tuple[int, int]:
    """Epochs of the search (for EB at most) and of the final training that the run will take."""
    if args.method.startswith("oneshot"):
        first = 0 if args.control == "reinit" else args.ticket_epoch
        return args.end_iter if args.ticket == "magnitude" else 0, args.end_iter - first
    if uses_early_bird(args.method):
        return args.end_iter, args.end_iter
    level = args.end_iter - args.rewinding_epoch
    if uses_early_time(args.method):
        start = max(args.rewinding_epoch, args.early_time_epoch)
        return start + args.sparsity_round * level, len(args.evaluate_levels) * level
    return args.rewinding_epoch + (args.sparsity_round + 1) * level, 0
