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

Made by `python docs/make_flags.py` from the scripts themselves. The flags of all scripts come first, then those of each
script, and those of the tools that take a run or a file of it.
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
    groups = {script: sections(parser_of(script)) for script in scripts}
    first, *others = groups.values()
    shared = [title for title in first if all(other.get(title) == first[title] for other in others)]
    parts = [INTRO, "## All scripts\n", *_tables({title: first[title] for title in shared})]
    for script, of_script in groups.items():
        own = {title: rows for title, rows in of_script.items() if title not in shared}
        parts += [f"## {script}.py\n", *_tables(own)]
    for tool in TOOLS:
        parts += [f"## {tool}.py RUN_OR_FILE\n", *_tables(sections(parser_of(tool)))]
    return "\n".join(parts)


def _tables(groups: dict[str, Rows]) -> list[str]:
    lines = []
    for title, rows in groups.items():
        lines += [f"| {title} | |", "|---|---|", *(f"| `{flag}` | {text} |" for flag, text in rows), ""]
    return lines


if __name__ == "__main__":
    (Path(__file__).parent / "flags.md").write_text(page(), encoding="utf-8")
