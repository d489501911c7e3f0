"""Every performance figure that this machine can take, one program after the other.

    python -m benchmarks [--results results/benchmarks]

Each program prints the machine, the versions and its figures, and writes its JSON beside the others. GPU figures are
`python benchmarks/gpu.py`'s: one call on a machine that has one.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PROGRAMS = (
    "command_line", "loss", "lars", "small_views", "data", "data_peers", "features", "convert", "engine_overhead",
    "knn", "linear_grid", "data_check", "compare", "scaling", "first_numbers",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("programs", nargs="*", default=PROGRAMS, help=f"of {', '.join(PROGRAMS)}")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for program in arguments.programs:
        print(f"\n== {program}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{program}", "--json", str(arguments.results / f"{program}.json")]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(program)
    if failed:
        sys.exit(f"These did not finish: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
