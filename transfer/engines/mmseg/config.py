"""MMSegmentation's config of a run: the installed one, ours, the weights', the linear rule, the overrides, and what of
it is recorded."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmseg
from mmengine.config import Config

from twist.catalog.data_sets import Split, find_data_set, read_sample
from twist.contracts.config import SHIPPED, parse_override
from twist.contracts.errors import UsageError, UserError
from twist.contracts.machine import cores
from twist.transfer.evaluation import Resolved
from twist.transfer.overrides import Tree, departures, near_keys, recorded, refuse_option
from twist.transfer.pictures import colour_of
from twist.transfer.request import Request
from twist.transfer.scaling import (
    TOLERANCE,
    Rule,
    Schedule,
    choose_rule,
    leaves_protocol,
    linear_rule,
    render_plan,
    searched,
    stretch,
)

CONFIGS = SHIPPED / "mmseg"
# Where the installed MMSegmentation keeps its own configs; ours name it in `_base_` through this variable.
BASES_VARIABLE = "MMSEG_CONFIGS"
# Keys that an option of the command line decides; overridden, they would be ignored or work against it.
_OPTIONS = {
    "*_dataloader.dataset.data_root": "--data",
    "data_root": "--data",
    "load_from": "--weights",
    "model.backbone.init_cfg": "--weights",
    "model.pretrained": "--weights",
    "resume": "--resume",
}
# What cannot change the number: how the machine works, and how often something is looked at, logged or saved. The
# evaluation that counts is the one at the end.
_HARMLESS = (
    "*_dataloader.num_workers",
    "*_dataloader.persistent_workers",
    "default_hooks.checkpoint.interval",
    "default_hooks.checkpoint.max_keep_ckpts",
    "default_hooks.logger.interval",
    "env_cfg",
    "log_level",
    "train_cfg.val_interval",
    "vis_backends",
    "visualizer",
)
# What an override may change without making the run another protocol's; the policies' places in the run follow its
# length and rate.
_SCHEDULE = (
    "train_dataloader.batch_size",
    "train_cfg.max_iters",
    "optim_wrapper.optimizer.lr",
    *(f"param_scheduler.*.{place}" for place in ("begin", "end", "eta_min", "milestones")),
)
# Variables of the installed configs, whose values the sections that count have copied.
_COPIED = ("optimizer", "train_pipeline", "test_pipeline", "tta_pipeline", "tta_model", "crop_size")
# Of a model and its backbone, what belongs to the weights and not to the protocol.
_OF_THE_WEIGHTS = ("data_preprocessor", "pretrained")
_OF_A_BACKBONE = ("init_cfg", "pretrained", "style")


def load(path: Path) -> Config:
    """One of our configs, its bases taken from the installed MMSegmentation."""
    os.environ[BASES_VARIABLE] = str(Path(mmseg.__file__).parent / ".mim" / "configs")
    return Config.fromfile(path)


def resolve(request: Request) -> Resolved:
    """Config, plan and recipe of `request`; nothing is built and nothing is written.

    Order, later wins: MMSegmentation's config, ours, the weights' overlay, the linear rule, `key=value` overrides (as
    written: the rule doesn't scale them again).

    Raises:
        UsageError: an override of a key that the config doesn't have, a batch that doesn't divide, frozen batch norm.
        UserError: weights that this model can't take.
    """
    backbone = request.backbone
    if backbone.is_vit:
        raise UserError(
            f"{backbone.display_name} is no backbone of an FCN recipe here: use linear, knn or "
            "finetune-100pct for ViTs, or a ResNet."
        )
    config = load(CONFIGS / request.protocol.config)
    config.merge_from_dict(Config.fromfile(request.overlay)._to_lazy_dict())
    config.model.pretrained = None
    config.model.backbone.init_cfg.checkpoint = str(request.weights)
    _set_channels(config, backbone.architecture, backbone.width)
    _set_data(config, request)

    reference = request.protocol.gpus
    published = _schedule(config, processes=reference or 1)
    rule = choose_rule(processes=request.processes, reference=reference, keep_batch=request.controls.keep_batch)
    planned = published
    if rule == "linear rule":
        planned = linear_rule(published, processes=request.processes, reference=reference)
    if request.controls.iterations:
        planned = stretch(planned, request.controls.iterations)
    _set_schedule(config, published, planned, processes=request.processes)
    before, ruled = _tree(config), _schedule(config, processes=request.processes)
    for override in request.overrides:
        _override(config, override)
    after = _tree(config)
    _check(config, request)

    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.num_workers = min(loader.num_workers, cores())  # more would wait for each other, and torch warns
        loader.persistent_workers = loader.num_workers > 0  # torch refuses the one without the other
    config.work_dir = str(request.output)
    config.launcher = "pytorch" if request.processes > 1 else "none"
    # mmengine keeps loggers and writers by name for the whole process: a suite's next run must not get this one's.
    config.experiment_name = config.visualizer.name = str(request.output).strip("/").replace("/", "-")
    config.randomness = {"seed": request.seed}
    config.env_cfg.dist_cfg = {"backend": "nccl" if request.gpus else "gloo"}
    config.device = "cuda" if request.gpus else "cpu"
    every = max(1, min(20, config.train_cfg.max_iters // 50))
    config.default_hooks.logger.interval = every
    config.resume = request.resume
    planned = _schedule(config, processes=request.processes)
    changed = [*leaves_protocol(published, planned), *departures(before, after, free=(*_SCHEDULE, *_HARMLESS))]
    end, last = config.param_scheduler[-1].end, config.train_cfg.max_iters
    if abs(end / last - 1) > TOLERANCE:
        changed.append(f"the rate's policy ends at iteration {end} of {last}, and in the protocol with the run")
    recipe_of = functools.partial(_recipe, processes=request.processes)
    return Resolved(
        config=config,
        recipe=recorded(before, after, recipe_of=recipe_of, harmless=_HARMLESS),
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


def _set_channels(config: Config, architecture: str, width: int) -> None:
    """Heads take what this backbone gives: the stock config is written for bottlenecks of width 1."""
    expansion = 1 if architecture in ("resnet18", "resnet34") else 4
    for head in (config.model.decode_head, config.model.auxiliary_head):
        if head is not None:
            head.in_channels = 64 * 2**head.in_index * expansion * width


def _set_data(config: Config, request: Request) -> None:
    """Where the data lie; their classes and files too, unless MMSegmentation's own dataset class knows those."""
    sample = read_sample(request.data)
    row = find_data_set(request.protocol.data[0])
    splits: dict[str, Split] = {split.role: split for split in row.run_splits().values() if "masks" in split.truth}
    # A sample's classes are none of the data set's, and MMSegmentation's own classes insist on their names.
    of_sample = sample is not None and row.classes_of_sample
    loaders = {"train": [config.train_dataloader], "val": [config.val_dataloader, config.test_dataloader]}
    for role, dataset in ((role, loader.dataset) for role, entries in loaders.items() for loader in entries):
        dataset.data_root = str(row.place(request.data))
        images, masks = splits[role].images, splits[role].truth["masks"]
        if dataset.type == "BaseSegDataset":
            folders = {"img_path": images.folder, "seg_map_path": masks.folder}
            dataset.update({"data_prefix": folders, "ann_file": splits[role].names})
        if of_sample or dataset.type == "BaseSegDataset":
            classes = row.label_names(sample)
            if not isinstance(classes, tuple):
                raise UserError(f"{row.name} has no names of classes: write them into its row of data_sets.toml.")
            palette = [colour_of(index) for index in range(len(classes))]
            names = {"classes": list(classes), "palette": palette}
            suffixes = {"img_suffix": images.suffix, "seg_map_suffix": masks.suffix}
            dataset.update({"type": "BaseSegDataset", **suffixes, "metainfo": names})
            for head in (config.model.decode_head, config.model.auxiliary_head):
                if head is not None:
                    head.num_classes = len(classes)


def _schedule(config: Config, *, processes: int) -> Schedule:
    policy = config.param_scheduler[-1]
    return Schedule(
        images_per_step=config.train_dataloader.batch_size * processes,
        learning_rate=config.optim_wrapper.optimizer.lr,
        iterations=config.train_cfg.max_iters,
        warmup_iterations=sum(p.end for p in config.param_scheduler[:-1]),
        steps=tuple(policy.get("milestones", ())),
    )


def _set_schedule(config: Config, published: Schedule, planned: Schedule, *, processes: int) -> None:
    if planned.images_per_step % processes:
        raise UsageError(
            f"{planned.images_per_step} images a step do not divide over {processes} processes: choose another --gpus."
        )
    config.train_dataloader.batch_size = planned.images_per_step // processes
    config.optim_wrapper.optimizer.lr = planned.learning_rate
    config.train_cfg.max_iters = config.train_cfg.val_interval = planned.iterations
    policy = config.param_scheduler[-1]
    policy.end = planned.iterations
    if planned.steps:
        policy.milestones = list(planned.steps)
    if "eta_min" in policy:  # a learning rate too
        policy.eta_min *= planned.learning_rate / published.learning_rate


def _override(config: Config, override: str) -> None:
    keys, value = parse_override(override)
    refuse_option(override, ".".join(keys), _OPTIONS)
    node: Any = config._cfg_dict
    for depth, key in enumerate(keys):
        inside = isinstance(node, (list, tuple)) and key.isdigit() and int(key) < len(node)
        if not inside and not (isinstance(node, dict) and key in node):
            raise UsageError(
                f'The MMSegmentation config has no key {".".join(keys[: depth + 1])} (in "{override}").'
                f"{near_keys(keys[: depth + 1], _tree(config), unused=_COPIED)}"
            )
        node = node[int(key)] if inside else node[key]
    if isinstance(node, dict):
        raise UsageError(f'"{override}": {".".join(keys)} is a section; name a key of it ({", ".join(sorted(node))}).')
    if isinstance(node, bool):
        # A bare word would be a string, and every string is true. Python's spelling is common in these configs.
        value = {"True": True, "False": False}.get(value, value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise UsageError(f'"{override}" does not fit: {".".join(keys)} is {node!r}; write true or false.')
    number = isinstance(node, (int, float)) and not isinstance(node, bool)
    if number and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UsageError(f'"{override}" does not fit: {".".join(keys)} is {node!r}, a number.')
    if isinstance(node, tuple) and isinstance(value, list):  # an override's [512, 512]: mmseg insists on its tuples
        value = tuple(value)
    config.merge_from_dict({".".join(keys): value}, allow_list_keys=True)


def _check(config: Config, request: Request) -> None:
    backbone = config.model.backbone
    if (backbone.get("norm_eval") or backbone.get("frozen_stages", -1) >= 0) and request.method != "supervised":
        raise UsageError(
            "Frozen batch norm or frozen stages do not go with self-supervised or random weights: their feature scales "
            "are not those the frozen statistics were tuned for (MoCo, arXiv 1911.05722, section 4.2); keep "
            "model.backbone.norm_eval=false and frozen_stages=-1."
        )
    if config.train_dataloader.batch_size < 1 or config.train_cfg.max_iters < 1:
        raise UsageError("train_dataloader.batch_size and train_cfg.max_iters must be at least 1.")
    if request.processes > 1 and not request.gpus:
        raise UsageError("Several processes need GPUs: synchronised batch norm does not run on CPUs; use one process.")


def _tree(config: Config) -> Tree:
    return json.loads(json.dumps(config.to_dict()))


def _recipe(config: Tree, *, processes: int) -> Tree:
    """What decides the number of `config`, for any weights and wherever data lie."""
    model = {key: value for key, value in config["model"].items() if key not in _OF_THE_WEIGHTS}
    model["backbone"] = {k: v for k, v in model["backbone"].items() if k not in _OF_A_BACKBONE}
    train, val = config["train_dataloader"]["dataset"], config["val_dataloader"]["dataset"]
    return {
        "model": model,
        "images_per_step": config["train_dataloader"]["batch_size"] * processes,
        "iterations": config["train_cfg"]["max_iters"],
        "optim_wrapper": config["optim_wrapper"],
        "param_scheduler": config["param_scheduler"],
        "train": {"pipeline": train["pipeline"], "prefix": train["data_prefix"], "list": train.get("ann_file", "")},
        "test": {"pipeline": val["pipeline"], "prefix": val["data_prefix"], "list": val.get("ann_file", "")},
    }


def _notes(rule: Rule, planned: Schedule, config: Config, request: Request) -> Iterator[str]:
    if rule != "as published" and request.protocol.scale == "full":
        lr = f"lr {planned.learning_rate:g}"
        yield f"{rule}: {planned.images_per_step} images a step, {lr}, {planned.iterations} iterations"
    if request.gpus == 0 and config.model.backbone.norm_cfg.type == "SyncBN":
        # Not in the recipe: over one process both take their statistics from the same images.
        yield "one process on the CPU: synchronised batch norm is plain batch norm there"
