"""Early-Time tickets: how few timesteps are enough to search with (section 3.3, Algorithm 1)."""

import math

import torch
from torch import Tensor

from .flags import Parser, not_negative, positive_int

DIVERGENCES = ("kl", "js")
SILENCE = 1e-12  # nats; a divergence below it is rounding
OWN_FLAGS = {"--early_time_epoch", "--early_time_threshold", "--early_time_samples", "--divergence"}
FEWEST = 2  # timesteps to consider; the paper leaves out 1, which has no dynamics


def divergence(log_p: Tensor, log_q: Tensor, kind: str = "kl") -> Tensor:
    """How far the distribution P is from Q, in nats, summed over the classes.

    Args:
        log_p: logarithms of probabilities [..., classes].
        log_q: the same; the leading dimensions broadcast.
        kind: ``kl``, D_KL(P || Q) of Eq. 1; ``js``, Jensen-Shannon (supplement F), the mean of D_KL(P || M) and
            D_KL(Q || M) with M = (P + Q) / 2, which is symmetric and at most ln 2.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kind!r}: choose from {', '.join(DIVERGENCES)}")
    if kind == "kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2


def divergences(logits: Tensor, kind: str = "kl") -> list[float]:
    """Normalised divergence of the prediction after t timesteps from that after all T, for t = 2 .. T-1.

    An SNN is causal: in eval mode its first t outputs are those of a run of t timesteps, so one run of T timesteps
    holds them all. P_t is the softmax of the mean of the first t logits; its divergence from P_T is averaged over the
    images and divided by its value at t = 2. A network that says the same after any number of timesteps (a silent
    one, or an ANN) tells nothing about time: its divergences are all 1, which keeps T.

    Args:
        logits: [T, N, classes].
        kind: ``kl`` or ``js``, see ``divergence``.

    Raises:
        ValueError: an unknown kind, T leaves no candidate, or a logit is not finite.
    """
    timesteps = len(logits)
    if timesteps <= FEWEST:
        raise ValueError(f"early time needs more than {FEWEST} timesteps, got {timesteps}")
    if not logits.isfinite().all():
        raise ValueError("early time needs finite logits")
    steps = torch.arange(1, timesteps + 1, device=logits.device).view(-1, 1, 1)
    log_p = (logits.double().cumsum(0) / steps).log_softmax(dim=-1)  # [T,N,classes], row t-1 is P_t
    values = divergence(log_p[FEWEST - 1 : -1], log_p[-1], kind).mean(-1)  # [T-2]
    return (values / values[0] if values[0] > SILENCE else torch.ones_like(values)).tolist()


class EarlyTime:
    """Chooses the timesteps of a search, once: the fewest whose predictions are close to those of all T.

    Args:
        timesteps: T.
        epoch: epochs of training at T before the choice.
        threshold: the paper's lambda; T_early is the smallest t whose normalised divergence is below it, T if there is
            none (0 always keeps T).
        kind: see ``divergence``.

    Attributes:
        timesteps: those to search with, T until the choice is made.
    """

    def __init__(self, timesteps: int, epoch: int, threshold: float, kind: str = "kl"):
        self.timesteps, self.epoch, self.threshold, self.kind = timesteps, epoch, threshold, kind
        self.decided = False

    def observe(self, epoch: int, logits: Tensor) -> dict:
        """Look at the predictions after an epoch, and choose if it is time to.

        Args:
            epoch: the epoch that has been trained, from 0.
            logits: [T, N, classes] of un-augmented training images in eval mode.

        Returns:
            For the log: ``divergences`` of t = 2 .. T-1 timesteps and, after the epoch that decides, ``early_time``.

        Raises:
            ValueError: see ``divergences``.
        """
        values = divergences(logits, self.kind)
        if self.decided or epoch + 1 < self.epoch:
            return {"divergences": values}
        close = (t for t, value in enumerate(values, start=FEWEST) if value < self.threshold)
        self.timesteps, self.decided = next(close, len(logits)), True
        return {"divergences": values, "early_time": self.timesteps}

    def state_dict(self) -> dict:
        return {"timesteps": self.timesteps, "decided": self.decided}

    def load_state_dict(self, state: dict) -> None:
        self.timesteps, self.decided = state["timesteps"], state["decided"]


def early_time_flags(parser: Parser, switch: bool = False) -> None:
    """The flags of Early-Time; with ``switch`` it is off unless ``--early_time`` is given."""
    flag = parser.section("Early-Time")
    if switch:
        flag("--early_time", bool, False, None, "search with fewer timesteps than T")
    text = "epochs of training at T before the timesteps of the search are chosen"
    flag("--early_time_epoch", positive_int, 2, "EPOCHS", text)
    text = "search with the fewest timesteps whose normalised divergence is below this; 0 keeps T"
    flag("--early_time_threshold", not_negative, 0.6, "LAMBDA", text)
    text = "training images that the divergence is measured on; all, if there are fewer"
    flag("--early_time_samples", positive_int, 1000, "N", text)
    text = "how predictions of fewer timesteps are compared with those of T: Kullback-Leibler or Jensen-Shannon"
    flag("--divergence", DIVERGENCES, "kl", None, text)

    def check(flags):
        if switch and not flags.early_time:
            for name in sorted(parser.given & OWN_FLAGS):
                parser.error(f"argument {name}: only with --early_time")
            return
        parser.require_below(flags, "early_time_epoch", "end_iter")
        if flags.neuron == "relu":
            parser.error("argument --neuron: relu has no time, of which Early-Time could save some")
        if flags.timestep < FEWEST + 2:
            text = f"must be at least {FEWEST + 2}, got {flags.timestep}: Early-Time needs timesteps to choose from"
            parser.error(f"argument --timestep: {text}")
        if switch:
            flags.method, flags.label = f"earlyT_{flags.method}", f"{flags.label} + ET"

    parser.check(check)
