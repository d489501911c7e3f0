"""`twist demo`: every stage on the built-in sample, at a size that a laptop runs in minutes.

Every step is a `twist` command, which is printed before it runs and can be typed again.
"""

import contextlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twist.contracts import machine, progress
from twist.contracts.config import SHIPPED, parse_override
from twist.transfer.end import typed

CONFIG = SHIPPED / "pretrain" / "sample.toml"
# Two epochs of two steps.
FAST = ("run.epochs=2", "run.batch_size=20", "optim.warmup_epochs=0")
# What the demo compares: the overrides of `--fast`, and seconds on two cores.
PROTOCOLS: dict[str, tuple[tuple[str, ...], float]] = {
    "sample-coco-mrcnn-fpn": (("iterations=8",), 85),
    "sample-voc-fcn-d8": (("iterations=8",), 60),
    "sample-knn": ((), 5),
    "sample-linear": ((), 12),
    "sample-voc-knn-seg": ((), 8),
    "sample-voc-linear-seg": (("iterations=8",), 12),
}
# Pretraining in seconds on two cores; in float32 where the processor has no bfloat16 instructions.
PRETRAIN_BF16_S, PRETRAIN_FLOAT32_S = 200, 410
# Share of the time that `--fast` takes.
FAST_SHARE = 0.25
# The columns of the demo's own table; the records hold every metric.
METRICS = ("coco_box_ap50_percent", "coco_mask_ap50_percent", "miou_percent", "knn_top1_percent", "top1_percent")
FOR_REAL = """\
  torchrun --nproc-per-node 8 -m twist pretrain {config} data.root=IMAGENET/train
  twist convert runs/r50_multicrop_100ep/backbone.safetensors --to detectron2
  twist transfer coco-mrcnn-fpn-1x --weights runs/r50_multicrop_100ep/backbone.safetensors --data DATASETS"""


@dataclass(frozen=True)
class Step:
    """One step: what it does, the arguments of `twist` that do it, and its seconds on two cores."""

    title: str
    arguments: tuple[str, ...]
    expected_s: float
    # Whether an earlier demo in this folder did it; most commands find that out themselves.
    done: Callable[[], bool] = lambda: False

    @property
    def command(self) -> str:
        return shlex.join(["twist", *self.arguments])


def run_demo(output: Path, *, twist: Callable[[list[str]], object], fast: bool = False) -> Path:
    """Run every step that is not done into `output`, by `twist`, which takes arguments; returns the page's path."""
    output.mkdir(parents=True, exist_ok=True)
    steps, began, log = plan_steps(output, fast=fast), time.monotonic(), output / "log.txt"
    display = Display(steps, scale=FAST_SHARE if fast else 1.0)
    with _output_to(log):
        for number, step in enumerate(steps, 1):
            with display.step(step, f"{number}/{len(steps)}"):
                if not step.done():
                    twist(list(step.arguments))
    _print_results(output, elapsed_s=time.monotonic() - began)
    return output / "report.html"


def plan_steps(output: Path, *, fast: bool) -> list[Step]:
    """The steps of a demo in `output`, in order."""
    sample, run, weights = output / "sample", output / "pretrain", output / "pretrain" / "backbone.safetensors"
    results, size = output / "results", "tiny" if fast else "small"
    config = (typed(CONFIG), _override("data.root", str(sample / "unlabelled")), *(FAST if fast else ()))

    def convert(target: str, title: str) -> Step:
        folder = output / f"weights-{target}"
        arguments = ("convert", str(weights), "--to", target, "--output", str(folder))
        return Step(f"Convert to {title}, and prove it", arguments, 8, folder.exists)  # it is whole or absent

    def transfer(protocol: str, method: str) -> Step:
        shorter, expected_s = PROTOCOLS[protocol]
        arguments = ["transfer", protocol, *(shorter if fast else ())]
        arguments += ["--weights", str(weights) if method == "twist" else "random", "--data", str(sample)]
        arguments += ["--output", str(output / "runs" / f"{protocol}-{method}"), "--results", str(results), "--resume"]

        def recorded() -> bool:
            return any((record.protocol, record.method) == (protocol, method) for record in _records(output))

        return Step(f"{protocol}, {method} weights", tuple(arguments), expected_s, recorded)

    page: list[str] = ["compare", str(results), "--baseline", "random", "--no-published"]
    page += [word for metric in METRICS for word in ("--metric", metric)]
    page += ["--format", "html", "--output", str(output / "report.html"), "--pretrain-run", str(run)]
    page += ["--title", "TWIST beside random initialisation, on the built-in sample"]
    page += ["--picture", f"Views of four images: what TWIST is asked to agree on={output / 'views.png'}"]

    pretrain_s = PRETRAIN_BF16_S if machine.cpu_has_bf16() else PRETRAIN_FLOAT32_S
    return [
        Step("Draw the sample", ("data", "sample", str(sample), "--size", size), 30),
        Step("Show the views of four images", ("pretrain", *config, "--show-views", "4", "--output", str(output)), 5),
        Step("Pretrain with TWIST", ("pretrain", *config, "--output", str(run), "--resume"), pretrain_s),
        convert("detectron2", "Detectron2"),
        convert("mmseg", "MMSegmentation"),
        *(transfer(protocol, method) for protocol in PROTOCOLS for method in ("twist", "random")),
        Step("Write the page", tuple(page), 2),
    ]


def _override(key: str, value: str) -> str:
    """`key=value`, the value in quotes only where it would not be read as that string without them."""
    bare = f"{key}={value}"
    return bare if parse_override(bare)[1] == value else f"{key}={json.dumps(value, ensure_ascii=False)}"


def _records(output: Path) -> list[Any]:
    from twist.contracts.record import find_records, read_record

    results = output / "results"
    return [read_record(path) for path in find_records([results])] if results.is_dir() else []


def _print_results(output: Path, *, elapsed_s: float) -> None:
    from twist.compare.table import build_table
    from twist.compare.writers import render

    print(render(build_table(_records(output), baseline="random", metrics=METRICS), "table"))
    print(f"\nThe page, with curves and pictures: {output / 'report.html'}   ({progress.duration(elapsed_s)})")
    config = shlex.quote(typed(CONFIG.with_stem("r50_multicrop_100ep")))
    print(f"\nTo do it for real:\n{FOR_REAL.format(config=config)}")


class Display:
    """Three lines a step on stderr, and one while it runs: how long remains, in place or each `every_s` seconds."""

    def __init__(self, steps: list[Step], *, scale: float, every_s: float | None = None) -> None:
        self._scale, self._total_s, self._done_s = scale, sum(step.expected_s for step in steps), 0.0
        self._stream, self._live = sys.stderr, sys.stderr.isatty()
        self.every_s = every_s or (1.0 if self._live else 30.0)
        self._began = time.monotonic()

    @contextlib.contextmanager
    def step(self, step: Step, place: str) -> Iterator[None]:
        self._print(f"[{place:>5}] {step.title}   (about {self._left(0.0)} left)\n       $ {step.command}")
        began, ended = time.monotonic(), threading.Event()

        def show() -> None:
            while not ended.wait(self.every_s):
                elapsed = time.monotonic() - began
                left = self._left(min(elapsed / self._scale, step.expected_s))
                self._print(
                    f"       {progress.duration(elapsed)}; about {left} left in all", "" if self._live else "\n"
                )

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        took = time.monotonic() - began
        if took < 0.1 * self._scale * step.expected_s:  # an earlier demo did it, which says nothing of the pace
            self._total_s -= step.expected_s
        else:
            self._done_s += step.expected_s
        self._print(f"       done in {progress.duration(took)}")

    def _print(self, text: str, end: str = "\n") -> None:
        print(("\r\033[2K" if self._live else "") + text, end=end, file=self._stream, flush=True)

    def _left(self, of_step_s: float) -> str:
        """The expected rest, times how much longer than expected this machine has taken for the steps so far."""
        done_s = self._done_s + of_step_s
        pace = (time.monotonic() - self._began) / done_s if self._done_s > 20 else self._scale
        return progress.duration((self._total_s - done_s) * pace)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what the steps print to `log`; here it would hide the steps."""
    terminal = sys.stderr
    try:
        with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            # The frameworks draw tables and warnings; colours have no place in a file.
            os.environ.setdefault("NO_COLOR", "1")
            yield
    except BaseException:
        print(f"\nThis step failed; what it printed is in {log}.", file=terminal)
        raise
