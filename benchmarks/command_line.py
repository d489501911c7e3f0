"""How long a user waits for `twist --help`, and for the short demo, with the demo's peak memory.

    python -m benchmarks.command_line [--repeats 5] [--skip-demo] [--json FILE]

Goals: `twist --help` under 0.3 s; `make demo FAST=1` about two minutes and under 4 GB on two cores (it is run once).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from contracts import atomic
from contracts.provenance import hardware, software


def timed(*arguments: str) -> tuple[float, float]:
    """(seconds, peak resident memory in MiB) of one `twist` command; raises when it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "twist", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"twist {' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def figures(*, repeats: int, demo: bool) -> dict[str, Any]:
    timed("--help")
    waits = sorted(timed("--help")[0] for _ in range(repeats))
    result: dict[str, Any] = {
        "help_s": {
            "median": round(median(waits), 3),
            "min": round(waits[0], 3),
            "max": round(waits[-1], 3),
            "n": repeats,
        }
    }
    if demo:
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak_mib = timed("demo", "--fast", "--output", str(Path(folder) / "demo"))
        result["fast_demo"] = {"wall_s": round(seconds, 1), "peak_mib": round(peak_mib), "n": 1}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-demo", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {
        "hardware": hardware(),
        "software": software(),
        **figures(repeats=arguments.repeats, demo=not arguments.skip_demo),
    }
    for name, value in report.items():
        print(f"{name}: {value}")
    if arguments.json:
        atomic.write_json(arguments.json, report)


if __name__ == "__main__":
    main()
