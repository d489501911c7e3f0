"""How long a user waits for `twist --help`, `twist inspect` and the short demo, with the demo's peak memory.

    python -m benchmarks.command_line [--repeats 5] [--skip-demo] [--json FILE]

Goals: `twist --help` under 0.3 s; `twist inspect` of a checkpoint of 100 MB at most 0.6 s; `make demo FAST=1` about two
minutes and under 4 GB on two cores (it is run once). Every command is a fresh process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from twist.contracts.machine import hardware, software

_WRITE_RESNET50 = """
import sys, torch, torchvision
torch.save(torchvision.models.resnet50().state_dict(), sys.argv[1])
"""


def timed(*arguments: str) -> tuple[float, float]:
    """(seconds, peak resident memory in MiB) of one `twist` command; raises when it fails."""
    return timed_python("-m", "twist", *arguments)


def timed_python(*arguments: str) -> tuple[float, float]:
    """The same of `python` with these arguments."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"python {' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def figures(*, repeats: int, demo: bool) -> dict[str, Any]:
    timed("--help")
    result: dict[str, Any] = {
        "help_s": _spread([timed("--help")[0] for _ in range(repeats)]),
        "inspect": inspecting(repeats=repeats),
    }
    if demo:
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak_mib = timed("demo", "--fast", "--output", str(Path(folder) / "demo"))
        result["fast_demo"] = {"wall_s": round(seconds, 1), "peak_mib": round(peak_mib), "n": 1}
    return result


def inspecting(*, repeats: int) -> dict[str, Any]:
    """Seconds of `twist inspect` of a ResNet-50 with its classifier, and of the import of torch, in turn."""
    inspect_s: list[float] = []
    import_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet50.pth"
        # In a process of its own, like everything else here: this one stays small.
        timed_python("-c", _WRITE_RESNET50, str(file))
        for number in range(repeats + 1):
            seconds = timed("inspect", str(file))[0], timed_python("-c", "import torch")[0]
            if number:  # the first reads everything from disk
                inspect_s.append(seconds[0])
                import_s.append(seconds[1])
        file_bytes = file.stat().st_size
    return {
        "inspect_s": _spread(inspect_s),
        "import_torch_s": _spread(import_s),
        "file_bytes": file_bytes,
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        "median": round(median(seconds), 3),
        "min": round(min(seconds), 3),
        "max": round(max(seconds), 3),
        "n": len(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-demo", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = figures(repeats=arguments.repeats, demo=not arguments.skip_demo)
    for name, value in {"hardware": hardware(), "software": software(), **found}.items():
        print(f"{name}: {value}")
    # Imported when all is measured: it brings torch along, and a child's peak memory is never below this process's.
    from benchmarks.side_by_side import write

    write(arguments.json, found)


if __name__ == "__main__":
    main()
