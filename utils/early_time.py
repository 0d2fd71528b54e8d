"""Early-Time tickets: how few timesteps are enough to search with (section 3.3, Algorithm 1)."""

import math

import torch
from torch import Tensor

DIVERGENCES = ("kl", "js")
SILENCE = 1e-12  # nats; a divergence below it is rounding


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


def divergences(logits: Tensor, kind: str = "kl", fewest: int = 2) -> list[float]:
    """Normalised divergence of the prediction after t timesteps from that after all T, for t = fewest .. T-1.

    An SNN is causal: in eval mode its first t outputs are those of a run of t timesteps, so one run of T timesteps
    holds them all. P_t is the softmax of the mean of the first t logits; its divergence from P_T is averaged over the
    images and divided by its value at ``fewest``. A network that says the same after any number of timesteps (a silent
    one, or an ANN) tells nothing about time: its divergences are all 1, which keeps T.

    Args:
        logits: [T, N, classes].
        kind: ``kl`` or ``js``, see ``divergence``.
        fewest: the smallest number of timesteps to consider; the paper leaves out 1, which has no dynamics.

    Raises:
        ValueError: an unknown kind, T leaves no candidate, or a logit is not finite.
    """
    timesteps = len(logits)
    if timesteps <= fewest:
        raise ValueError(f"early time needs more than {fewest} timesteps, got {timesteps}")
    if not logits.isfinite().all():
        raise ValueError("early time needs finite logits")
    steps = torch.arange(1, timesteps + 1, device=logits.device).view(-1, 1, 1)
    log_p = (logits.double().cumsum(0) / steps).log_softmax(dim=-1)  # [T,N,classes], row t-1 is P_t
    values = divergence(log_p[fewest - 1 : -1], log_p[-1], kind).mean(-1)  # [T-fewest]
    return (values / values[0] if values[0] > SILENCE else torch.ones_like(values)).tolist()


def early_time(logits: Tensor, threshold: float, kind: str = "kl", fewest: int = 2) -> int:
    """The smallest number of timesteps whose normalised divergence is below the threshold; T if there is none.

    Args:
        logits: [T, N, classes] of a network run for T timesteps in eval mode.
        threshold: the paper's lambda; 0 always gives T.
        kind: see ``divergence``.
        fewest: see ``divergences``.

    Raises:
        ValueError: see ``divergences``.
    """
    for t, value in enumerate(divergences(logits, kind, fewest), start=fewest):
        if value < threshold:
            return t
    return len(logits)
