"""How long a user waits for numbers: for the first of a checkpoint, for a suite, and for a checkpoint's dense quality.

    python -m benchmarks.first_numbers [--only first suite dense] [--json FILE]

- first: `inspect`, `convert` with its proof and k-NN on the sample, of a ResNet-50 (random weights), one after another.
- suite: twelve runs on the sample (k-NN, linear, 10 % of the labels; two weights, two seeds) as one suite, beside the
  sum of what the runs themselves took by their records.
- dense: k-NN and linear segmentation of CamVid and object discovery on COCO pictures, by the cards `camvid` and
  `real-coco`, as one suite from a ResNet-50 (random weights); beside the way without it, in which each protocol and
  each of five learning rates makes its features anew (one rate is timed, and counted five times).

Every command is a fresh process with nothing of an earlier one in its folder. Memory is the largest process's, by
the kernel's count. Each figure is taken once: it is minutes, not milliseconds.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import heading, write
from twist.contracts.networks import build_backbone
from twist.contracts.record import find_records, read_record
from twist.contracts.weights import Backbone, write_backbone

# Of the dense part: what the laptop's recipe changes, and the rates of the grid.
SIZE, SHORT = ("size=224", "memory_size=10240"), ("size=224", "loss_size=56", "iterations=200")
RATES = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
GRID = f"learning_rates=[{','.join(RATES)}]"
SUITE = """
protocols = ["sample-knn", "sample-linear", "sample-semi-10pct"]
seeds = [0, 1]
[[weights]]
name = "ours"
file = "resnet18.safetensors"
[[weights]]
name = "random"
file = "random"
"""
DENSE = f"""
protocols = ["cityscapes-knn-seg", "cityscapes-linear-seg", "voc07-corloc"]
seeds = [0]
[data]
cityscapes-knn-seg = "camvid"
cityscapes-linear-seg = "camvid"
voc07-corloc = "real-coco"
[overrides]
cityscapes-knn-seg = {json.dumps(SIZE)}
cityscapes-linear-seg = {json.dumps([*SHORT, GRID])}
[[weights]]
name = "ours"
file = "resnet50.pth"
"""


def twist(folder: Path, command: str, *arguments: str) -> float:
    """Seconds of one command in `folder`; raises where it fails."""
    arguments = (*command.split(), *arguments)
    began = time.perf_counter()
    with (folder / "log").open("ab") as log:
        done = subprocess.run([sys.executable, "-m", "twist", *arguments], cwd=folder, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"twist {' '.join(arguments)}: exit status {done.returncode}\n{(folder / 'log').read_text()}")
    return time.perf_counter() - began


def transfer(folder: Path, protocol: str, *overrides: str, data: str, output: str) -> float:
    """Seconds of one transfer of resnet50.pth; `output` is new, so nothing made earlier is read."""
    chosen = ("--weights", "resnet50.pth", "--data", data, "--output", output)
    return twist(folder, "transfer", protocol, *overrides, *chosen)


def first(folder: Path) -> dict[str, Any]:
    seconds = {
        "inspect": twist(folder, "inspect resnet50.pth"),
        "convert": twist(folder, "convert resnet50.pth --to detectron2 --output converted"),
        "k-NN": transfer(folder, "sample-knn", data="sample", output="knn"),
    }
    return {"wall_s": sum(seconds.values()), "parts_s": seconds}


def suite(folder: Path) -> dict[str, Any]:
    (folder / "suite.toml").write_text(SUITE)
    wall_s = twist(folder, "suite suite.toml --data sample --output suite --results suite-results")
    records = [read_record(path) for path in find_records([folder / "suite-results"])]
    return {"wall_s": wall_s, "runs": len(records), "own_s": sum(record.wall_s for record in records)}


def dense(folder: Path) -> dict[str, Any]:
    (folder / "dense.toml").write_text(DENSE)
    wall_s = twist(folder, "suite dense.toml --output dense --results dense-results")
    apart_s = transfer(folder, "cityscapes-knn-seg", *SIZE, data="camvid", output="apart/knn-seg")
    apart_s += transfer(folder, "voc07-corloc", data="real-coco", output="apart/corloc")
    # A run for each rate; they differ in nothing but the number, so one is timed.
    one = f"learning_rates=[{RATES[0]}]"
    linear_s = transfer(folder, "cityscapes-linear-seg", *SHORT, one, data="camvid", output="apart/linear-seg")
    apart_s += len(RATES) * linear_s
    return {"wall_s": wall_s, "apart_s": apart_s}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"first": first, "suite": suite, "dense": dense}


def prepare(folder: Path) -> None:
    """A ResNet-50 as a plain state dict, a ResNet-18 as ours, and the sample."""
    torch.save(build_backbone("resnet50").state_dict(), folder / "resnet50.pth")
    network = build_backbone("resnet18").state_dict()
    write_backbone(folder / "resnet18.safetensors", network, Backbone(architecture="resnet18", method="twist"))
    twist(folder, "data sample sample")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(heading("first numbers, in seconds"))
    found: dict[str, Any] = {}
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            found[name] = PARTS[name](Path(folder))
        # Of all children so far: the parts come in the order of what they need.
        found[name]["peak_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        print(f"  {name}: {found[name]}", flush=True)
    write(given.json, found)


if __name__ == "__main__":
    main()
