"""The commands behind every row of the paper's Table 1 and every figure: runs what is missing, skips what is done.

    python benchmarks/reproduce.py --dry_run                # the list, with the time it would take on this machine
    python benchmarks/reproduce.py                          # everything at full size, into runs/full/
    python benchmarks/reproduce.py --scale small --jobs 2   # handwritten digits and a narrow network, into runs/small/
    python benchmarks/reproduce.py --only "Table 1"         # a part
    python benchmarks/reproduce.py --launcher ray           # as many at a time as a Ray cluster, or this machine, holds

A run that was stopped goes on when its command is run again, so this script can be stopped and started too, and be
started many times over: what one is working on, the others leave alone. It ends with the report of all that is there.
"""

import argparse
import contextlib
import io
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.launch import Local, OnRay, Work  # noqa: E402
from models import build_model  # noqa: E402
from utils.data import DATASETS  # noqa: E402
from utils.errors import InputError, one_line_errors  # noqa: E402
from utils.flags import get_args, planned_epochs  # noqa: E402
from utils.masks import dense_mask  # noqa: E402
from utils.runs import Run, clock  # noqa: E402
from utils.training import MaskedUpdate, forward, loss_over_time, make_optimizer  # noqa: E402

IMAGES = {"tinyimagenet": (100_000, 64), "svhn": (73_257, 32), "fmnist": (60_000, 32), "digits": (1_437, 32)}
TIMED_STEPS, TIMED_IMAGES = 2, 8
TABLE_1 = ("Table 1", "Table 2", "Fig. 1", "Fig. 6", "Fig. 8a", "Fig. 8b", "Fig. 11")
OBSERVATIONS = ("Fig. 3", "Fig. 7a", "Fig. 7b", "Fig. 7c", "Fig. 8c")  # IMP's own share of them


@dataclass(frozen=True)
class Scale:
    """How large the experiments are."""

    flags: str  # of every run
    networks: tuple[tuple[str, str], ...]  # data set, network; the first has all the experiments
    early_networks: tuple[tuple[str, str], ...]  # of Fig. 4
    deeper_networks: tuple[tuple[str, str], ...]  # of supplement G
    levels: tuple[int, ...]  # prunings
    rewinding_epochs: tuple[int, ...]  # beside the default one
    rounds: int


SCALES = {
    "full": Scale(
        flags="",
        networks=tuple((d, a) for d in ("cifar10", "cifar100", "svhn", "fmnist") for a in ("vgg16", "resnet19")),
        early_networks=tuple((d, a) for d in ("cifar10", "cifar100") for a in ("vgg16", "resnet19")),
        deeper_networks=(("tinyimagenet", "resnet34"), ("cifar10", "alexnet")),
        levels=(4, 8, 11, 14),
        rewinding_epochs=(0, 100, 180, 260),
        rounds=5,
    ),
    "small": Scale(
        flags="--train_samples 1000 --width 0.125 --batch_size 16 --learning_rate 0.1 --end_iter 8 --valid_freq 4 "
        "--prune_percent 50 --prune_iterations 7 --rewinding_epoch 2 --eb_window 3 --eb_tolerance 0.05",
        networks=(("digits", "alexnet"),),
        early_networks=(("digits", "alexnet"),),
        deeper_networks=(),
        levels=(2, 4, 6),
        rewinding_epochs=(0, 4, 6),
        rounds=3,
    ),
}


@dataclass(frozen=True)
class Command:
    """One run: what of the paper it is behind, and the script with its flags."""

    shows: tuple[str, ...]
    method: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"python train_snn_{self.method}.py {shlex.join(self.flags)}"

    def value(self, flag: str) -> str | None:
        """What follows a flag; the last one counts."""
        places = [place for place, word in enumerate(self.flags) if word == flag]
        return self.flags[places[-1] + 1] if places else None

    @property
    def name(self) -> str:
        """Experiment and run, as in the folder's path."""
        run = f"{self.value('--dataset')}-{self.value('--arch')}-round{self.value('--round')}"
        return f"{self.value('--exp_name')}/{run}"

    @property
    def source(self) -> str | None:
        """The name of the run whose ticket this one is given."""
        ticket = self.value("--ticket")
        return "/".join(Path(ticket).parts[-4:-2]) if ticket and ticket.endswith(".safetensors") else None


def commands(scale: Scale, output_dir: str, data_dir: str | None = None) -> Iterator[Command]:
    """All runs, round by round."""
    where = ["--output_dir", output_dir, *(["--data_dir", data_dir] if data_dir else [])]
    for number in range(1, scale.rounds + 1):
        for network in scale.networks:
            command = Maker(scale, where, *network, number)
            yield from _table_1(command, scale, TABLE_1, OBSERVATIONS if network == scale.networks[0] else ())
            if network == scale.networks[0] or network[1] == "vgg16":
                yield command(("Fig. 9", "Fig. 10"), "laterewindlth", "ann", "--neuron relu --timestep 1")
                for level in scale.levels:
                    yield command(("Fig. 9",), "oneshot", f"transfer-{level}", command.ticket("ann", level))
            if network in scale.early_networks:
                # section 3.3: the divergence of a network that is trained at T throughout
                flags = "--early_time_threshold 0 --sparsity_round 1"
                yield command(("Fig. 5", "supplement C"), "earlyT_laterewindlth", "divergence", flags)
                for timesteps in range(2, 6):
                    flags = f"--ticket magnitude --search_timestep {timesteps} --sparsity_round {scale.levels[1]}"
                    yield command(("Fig. 4",), "oneshot", f"magnitude-t{timesteps}", flags)
        for network in scale.deeper_networks:
            yield from _table_1(Maker(scale, where, *network, number), scale, ("supplement G",), ())
        yield from _first_network(Maker(scale, where, *scale.networks[0], number), scale)


@dataclass(frozen=True)
class Maker:
    """Makes the commands of one data set, network and round."""

    scale: Scale
    where: list[str]
    dataset: str
    arch: str
    number: int

    def __call__(self, shows: tuple[str, ...], method: str, name: str, flags: str = "") -> Command:
        network = f"--dataset {self.dataset} --arch {self.arch} {self.scale.flags}"
        words = shlex.split(f"{network} {flags} --round {self.number} --exp_name {name}")
        return Command(shows, method, (*words, *self.where))

    def ticket(self, name: str, level: int) -> str:
        """The flag that gives a run the ticket of another one."""
        folder = Path(self.where[1]) / name / f"{self.dataset}-{self.arch}-round{self.number}"
        return f"--ticket {shlex.quote(str(folder / 'tickets' / f'level_{level:02d}.safetensors'))}"


def _table_1(command: Maker, scale: Scale, shows: tuple[str, ...], more: tuple[str, ...]) -> Iterator[Command]:
    levels = " ".join(map(str, scale.levels))
    yield command(shows + more, "laterewindlth", "imp")
    yield command(shows + more, "earlyT_laterewindlth", "imp-et", f"--evaluate_levels {levels}")
    for level in scale.levels:
        yield command(shows, "earlybird", f"eb-{level}", f"--sparsity_round {level}")
        yield command(shows, "earlyT_earlybird", f"eb-et-{level}", f"--sparsity_round {level}")
        yield command((*shows, "Fig. 10"), "oneshot", f"random-{level}", f"--ticket random --sparsity_round {level}")


def _first_network(command: Maker, scale: Scale) -> Iterator[Command]:
    for epoch in scale.rewinding_epochs:
        shows = ("Fig. 3", "Fig. 7a") if epoch == 0 else ("Fig. 7a",)
        yield command(shows, "laterewindlth", f"imp-rewind-{epoch}", f"--rewinding_epoch {epoch}")
    yield command(("Fig. 7b",), "laterewindlth", "imp-local", "--pruning_scope local")
    levels = " ".join(map(str, scale.levels))
    for threshold in ("0.2", "1.01"):  # where 0.6 leads to T = 3, these lead to 4 and to 2
        flags = f"--early_time_threshold {threshold} --evaluate_levels {levels}"
        yield command(("Fig. 8c",), "earlyT_laterewindlth", f"imp-et-{threshold}", flags)
    flags = f"--divergence js --evaluate_levels {levels}"
    yield command(("supplement F",), "earlyT_laterewindlth", "imp-et-js", flags)
    for level in scale.levels:
        yield command(("Fig. 10",), "oneshot", f"snip-{level}", f"--ticket snip --sparsity_round {level}")
        for kind in ("snip", "random"):
            flags = f"--ticket {kind} --sparsity_round {level} --neuron relu --timestep 1"
            yield command(("Fig. 10",), "oneshot", f"ann-{kind}-{level}", flags)
    for how in ("weights", "lr", "none"):  # the last rate of a cosine is too small to fine-tune with
        flags = f"--rewind {how} --scheduler step"
        yield command(("rewinding",), "laterewindlth", f"imp-step-{how}", flags)
    for level in scale.levels:
        for name, source in (("imp", "imp"), ("eb", f"eb-{level}"), ("eb-et", f"eb-et-{level}")):
            flags = f"{command.ticket(source, level)} --control shuffle"
            yield command(("controls",), "oneshot", f"{name}-shuffle-{level}", flags)
        flags = f"{command.ticket('imp', level)} --control reinit"
        yield command(("controls",), "oneshot", f"imp-reinit-{level}", flags)
    for options in ("--precision fp32", "--precision bf16", "--precision bf16 --compile"):
        name = "dense-" + "-".join(word for word in options.replace("--", "").split() if word != "precision")
        yield command(("precision",), "oneshot", name, f"--ticket random --sparsity_round 0 {options}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full", help="size of the experiments (default: full)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and how long they would take")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only what is behind this (Fig. 9), or has it among its flags"
    )
    parser.add_argument(
        "--launcher", choices=("local", "ray"), default="local", help="where the runs are: here, or on a Ray cluster"
    )
    parser.add_argument(
        "--jobs", type=_at_least_1, metavar="N", help="runs at a time (default: 1; ray: as many as there is room for)"
    )
    parser.add_argument(
        "--cpus_per_run", type=_at_least_1, metavar="N", help="threads of a run (default: cores / --jobs; ray: 1)"
    )
    parser.add_argument(
        "--gpus_per_run", type=_gpus, metavar="N", help="ray: GPUs of a run, or a share of one (default: 1 if any)"
    )
    parser.add_argument(
        "--address", help="ray: the cluster, or auto for the one this machine is in (default: one is started here)"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="passed on to every run")
    parser.add_argument("--output_dir", metavar="DIR", help="folder that holds the runs (default: runs/SCALE)")
    return parser


@one_line_errors
def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("address", "gpus_per_run"):
        if args.launcher == "local" and getattr(args, name) is not None:
            parser.error(f"argument --{name}: only with --launcher ray")
    output_dir = args.output_dir or f"runs/{args.scale}"
    everything = list(commands(SCALES[args.scale], output_dir, args.data_dir))
    without_paths = commands(SCALES[args.scale], ".")
    texts = {command: str(bare) for command, bare in zip(everything, without_paths, strict=True)}
    wanted = [command for command in everything if args.only in command.shows or args.only in texts[command]]
    if not wanted:
        shown = dict.fromkeys(name for command in everything for name in command.shows)
        parser.error(f"argument --only: no command has {args.only!r}; they are behind: {'; '.join(shown)}")
    sources = {command.source for command in wanted}
    wanted = [command for command in everything if command in wanted or command.name in sources]
    if args.dry_run:
        return dry_run(wanted)
    with contextlib.closing(_executor(args)) as executor:
        work = Work(wanted, executor, Path(output_dir) / "logs", state, cost)
        try:
            work.run()
        finally:
            for command, lines in work.failed.items():
                print(f"\nfailed: {command}\n{lines}", file=sys.stderr)
    subprocess.run([sys.executable, ROOT / "report.py", output_dir, "--out", f"{output_dir}-report"], check=False)
    raise SystemExit(1 if work.failed else 0)


def _executor(args) -> Local | OnRay:
    if args.launcher == "ray":
        return OnRay(args.address, args.jobs, args.cpus_per_run or 1, args.gpus_per_run)
    jobs = args.jobs or 1
    # a batch system may give a part of the machine
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Local(jobs, args.cpus_per_run or max(1, cores // jobs))


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number and at least 1, got {text!r}")
    return int(text)


def _gpus(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (0 <= number <= 1 or (number > 1 and number.is_integer())):
        raise argparse.ArgumentTypeError(f"must be from 0 to 1 or a whole number, got {text!r}")
    return number


def state(command: Command) -> str:
    """``done``, ``missing`` (also if begun, or refused: the script says why), or ``waits`` for another run's ticket."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            return "done" if Run(get_args(command.method, None, list(command.flags))).finished else "missing"
        except (InputError, OSError, SystemExit):
            return "waits" if "argument --ticket" in error.getvalue() else "missing"


def dry_run(wanted: list[Command]) -> None:
    """Print what is behind what, and about how long it takes: its training, all at T, EB to the last epoch."""
    total = 0.0
    for command in wanted:
        now = state(command)
        seconds = 0.0 if now == "done" else estimate(command)
        total += seconds
        print(f"# {', '.join(command.shows)}: {now}" + ("" if now == "done" else f", about {clock(seconds)}"))
        print(command)
    print(f"# {len(wanted)} runs, about {clock(total)} one after the other on this machine")


def estimate(command: Command) -> float:
    """Seconds that the training of a run takes, from a few steps here."""
    args = _training(command)
    images, side = _images(args)
    # a CPU's time goes with the images, and a full batch may not fit its memory
    batch_size = args.batch_size if args.device.startswith("cuda") else min(args.batch_size, TIMED_IMAGES)
    network = (args.arch, DATASETS[args.dataset].channels, side, args.neuron, args.width)
    step = seconds_per_step(*network, args.timestep, batch_size, args.device, args.precision)
    return step * images / batch_size * sum(planned_epochs(args))


def cost(command: Command) -> float:
    """Operations of the training of a run, all at T; only their ratios mean something."""
    args = _training(command)
    images, side = _images(args)
    step = operations(args.arch, DATASETS[args.dataset].channels, side, args.width)
    return step * args.timestep * images * sum(planned_epochs(args))


def _training(command: Command) -> argparse.Namespace:
    """The flags that say how long a run trains."""
    flags = list(command.flags)
    if command.source:
        flags[flags.index("--ticket") + 1] = "random"  # it need not be there yet; its training takes as long
    with contextlib.redirect_stdout(io.StringIO()):
        return get_args(command.method, None, flags)


def _images(args: argparse.Namespace) -> tuple[int, int]:
    """How many there are to train on, and their side in pixels."""
    images, side = IMAGES.get(args.dataset, (50_000, 32))
    return min(images, args.train_samples or images), side


@cache
def operations(arch, channels, side, width) -> int:
    """Of convolutions and linear layers, for one image and timestep; nothing is computed for it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(arch, channels, 10, "relu", width)(torch.empty(1, channels, side, side), 1)
    return counter.get_total_flops()


@cache
def seconds_per_step(arch, channels, side, neuron, width, timesteps, batch_size, device, precision) -> float:
    """Seconds of a training step on this machine, the mean of a few after a first one."""
    model = build_model(arch, channels, 10, neuron, width).to(device)
    settings = argparse.Namespace(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=5e-4, cuda_graph=False)
    update = MaskedUpdate(make_optimizer(model, settings), model, dense_mask(model))
    images = torch.randn(batch_size, channels, side, side, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    for step in range(TIMED_STEPS + 1):
        if step == 1:
            started = time.perf_counter()
        loss = loss_over_time(forward(model, images, timesteps, precision, batch_size), labels)
        update(loss)
        loss.item()
    return (time.perf_counter() - started) / TIMED_STEPS


if __name__ == "__main__":
    main()
