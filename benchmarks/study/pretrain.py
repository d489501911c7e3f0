"""The study's pretrainings, several beside each other: every method, every seed, as the commands of the suite say.

    python -m benchmarks.study.pretrain --data sample-study/unlabelled --output runs/study [--config FILE]
        [--methods twist moco-v2 byol simsiam] [--seeds 0 1 2] [--epochs 100] [--at-once 2] [--workers N]
        [--within SECONDS]

Each is a process of its own with a log beside its folder, OUTPUT/METHOD-seedN (with --epochs METHOD-EPOCHSep-seedN),
and ends in a backbone.safetensors there; those that have one are left alone, those that were stopped go on. Seeds come
before methods, so that what is finished early can be compared. --workers is data workers for each of MoCo v2 and BYOL,
whose views Pillow makes; TWIST makes its own in a third of the time and takes a third of them.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from twist.pretrain.slurm import Requeue

CONFIG = Path(__file__).with_name("config.toml")
METHODS = ("twist", "moco-v2", "byol", "simsiam")
POLL_S = 0.5


def command(
    method: str, *, config: Path, data: str, folder: Path, seed: int, epochs: int | None, workers: int
) -> list[str]:
    """The command of one pretraining; the config's own values where nothing else is asked for."""
    changed = [f"data.root={data}", f"run.seed={seed}"]
    if workers:
        changed.append(f"data.workers={-(-workers // 3) if method == 'twist' else workers}")
    if epochs is not None:
        changed.append(f"run.epochs={epochs}")
    if method == "twist":
        resume = ["--resume"] if (folder / "config.json").exists() else []
        changed.append("run.checkpoint_every_epochs=10")
        return [sys.executable, "-m", "twist", "pretrain", str(config), *changed, "--output", str(folder), *resume]
    return [
        sys.executable, "-m", "benchmarks.study.peers", method, str(config), *changed, "--output", str(folder)
    ]  # fmt: skip


def folder_of(output: Path, method: str, *, seed: int, epochs: int | None) -> Path:
    return output / (f"{method}-seed{seed}" if epochs is None else f"{method}-{epochs}ep-seed{seed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images as data.root takes them: a folder, shards, a card")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of `twist pretrain`; its budget is everyone's")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:3]))
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
            asked = {"config": given.config, "data": given.data, "folder": folder, "seed": seed, "epochs": given.epochs}
            waiting.append((folder.name, command(method, **asked, workers=given.workers)))
    signal.signal(signal.SIGTERM, _interrupt)
    return 0 if _run(waiting, given) else 1


def _run(waiting: list[tuple[str, list[str]]], given: argparse.Namespace) -> bool:
    """Run these commands, by name; True when all came to their end. None outlives this process."""
    # Processes beside each other would each take all cores for their arithmetic.
    threads = str(max(1, (os.cpu_count() or 1) // given.at_once))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    began, right = time.monotonic(), True
    try:
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
                    right &= _tell(name, process, since)
    finally:
        for process, _ in running.values():
            process.terminate()
        for name, (process, since) in running.items():
            process.wait()
            right &= _tell(name, process, since)
        for name, _ in waiting:
            print(f"{name}: not begun", flush=True)
    return right and not waiting


def _tell(name: str, process: subprocess.Popen[bytes], since: float) -> bool:
    # TWIST saves and says so with a status of its own; the peers' last checkpoint is there already.
    stopped = process.returncode in (-signal.SIGTERM, Requeue.exit_status)
    verdict = "stopped, goes on with the same command" if stopped else f"failed ({process.returncode}), see its log"
    print(f"{name}: {'done' if process.returncode == 0 else verdict}, {time.monotonic() - since:.0f} s", flush=True)
    return process.returncode == 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # so that what runs is stopped, too


if __name__ == "__main__":
    raise SystemExit(main())
