"""One part of ``gpu.py``: python -m benchmarks.gpu_part NAME FILE"""

import sys
import traceback
from pathlib import Path

from benchmarks import gpu_checks, gpu_figures
from benchmarks.gpu_checks import Failed, Skipped
from utils.files import InputError, write_json

PARTS = {
    "environment": gpu_figures.environment,
    "neuron": gpu_checks.neuron,
    "network": gpu_checks.network,
    "captured": gpu_checks.captured,
    "fused": gpu_checks.fused,
    "scripts": gpu_checks.scripts,
    "memory": gpu_figures.memory,
    "speed": gpu_figures.timing,
    "profile": gpu_figures.kernels,
}


def main(name: str, path: Path) -> None:
    """Run a part, and write what it has found after each piece of it."""
    found = {"why": ""}
    try:
        for more in PARTS[name]():
            found |= more
            write_json(path, found)
        found["outcome"] = "PASS"
    except Skipped as reason:
        found |= {"outcome": "SKIP", "why": str(reason)}
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, Failed | InputError) else f"{type(error).__name__}: "
        found |= {"outcome": "FAIL", "why": kind + (str(error).splitlines() or ["no message"])[0]}
    write_json(path, found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
