"""`twist demo`: the whole mission on the built-in sample, small but with nothing left out.

Sample → TWIST pretraining → conversion with proof → detection, segmentation, k-NN and a linear probe, each for the
TWIST weights and for random ones → records → table and page. Every step is a `twist` command, printed before it runs
as it could be typed, so that a reader can go on alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from twist.contracts import progress
from twist.contracts.config import SHIPPED, parse_override

CONFIG = SHIPPED / "pretrain" / "sample.toml"
# Two epochs of two steps.
FAST = ("run.epochs=2", "run.batch_size=20", "optim.warmup_epochs=0")
# What the demo compares, with the overrides that make it fit into two minutes.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "sample-coco-mrcnn-fpn": ("iterations=20",),
    "sample-voc-fcn-d8": ("iterations=20",),
    "sample-knn": (),
    "sample-linear": (),
}

# The columns of the demo's own table; the records hold every metric.
METRICS = ("coco_box_ap50_percent", "coco_mask_ap50_percent", "miou_percent", "knn_top1_percent", "top1_percent")


@dataclass(frozen=True)
class Step:
    """One step: what it does, the arguments of `twist` that do it, and its share of the time on 2 cores."""

    title: str
    arguments: tuple[str, ...]
    expected_s: float
    # Whether an earlier demo in this folder did it; most commands find that out themselves.
    done: Callable[[], bool] = lambda: False

    @property
    def command(self) -> str:
        return shlex.join(["twist", *self.arguments])


def run_demo(output: Path, *, twist: Callable[[list[str]], object], source: str = "shapes", fast: bool = False) -> Path:
    """Run every step into `output` and return the path of the HTML page. Finished steps are not repeated.

    Args:
        twist: runs the command line with these arguments.
    """
    output.mkdir(parents=True, exist_ok=True)
    steps = _plan(output, source=source, fast=fast)
    began = time.monotonic()
    with _Display(steps, log=output / "log.txt") as display:
        for step in steps:
            with display.step(step):
                if not step.done():
                    twist(list(step.arguments))
    _closing_words(output, elapsed_s=time.monotonic() - began)
    return output / "report.html"


def _plan(output: Path, *, source: str, fast: bool) -> list[Step]:
    sample, run, weights = output / "sample", output / "pretrain", output / "pretrain" / "backbone.safetensors"
    results, size = output / "results", "tiny" if fast else "small"
    config = (_from_here(CONFIG), _override("data.root", str(sample / "unlabelled")), *(FAST if fast else ()))

    def convert(target: str, title: str) -> Step:
        folder = output / f"weights-{target}"
        arguments = ("convert", str(weights), "--to", target, "--output", str(folder))
        return Step(f"Convert to {title}, and prove it", arguments, 8, folder.exists)  # it is whole or absent

    def transfer(protocol: str, name: str) -> Step:
        arguments = ["transfer", protocol, *(PROTOCOLS[protocol] if fast else ())]
        arguments += ["--weights", str(weights) if name == "twist" else "random", "--data", str(sample)]
        arguments += ["--output", str(output / "runs" / f"{protocol}-{name}"), "--results", str(results), "--resume"]

        def recorded() -> bool:
            return any((record.protocol, record.method) == (protocol, name) for _, record in _records(output))

        return Step(f"{protocol}, {name} weights", tuple(arguments), expected[protocol], recorded)

    page: list[str] = ["compare", str(results), "--baseline", "random", "--no-published"]
    page += [word for metric in METRICS for word in ("--metric", metric)]
    page += ["--format", "html", "--output", str(output / "report.html"), "--pretrain-run", str(run)]
    page += ["--title", "TWIST beside random initialisation, on the built-in sample"]
    page += ["--picture", f"Views of four images: what TWIST is asked to agree on={output / 'views.png'}"]

    expected = {"sample-coco-mrcnn-fpn": 85, "sample-voc-fcn-d8": 60, "sample-knn": 5, "sample-linear": 12}
    scale = 0.25 if fast else 1.0
    steps = [
        Step("Draw the sample", ("data", "sample", str(sample), "--source", source, "--size", size), 30),
        Step("Show the views of four images", ("pretrain", *config, "--show-views", "4", "--output", str(output)), 5),
        Step("Pretrain with TWIST", ("pretrain", *config, "--output", str(run), "--resume"), 200),
        convert("detectron2", "Detectron2"),
        convert("mmseg", "MMSegmentation"),
        *(transfer(protocol, name) for protocol in PROTOCOLS for name in ("twist", "random")),
        Step("Write the page", tuple(page), 2),
    ]
    return [dataclasses.replace(step, expected_s=step.expected_s * scale) for step in steps]


def _from_here(path: Path) -> str:
    """`path` as it is typed in the working directory: relative where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _override(key: str, value: str) -> str:
    """`key=value`, the value in quotes only where it would not be read as that string without them."""
    bare = f"{key}={value}"
    return bare if parse_override(bare)[1] == value else f"{key}={json.dumps(value, ensure_ascii=False)}"


def _records(output: Path) -> list[tuple[Path, Any]]:
    from twist.contracts.record import find_records, read_record

    results = output / "results"
    return [(path, read_record(path)) for path in find_records([results])] if results.is_dir() else []


def _closing_words(output: Path, *, elapsed_s: float) -> None:
    from twist.compare.table import build_table
    from twist.compare.writers import render

    print(render(build_table([record for _, record in _records(output)], baseline="random", metrics=METRICS), "table"))
    print(f"\nThe page, with curves and pictures: {output / 'report.html'}   ({elapsed_s / 60:.1f} minutes)")
    config = shlex.quote(_from_here(CONFIG.with_stem("r50_multicrop_100ep")))
    print(f"\nTo do it for real:\n{_FOR_REAL.format(config=config)}")


_FOR_REAL = """\
  torchrun --nproc-per-node 8 -m twist pretrain {config} data.root=IMAGENET/train
  twist convert runs/r50_multicrop_100ep/backbone.safetensors --to detectron2
  twist transfer coco-mrcnn-fpn-1x --weights runs/r50_multicrop_100ep/backbone.safetensors --data DATASETS"""


class _Display:
    """What is being done and how long remains: one line a step, and on a terminal a live line below it.

    Everything that the frameworks print meanwhile goes to `log`, where it helps; here it would hide the steps.
    """

    def __init__(self, steps: list[Step], *, log: Path) -> None:
        self._steps, self._log_path = steps, log
        self._total_s = sum(step.expected_s for step in steps)
        self._began = time.monotonic()
        self._expected_done_s = 0.0
        self._terminal: TextIO = sys.stderr
        self._current: Step | None = None

    def __enter__(self) -> _Display:
        self._stack = contextlib.ExitStack()
        log = self._stack.enter_context(self._log_path.open("a", buffering=1))
        self._stack.enter_context(_everything_to(log))
        progress.listeners.append(self._listen)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        progress.listeners.remove(self._listen)
        self._stack.close()
        if kind is not None:
            print(f"\nThis step failed; what it printed is in {self._log_path}.", file=self._terminal)

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        number = self._steps.index(step) + 1
        self._current = step
        self._say(
            f"[{number:>2}/{len(self._steps)}] {step.title}   (about {self._left(0.0)} left)\n       $ {step.command}"
        )
        began = time.monotonic()
        yield
        self._expected_done_s += step.expected_s
        self._say(f"       done in {time.monotonic() - began:.0f} s")

    def _listen(self, title: str, done: int, total: int | None, elapsed_s: float) -> None:
        if not self._terminal.isatty() or self._current is None:
            return
        share = done / total if total else 0.0
        counted = f"{done}/{total}" if total else str(done)
        line = f"       {title} {counted}, {elapsed_s:.0f} s; about {self._left(share)} left in all"
        self._terminal.write(f"\r\033[2K{line}")
        self._terminal.flush()

    def _say(self, text: str) -> None:
        clear = "\r\033[2K" if self._terminal.isatty() else ""
        self._terminal.write(f"{clear}{text}\n")
        self._terminal.flush()

    def _left(self, share_of_step: float) -> str:
        """What the expectation leaves, stretched by how this machine has kept to it so far."""
        step_s = self._current.expected_s * share_of_step if self._current else 0.0
        expected_s = self._expected_done_s + step_s
        pace = (time.monotonic() - self._began) / expected_s if expected_s > 20 else 1.0
        left_s = max(self._total_s - expected_s, 0) * pace
        return f"{left_s / 60:.0f} min" if left_s >= 90 else f"{left_s:.0f} s"


@contextlib.contextmanager
def _everything_to(log: TextIO) -> Iterator[None]:
    """Send Python's stdout and stderr to `log`: our progress and the frameworks' loggers write there."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        # The frameworks draw tables and warnings; colours have no place in a file.
        os.environ.setdefault("NO_COLOR", "1")
        yield
