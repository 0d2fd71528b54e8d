"""What a run found: reading it, and describing it."""

from pathlib import Path

from .files import check_fields, read_json

FIELDS = (  # of a row of results.json
    *("ticket", "sparsity", "sparsity_all_parameters", "timesteps", "search_timesteps", "test_accuracy"),
    *("best_test_accuracy", "search_epochs", "search_timestep_epochs", "search_seconds"),
)


def read_results(path: Path) -> list[dict]:
    """Read ``results.json``.

    Raises:
        DamagedError: it does not parse, or a row lacks a field; the message names the file.
    """
    rows = read_json(path)
    for row in rows if isinstance(rows, list) else [rows]:
        check_fields(path, row, FIELDS)
    return rows


def describe(results: list[dict]) -> list[str]:
    """Lines on the rows of ``results.json``: a table (percents as in the paper, the search's cost without the final
    training), and whether the masks of Early-Bird settled."""
    rows = [("ticket", "sparsity %", "of all %", "T", "search T", "accuracy %", "best %", "search epochs", "x T", "s")]
    for row in results:
        percents = [f"{row[field]:.2f}" for field in ("sparsity", "sparsity_all_parameters")]
        accuracies = [f"{row[field]:.2f}" for field in ("test_accuracy", "best_test_accuracy")]
        times, costs = (
            [row["timesteps"], row["search_timesteps"]],
            [row["search_epochs"], row["search_timestep_epochs"]],
        )
        rows.append((row["ticket"], *percents, *times, *accuracies, *costs, f"{row['search_seconds']:.1f}"))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for row in results:
        if "settled" in row:
            how = "settled after" if row["settled"] else "is the last one; none settled within"
            lines.append(f"{row['ticket']}: the mask {how} {row['search_epochs']} epochs of search")
    return lines
