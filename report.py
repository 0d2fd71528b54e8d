"""Tables, figures and one page from run folders, whatever mixture of methods, data sets, networks and rounds they hold.

Runs that differ in their round alone are repetitions of one experiment: every number is their mean, with the sample
standard deviation and how many they are. The paper's Table 1 stands beside it. Runs that are not finished are reported
as far as they are; one that cannot be read is named, and left out.

    python report.py runs/ --out report/

Written: report.html (self-contained), tables.md, tables.csv, figures/*.png and figures/*.svg.
"""

import argparse
import sys
from pathlib import Path

from utils.errors import InputError, one_line_errors
from utils.files import write_bytes, write_text
from utils.report_figures import draw_all
from utils.report_page import page
from utils.report_runs import read_runs, sections_of
from utils.report_tables import cost_table, every_ticket, markdown, paper_table, remarks, table_1, tables_csv


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to (default: report)")
    args = parser.parse_args(argv)

    runs, damaged = read_runs(args.runs)
    for line in damaged.values():
        print(f"report.py: {line}", file=sys.stderr)
    if not runs:
        raise InputError(f"none of the {len(damaged)} runs below {args.runs} can be read")
    sections, paper = sections_of(runs), paper_table()

    tables = {}
    for section in sections:
        found = [table_1(section, paper), cost_table(section), every_ticket(section)]
        tables[section.slug] = [table for table in found if table is not None and table.rows]
    plots = draw_all(sections)

    text = "# Report\n\n"
    for section in sections:
        notes = "".join(f"- {line}\n" for line in remarks(section))
        text += f"## {section.title}\n\n{notes}\n" + "".join(markdown(table) for table in tables[section.slug])
    if damaged:
        text += "## Left out\n\n" + "".join(f"- {line}\n" for line in damaged.values())
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    write_text(args.out / "tables.md", text)
    write_text(args.out / "tables.csv", tables_csv(sections, paper))
    for plot in (plot for of_section in plots.values() for plot in of_section):
        write_text(args.out / "figures" / f"{plot.name}.svg", plot.svg)
        write_bytes(args.out / "figures" / f"{plot.name}.png", plot.png)
    write_text(args.out / "report.html", page(runs, damaged, sections, tables, plots))
    print(f"runs: {len(runs)}, left out: {len(damaged)}, report: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
