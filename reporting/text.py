"""Numbers as text, and tables of such text."""

import math
from dataclasses import dataclass, replace

from .experiments import Cell, Spread

SILENT = "†"  # marks an accuracy of a network with a layer that does not spike
PREFIXES = ("", "k", "M", "G", "T")
MACHINES = "‡"  # stands for a time whose rounds ran on different machines
REPEATED = "§"  # marks a number of rounds that train one saved ticket


@dataclass(frozen=True)
class Table:
    """A table as text: rows by title of the column, "group: title" where columns have a title over them.

    A cell is a text or its lines: the number, and what stands small below it.
    """

    title: str
    rows: list[dict[str, str | list[str]]]
    notes: list[str]

    def upright(self) -> "Table":
        """The table itself; one of a single row is turned, so that its columns are below each other."""
        if len(self.rows) != 1:
            return self
        (name, first), *rest = self.rows[0].items()
        title = first if isinstance(first, str) else ", ".join(first)
        return replace(self, rows=[{name: other.replace(": ", ", "), title: cell} for other, cell in rest])


def number(value: float, digits: int = 2, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}".replace("-", "−")  # noqa: RUF001


def measured(value: Spread, digits: int = 2, sign: str = "", unit: float = 1) -> str:
    """A mean, in units of ``unit``, and the deviation where there is one."""
    deviation = f" ± {number(value.std / unit, digits)}" if value.n > 1 else ""
    return number(value.mean / unit, digits, sign) + deviation


def whole(value: Spread | None) -> str:
    """A mean of whole numbers, with a deviation only where they differ; nothing if there is no number."""
    if value is None or value.std > 0:
        return measured(value, 1) if value else ""
    return number(value.mean, 0 if value.mean == int(value.mean) else 1)


def significant(value: Spread | None, n: int) -> str:
    """A mean of any size to three digits, and a deviation where the values differ; nothing if there is no number.

    Args:
        value: the number.
        n: that is written beside it; another is written after it.
    """
    if value is None:
        return ""
    power = min(int(math.log10(value.mean) // 3), len(PREFIXES) - 1) if value.mean >= 1000 else 0
    unit = 1000.0**power
    digits = max(0, 2 - math.floor(math.log10(value.mean / unit))) if value.mean > 0 else 0
    text = f"{value.mean / unit:.{digits}f}" + (f" ± {value.std / unit:.{digits}f}" if value.std > 0 else "")
    text = f"{text} {PREFIXES[power]}".rstrip()
    return text if value.n == n else with_n(text, value)


def duration(value: Spread | None) -> str:
    """Seconds, mean and deviation, in the unit that they are read best in; a mark if there is no common time."""
    if value is None:
        return MACHINES
    unit, name, digits = (3600, "h", 2) if value.mean >= 3600 else (60, "min", 1) if value.mean >= 120 else (1, "s", 1)
    return f"{measured(value, digits, unit=unit)} {name}"


def with_n(text: str, value: Spread) -> str:
    """A number never stands without how many it is the mean of."""
    return f"{text} (n={value.n})"


def percent(column: float) -> str:
    return f"{column:.2f} %"


def accuracy_of(cell: Cell) -> str:
    """Accuracy of a ticket with its n, marked where a layer of the network is silent, and where n is not of tickets."""
    accuracy = cell.spread("test_accuracy")
    text = with_n(measured(accuracy) + (SILENT if cell.silent else ""), accuracy)
    return text + (REPEATED if cell.repeats_training else "")


def search_of(cell: Cell) -> list[str]:
    """What the search for a ticket took, in two lines."""
    cost = cell.spread("search_timestep_epochs")
    if cost is None:
        return ["see its source"]  # it stands with the run that found the saved ticket
    if not cost.mean:
        return [with_n("no training", cost)]
    return [with_n(duration(cell.spread("search_seconds")), cost), f"{whole(cost)} epochs x T"]


def marks(cells: list[Cell]) -> list[str]:
    """What the marks say, where one of the cells has them."""
    layers = ", ".join(dict.fromkeys(name for cell in cells for name in cell.silent))
    silent = (
        f"{SILENT} In at least one round a layer is silent, it does not spike once on the test images (here: "
        f"{layers}): what follows it may see nothing of the image, and the accuracy is then chance."
    )
    machines = (
        f"{MACHINES} No time: the rounds, or parts of one, differ in the machine, its threads or ranks, in package "
        "versions or in how the network was computed, and times of different machines have no mean."
    )
    repeated = (
        f"{REPEATED} Rounds train one saved ticket: their spread is that of its training, and says nothing of other "
        "searches."
    )
    comparable = [cell.rows["one_machine"].all() for cell in cells]
    notes = {
        silent: bool(layers),
        machines: not all(comparable),
        repeated: any(cell.repeats_training for cell in cells),
    }
    return [note for note, needed in notes.items() if needed]
