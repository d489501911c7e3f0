"""Detection and instance segmentation by real Detectron2: its models, its trainer, its evaluators, its launcher.

What this file adds to `DefaultTrainer` is what a comparison needs and Detectron2 leaves to its user: configs that stand
on the installed model zoo, a data root a run, the evaluator of each data set, the linear rule stated before the start,
proof that the backbone's weights really arrived (Detectron2 only warns), curves, pictures, and one sentence for
everything that goes wrong.
"""

from __future__ import annotations

import copy
import json
import math
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
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
from torch import Tensor, nn

import transfer.detectron2_heads  # noqa: F401  (registers Res5ROIHeadsExtraNorm)
from contracts import atomic
from contracts.config import parse_override
from contracts.errors import UsageError, UserError, did_you_mean
from contracts.progress import Progress
from transfer.curves import Curves
from transfer.detectron2_data import count_images, register_data
from transfer.evaluation import CURVES, Resolved, collect, leave, require_finished
from transfer.failures import guard, raise_failure
from transfer.overrides import Tree, departures, recorded, refuse_option
from transfer.pictures import draw_instances, save_pair
from transfer.preflight import read_sample
from transfer.quiet import frameworks_quiet
from transfer.request import Request
from transfer.result import EngineResult
from transfer.scaling import Rule, Schedule, choose_rule, leaves_protocol, render_plan, searched, stretch

with warnings.catch_warnings():
    # It imports pkg_resources, which complains about itself, in every worker again.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from detectron2 import model_zoo

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "detectron2"
PICTURES = 4
KNOB = "SOLVER.IMS_PER_BATCH and SOLVER.BASE_LR by one factor and raise iterations by it"
# Detections below this score would hide a picture; the evaluation uses all of them.
PICTURE_SCORE = 0.1

# Keys that an option of the command line decides; overridden, they would be ignored or work against it.
_OPTIONS = {
    "MODEL.DEVICE": "--gpus",
    "MODEL.WEIGHTS": "--weights",
    "OUTPUT_DIR": "--output",
    "SEED": "--seed",
    "SOLVER.REFERENCE_WORLD_SIZE": "--gpus",
}
# What cannot change the number: how the machine works, and how often something is looked at or saved. Images, their
# order and what is learnt from them stay as they are; the evaluation that counts is the one at the end.
_HARMLESS = (
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
    "VIS_PERIOD",
)
# What an override may change without making the run another protocol's, as long as `leaves_protocol` finds nothing.
_SCHEDULE = tuple(f"SOLVER.{key}" for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS"))
# What belongs to the weights and not to the protocol: their normalisation, channel order and stride.
_OF_THE_WEIGHTS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1")
# Detectron2's global defaults that no R-CNN of ours uses, unless an override does (`transfer/overrides.py`).
_NOT_USED = (
    "GLOBAL",
    "INPUT.CROP",
    "MODEL.KEYPOINT_ON",
    "MODEL.LOAD_PROPOSALS",
    "MODEL.PANOPTIC_FPN",
    "MODEL.RETINANET",
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "MODEL.ROI_KEYPOINT_HEAD",
    "MODEL.SEM_SEG_HEAD",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "VERSION",
)


# ---------------------------------------------------------------------------------------------------------------------
# The config


def resolve(request: Request) -> Resolved:
    """Config, plan and recipe of `request`; nothing is built and nothing is written.

    Order, later wins: the model zoo's config, our deltas, the weights' overlay, the linear rule, `key=value` overrides
    (taken as written: the rule doesn't scale them again).

    Raises:
        UsageError: an override that Detectron2 doesn't know, a batch that doesn't divide, frozen batch norm.
        UserError: data missing, weights that no R-CNN can take.
    """
    if request.backbone.is_vit:
        raise UserError(
            f"{request.backbone.display_name} is no backbone of an R-CNN recipe here: use linear, knn or "
            "finetune-100pct for ViTs, or a ResNet."
        )
    config = get_cfg()
    merge_yaml(config, CONFIGS / request.protocol.config)
    sample = read_sample(request.data)
    if request.protocol.scale == "sample":
        assert sample is not None, "run.py checks the root first"
        config.MODEL.ROI_HEADS.NUM_CLASSES = len(sample["classes"])
    config.merge_from_other_cfg(CfgNode(yaml.safe_load(request.overlay.read_text())))
    published = _schedule(config)
    reference = config.SOLVER.REFERENCE_WORLD_SIZE
    rule = choose_rule(processes=request.processes, reference=reference, keep_batch=request.controls.keep_batch)
    if rule == "linear rule":
        if config.SOLVER.IMS_PER_BATCH % reference:
            raise UsageError(
                f"{request.protocol.config}: {config.SOLVER.IMS_PER_BATCH} images do not divide by {reference}."
            )
        config = DefaultTrainer.auto_scale_workers(config, request.processes)
    config.SOLVER.REFERENCE_WORLD_SIZE = 0  # done here, and said; the trainer shall not do it again
    if request.controls.iterations:
        _set_schedule(config, stretch(_schedule(config), request.controls.iterations))
    before, ruled = _tree(config), _schedule(config)
    for override in request.overrides:
        _override(config, override)
    after = _tree(config)
    config.MODEL.WEIGHTS = f"{request.weights}?matching_heuristics=True"
    config.MODEL.DEVICE = "cuda" if request.gpus else "cpu"
    config.OUTPUT_DIR = str(request.output)
    config.SEED = request.seed
    _check(config, request)
    config.freeze()
    planned = _schedule(config)
    changed = [*leaves_protocol(published, planned), *departures(before, after, free=(*_SCHEDULE, *_HARMLESS))]
    return Resolved(
        config=config,
        recipe=recorded(before, after, recipe_of=_recipe, harmless=_HARMLESS),
        plan=render_plan(
            published, planned, rule=rule, processes=request.processes, gpus=request.gpus, reference=reference
        ),
        reduced=bool(changed),
        notes=(*_notes(rule, planned, config, request), *searched(ruled, planned), *changed),
    )


def merge_yaml(config: CfgNode, path: Path) -> None:
    """Merge one of our YAML deltas and, before it, what its `_BASE_` names: `model_zoo://…` or a file beside it."""
    values = yaml.safe_load(path.read_text())
    bases = values.pop("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if base.startswith("model_zoo://"):
            config.merge_from_file(model_zoo.get_config_file(base.removeprefix("model_zoo://")))
        else:
            merge_yaml(config, path.parent / base)
    config.merge_from_other_cfg(CfgNode(values))


def _override(config: CfgNode, override: str) -> None:
    keys, value = parse_override(override)
    refuse_option(override, ".".join(keys), _OPTIONS)
    node: Any = config
    for depth, key in enumerate(keys):
        if not isinstance(node, CfgNode) or key not in node:
            known = node.keys() if isinstance(node, CfgNode) else ()
            raise UsageError(
                f'Detectron2 knows no key {".".join(keys[: depth + 1])} (in "{override}").{did_you_mean(key, known)}'
            )
        node = node[key]
    if isinstance(node, CfgNode):
        raise UsageError(f'"{override}": {".".join(keys)} is a section; name a key of it ({", ".join(sorted(node))}).')
    if isinstance(node, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    try:
        config.merge_from_list([".".join(keys), value])
    except (ValueError, AssertionError) as error:
        raise UsageError(
            f'"{override}" does not fit: {".".join(keys)} is {node!r} ({str(error).splitlines()[0].rstrip(".")}).'
        ) from None


def _check(config: CfgNode, request: Request) -> None:
    frozen = config.MODEL.BACKBONE.FREEZE_AT > 0 or "Frozen" in config.MODEL.RESNETS.NORM
    if frozen and request.method != "supervised":
        raise UsageError(
            "Frozen batch norm or frozen stages do not go with self-supervised or random weights: their feature scales "
            "are not those the frozen statistics were tuned for (MoCo, arXiv 1911.05722, section 4.2); keep "
            "MODEL.BACKBONE.FREEZE_AT=0 and a trained norm."
        )
    if config.SOLVER.IMS_PER_BATCH % request.processes:
        raise UsageError(
            f"SOLVER.IMS_PER_BATCH={config.SOLVER.IMS_PER_BATCH} does not divide over {request.processes} processes: "
            "choose a multiple."
        )
    if request.processes > 1 and not request.gpus:
        raise UsageError("Several processes need GPUs: neither SyncBN nor Detectron2's trainer runs on several CPUs.")
    if config.SOLVER.IMS_PER_BATCH // request.processes < 1 or config.SOLVER.MAX_ITER < 1:
        raise UsageError("SOLVER.IMS_PER_BATCH and SOLVER.MAX_ITER must leave at least one image and one iteration.")


def _schedule(config: CfgNode) -> Schedule:
    solver = config.SOLVER
    return Schedule(
        solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, solver.WARMUP_ITERS, tuple(int(s) for s in solver.STEPS)
    )


def _set_schedule(config: CfgNode, schedule: Schedule) -> None:
    config.SOLVER.MAX_ITER = schedule.iterations
    config.SOLVER.WARMUP_ITERS = schedule.warmup_iterations
    config.SOLVER.STEPS = schedule.steps


def _tree(config: CfgNode) -> Tree:
    # Through JSON, because Detectron2's YAML shares equal lists between sections.
    return json.loads(json.dumps(yaml.safe_load(config.dump())))


def _recipe(config: Tree) -> Tree:
    """`config` without where things lie, what the machine is, what is the weights' and what nothing uses."""
    values = copy.deepcopy(config)
    unused = (*_NOT_USED, *(() if config["MODEL"]["MASK_ON"] else ("MODEL.ROI_MASK_HEAD",)))
    for name in (*_OPTIONS, *_HARMLESS, *_OF_THE_WEIGHTS, *unused):
        *sections, key = name.split(".")
        table = values
        for section in sections:
            table = table.get(section, {})
        table.pop(key, None)
    return values


def _notes(rule: Rule, planned: Schedule, config: CfgNode, request: Request) -> Iterator[str]:
    if rule != "as published" and request.protocol.scale == "full":
        lr = f"lr {planned.learning_rate:g}"
        yield f"{rule}: {planned.images_per_step} images a step, {lr}, {planned.iterations} iterations"
    if request.gpus == 0 and "SyncBN" in config.MODEL.RESNETS.NORM:
        # Not in the recipe: over one process both take their statistics from the same images.
        yield "one process on the CPU: synchronised batch norm is plain batch norm there"


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run(request: Request, resolved: Resolved) -> EngineResult:
    """Train and evaluate by `resolved`; files go to `request.output`.

    Raises:
        UserError: memory ran out, a worker died, the data or the weights are not what they should be.
    """
    atomic.write_text(request.output / "config.yaml", resolved.config.dump())
    controls = request.controls
    url = f"tcp://{controls.master}" if controls.master else "auto"
    arguments = (request, resolved.config.dump())
    with raise_failure(request.output):
        launch(_worker, max(request.gpus, 1), controls.nodes, controls.node_rank, url, arguments)
    return collect(request, resolved)


def _worker(request: Request, dumped: str) -> None:
    """One process of the run: every rank executes it."""
    with (
        guard(request.output, knob=KNOB),
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
            prove_loaded(_bare(trainer.model), request.weights)
        if request.eval_only:
            require_finished(request.output, done=trainer.start_iter, of=config.SOLVER.MAX_ITER)
            results = Trainer.test(config, trainer.model)
        else:
            trainer.train()
            results = trainer._last_eval_results
        results, images = comm.all_gather((results, images))[0]
        if comm.get_local_rank() == 0:  # one process of every node: its caller wants the result too
            metrics, notes = _metrics(results, request)
            media = _draw(_bare(trainer.model), config, request.output)
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


# ---------------------------------------------------------------------------------------------------------------------
# Proof, metrics, pictures


def prove_loaded(model: nn.Module, weights: Path) -> None:
    """Every tensor of the weights file is in `model`, once and bit for bit; every backbone tensor came from the file.

    Raises:
        UserError: Detectron2 skipped something (it would only warn).
    """
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = loaded.get("model", loaded)
    state = model.state_dict()
    filled = set()
    wrong = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or name.endswith("num_batches_tracked"):
            continue
        places = [key for key in state if key == name or key.endswith(f".{name}")]
        if len(places) != 1 or not torch.equal(state[places[0]].cpu(), tensor):
            wrong.append(name)
        filled.update(places)
    expected = {key for key in state if _is_backbone(key)}
    random = sorted(expected - filled)
    if wrong or random:
        raise UserError(
            f"Detectron2 did not take the weights: {len(wrong)} tensors of {weights} are not in the model, "
            f"{len(random)} of the backbone's {len(expected)} were left at random (first: {(wrong or random)[0]}); "
            "convert them again."
        )


def _is_backbone(key: str) -> bool:
    if key.endswith("num_batches_tracked"):
        return False
    if key.startswith("roi_heads.res5."):
        return not key.startswith("roi_heads.res5.norm.")
    return key.startswith(("backbone.bottom_up.", "backbone.stem.", "backbone.res"))


def _metrics(results: dict[str, dict[str, float]], request: Request) -> tuple[dict[str, float], list[str]]:
    """Detectron2's results under the names of `contracts.metrics`."""
    metrics, notes = {}, []
    for name in request.protocol.metrics:
        _, kind, which, _ = name.rsplit("_", 3)
        value = results.get({"box": "bbox", "mask": "segm"}[kind], {}).get(which.upper())
        if value is None or not math.isfinite(value):
            # Detectron2 gives nothing, or NaN, where the model detected nothing at all: that is an AP of 0. Where there
            # is nothing to detect it gives NaN, too: such data do not come so far (`count_images`).
            notes.append(f"{name}: the evaluator gave no number because nothing was detected; counted as 0")
            value = 0.0
        metrics[name] = float(value)
    return metrics, notes


def _draw(model: nn.Module, config: CfgNode, output: Path) -> list[Path]:
    """Truth and prediction of the first images of the test set that have objects."""
    (name,) = config.DATASETS.TEST
    metadata = MetadataCatalog.get(name)
    entries = [entry for entry in DatasetCatalog.get(name) if entry["annotations"]][:PICTURES]
    mapper = DatasetMapper(config, is_train=False)
    model.eval()
    paths = []
    for number, entry in enumerate(entries):
        image = read_image(entry["file_name"], "RGB")
        truth = annotations_to_instances(
            [a for a in entry["annotations"] if not a.get("iscrowd", 0)], image.shape[:2], mask_format="bitmask"
        )
        masks = truth.gt_masks.tensor.numpy() if truth.has("gt_masks") else None
        left = draw_instances(
            image, truth.gt_boxes.tensor.numpy(), truth.gt_classes.tolist(), metadata.thing_classes, masks=masks
        )
        with torch.no_grad():
            found = model([mapper(dict(entry))])[0]["instances"].to("cpu")
        # As many as there are objects, the highest scores first (the detector's order).
        found = found[found.scores >= PICTURE_SCORE][: len(truth)]
        right = draw_instances(
            image,
            found.pred_boxes.tensor.numpy(),
            found.pred_classes.tolist(),
            metadata.thing_classes,
            scores=found.scores.tolist(),
            masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
        )
        paths.append(save_pair(left, right, output / f"prediction-{number + 1}.png"))
    return paths


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
