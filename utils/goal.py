"""How sparse a run is to get: the flags, the name of the ticket, and the prunings that lead there."""

import math
from dataclasses import dataclass

from .flags import Parser, between, count, percent, whole
from .masks import REWINDS, SCOPES, sparsity_after

DEFAULT_ROUND = 4
OF_ALL = 14_715_584 / 14_728_266  # prunable weights of VGG16's parameters
TABLE = "R prunings of 25 % come to (% of the prunable weights / of all parameters of VGG16):\n" + "\n".join(
    "  ".join(f"{r:2d}: {100 * s:5.2f} / {100 * s * OF_ALL:5.2f}" for r in row for s in [sparsity_after(r, 0.25)])
    for row in (range(1, 6), range(6, 11), range(11, 15))
)


def sparsity_flags(parser: Parser, default_round: int | None = DEFAULT_ROUND) -> None:
    """How sparse a ticket is to be; ``default_round`` None means K - 1."""
    flag = parser.section("sparsity", TABLE)
    shown = "K - 1" if default_round is None else f"{default_round}, or K - 1 if that is less"

    def round_of(flags) -> int | None:
        most = flags.prune_iterations - 1
        return None if flags.sparsity is not None else min(most, most if default_round is None else default_round)

    flag(
        "--prune_percent",
        between(0.1, 100, open_high=True),
        25.0,
        "PERCENT",
        "share of the surviving weights that one pruning takes",
    )
    flag("--prune_iterations", count, 15, "K", "trainings of a whole IMP search; K - 1 prunings lie between them")
    flag("--sparsity_round", whole, round_of, "R", "prune to the sparsity that R prunings reach", shown=shown)
    flag("--sparsity", percent, None, "PERCENT", "prune to this share of the prunable weights, instead", shown="off")

    def check(flags):
        if flags.sparsity is not None and flags.sparsity_round is not None:
            parser.error("argument --sparsity: not with --sparsity_round")
        unused = ("--prune_iterations",) if default_round is None else ("--prune_iterations", "--prune_percent")
        for name in parser.given.intersection(unused) if flags.sparsity is not None else ():
            parser.error(f"argument {name}: not with --sparsity")
        if flags.sparsity is None and flags.sparsity_round >= flags.prune_iterations:
            most = flags.prune_iterations - 1
            parser.error(
                f"argument --sparsity_round: must be from 0 to {most} (--prune_iterations {most + 1} has {most} "
                f"prunings), got {flags.sparsity_round}"
            )

    parser.check(check)


def scope_flags(parser: Parser) -> None:
    flag = parser.section("pruning")
    flag("--pruning_scope", SCOPES, "global", None, "rank weights in the network or per layer")


def imp_flags(parser: Parser) -> None:
    """The flags of iterative magnitude pruning."""
    sparsity_flags(parser, default_round=None)
    scope_flags(parser)
    flag = parser.section("rewinding")
    text = "a pruned network goes back to the weights after so many epochs, 0 for the initial ones"
    flag("--rewinding_epoch", whole, 20, "EPOCHS", text, below="end_iter")
    flag(
        "--rewind",
        REWINDS,
        "weights",
        None,
        "what goes back: weights and learning rate; only the rate (lr); or neither",
    )


def evaluation_flags(parser: Parser) -> None:
    """Which tickets of a search are trained at T (IMP + ET, short cycles)."""
    flag = parser.section("evaluation")
    text = "levels, as numbers of prunings, whose tickets are trained at T"
    flag("--evaluate_levels", whole, lambda f: [len(prunings_of(f))], "R", text, nargs="+", shown="the last")

    def check(flags):
        levels, last = sorted(set(flags.evaluate_levels)), len(prunings_of(flags))
        if levels[-1] > last:
            parser.error(f"argument --evaluate_levels: must be from 0 to {last}, the last level, got {levels[-1]}")
        flags.evaluate_levels = levels

    parser.check(check)


@dataclass(frozen=True)
class Goal:
    """The ticket that a run is to find: its name, the prunings that its sparsity stands for (None where it was given
    directly), and its sparsity, 0 to 1, of the prunable weights."""

    name: str
    level: int | None
    sparsity: float


def goal_of(args) -> Goal:
    """What ``--sparsity`` or ``--sparsity_round`` ask for."""
    if args.sparsity is not None:
        return goal_for(None, args.sparsity / 100)
    return goal_for(args.sparsity_round, sparsity_after(args.sparsity_round, args.prune_percent / 100))


def goal_for(level: int | None, sparsity: float) -> Goal:
    """A ticket that stands for so many prunings, or else for its sparsity, 0 to 1."""
    return Goal(f"sparsity_{round(100 * sparsity, 2):g}" if level is None else level_name(level), level, sparsity)


def prunings_of(args) -> list[float]:
    """The share of the survivors, 0 to 1, that each pruning of IMP takes; with ``--sparsity`` the last is made smaller,
    so that it ends there (but for the rounding of the prunings before it to whole weights)."""
    share = args.prune_percent / 100
    if args.sparsity is None:
        return [share] * args.sparsity_round
    left = 1 - args.sparsity / 100
    full = math.floor(math.log(left) / math.log(1 - share) + 1e-9)
    last = 1 - left / (1 - share) ** full
    return [share] * full + ([last] if last > 1e-9 else [])


def level_name(level: int) -> str:
    """Name of the ticket after so many prunings."""
    return f"level_{level:02d}"
