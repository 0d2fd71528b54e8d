"""Writes docs/flags.md: every flag of every script, read from their parsers.

python docs/make_flags.py
"""

import importlib
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.flags import Parser  # noqa: E402

INTRO = """# Flags

Made by `python docs/make_flags.py` from the scripts themselves: the flags of all scripts, those of some (named without
`train_snn_`), and those of the tools that take a run or a file of it.
"""
TOOLS = ("measure_ticket", "export_ticket")
Rows = list[tuple[str, str]]


class Found(Exception):
    """Carries the parser of a script."""


def parser_of(script: str) -> Parser:
    """The parser that a script's main function makes."""

    def stop(parser, argv):
        raise Found(parser)

    with patch.object(Parser, "parse", stop):
        try:
            importlib.import_module(script).main.__wrapped__([])
        except Found as found:
            return found.args[0]
    raise AssertionError(f"{script} parses no flags")


def sections(parser: Parser) -> dict[str, Rows]:
    """Flags with their values, and what they mean, by the title of their group."""
    found = {}
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            names = [name for name in action.option_strings if name not in ("-h", "--help")]
            values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar or ""
            values = values if isinstance(values, str) else " ".join(values)
            values += " ..." * (action.nargs == "+")
            if names:
                rows.append((f"{', '.join(names)} {values}".strip(), _escaped(action.help)))
        if rows:
            found[group.title] = rows
    return found


def _escaped(text: str) -> str:
    """Help as argparse takes it, as text of a markdown table."""
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """docs/flags.md."""
    scripts = sorted(path.stem for path in ROOT.glob("train_snn_*.py"))
    owners: dict[tuple, list[str]] = {}  # the scripts that have a table
    for script in scripts:
        for title, rows in sections(parser_of(script)).items():
            owners.setdefault((title, tuple(rows)), []).append(script.removeprefix("train_snn_"))
    parts = [INTRO, "## All scripts\n"]
    parts += [_table(*table) for table, names in owners.items() if len(names) == len(scripts)]
    parts.append("## Some scripts\n")
    for table, names in owners.items():
        if len(names) < len(scripts):
            parts += [f"{', '.join(f'`{name}`' for name in names)}:\n", _table(*table)]
    for tool in TOOLS:
        parts += [f"## {tool}.py RUN_OR_FILE\n", *(_table(*table) for table in sections(parser_of(tool)).items())]
    return "\n".join(parts)


def _table(title: str, rows: Rows) -> str:
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| `{flag}` | {text} |" for flag, text in rows), ""])


if __name__ == "__main__":
    (Path(__file__).parent / "flags.md").write_text(page(), encoding="utf-8")
