"""Semantic segmentation by real MMSegmentation: its models, pipelines, Runner and IoU metric.

What this file adds is what a comparison needs and MMSegmentation leaves to its user: configs that stand on the
installed ones, a data root a run, the linear rule stated before the start, proof that the backbone's weights really
arrived (mmengine only prints a warning), curves, pictures, and one sentence for everything that goes wrong.
"""

from __future__ import annotations

import functools
import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmseg
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint
from mmseg.utils import register_all_modules
from torch import Tensor, nn

from contracts.config import parse_override
from contracts.errors import UsageError, UserError, did_you_mean
from contracts.images import read_image
from contracts.progress import Progress
from transfer.curves import Curves
from transfer.evaluation import CURVES, Resolved, collect, leave, require_finished
from transfer.failures import guard, raise_failure
from transfer.overrides import Tree, departures, recorded, refuse_option
from transfer.pictures import colour_of, draw_classes, save_pair
from transfer.preflight import read_sample, voc_folder
from transfer.quiet import frameworks_quiet
from transfer.request import Request
from transfer.result import EngineResult
from transfer.scaling import (
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

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "mmseg"
# Where the installed MMSegmentation keeps its own configs; ours name it in `_base_` through this variable.
BASES_VARIABLE = "MMSEG_CONFIGS"
PICTURES = 4

_METRICS = {"miou_percent": "mIoU", "macc_percent": "mAcc", "aacc_percent": "aAcc"}
KNOB = "train_dataloader.batch_size and optim_wrapper.optimizer.lr by one factor and raise iterations by it"
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
# Of a model and its backbone, what belongs to the weights and not to the protocol.
_OF_THE_WEIGHTS = ("data_preprocessor", "pretrained")
_OF_A_BACKBONE = ("init_cfg", "pretrained", "style")


# ---------------------------------------------------------------------------------------------------------------------
# The config


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
            published, planned, rule=rule, processes=request.processes, gpus=request.gpus, reference=reference
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
    sample = read_sample(request.data)
    kind: dict[str, Any] = {}
    if "cityscapes" in request.protocol.data:
        root = request.data / "cityscapes"
    else:
        root = voc_folder(request.data, 2012)
        if sample is not None:
            classes = ["background", *sample["classes"]]
            # The sample's classes are none of VOC's, and PascalVOCDataset insists on its own names.
            names = {"classes": classes, "palette": [colour_of(index) for index in range(len(classes))]}
            kind = {"type": "BaseSegDataset", "img_suffix": ".jpg", "seg_map_suffix": ".png", "metainfo": names}
            for head in (config.model.decode_head, config.model.auxiliary_head):
                if head is not None:
                    head.num_classes = len(classes)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(root)
        loader.dataset.update(kind)


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
            known = (
                node.keys()
                if isinstance(node, dict)
                else [str(i) for i in range(len(node))]
                if isinstance(node, (list, tuple))
                else ()
            )
            raise UsageError(
                f'The MMSegmentation config has no key {".".join(keys[: depth + 1])} (in "{override}").'
                f"{did_you_mean(key, map(str, known))}"
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


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run(request: Request, resolved: Resolved) -> EngineResult:
    """Train and evaluate by `resolved`; files go to `request.output`.

    Raises:
        UserError: memory ran out, a worker died, the data or the weights are not what they should be.
    """
    resolved.config.dump(request.output / "config.py")
    with raise_failure(request.output):
        if request.processes == 1:
            _worker(0, request, None)
        else:
            address = request.controls.master or f"127.0.0.1:{_free_port()}"
            torch.multiprocessing.start_processes(_worker, args=(request, address), nprocs=request.gpus)
    return collect(request, resolved)


def _worker(local_rank: int, request: Request, address: str | None) -> None:
    """One process of the run; with an address, it joins the others as mmengine's "pytorch" launcher expects."""
    if address is not None:
        host, _, port = address.rpartition(":")
        os.environ.update(
            RANK=str(request.controls.node_rank * request.gpus + local_rank),
            LOCAL_RANK=str(local_rank),
            LOCAL_WORLD_SIZE=str(request.gpus),
            WORLD_SIZE=str(request.processes),
            MASTER_ADDR=host,
            MASTER_PORT=port,
        )
    with guard(request.output, knob=KNOB), frameworks_quiet():
        register_all_modules(init_default_scope=False)
        init_default_scope("mmseg")
        config = Config.fromfile(request.output / "config.py")
        last = _last_checkpoint(request.output) if request.resume or request.eval_only else None
        if request.eval_only:
            done = 0 if last is None else int(last.stem.rpartition("_")[2])  # mmengine's iter_120.pth
            require_finished(request.output, done=done, of=config.train_cfg.max_iters)
        config.resume = last is not None and not request.eval_only
        config.load_from = None if last is None else str(last)
        runner = _Runner.from_cfg(config)
        watch = _Watch(request, continued=last is not None)
        # Before the scheduler moves lr on and before the checkpoint: a kill then loses no line of the curves.
        runner.register_hook(watch, priority="BELOW_NORMAL")
        try:
            if request.eval_only:
                runner.val()
            else:
                runner.train()
                if not watch.metrics:  # a finished run that is resumed has no iteration left, so no evaluation ran
                    runner.val()
        finally:
            runner.logger.handlers = []  # its terminal handler holds a stream that is closed now
        if local_rank == 0:  # one process of every node: its caller wants the result too
            train, test = runner.train_dataloader.dataset, runner.val_dataloader.dataset
            media = _draw(runner, request.output)
            leave(
                request.output,
                _metrics(watch.metrics),
                images={"train": len(train), "test": len(test)},
                media=media,
                notes=(),
            )


def _last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of the run in `output`, None before the first.

    mmengine notes its whole path, which after the folder was moved or copied is another run's, or nobody's.

    Raises:
        UserError: the file that is noted is not in the folder.
    """
    noted = find_latest_checkpoint(str(output))
    if noted is None:
        return None
    file = output / Path(noted).name
    if not file.is_file():
        raise UserError(f"{output} holds no {file.name}, its newest checkpoint: put it back, or start in a new folder.")
    return file


class _Runner(Runner):
    """mmengine's Runner with its log at `log.txt` in the run folder, and on the device that was asked for."""

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        return super().build_logger(log_level, log_file or str(Path(self.work_dir) / "log.txt"), **kwargs)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        # mmengine moves every model to the GPU it sees; a run that asked for the CPU stays there.
        return model if self.cfg.device == "cpu" else super().wrap_model(model_wrapper_cfg, model)


class _Watch(Hook):
    """Proof before the first iteration, curves and progress during, the metrics of the last evaluation after."""

    def __init__(self, request: Request, *, continued: bool) -> None:
        self.request, self.continued = request, continued
        self.metrics: dict[str, float] = {}
        self._curves: Curves | None = None
        self._progress: Progress | None = None

    def before_train(self, runner: Runner) -> None:
        if not self.continued:
            prove_loaded(_bare(runner.model).backbone, self.request.weights)
        self._every = runner.cfg.default_hooks.logger.interval
        if is_main_process():
            self._curves = Curves(self.request.output / CURVES, start=runner.iter)
            self._progress = Progress("train", total=runner.max_iters, unit="step", start=runner.iter).__enter__()

    def after_train_iter(self, runner: Runner, *, outputs: dict[str, Tensor], **_: Any) -> None:
        if self._progress is None or self._curves is None:
            return
        done = runner.iter + 1
        if done % self._every == 0 or done == runner.max_iters:
            values = {name: float(value.detach()) for name, value in outputs.items() if "loss" in name}
            if not math.isfinite(values.get("loss", 0.0)):
                raise FloatingPointError(f"loss {values['loss']} at iteration {done}")
            self._curves.add(done, {**values, "lr": runner.optim_wrapper.get_lr()["lr"][0]})
            self._progress.advance(done - self._progress.done, loss=values.get("loss", math.nan))
        if done == runner.max_iters:  # the evaluation that follows shows its own
            self._progress.__exit__(None, None, None)
            self._progress = None

    def after_train(self, _runner: Runner) -> None:
        if self._curves is not None:
            self._curves.close()

    def before_val_epoch(self, runner: Runner) -> None:
        quiet = not is_main_process() or self._progress is not None
        total = len(runner.val_dataloader)
        self._evaluation = Progress("evaluate", total=total, unit="image", quiet=quiet).__enter__()

    def after_val_iter(self, _runner: Runner, **_: Any) -> None:
        self._evaluation.advance()

    def after_val_epoch(self, _runner: Runner, *, metrics: dict[str, float]) -> None:
        self._evaluation.__exit__(None, None, None)
        self.metrics = dict(metrics)


# ---------------------------------------------------------------------------------------------------------------------
# Proof, metrics, pictures


def prove_loaded(backbone: nn.Module, weights: Path) -> None:
    """`backbone` holds exactly the tensors of the weights file, bit for bit.

    Raises:
        UserError: mmengine skipped something (it would only print).
    """
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("backbone."): t for name, t in loaded.get("state_dict", loaded).items()}
    counters = "num_batches_tracked"
    state = {k: v for k, v in backbone.state_dict().items() if not k.endswith(counters)}
    given = {k: v for k, v in tensors.items() if not k.endswith(counters)}
    wrong = sorted(k for k in given if k not in state or not torch.equal(state[k].cpu(), given[k]))
    random = sorted(state.keys() - given.keys())
    if wrong or random:
        raise UserError(
            f"MMSegmentation did not take the weights: {len(wrong)} tensors of {weights} are not in the model, "
            f"{len(random)} of the backbone's {len(state)} were left at random (first: {(wrong or random)[0]}); "
            "convert them again."
        )


def _metrics(measured: dict[str, float]) -> dict[str, float]:
    metrics = {}
    for name, key in _METRICS.items():
        value = float(measured[key])
        if not math.isfinite(value):
            raise UserError(
                f"{key} is {value}: no labelled pixel was evaluated; `twist data check` looks at the masks."
            )
        metrics[name] = round(value, 4)  # two decimals, gathered as float32 over several processes
    return metrics


def _draw(runner: Runner, output: Path) -> list[Path]:
    """Truth and prediction of the first images of the validation set."""
    model = _bare(runner.model).eval()
    dataset = runner.val_dataloader.dataset
    paths = []
    for number in range(min(PICTURES, len(dataset))):
        item = dataset[number]
        with torch.no_grad():
            (found,) = model.test_step({"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]})
        image = read_image(found.img_path).permute(1, 2, 0).numpy()
        truth, prediction = (
            np.asarray(part.data[0].cpu()) for part in (item["data_samples"].gt_sem_seg, found.pred_sem_seg)
        )
        path = output / f"prediction-{number + 1}.png"
        paths.append(save_pair(draw_classes(image, truth), draw_classes(image, prediction), path))
    return paths


def _bare(model: nn.Module) -> Any:
    return model.module if is_model_wrapper(model) else model


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
