"""The curves of ``metrics.jsonl`` in TensorBoard, while they grow."""

import shutil
from pathlib import Path

from .errors import InputError

FEWEST = 2  # timesteps that a row's first divergence is of


class Curves:
    """Event files in a folder ``<phase>_level_<NN>`` for each stage, which TensorBoard shows as runs to compare; the
    step of a point is its epoch.

    Args:
        folder: the folder of all stages.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import
        except ImportError as error:
            raise InputError(
                f"--tensorboard needs the package tensorboard (pip install tensorboard): {error}"
            ) from error
        self.folder, self.open = folder, SummaryWriter
        self.stage, self.writer = None, None

    def start_over(self, phase: str, level: int, rows: list[dict]) -> None:
        """Write a stage's file anew, from those of the log's rows that are the stage's: no point is there twice, and
        none is left of an epoch that is about to be run again."""
        if self.writer is not None:
            self.writer.close()
        self.stage = (phase, level)
        folder = self.folder / f"{phase}_level_{level:02d}"
        if folder.exists():
            shutil.rmtree(folder)
        self.writer = self.open(str(folder), purge_step=0)  # a TensorBoard that has read the old file forgets it
        for row in rows:
            if (row["phase"], row["level"]) == self.stage:
                self.add(row, row)

    def add(self, row: dict, fields: dict) -> None:
        """Add points at a row's epoch: the numbers among ``fields``, and a curve for each t of its divergences."""
        if (row["phase"], row["level"]) != self.stage:
            self.start_over(row["phase"], row["level"], [])
        for name, value in fields.items():
            if name == "divergences":
                for t, divergence in enumerate(value, start=FEWEST):
                    self.writer.add_scalar(f"{name}/{t}_timesteps", divergence, row["epoch"])
            elif isinstance(value, int | float) and name not in ("level", "epoch"):
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()
