"""Early-Bird tickets: when a mask has settled (section 3.2)."""

from torch import Tensor

from .flags import Parser, between, count
from .masks import DISTANCES, Mask, distance

TOLERANCES = {"hamming": 0.02, "jaccard": 0.5}


class EarlyBird:
    """Watches the masks of a network in training, one an epoch, until the newest is an Early-Bird ticket.

    Args:
        window: the paper's q, how many earlier masks the newest is compared with. None of them may be of the untrained
            network.
        tolerance: the paper's tau, 0 to 1; all distances must be below it.
        kind: the distance, see ``masks.distance``.
    """

    def __init__(self, window: int, tolerance: float, kind: str = "hamming"):
        self.window, self.tolerance, self.kind = window, tolerance, kind
        self.recent: list[Mask] = []  # oldest first

    def observe(self, mask: Mask) -> dict:
        """Take in the mask of one more epoch.

        Returns:
            For the log: the largest distance, 0 to 1, from this mask to those before it in the window, by kind (0 if it
            is alone), and whether it has settled.
        """
        self.recent = [*self.recent, mask][-self.window - 1 :]
        distances = {kind: self._largest_distance(kind) for kind in DISTANCES}
        return {**distances, "settled": self.settled}

    @property
    def mask(self) -> Mask:
        """The newest mask, empty before the first."""
        return self.recent[-1] if self.recent else {}

    @property
    def settled(self) -> bool:
        """Whether the window is full and all in it are close to the newest mask."""
        return len(self.recent) > self.window and self._largest_distance(self.kind) < self.tolerance

    def _largest_distance(self, kind: str) -> float:
        return max((distance(self.mask, earlier, kind) for earlier in self.recent[:-1]), default=0.0)

    def state_dict(self) -> dict[str, list[dict[str, Tensor]]]:
        return {"recent": self.recent}

    def load_state_dict(self, state: dict[str, list[dict[str, Tensor]]]) -> None:
        self.recent = list(state["recent"])


def early_bird_flags(parser: Parser) -> None:
    flag = parser.section("Early-Bird")
    flag("--eb_window", count, 5, "Q", "masks of earlier epochs that the current one is compared with")
    flag("--eb_distance", DISTANCES, "hamming", None, "differing entries over all entries, or over those either keeps")
    flag(
        "--eb_tolerance",
        between(0, 1),
        lambda flags: TOLERANCES[flags.eb_distance],
        "FRACTION",
        "a mask has settled when all distances in the window are below this fraction",
        shown=", ".join(f"{tolerance} for {kind}" for kind, tolerance in TOLERANCES.items()),
    )
