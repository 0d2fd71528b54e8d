"""Early-Time tickets: how few timesteps are enough to search with (section 3.3, Algorithm 1)."""

import torch
from torch import Tensor

SILENCE = 1e-12  # nats; a divergence below it is rounding


def divergences(logits: Tensor, fewest: int = 2) -> list[float]:
    """Normalised KL divergence of the prediction after t timesteps from that after all T, for t = fewest .. T-1.

    An SNN is causal: in eval mode its first t outputs are those of a run of t timesteps, so one run of T timesteps
    holds them all. P_t is the softmax of the mean of the first t logits; D_KL(P_t || P_T) of Eq. 1 is summed over the
    classes and averaged over the images, and divided by its value at ``fewest``. A network that says the same after any
    number of timesteps (a silent one, or an ANN) tells nothing about time: its divergences are all 1, which keeps T.

    Args:
        logits: [T, N, classes].
        fewest: the smallest number of timesteps to consider; the paper leaves out 1, which has no dynamics.

    Raises:
        ValueError: T leaves no candidate, or a logit is not finite.
    """
    timesteps = len(logits)
    if timesteps <= fewest:
        raise ValueError(f"early time needs more than {fewest} timesteps, got {timesteps}")
    if not logits.isfinite().all():
        raise ValueError("early time needs finite logits")
    steps = torch.arange(1, timesteps + 1, device=logits.device).view(-1, 1, 1)
    log_p = (logits.double().cumsum(0) / steps).log_softmax(dim=-1)  # [T,N,classes], row t-1 is P_t
    kl = (log_p.exp() * (log_p - log_p[-1])).sum(-1).mean(-1)[fewest - 1 : -1]  # [T-fewest]
    return (kl / kl[0] if kl[0] > SILENCE else torch.ones_like(kl)).tolist()


def early_time(logits: Tensor, threshold: float, fewest: int = 2) -> int:
    """The smallest number of timesteps whose normalised divergence is below the threshold; T if there is none.

    Args:
        logits: [T, N, classes] of a network run for T timesteps in eval mode.
        threshold: the paper's lambda; 0 always gives T.
        fewest: see ``divergences``.

    Raises:
        ValueError: see ``divergences``.
    """
    for t, divergence in enumerate(divergences(logits, fewest), start=fewest):
        if divergence < threshold:
            return t
    return len(logits)
