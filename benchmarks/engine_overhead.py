"""What our engines cost over the frameworks' own training loops: the same config, model, data and device, interleaved.

    python -m benchmarks.engine_overhead [--data SAMPLE] [--iterations 40] [--repeats 5] [--json FILE]

SAMPLE is made by `twist data sample`; without it one is made and removed again. Detectron2's own is `DefaultTrainer`
with its default hooks and writers, MMSegmentation's its `Runner` with its default hooks; ours add curves, progress,
TensorBoard and the proof of the weights. Both train, neither evaluates. Runs alternate, so a slow minute of the machine
hits both; reported are the iterations a second of each, and the overhead of the pairs, each with median and spread. The
goal is at most 2 %.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import heading, write
from twist.catalog.sample.make import make_sample
from twist.contracts.networks import build_backbone
from twist.contracts.weights import Backbone
from twist.converters.targets import TARGETS
from twist.transfer.engines.framework import frameworks_quiet
from twist.transfer.protocols import find_protocol
from twist.transfer.request import Controls, Request, Weights

# Iterations at the start that are not counted: allocators, caches and loaders fill.
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--engine", choices=["detectron2", "mmseg"], nargs="+", default=["detectron2", "mmseg"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with _folder() as folder:
        if arguments.data is None:
            arguments.data = folder / "sample"
            make_sample(arguments.data, size="tiny", seed=0)
        results = measure_all(arguments)
    write(arguments.json, results)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(heading("Training loops of the frameworks and of our engines"))
    for engine in arguments.engine:
        results[engine] = compare(engine, arguments)
        row = results[engine]
        print(
            f"{engine:12} own {row['own']['median']:.3f} it/s ({row['own']['low']:.3f}–{row['own']['high']:.3f})   "
            f"ours {row['ours']['median']:.3f} it/s ({row['ours']['low']:.3f}–{row['ours']['high']:.3f})   "
            f"overhead {row['overhead_percent']['median']:+.2f} % (median of {arguments.repeats} pairs)"
        )
    return results


def compare(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`own` and `ours` in iterations a second, and the overhead of the pairs in percent."""
    measure = {"detectron2": _detectron2, "mmseg": _mmseg}[engine]
    own, ours = [], []
    for repeat in range(arguments.repeats):
        order = [(own, False), (ours, True)] if repeat % 2 == 0 else [(ours, True), (own, False)]
        for rates, is_ours in order:
            rates.append(measure(arguments, is_ours))
    overheads = [100 * (a / b - 1) for a, b in zip(own, ours, strict=True)]
    return {"own": _spread(own), "ours": _spread(ours), "overhead_percent": _spread(overheads), "n": arguments.repeats}


def _spread(rates: list[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "low": min(rates), "high": max(rates)}


def _request(name: str, arguments: argparse.Namespace, folder: Path, writer: Any) -> tuple[Request, Weights]:
    torch.manual_seed(0)
    header = Backbone(architecture="resnet18", method="random")
    ((name_of_settings, text),) = writer.settings(header).items()
    overlay = folder / name_of_settings
    overlay.write_text(text)
    writer.write(folder / "weights.pth", build_backbone("resnet18").state_dict(), header)
    controls = Controls(iterations=arguments.iterations + WARM_UP)
    request = Request(find_protocol(name), arguments.data, folder, gpus=arguments.gpus, controls=controls)
    return request, Weights(header, folder / "weights.pth", overlay)


def _detectron2(arguments: argparse.Namespace, is_ours: bool) -> float:

    with _folder() as folder, frameworks_quiet(folder / "log.txt"):
        from detectron2.engine import DefaultTrainer, HookBase
        from detectron2.utils.env import seed_all_rng

        from twist.catalog.data_sets import read_sample
        from twist.transfer.engines.detectron2 import engine as engine
        from twist.transfer.engines.detectron2.data import register_data

        class Clock(HookBase):
            def after_step(self) -> None:
                if self.trainer.iter + 1 == WARM_UP:
                    self.began = time.perf_counter()
                if self.trainer.iter + 1 == self.trainer.max_iter:
                    self.wall_s = time.perf_counter() - self.began

        asked = _request("sample-coco-mrcnn-fpn", arguments, folder, TARGETS["detectron2"])
        config = engine.resolve(*asked).config.clone()
        config.defrost()
        config.DATASETS.TEST = ()
        config.TEST.PRECISE_BN.ENABLED = False
        config.SOLVER.CHECKPOINT_PERIOD = 10**9
        names = [*config.DATASETS.TRAIN]
        register_data(arguments.data, names, sample=read_sample(arguments.data))
        seed_all_rng(0)
        trainer = (engine.Trainer if is_ours else DefaultTrainer)(config)
        trainer.resume_or_load(resume=False)
        clock = Clock()
        trainer.register_hooks([clock])
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            trainer.train()
        return arguments.iterations / clock.wall_s


def _mmseg(arguments: argparse.Namespace, is_ours: bool) -> float:

    with _folder() as folder, frameworks_quiet():
        from mmengine.hooks import Hook
        from mmengine.registry import init_default_scope
        from mmengine.runner import Runner
        from mmseg.utils import register_all_modules

        from twist.transfer.engines.mmseg import engine as engine

        class Clock(Hook):
            priority = "LOWEST"

            def after_train_iter(self, runner: Runner, **_: Any) -> None:
                if runner.iter + 1 == WARM_UP:
                    self.began = time.perf_counter()
                if runner.iter + 1 == runner.max_iters:
                    self.wall_s = time.perf_counter() - self.began

        register_all_modules(init_default_scope=False)
        init_default_scope("mmseg")
        request, weights = _request("sample-voc-fcn-d8", arguments, folder, TARGETS["mmseg"])
        config = engine.resolve(request, weights).config
        for key in ("val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg"):
            config[key] = None
        config.default_hooks.checkpoint.interval = 10**9
        config.default_hooks.checkpoint.save_last = False
        if not is_ours:
            # MMSegmentation's own defaults: a line of log every 50 iterations, local scalars.
            config.default_hooks.logger.interval = 50
            config.vis_backends = config.visualizer.vis_backends = [{"type": "LocalVisBackend"}]
        runner = (engine._Runner if is_ours else Runner).from_cfg(config)
        clock = Clock()
        if is_ours:
            runner.register_hook(engine._Watch(request.output, weights.file), priority="BELOW_NORMAL")
        runner.register_hook(clock, priority="LOWEST")
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            runner.train()
        runner.logger.handlers = []
        return arguments.iterations / clock.wall_s


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
