"""`twist demo`: the whole mission on the built-in sample, small but with nothing left out.

Sample → TWIST pretraining → conversion with proof → detection, segmentation, k-NN and a linear probe, each for the
TWIST weights and for random ones → records → table and page. Every step is a call that the command line makes too;
the equivalent command is printed before it, so that a reader can go on alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from contracts import progress

if TYPE_CHECKING:
    from converters.convert import TargetName

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "pretrain" / "sample.toml"
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
    """One step: what it does, the command that does the same, its share of the time on 2 cores, and the work."""

    title: str
    command: str
    expected_s: float
    work: Callable[[], Any]


def run_demo(output: Path, *, source: str = "shapes", fast: bool = False) -> Path:
    """Run every step into `output` and return the path of the HTML page. Finished steps are not repeated."""
    output.mkdir(parents=True, exist_ok=True)
    steps = _plan(output, source=source, fast=fast)
    began = time.monotonic()
    with _Display(steps, log=output / "log.txt") as display:
        for step in steps:
            with display.step(step):
                step.work()
    _closing_words(output, elapsed_s=time.monotonic() - began)
    return output / "report.html"


def _plan(output: Path, *, source: str, fast: bool) -> list[Step]:
    sample, run, weights = output / "sample", output / "pretrain", output / "pretrain" / "backbone.safetensors"
    size = "tiny" if fast else "small"
    overrides = [
        f'data.root="{sample / "unlabelled"}"',
        *(FAST if fast else ()),
    ]

    def make_sample() -> None:
        from transfer.data.sample import make_sample as make

        make(sample, source=source, size=size, seed=0)

    def show_views() -> None:
        from contracts.config import load_config
        from pretrain.config import PretrainConfig
        from pretrain.contact_sheet import contact_sheet

        contact_sheet(load_config(CONFIG, PretrainConfig, overrides), 4, output / "views.png")

    def pretrain() -> None:
        from contracts.config import load_config
        from pretrain.config import PretrainConfig
        from pretrain.train import pretrain as run_pretraining

        run_pretraining(load_config(CONFIG, PretrainConfig, overrides), output=run, resume=run.exists())

    def convert(target: TargetName) -> Callable[[], None]:
        def work() -> None:
            from converters.convert import convert as run_conversion

            folder = output / f"weights-{target}"
            if not folder.exists():  # a conversion is whole or absent
                run_conversion(weights, target=target, output=folder)

        return work

    def transfer(protocol: str, name: str) -> Callable[[], None]:
        def work() -> None:
            from transfer.run import transfer as run_transfer

            if any((record.protocol, record.method) == (protocol, name) for _, record in _records(output)):
                return
            run_transfer(
                protocol,
                weights=str(weights) if name == "twist" else "random",
                data=sample,
                output=output / "runs" / f"{protocol}-{name}",
                resume=(output / "runs" / f"{protocol}-{name}").exists(),
                results=output / "results",
                overrides=PROTOCOLS[protocol] if fast else (),
            )

        return work

    def compare() -> None:
        _write_page(output)

    expected = {"sample-coco-mrcnn-fpn": 85, "sample-voc-fcn-d8": 60, "sample-knn": 5, "sample-linear": 12}
    scale = 0.25 if fast else 1.0
    steps = [
        Step("Draw the sample", f"twist data sample {sample} --source {source} --size {size}", 30, make_sample),
        Step("Show the views of four images", f"twist pretrain {CONFIG.name} --show-views 4", 5, show_views),
        Step("Pretrain with TWIST", f"twist pretrain {CONFIG.name} --output {run}", 200, pretrain),
        Step(
            "Convert to Detectron2, and prove it",
            f"twist convert {weights} --to detectron2",
            8,
            convert("detectron2"),
        ),
        Step("Convert to MMSegmentation, and prove it", f"twist convert {weights} --to mmseg", 8, convert("mmseg")),
        *(
            Step(
                f"{protocol}, {name} weights",
                f"twist transfer {protocol} --weights {weights if name == 'twist' else 'random'} --data {sample}",
                expected[protocol],
                transfer(protocol, name),
            )
            for protocol in PROTOCOLS
            for name in ("twist", "random")
        ),
        Step("Write the page", f"twist compare {output / 'results'} --baseline random --format html", 2, compare),
    ]
    return [Step(s.title, s.command, s.expected_s * scale, s.work) for s in steps]


def _records(output: Path) -> list[tuple[Path, Any]]:
    from contracts.record import find_records, read_record

    results = output / "results"
    return [(path, read_record(path)) for path in find_records([results])] if results.is_dir() else []


def _write_page(output: Path) -> None:
    from compare.report import write_report
    from compare.table import build_table

    found = _records(output)
    write_report(
        output / "report.html",
        build_table([record for _, record in found], baseline="random", metrics=METRICS),
        found,
        pretrain_runs=[output / "pretrain"],
        title="TWIST beside random initialisation, on the built-in sample",
        pictures=[("Views of four images: what TWIST is asked to agree on", output / "views.png")],
    )


def _closing_words(output: Path, *, elapsed_s: float) -> None:
    from compare.render import render
    from compare.table import build_table

    print(render(build_table([record for _, record in _records(output)], baseline="random", metrics=METRICS), "table"))
    print(f"\nThe page, with curves and pictures: {output / 'report.html'}   ({elapsed_s / 60:.1f} minutes)")
    print(f"\nTo do it for real:\n{_FOR_REAL}")


_FOR_REAL = """\
  torchrun --nproc-per-node 8 -m twist pretrain configs/pretrain/r50_multicrop_100ep.toml data.root=IMAGENET/train
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
