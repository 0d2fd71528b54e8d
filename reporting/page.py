"""The report's files: one HTML page that loads nothing, its tables as Markdown and CSV, its figures."""

import base64
import re
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.files import InputError, write_bytes, write_text

from .comparison import table_2
from .experiments import Section, sections_of
from .figures import draw_all
from .one_run import facts, is_one_run, layer_tables
from .remarks import remarks
from .runs import Run, read_runs
from .tables import costs, every_ticket, overview, paper_table, table_1, tables_csv
from .text import Table


def write_report(root: Path, out: Path) -> None:
    """Read the runs below a folder and write the report to another one.

    Raises:
        InputError: there is no run that can be reported.
        OSError: a file cannot be written.
    """
    runs, left_out = read_runs(root)
    sys.stderr.writelines(f"report.py: {line}\n" for line in left_out.values())
    if not runs:
        raise InputError(
            f"{root} holds no run that can be read: name the folder that the scripts wrote to (--output_dir)"
        )
    sections, paper, paper_2 = sections_of(runs), paper_table(), paper_table("table2")
    plots = draw_all(sections)
    views = [
        {
            "slug": section.slug,
            "title": section.title,
            "count": len(section.experiments),
            "remarks": remarks(section),
            "tables": tables_of(section, paper, paper_2),
            "tickets": every_ticket(section),
            "plots": plots[section.slug],
        }
        for section in sections
    ]
    unfinished = {run.folder: how_far(run) for run in runs if not run.finished}
    context = {"runs": runs, "unfinished": unfinished, "left_out": left_out, "sections": views}
    context["plots_of_all"] = plots[""]
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for plot in (plot for of_section in plots.values() for plot in of_section):
        write_bytes(out / "figures" / f"{plot.name}.svg", plot.svg)
        write_bytes(out / "figures" / f"{plot.name}.png", plot.png)
    write_text(out / "tables.csv", tables_csv(sections, paper))
    write_text(out / "tables.md", render("template.md.jinja", **context))
    write_text(out / "report.html", render("template.html.jinja", **context))
    print(f"runs: {len(runs)}, left out: {len(left_out)}, report: {out / 'report.html'}")


def tables_of(section: Section, paper: list[dict], paper_2: list[dict]) -> list[Table]:
    """The tables of a section that have rows, without the list of every ticket."""
    one = is_one_run(section)
    compared = [table_1(section, paper), table_2(section, paper_2)]
    tables = [facts(section) if one else overview(section), *(compared if len(every_ticket(section).rows) > 1 else [])]
    tables += [*costs(section), *(layer_tables(section) if one else [])]
    return [table.upright() for table in tables if table.rows]


def how_far(run: Run) -> str:
    """What there is of a run that is not finished: only the tickets that it has trained so far count."""
    done = f"{len(run.rows)} epochs, {len(run.results)} trained tickets"
    if not run.rows:
        return done
    last = run.rows[-1]
    level = "" if last["level"] is None else f" of level {last['level']}"
    return f"{done}, last: {last['phase']}{level}, epoch {last['epoch'] + 1} of {run.stop}"


def render(template: str, **context) -> str:
    """Fill a template of this folder; what is put into HTML is escaped, and ``markdown`` escapes text for Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode(),
        "markdown": lambda text: re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text).replace("\n", " "),
    }
    return environment.get_template(template).render(context)
