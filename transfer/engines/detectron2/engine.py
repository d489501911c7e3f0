"""Detection and instance segmentation by real Detectron2: its models, its trainer, its evaluators, its launcher.

Added is what a comparison needs: a data root a run, proof that the backbone's weights arrived, curves and pictures.
"""

import tempfile
import unittest.mock
import weakref
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faster_coco_eval
import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks, launch
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    PascalVOCDetectionEvaluator,
    coco_evaluation,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage, has_event_storage

from twist.catalog.data_sets import read_sample
from twist.contracts import files
from twist.contracts.failures import explained
from twist.contracts.progress import Progress
from twist.contracts.trackers import Logger
from twist.transfer.engines import framework
from twist.transfer.engines.detectron2 import vit
from twist.transfer.engines.detectron2.config import read_tree, resolve
from twist.transfer.engines.detectron2.data import (
    OWN_VAL,
    count_images,
    register_data,
    register_own,
    voc_objects,
    write_own,
)
from twist.transfer.engines.detectron2.model import bare, draw, metrics_of, predict, prove_loaded
from twist.transfer.engines.framework import TrainingLog, agree, collect, frameworks_quiet, leave, require_finished
from twist.transfer.pictures import save_pairs
from twist.transfer.request import Request, Resolved, Result, Weights

__all__ = ["predict", "resolve", "run"]
# More GPUs alone do not help: the linear rule keeps the images on each.
NEEDS_LESS = (
    "lower SOLVER.IMS_PER_BATCH and SOLVER.BASE_LR by one factor and raise iterations by it, or use more GPUs with "
    "keep_batch=true"
)


def run(request: Request, weights: Weights, resolved: Resolved) -> Result:
    """Train and evaluate by `resolved`; files go to `request.output`. `UserError` for what is nobody's bug."""
    files.write_text(request.output / "config.yaml", resolved.config.dump())
    controls = request.controls
    url = f"tcp://{controls.master}" if controls.master else "auto"
    if request.own is not None and request.leads:
        write_own(request.own, request.output / "data", masks=resolved.config.MODEL.MASK_ON)
    with framework.processes_of(request, "model") as given:
        arguments = (given, weights.file, resolved.config.dump())
        launch(_worker, max(request.gpus, 1), controls.nodes, controls.node_rank, url, arguments)
    return collect(request, resolved)


def _worker(request: Request, weights: Path, dumped: str) -> None:
    """One process of the run: every rank executes it."""
    rank = comm.get_rank()
    log = request.output / (f"log.rank{rank}.txt" if rank else "log.txt")
    with explained(report=request.output, memory=NEEDS_LESS), frameworks_quiet(log):
        framework.require_one_run(request)
        config = read_tree(CfgNode.load_cfg(dumped))
        config.freeze()
        names = [*config.DATASETS.TRAIN, *config.DATASETS.TEST]
        own = OWN_VAL in names
        if own:
            register_own(request.output / "data", voc=request.protocol.metrics[0].startswith("voc"))
        else:
            register_data(request.data, names, sample=read_sample(request.data))
        images = count_images(names) if comm.is_main_process() else {}
        seed_all_rng(request.seed + rank)
        trainer = Trainer(config)
        trainer.tracker = request.controls.logger
        trainer.resume_or_load(resume=request.resume or request.eval_only)
        if trainer.start_iter == 0:
            model = bare(trainer.model)
            if (network := vit.network_of(model)) is not None:
                network.load_state_dict(vit.tensors_for(network, weights)[0], strict=False)  # the proof is strict
            agree(request.output, comm.all_gather(prove_loaded(model, weights)), leads=comm.is_main_process())
        if request.eval_only:
            require_finished(request.output, done=trainer.start_iter, of=config.SOLVER.MAX_ITER)
            results = Trainer.test(config, trainer.model)
        else:
            trainer.train()
            results = trainer._last_eval_results
        results, images = comm.all_gather((results, images))[0]
        if comm.get_local_rank() == 0:  # one process of every node: its caller wants the result too
            metrics, notes = metrics_of(results, request, masks=config.MODEL.MASK_ON or not own)
            media = save_pairs(request.output, draw(bare(trainer.model), config))
            classes = list(MetadataCatalog.get(config.DATASETS.TEST[0]).thing_classes)
            leave(request.output, metrics=metrics, images=images, media=media, notes=notes, classes=classes)


class Trainer(DefaultTrainer):
    """`DefaultTrainer` with the data sets' own evaluators, our curves and progress, and two checkpoints kept."""

    tracker: Logger | None = None

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: Any) -> Any:
        is_vitdet = cfg.MODEL.BACKBONE.NAME == vit.VITDET
        return vit.build_optimizer(cfg, model) if is_vitdet else super().build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        mapper = vit.lsj_mapper(cfg) if cfg.INPUT.get("LSJ_SIZE") else None
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind == "coco":
            tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
            return FastCocoEvaluator(dataset_name, tasks=tasks, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))
        evaluators = {"pascal_voc": _VocEvaluator, "cityscapes_instance": _CityscapesEvaluator}
        return evaluators[kind](dataset_name)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        loader = super().build_test_loader(cfg, dataset_name)
        return _Watched(loader, title=f"evaluate {dataset_name}", last=cfg.SOLVER.MAX_ITER)

    def build_hooks(self) -> list[HookBase]:
        self.checkpointer = _Checkpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        built = [hook for hook in super().build_hooks() if hook is not None]
        for index, hook in enumerate(built):
            if isinstance(hook, hooks.PeriodicCheckpointer):  # only the main process has one
                hook.max_to_keep = 2  # a resume needs the last one, and a torn last one the one before
                # Before the checkpoint, so that a kill loses no line of the curves; the evaluation comes later.
                return [*built[:index], _Watch(), *built[index:]]
        return built

    def build_writers(self) -> list[EventWriter]:
        return [TensorboardXWriter(str(Path(self.cfg.OUTPUT_DIR) / "tensorboard"))]


class _Checkpointer(DetectionCheckpointer):
    """Detectron2's, with a manifest beside each file before the file is noted as the last one."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        framework.seal(Path(self.save_dir) / last_filename_basename)
        super().tag_last_checkpoint(last_filename_basename)


class _Watch(HookBase):
    """Curves and progress."""

    def before_train(self) -> None:
        trainer = self.trainer
        length = {"start": trainer.start_iter, "total": trainer.max_iter}
        self._log = TrainingLog(Path(trainer.cfg.OUTPUT_DIR), **length, logger=trainer.tracker)

    def after_step(self) -> None:
        self._log.step(self.trainer.iter + 1, self._values)

    def _values(self) -> dict[str, float]:
        latest = self.trainer.storage.latest_with_smoothing_hint(20)
        now = {name: value for name, (value, step) in latest.items() if step == self.trainer.iter}
        return {k.replace("total_loss", "loss"): v for k, v in now.items() if "loss" in k or k == "lr"}

    def after_train(self) -> None:
        self._log.close()


class FastCocoEvaluator(COCOEvaluator):
    """Detectron2's, with faster-coco-eval in the place of pycocotools: the same numbers (a test compares them)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with unittest.mock.patch.object(coco_evaluation, "COCO", faster_coco_eval.COCO):
            super().__init__(*arguments, **options)

    def evaluate(self, img_ids: Any = None) -> Any:
        with (
            unittest.mock.patch.object(coco_evaluation, "COCOeval", faster_coco_eval.COCOeval_faster),
            unittest.mock.patch.object(coco_evaluation, "COCOeval_opt", faster_coco_eval.COCOeval_faster),
        ):
            return super().evaluate(img_ids)


class _VocEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's on the objects as our one reader of VOC's XML gives them, or on a data card's.

    Its own reader fails, after the training, on files without <pose>, <truncated> or <difficult>. Classes go by number,
    because their names become names of files.
    """

    _class_names: list[str]
    _predictions: dict[int, list[str]]

    def __init__(self, dataset_name: str) -> None:
        super().__init__(dataset_name)
        numbers = {name: str(index) for index, name in enumerate(self._class_names)}
        self._objects = {
            image: [{**one, "name": numbers[one["name"]]} for one in objects]
            for image, objects in voc_objects(dataset_name).items()
        }
        found = {one["name"] for objects in self._objects.values() for one in objects if not one["difficult"]}
        # Of a user's own classes some may be in no validation image; the mean is over the others, as COCO's is.
        self._class_names = [name for name in numbers.values() if name in found or dataset_name != OWN_VAL]
        flagless = sum(one.get("lacks flags", False) for objects in self._objects.values() for one in objects)
        if flagless:
            self._logger.warning(f"{flagless} objects have no <truncated> or <difficult>: they count as 0")

    def evaluate(self) -> Any:
        from detectron2.evaluation import pascal_voc_evaluation as scripts

        kept = enumerate(map(int, self._class_names))
        self._predictions = defaultdict(list, {place: self._predictions[number] for place, number in kept})
        with tempfile.TemporaryDirectory() as folder:
            listed = Path(folder) / "images.txt"
            listed.write_text("".join(f"{image}\n" for image in self._objects))
            self._image_set_path, self._anno_file_template = str(listed), "{}"
            with unittest.mock.patch.object(scripts, "parse_rec", self._objects.__getitem__):
                return super().evaluate()


class _CityscapesEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's, without two habits of cityscapesScripts 2.3.0; the numbers are untouched.

    It calls `numpy.in1d`, which NumPy 2.4 dropped for `isin`, and leaves a `matches.json` that nothing reads.
    """

    def evaluate(self) -> Any:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as scripts

        write = scripts.writeDict2JSON

        def write_what_is_read(values: Any, file: str) -> None:
            if file != "matches.json":
                write(values, file)

        with (
            unittest.mock.patch.object(np, "in1d", np.isin, create=True),
            unittest.mock.patch.object(scripts, "writeDict2JSON", write_what_is_read),
        ):
            return super().evaluate()


class _Watched:
    """A test loader that shows how far it is; an evaluation in the middle of the training stays silent."""

    def __init__(self, loader: Any, *, title: str, last: int) -> None:
        self._loader, self._title, self._last = loader, title, last

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        quiet = not comm.is_main_process() or (has_event_storage() and get_event_storage().iter < self._last)
        with Progress(self._title, total=len(self), unit="image", quiet=quiet) as progress:
            for item in self._loader:
                yield item
                progress.advance()
