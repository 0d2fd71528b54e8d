"""The commands behind every row of the paper's Table 1 and every figure: runs what is missing, skips what is done.

    python benchmarks/reproduce.py --dry_run                # the list, and what of it is done
    python benchmarks/reproduce.py                          # everything at full size, into runs/full/
    python benchmarks/reproduce.py --scale small --jobs 2   # handwritten digits and a narrow network, into runs/small/
    python benchmarks/reproduce.py --only "Table 1"         # a part
    python benchmarks/reproduce.py --flags=--decay_kernels_only --output_dir runs/kernels   # all with one thing changed
    python benchmarks/reproduce.py --launcher ray           # as many at a time as a Ray cluster, or this machine, holds

A run that was stopped resumes when its command is run again, so this script can be stopped and started too, and be
started several times at once: each leaves alone what another one is working on. It ends with the report of all runs.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.launch import run_here, run_on_ray  # noqa: E402
from benchmarks.scales import SCALES, Scale  # noqa: E402
from utils.files import InputError  # noqa: E402
from utils.flags import Parser, not_negative, positive_int  # noqa: E402
from utils.masks import sparsity_after  # noqa: E402

COMPARISON = ("Table 2", "Fig. search cost")
TABLE_1 = ("Table 1", *COMPARISON, "Fig. 1", "Fig. 6", "Fig. 8a", "Fig. 8b", "Fig. 11")
OBSERVATIONS = ("Fig. 3", "Fig. 7a", "Fig. 7b", "Fig. 7c", "Fig. 8c")  # IMP's own share of them
ANN = "--neuron relu --timestep 1"

# the groups of flags that a script has, beside those of all scripts
SCRIPTS = {
    "laterewindlth": ("sparsity", "rewinding"),
    "earlyT_laterewindlth": ("sparsity", "rewinding"),
    "earlybird": ("sparsity", "early_bird"),
    "earlyT_earlybird": ("sparsity", "early_bird"),
    "shortcycle": ("sparsity", "rewinding"),
    **dict.fromkeys(("oneshot", "gradual", "admm", "rigl", "deeprewiring", "gradrewiring"), ("sparsity",)),
}
# what finds a ticket of the sparsity that it is asked for: what it is behind, name, script, its flags
EACH_LEVEL = (
    (TABLE_1, "eb", "earlybird", ""),
    (TABLE_1, "eb-et", "earlyT_earlybird", ""),
    ((*TABLE_1, "Fig. 10"), "random", "oneshot", "--ticket random"),
)
# the same, of the first network alone
EACH_LEVEL_OF_THE_FIRST = (
    (COMPARISON, "gradual", "gradual", ""),
    (COMPARISON, "gradual-et", "gradual", "--early_time"),
    (COMPARISON, "admm", "admm", ""),
    (COMPARISON, "rigl", "rigl", ""),
    (COMPARISON, "set", "rigl", "--grow random"),
    (COMPARISON, "deep-r", "deeprewiring", ""),
    (COMPARISON, "deep-r-from-dense", "deeprewiring", "--from_dense"),
    (COMPARISON, "grad-r", "gradrewiring", ""),
    (COMPARISON, "erk", "oneshot", "--ticket erk"),
    ((*COMPARISON, "Fig. 10"), "snip", "oneshot", "--ticket snip"),
    (("Fig. 10",), "ann-snip", "oneshot", f"--ticket snip {ANN}"),
    (("Fig. 10",), "ann-random", "oneshot", f"--ticket random {ANN}"),
)


@dataclass(frozen=True)
class Command:
    """One run.

    Attributes:
        shows: what of the paper it is behind.
        name: experiment and run, as in the folder's path; the folder's own name may hold a sparsity, too.
        script: its file.
        flags: what makes it this run.
        places: the flags that say where files are.
        needs: the name of the run whose ticket this one is given.
        ticket: the file of that ticket.
    """

    shows: tuple[str, ...]
    name: str
    script: str
    flags: tuple[str, ...]
    places: tuple[str, ...]
    needs: str | None = None
    ticket: Path | None = None

    @property
    def words(self) -> tuple[str, ...]:
        ticket = ("--ticket", str(self.ticket)) if self.ticket else ()
        return (self.script, *self.flags, *ticket, *self.places)

    def state(self, output_dir: Path) -> str:
        """``done``, ``waits`` for another run's ticket, or ``missing``, also if it has begun."""
        run, _, repetition = self.name.rpartition("-")
        if any(output_dir.glob(f"{run}*-{repetition}/summary.txt")):
            return "done"
        return "waits" if self.ticket and not self.ticket.is_file() else "missing"


@dataclass(frozen=True)
class Maker:
    """Makes the commands of one data set, network and round."""

    scale: Scale
    output_dir: Path
    places: tuple[str, ...]
    dataset: str
    arch: str
    number: int

    def __call__(self, shows: tuple[str, ...], script: str, experiment: str, flags: str = "", **ticket) -> Command:
        """A run of a script. One that is given a ticket has the ticket's sparsity, and no flags for it."""
        groups = ("all",) if ticket else ("all", *SCRIPTS[script])
        sized = self.scale.flags.items()
        own = [text for name, text in sized if name in groups or f"{experiment}-".startswith(f"{name}-")]
        texts = [f"--dataset {self.dataset} --arch {self.arch}", *own]
        words = shlex.split(" ".join([*texts, flags, f"--round {self.number} --exp_name {experiment}"]))
        name = f"{experiment}/{self._run()}"
        return Command(shows, name, f"train_snn_{script}.py", tuple(words), self.places, **ticket)

    def imp_ticket(self, experiment: str, level: int) -> dict:
        """The ticket of an IMP run, for a run that is to be given it."""
        return self._ticket(experiment, self._run(), level)

    def early_bird_ticket(self, experiment: str, level: int) -> dict:
        """The ticket of an EB run, for a run that is to be given it."""
        percent = round(100 * sparsity_after(level, self.scale.prune_percent / 100), 2)
        return self._ticket(experiment, self._run(f"-{percent:g}"), level)

    def _run(self, sparsity: str = "") -> str:
        return f"{self.dataset}-{self.arch}{sparsity}-round{self.number}"

    def _ticket(self, experiment: str, run: str, level: int) -> dict:
        path = self.output_dir / experiment / run / "tickets" / f"level_{level:02d}.safetensors"
        return {"needs": f"{experiment}/{self._run()}", "ticket": path}


def commands(scale: Scale, output_dir: Path, data_dir: str | None = None) -> Iterator[Command]:
    """All runs, round by round; each after the run whose ticket it needs."""
    places = ("--output_dir", str(output_dir), *(("--data_dir", data_dir) if data_dir else ()))
    for number in range(1, scale.rounds + 1):
        for network in scale.networks:
            command = Maker(scale, output_dir, places, *network, number)
            first = network == scale.networks[0]
            yield from _table_1(command, TABLE_1 + OBSERVATIONS if first else TABLE_1, EACH_LEVEL)
            levels = f"--evaluate_levels {' '.join(map(str, scale.levels))}"  # one search finds all tickets
            yield command(COMPARISON, "shortcycle", "short-cycles", levels)
            yield command(COMPARISON, "shortcycle", "short-cycles-et", f"--early_time {levels}")
            for epochs in scale.cycles:
                flags = f"--cycle_epochs {epochs} {levels}"
                yield command(COMPARISON, "shortcycle", f"short-cycles-{epochs}", flags)
            if first or network[1] == "vgg16":
                yield command(("Fig. 9", "Fig. 10"), "laterewindlth", "ann", ANN)
                for level in scale.levels:
                    ticket = command.imp_ticket("ann", level)
                    yield command(("Fig. 9",), "oneshot", f"transfer-{level}", **ticket)
            if network in scale.early_networks:
                yield from _early_time(command)
            if first:
                yield from _first_network(command)
        for network in scale.deeper_networks:
            each_level = [(("supplement G",), *rest) for _, *rest in EACH_LEVEL]
            yield from _table_1(Maker(scale, output_dir, places, *network, number), ("supplement G",), each_level)


def _table_1(command: Maker, shows: tuple[str, ...], each_level) -> Iterator[Command]:
    levels = " ".join(map(str, command.scale.levels))
    yield command(shows, "laterewindlth", "imp")
    yield command(shows, "earlyT_laterewindlth", "imp-et", f"--evaluate_levels {levels}")
    yield from _each_level(command, each_level)


def _each_level(command: Maker, each_level) -> Iterator[Command]:
    for level in command.scale.levels:
        for shows, name, script, flags in each_level:
            yield command(shows, script, f"{name}-{level}", f"{flags} --sparsity_round {level}")


def _early_time(command: Maker) -> Iterator[Command]:
    # section 3.3: the divergence of a network that is trained at T throughout
    flags = "--early_time_threshold 0 --sparsity_round 1"
    yield command(("Fig. 5", "supplement C"), "earlyT_laterewindlth", "divergence", flags)
    for timesteps in range(2, command.scale.timestep + 1):
        shows = ("Fig. 4", *COMPARISON) if timesteps == command.scale.timestep else ("Fig. 4",)
        flags = f"--ticket magnitude --search_timestep {timesteps} --sparsity_round {command.scale.levels[1]}"
        yield command(shows, "oneshot", f"magnitude-t{timesteps}", flags)


def _first_network(command: Maker) -> Iterator[Command]:
    for epoch in command.scale.rewinding_epochs:
        shows = ("Fig. 3", "Fig. 7a") if epoch == 0 else ("Fig. 7a",)
        yield command(shows, "laterewindlth", f"imp-rewind-{epoch}", f"--rewinding_epoch {epoch}")
    yield command(("Fig. 7b",), "laterewindlth", "imp-local", "--pruning_scope local")
    levels = f"--evaluate_levels {' '.join(map(str, command.scale.levels))}"
    for threshold in ("0.2", "1.01"):  # where 0.6 leads to T = 3, these lead to 4 and to 2
        flags = f"--early_time_threshold {threshold} {levels}"
        yield command(("Fig. 8c",), "earlyT_laterewindlth", f"imp-et-{threshold}", flags)
    yield command(("supplement F",), "earlyT_laterewindlth", "imp-et-js", f"--divergence js {levels}")
    yield from _each_level(command, EACH_LEVEL_OF_THE_FIRST)
    for level in command.scale.levels:
        if level not in command.scale.levels[1:2]:  # there it is a run of Fig. 4
            flags = f"--ticket magnitude --sparsity_round {level}"
            yield command(COMPARISON, "oneshot", f"magnitude-{level}", flags)
    for how in ("weights", "lr", "none"):  # the last rate of a cosine is too small to fine-tune with
        flags = f"--rewind {how} --scheduler step"
        yield command(("rewinding",), "laterewindlth", f"imp-step-{how}", flags)
    for level in command.scale.levels:
        imp = command.imp_ticket("imp", level)
        birds = {name: command.early_bird_ticket(f"{name}-{level}", level) for name in ("eb", "eb-et")}
        for name, ticket in ({"imp": imp} | birds).items():
            yield command(("controls",), "oneshot", f"{name}-shuffle-{level}", "--control shuffle", **ticket)
        yield command(("controls",), "oneshot", f"imp-reinit-{level}", "--control reinit", **imp)
    for options in ("--precision fp32", "--precision bf16", "--precision bf16 --compile"):
        name = "dense-" + options.removeprefix("--precision ").replace(" --", "-")
        yield command(("precision",), "oneshot", name, f"--ticket random --sparsity_round 0 {options}")


def make_parser() -> Parser:
    parser = Parser("reproduce.py", __doc__)
    flag = parser.section("which runs")
    flag("--scale", SCALES, "full", None, "size of the experiments")
    flag("--only", str, "", "TEXT", "only what is behind this (Fig. 9), or has it in its command", shown="all")
    flag("--flags", shlex.split, "", "=TEXT", "more flags for every run; a run's own flags beat them", shown="none")
    flag("--dry_run", bool, False, None, "print the commands and what is done")
    flag("--data_dir", str, None, "DIR", "passed on to every run", shown="that of the scripts")
    flag("--output_dir", str, lambda flags: f"runs/{flags.scale}", "DIR", "folder of all runs", shown="runs/SCALE")

    flag = parser.section("where they run")
    flag("--launcher", ("local", "ray"), "local", None, "on this machine, or on a Ray cluster")
    flag("--jobs", positive_int, None, "N", "local: runs at a time", shown="1")
    flag("--cpus_per_run", positive_int, None, "N", "threads of a run", shown="cores / --jobs; ray: 1")
    flag("--gpus_per_run", not_negative, None, "N", "ray: GPUs of a run, or a share of one", shown="1 if there is any")
    flag("--address", str, None, "HOST:PORT", "ray: the cluster; auto for that of this machine", shown="starts one")
    for name, launcher in (("--jobs", "local"), ("--gpus_per_run", "ray"), ("--address", "ray")):
        parser.only_with(name, "--launcher", launcher)

    def whole_above_1(flags):
        gpus = flags.gpus_per_run
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            parser.error(f"argument --gpus_per_run: must be from 0 to 1 or a whole number, got {gpus:g}")

    def own_folder(flags):
        if flags.flags and "--output_dir" not in parser.given:
            parser.error(f"argument --flags: needs --output_dir: {flags.output_dir} is for runs without them")

    parser.check(whole_above_1)
    parser.check(own_folder)
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse(argv)
    output_dir = Path(args.output_dir)
    scale = SCALES[args.scale]
    scale = replace(scale, flags=scale.flags | {"all": f"{scale.flags.get('all', '')} {shlex.join(args.flags)}"})
    everything = list(commands(scale, output_dir, args.data_dir))
    wanted = [c for c in everything if args.only in c.shows or args.only in shlex.join([c.script, *c.flags])]
    if not wanted:
        shown = dict.fromkeys(name for command in everything for name in command.shows)
        parser.error(f"argument --only: no command has {args.only!r}; they are behind: {'; '.join(shown)}")
    needed = {command.needs for command in wanted}
    wanted = [command for command in everything if command in wanted or command.name in needed]
    states = {command: command.state(output_dir) for command in wanted}
    missing = [command for command, state in states.items() if state != "done"]
    if args.dry_run:
        for command, state in states.items():
            print(f"# {', '.join(command.shows)}: {state}\npython {shlex.join(command.words)}")
        print(f"# done {len(wanted) - len(missing)} of {len(wanted)}")
        return
    print(f"{len(missing)} of {len(wanted)} runs, output in {output_dir / 'logs'}", flush=True)
    try:
        if args.launcher == "ray":
            cpus, gpus = args.cpus_per_run or 1, args.gpus_per_run
            failed = run_on_ray(missing, output_dir / "logs", args.address, cpus, gpus)
        else:
            jobs = args.jobs or 1
            failed = run_here(missing, output_dir / "logs", jobs, args.cpus_per_run or max(1, _cores() // jobs))
    except (InputError, OSError) as error:
        parser.error(str(error))
    subprocess.run([sys.executable, ROOT / "report.py", output_dir, "--out", f"{output_dir}-report"], check=False)
    if failed:
        names = "; ".join(command.name for command in failed)
        print(f"failed, or without the ticket of one that failed: {names}", file=sys.stderr)
        raise SystemExit(1)


def _cores() -> int:
    """Cores that this process may use: a batch system may give a part of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
