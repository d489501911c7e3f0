"""What a conversion costs: ResNet-50 to both frameworks, without and with the proof, each in a fresh process.

    python -m benchmarks.convert [--rounds 5] [--json FILE]

Goals: without proof under 2 × (import torch + read + write), with peak memory under 2.5 × the file beyond what torch
itself takes; with proof under 15 s on 2 cores. The alternatives run in turn, so a slow minute hits all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import Times, heading, table, write
from twist.contracts.shapes import shapes_of

TARGETS = ("detectron2", "mmseg")
# Peak and current resident memory in bytes; Linux's own counters, as `resource` cannot be reset.
_PRELUDE = """
import json, sys, time
began = time.perf_counter()
import torch
def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024
file, folder = sys.argv[1:]
before = status("VmRSS")
"""
_BARE = """
value = torch.load(file, weights_only=True)
for name in ("a", "b"):
    torch.save(value, f"{folder}/{name}.pth")
"""
_CONVERT = """
from pathlib import Path
from twist.converters.convert import convert
for target in ("detectron2", "mmseg"):
    convert(Path(file), to=target, output=Path(folder) / target, verify=%r)
"""
_END = """
print(json.dumps({"wall_s": time.perf_counter() - began, "grown_bytes": status("VmHWM") - before}))
"""


def figures(*, rounds: int, proof_rounds: int) -> dict[str, Any]:
    programs = {
        "import torch, read, write twice": _BARE,
        "convert, no proof": _CONVERT % False,
        "convert, with proof": _CONVERT % True,
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    grown: dict[str, list[int]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet50.pth"
        file_bytes = _write_resnet50(file)
        for round_ in range(max(rounds, proof_rounds)):
            for name, program in programs.items():
                if round_ >= (proof_rounds if "with" in name else rounds):
                    continue
                measured = _run(_PRELUDE + program + _END, file, Path(folder))
                seconds[name].append(measured["wall_s"])
                grown[name].append(measured["grown_bytes"])
    times = {name: Times(statistics.median(s), min(s), max(s), len(s)) for name, s in seconds.items()}
    bare, plain = (times[name].median_s for name in list(programs)[:2])
    return {
        "times": times,
        "file_bytes": file_bytes,
        "wall_over_bare": plain / bare,
        "peak_over_file": statistics.median(grown["convert, no proof"]) / file_bytes,
        "bare_peak_over_file": statistics.median(grown["import torch, read, write twice"]) / file_bytes,
    }


def _write_resnet50(file: Path) -> int:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, empty in shapes_of("resnet50").items():
        shape = empty.shape
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        elif len(shape) == 4:
            state[name] = torch.randn(shape, generator=generator) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        else:
            state[name] = torch.rand(shape, generator=generator) + 0.5  # variances are positive
    torch.save(state, file)
    return file.stat().st_size


def _run(program: str, file: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-c", program, str(file), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--proof-rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = figures(rounds=arguments.rounds, proof_rounds=arguments.proof_rounds)
    print(
        heading(f"Conversion of a ResNet-50 ({found['file_bytes'] / 2**20:.0f} MiB) to Detectron2 and MMSegmentation")
    )
    print(table(found["times"]))
    print(f"  without proof: {found['wall_over_bare']:.2f} × (import torch + read + write twice); goal < 2")
    print(f"  its peak memory: {found['peak_over_file']:.2f} × the file; goal < 2.5")
    print(f"  with proof: {found['times']['convert, with proof'].median_s:.1f} s; goal < 15 on 2 cores")
    write(arguments.json, found)


if __name__ == "__main__":
    main()
