"""The study's pretrainings, several beside each other: every method, every seed, as the commands of the suite say.

    python -m benchmarks.study.pretrain --data sample-study --output runs/study [--methods twist moco-v2 byol]
        [--seeds 0 1 2] [--epochs 100] [--at-once 2] [--workers N] [--within SECONDS]

Each is a process of its own with a log beside its folder, OUTPUT/METHOD-seedN (with --epochs METHOD-EPOCHSep-seedN),
and ends in a backbone.safetensors there; those that have one are left alone, those that were stopped go on. Seeds come
before methods, so that what is finished early can be compared. --workers is data workers for each of MoCo v2 and BYOL,
whose views Pillow makes; TWIST makes its own in a third of the time and takes a third of them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

CONFIG = Path(__file__).with_name("config.toml")
METHODS = ("twist", "moco-v2", "byol")
POLL_S = 0.5


def command(method: str, *, data: Path, folder: Path, seed: int, epochs: int | None, workers: int) -> list[str]:
    """The command of one pretraining; the config's own values where nothing else is asked for."""
    changed = [f"data.root={data / 'unlabelled'}", f"run.seed={seed}"]
    if workers:
        changed.append(f"data.workers={-(-workers // 3) if method == 'twist' else workers}")
    if epochs is not None:
        changed += [f"run.epochs={epochs}", f"run.mutual_information_epochs={epochs}"]
    if method == "twist":
        resume = ["--resume"] if (folder / "config.json").exists() else []
        changed.append("run.checkpoint_every_epochs=10")
        return [sys.executable, "-m", "twist", "pretrain", str(CONFIG), *changed, "--output", str(folder), *resume]
    return [
        sys.executable, "-m", "benchmarks.study.peers", method, str(CONFIG), *changed, "--output", str(folder)
    ]  # fmt: skip


def folder_of(output: Path, method: str, *, seed: int, epochs: int | None) -> Path:
    return output / (f"{method}-seed{seed}" if epochs is None else f"{method}-{epochs}ep-seed{seed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--within", type=float, default=float("inf"), help="Seconds after which what runs is stopped.")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)

    waiting = []
    for seed, method in itertools.product(given.seeds, given.methods):
        folder = folder_of(given.output, method, seed=seed, epochs=given.epochs)
        if not (folder / "backbone.safetensors").exists():
            asked = {"data": given.data, "folder": folder, "seed": seed, "epochs": given.epochs}
            waiting.append((folder.name, command(method, **asked, workers=given.workers)))
    # Processes beside each other would each take all cores for their arithmetic.
    threads = str(max(1, (os.cpu_count() or 1) // given.at_once))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    began, failed = time.monotonic(), []
    while (waiting or running) and time.monotonic() - began < given.within:
        while waiting and len(running) < given.at_once:
            name, arguments = waiting.pop(0)
            with open(given.output / f"{name}.log", "ab") as log:
                process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running[name] = process, time.monotonic()
        time.sleep(POLL_S)
        for name, (process, since) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                verdict = "done" if process.returncode == 0 else f"failed ({process.returncode}), see its log"
                print(f"{name}: {verdict}, {time.monotonic() - since:.0f} s", flush=True)
                failed += [name] if process.returncode else []
    for process, _ in running.values():
        process.terminate()
    for name, (process, _) in running.items():
        process.wait()
        print(f"{name}: stopped, goes on with the same command", flush=True)
    return 1 if failed or running or waiting else 0


if __name__ == "__main__":
    raise SystemExit(main())
