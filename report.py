"""Tables, figures and one page from run folders, whatever mixture of methods, data sets, networks and rounds they hold.

Runs that differ in their round alone are repetitions of one experiment: every number is their mean, with the sample
standard deviation and how many they are. The paper's Table 1 stands next to it. Runs that are not finished are reported
as far as they are; one that cannot be read is named, and left out.

    python report.py runs/ --out report/
    python report.py runs/ --status

Written: report.html (self-contained), tables.md, tables.csv, figures/*.png and figures/*.svg; with --status nothing:
how far each run is is printed.
"""

import argparse
import sys
from pathlib import Path

from reporting.status import status
from utils.files import InputError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to (default: report)")
    parser.add_argument("--status", action="store_true", help="print how far each run is, and write nothing")
    parser.error = lambda message: parser.exit(2, f"report.py: error: {message}\n")  # one line, without the usage
    args = parser.parse_args(argv)
    try:
        if args.status:
            print(status(args.runs))
            return
        from reporting.page import write_report  # slow to import

        write_report(args.runs, args.out)
    except (InputError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
