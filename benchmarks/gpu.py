"""Is everything right on this GPU, and how fast is it? One command, at most 12 minutes, one file to send back.

    python benchmarks/gpu.py                              # all parts
    python benchmarks/gpu.py --parts neuron captured      # some of them
    python benchmarks/gpu.py --tables gpu-report.json     # a report as Markdown, on any machine

Every part (``gpu_part.py``) runs in a process of its own, within a limit, so an error of CUDA ends only that part. The
report is written after each. Exit code 1 if a part failed, 2 without a GPU.
"""

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.experiment import PACKAGES, git_commit  # noqa: E402
from utils.files import InputError, check_fields, read_json, write_json  # noqa: E402
from utils.flags import Parser  # noqa: E402
from utils.machine import unused_gpu  # noqa: E402

# seconds; the cheapest and most telling first: a report that ends early is still of use
LIMITS = {
    "environment": 40,
    "neuron": 60,
    "network": 60,
    "captured": 70,
    "fused": 70,
    "scripts": 120,
    "memory": 60,
    "speed": 200,
    "profile": 40,
}
LAST = 4000  # characters of a failed part's output that are reported


def main(argv=None):
    parser = Parser("gpu.py", __doc__)
    flag = parser.section("what is run")
    flag("--parts", str, list(LIMITS), "PART", f"some of: {', '.join(LIMITS)}", nargs="+", shown="all")
    flag("--out", str, "gpu-report.json", "FILE", "the report")
    flag("--tables", str, None, "FILE", "print the tables of a report instead", shown="off")
    args = parser.parse(argv)
    if args.tables:
        try:
            print(tables(read_report(Path(args.tables))))
        except (InputError, OSError) as error:
            parser.error(f"argument --tables: {error}")
        return
    unknown = [name for name in args.parts if name not in LIMITS]
    if unknown:
        parser.error(f"argument --parts: there is no part {unknown[0]!r}; choose from {', '.join(LIMITS)}")
    if not torch.cuda.is_available():
        parser.error(unused_gpu() or f"torch {torch.__version__} finds no GPU here: this run is for a machine with one")
    out = Path(args.out).resolve()
    report = {
        "began": time.strftime("%Y-%m-%d %H:%M"),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "parts": {},
    }
    commands = {name: [sys.executable, "-m", "benchmarks.gpu_part", name] for name in LIMITS if name in args.parts}
    try:
        run_parts(commands, report, out)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    print(f"send back: {out}")
    if any(part["outcome"] == "FAIL" for part in report["parts"].values()):
        raise SystemExit(1)


def run_parts(commands: dict[str, list[str]], report: dict, out: Path) -> None:
    """Run parts in turn, print a line for each, and write the report after each. Without an environment that works the
    others would only say so again."""
    for name, command in commands.items():
        if report["parts"].get("environment", {}).get("outcome") == "FAIL":
            found = {"outcome": "SKIP", "why": "the environment is not right", "seconds": 0}
        else:
            found = run_part(command, LIMITS[name])
        report["parts"][name] = found
        write_json(out, report)
        print(line_of(name, found), flush=True)


def line_of(name: str, found: dict) -> str:
    return f"{found['outcome']} {name} ({found['seconds']} s): {found['why']}"


def run_part(command: list[str], limit: float) -> dict:
    """Run a part in a process of its own, and end that process and all that it started at the limit.

    Args:
        command: what to run; it is given the file for what it finds, a JSON object, and writes it as it goes on.
        limit: seconds.

    Returns:
        What it found by then, with ``outcome`` (PASS, FAIL or SKIP), ``why`` and ``seconds``, and after a failure the
        end of its ``output``.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "found.json", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(path)], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:  # a child of the process may wait, too
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        found = read_json(path) if path.exists() else {}
        text = log.read_text(errors="replace").strip()
    if code is None:
        found |= {"outcome": "FAIL", "why": f"not done after {limit} s"}
    elif "outcome" not in found:  # a crash, or too little memory
        found |= {"outcome": "FAIL", "why": f"exit code {code}: {text.splitlines()[-1] if text else 'no output'}"}
    if found["outcome"] == "FAIL":
        found["output"] = text[-LAST:]
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def read_report(path: Path) -> dict:
    """Read a report; raises ``DamagedError`` if it is none."""
    report = read_json(path)
    check_fields(path, report, ("began", "git_commit", "versions", "parts"))
    for found in report["parts"].values():
        check_fields(path, found, ("outcome", "why", "seconds"))
    return report


def tables(report: dict) -> str:
    """A report as Markdown, for ``benchmarks/results/``: the machine, the parts, and the figures that parts have."""
    parts = report["parts"]
    machine = parts.get("environment", {})
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    text = [
        f"# {machine.get('name', 'A GPU')}",
        f"{report['began']}; commit {report['git_commit']}; driver {machine.get('driver', 'unknown')}; {versions}.",
        table(
            [{"part": name, **{k: found[k] for k in ("outcome", "seconds", "why")}} for name, found in parts.items()]
        ),
    ]
    for name, found in parts.items():
        if found.get("rows"):
            text += [f"## {name.capitalize()}", table(found["rows"])]
    return "\n\n".join(text) + "\n"


def table(rows: list[dict]) -> str:
    """A Markdown table of rows, with a column for every field that one of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value) -> str:
    text = "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", r"\|").replace("\n", " ")


if __name__ == "__main__":
    main()
