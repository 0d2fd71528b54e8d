"""Early-Bird tickets: when a mask has settled (section 3.2)."""

from collections import deque

from .masks import Mask, distance


def recent_masks(window: int) -> "deque[Mask]":
    """Room for the current mask and the ``window`` masks before it; the oldest leaves when a new one comes."""
    return deque(maxlen=window + 1)


def window_distance(recent: "deque[Mask]", kind: str = "hamming") -> float:
    """Largest distance, 0 to 1, from the newest mask to those before it in the window (0 if it is alone)."""
    *earlier, current = recent
    return max((distance(current, mask, kind) for mask in earlier), default=0.0)


def has_settled(recent: "deque[Mask]", tolerance: float, kind: str = "hamming") -> bool:
    """Whether the newest mask is an Early-Bird ticket: the window is full and all in it are closer than ``tolerance``.

    Args:
        recent: from ``recent_masks``, oldest first; masks of trained networks only, one an epoch.
        tolerance: the paper's tau, 0 to 1; the largest distance must be below it.
        kind: the distance, see ``masks.distance``.
    """
    return len(recent) == recent.maxlen and window_distance(recent, kind) < tolerance
