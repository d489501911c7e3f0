"""Detection and instance segmentation by real Detectron2: its models, its trainer, its evaluators, its launcher.

What this file adds to `DefaultTrainer` is what a comparison needs and Detectron2 leaves to its user: configs that stand
on the installed model zoo, a data root a run, the evaluator of each data set, the linear rule stated before the start,
proof that the backbone's weights really arrived (Detectron2 only warns), curves, pictures, and one sentence for
everything that goes wrong.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, hooks, launch
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage, has_event_storage

from twist.catalog.roots import read_sample
from twist.contracts import files
from twist.contracts.failures import explained, raise_reported
from twist.contracts.progress import Progress
from twist.transfer.curves import Curves
from twist.transfer.engines.detectron2.config import resolve
from twist.transfer.engines.detectron2.data import count_images, register_data
from twist.transfer.engines.detectron2.outcome import bare, draw, metrics_of, prove_loaded
from twist.transfer.evaluation import CURVES, Resolved, collect, leave, require_finished
from twist.transfer.quiet import frameworks_quiet
from twist.transfer.request import Request
from twist.transfer.result import EngineResult

__all__ = ["resolve", "run"]
MEMORY = (
    "lower SOLVER.IMS_PER_BATCH and SOLVER.BASE_LR by one factor and raise iterations by it, "
    "or use more GPUs with keep_batch=true"
)


def run(request: Request, resolved: Resolved) -> EngineResult:
    """Train and evaluate by `resolved`; files go to `request.output`.

    Raises:
        UserError: memory ran out, a worker died, the data or the weights are not what they should be.
    """
    files.write_text(request.output / "config.yaml", resolved.config.dump())
    controls = request.controls
    url = f"tcp://{controls.master}" if controls.master else "auto"
    arguments = (request, resolved.config.dump())
    with raise_reported(request.output):
        launch(_worker, max(request.gpus, 1), controls.nodes, controls.node_rank, url, arguments)
    return collect(request, resolved)


def _worker(request: Request, dumped: str) -> None:
    """One process of the run: every rank executes it."""
    with (
        explained(report=request.output, memory=MEMORY),
        frameworks_quiet(_log(request)),
    ):
        config = get_cfg()
        config.merge_from_other_cfg(CfgNode.load_cfg(dumped))
        config.freeze()
        sample = read_sample(request.data) or {}
        names = [*config.DATASETS.TRAIN, *config.DATASETS.TEST]
        register_data(request.data, names, sample_classes=sample.get("classes"))
        images = count_images(names) if comm.is_main_process() else {}
        seed_all_rng(request.seed + comm.get_rank())
        trainer = Trainer(config)
        trainer.resume_or_load(resume=request.resume or request.eval_only)
        if trainer.start_iter == 0:
            prove_loaded(bare(trainer.model), request.weights)
        if request.eval_only:
            require_finished(request.output, done=trainer.start_iter, of=config.SOLVER.MAX_ITER)
            results = Trainer.test(config, trainer.model)
        else:
            trainer.train()
            results = trainer._last_eval_results
        results, images = comm.all_gather((results, images))[0]
        if comm.get_local_rank() == 0:  # one process of every node: its caller wants the result too
            metrics, notes = metrics_of(results, request)
            media = draw(bare(trainer.model), config, request.output)
            leave(request.output, metrics, images=images, media=media, notes=notes)


def _log(request: Request) -> Path:
    rank = comm.get_rank()
    return request.output / (f"log.rank{rank}.txt" if rank else "log.txt")


class Trainer(DefaultTrainer):
    """`DefaultTrainer` with the data sets' own evaluators, our curves and progress, and two checkpoints kept."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind == "coco":
            tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
            return COCOEvaluator(dataset_name, tasks=tasks, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        assert kind == "cityscapes_instance", kind
        return _CityscapesEvaluator(dataset_name)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        loader = super().build_test_loader(cfg, dataset_name)
        return _Watched(loader, title=f"evaluate {dataset_name}", last=cfg.SOLVER.MAX_ITER)

    def build_hooks(self) -> list[HookBase]:
        built = [hook for hook in super().build_hooks() if hook is not None]
        for hook in built:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = 2  # a resume needs the last one, and a torn last one the one before
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = max(1, min(20, self.max_iter // 50))
        if comm.is_main_process():
            (evaluation,) = (index for index, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
            built.insert(evaluation, _ShowProgress())  # it ends before the last evaluation, which shows its own
        return built

    def build_writers(self) -> list[EventWriter]:
        output = Path(self.cfg.OUTPUT_DIR)
        return [_CurveWriter(output / CURVES, self), TensorboardXWriter(str(output / "tensorboard"))]


class _CityscapesEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's, around two habits of cityscapesScripts' evaluation (2.3.0).

    It calls `numpy.in1d`, which NumPy 2.4 dropped for `isin`, and it leaves a `matches.json` in the working directory,
    which nothing reads and which NumPy 2.4's integers break. The numbers are untouched.
    """

    def evaluate(self) -> Any:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as scripts

        write = scripts.writeDict2JSON

        def write_what_is_read(values: Any, file: str) -> None:
            if file != "matches.json":
                write(values, file)

        with (
            unittest.mock.patch.object(np, "in1d", getattr(np, "in1d", np.isin), create=True),
            unittest.mock.patch.object(scripts, "writeDict2JSON", write_what_is_read),
        ):
            return super().evaluate()


class _CurveWriter(EventWriter):
    """Losses and learning rate of the storage into `metrics.jsonl`."""

    def __init__(self, path: Path, trainer: Trainer) -> None:
        self._path, self._trainer = path, trainer
        self._curves: Curves | None = None
        self._last = -1

    def write(self) -> None:
        storage = get_event_storage()
        if self._curves is None:  # only now is it known where the run continues
            self._curves = Curves(self._path, start=self._trainer.start_iter)
        if storage.iter == self._last:
            return
        self._last = storage.iter
        latest = {k: v for k, (v, step) in storage.latest_with_smoothing_hint(20).items() if step == storage.iter}
        values = {k.replace("total_loss", "loss"): v for k, v in latest.items() if "loss" in k or k == "lr"}
        if values:
            self._curves.add(storage.iter + 1, values)

    def close(self) -> None:
        if self._curves is None:
            self._curves = Curves(self._path, start=self._trainer.start_iter)
        self._curves.close()


class _ShowProgress(HookBase):
    def before_train(self) -> None:
        total = self.trainer.max_iter
        self._progress = Progress("train", total=total, unit="step", start=self.trainer.start_iter).__enter__()

    def after_step(self) -> None:
        self._progress.advance(1, loss=self.trainer.storage.history("total_loss").latest())

    def after_train(self) -> None:
        self._progress.__exit__(None, None, None)


class _Watched:
    """A test loader that shows how far it is."""

    def __init__(self, loader: Any, *, title: str, last: int) -> None:
        self._loader, self._title, self._last = loader, title, last

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        # An evaluation in the middle of the training stays silent: one bar at a time.
        quiet = not comm.is_main_process() or (has_event_storage() and get_event_storage().iter < self._last)
        with Progress(self._title, total=len(self._loader), unit="image", quiet=quiet) as progress:
            for item in self._loader:
                yield item
                progress.advance()
