"""Detectron2's config of a run: the model zoo's, ours, the weights', the linear rule, the overrides, and what of it is
recorded."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from twist.catalog.data_sets import read_sample
from twist.contracts.config import SHIPPED, parse_override
from twist.contracts.errors import UsageError, UserError
from twist.contracts.machine import cores
from twist.transfer.evaluation import Resolved
from twist.transfer.overrides import Tree, departures, near_keys, recorded, refuse_option
from twist.transfer.request import Request
from twist.transfer.scaling import Rule, Schedule, choose_rule, leaves_protocol, render_plan, searched, stretch

with warnings.catch_warnings():
    # It imports pkg_resources, which complains about itself, in every worker again.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from detectron2 import model_zoo

CONFIGS = SHIPPED / "detectron2"

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
    config.DATALOADER.NUM_WORKERS = min(config.DATALOADER.NUM_WORKERS, cores())  # more would wait, and torch warns
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
            published,
            planned,
            rule=rule,
            processes=request.processes,
            gpus=request.gpus,
            reference=reference,
            changed=changed,
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
            raise UsageError(
                f'Detectron2 knows no key {".".join(keys[: depth + 1])} (in "{override}").'
                f"{near_keys(keys[: depth + 1], _tree(config))}"
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
