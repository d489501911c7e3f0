"""Semantic segmentation by real MMSegmentation: its models, pipelines, Runner, IoU metric and visualiser.

Added is what a comparison needs: a data root a run, proof that the backbone's weights arrived, curves and pictures.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from mmseg.visualization import SegLocalVisualizer
from PIL import Image
from torch import Tensor, nn
from torch.distributed.elastic.utils.distributed import get_free_port

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.failures import explained
from twist.contracts.progress import Progress
from twist.contracts.trackers import Logger
from twist.converters.open import as_torch, read_contents
from twist.transfer.engines import framework
from twist.transfer.engines.framework import TrainingLog, collect, frameworks_quiet
from twist.transfer.engines.mmseg.config import resolve
from twist.transfer.pictures import PANEL_PIXELS, save_pairs
from twist.transfer.predict import Picture
from twist.transfer.request import Request, Resolved, Result, Weights

__all__ = ["resolve", "run"]
NEEDS_LESS = (
    "lower train_dataloader.batch_size and optim_wrapper.optimizer.lr by one factor and raise iterations by it, or use "
    "more GPUs with keep_batch=true"
)
_METRICS = {"miou_percent": "mIoU", "macc_percent": "mAcc", "aacc_percent": "aAcc"}


def run(request: Request, weights: Weights, resolved: Resolved) -> Result:
    """Train and evaluate by `resolved`; files go to `request.output`. `UserError` for what is nobody's bug."""
    resolved.config.dump(request.output / "config.py")
    if request.own is not None and request.leads:
        for role, pairs in (request.own.pairs or {}).items():  # every process and a continued run read the same
            listed = [[str(pair.image), str(pair.mask)] for pair in pairs]
            files.write_json(request.output / "data" / f"own_{role}.json", listed)
    with framework.processes_of(request, "iter") as given:
        if request.processes == 1:
            _worker(0, given, weights.file, None)
        else:
            address = request.controls.master or f"127.0.0.1:{get_free_port()}"
            arguments = (given, weights.file, address)
            torch.multiprocessing.start_processes(_worker, args=arguments, nprocs=request.gpus)
    return collect(request, resolved)


def _worker(local_rank: int, request: Request, weights: Path | None, address: str | None) -> None:
    """One process of the run; with an address, it joins the others as mmengine's "pytorch" launcher expects."""
    if address is not None:
        host, _, port = address.rpartition(":")
        rank = request.controls.node_rank * request.gpus + local_rank
        ranks = {"RANK": rank, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": request.gpus}
        ranks |= {"WORLD_SIZE": request.processes}
        os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR=host, MASTER_PORT=port)
    with explained(report=request.output, memory=NEEDS_LESS), frameworks_quiet():
        config = _registered(request.output)
        last = last_checkpoint(request.output) if request.resume or request.eval_only else None
        if request.eval_only:
            done = 0 if last is None else int(last.stem.rpartition("_")[2])  # mmengine's iter_120.pth
            framework.require_finished(request.output, done=done, of=config.train_cfg.max_iters)
        config.resume = last is not None and not request.eval_only
        config.load_from = None if last is None else str(last)
        runner = _Runner.from_cfg(config)
        framework.require_one_run(request)
        watch = _Watch(request.output, None if last else weights, request.controls.logger)
        # Before the scheduler moves lr on and before the checkpoint: a kill then loses no line of the curves.
        runner.register_hook(watch, priority="BELOW_NORMAL")
        try:
            if not request.eval_only:
                runner.train()
            if not watch.metrics:  # nothing was to be trained, here or in a finished run that is resumed
                runner.val()
        finally:
            runner.logger.handlers = []  # its terminal handler holds a stream that is closed now
        if local_rank == 0:  # one process of every node: its caller wants the result too
            train, test = runner.train_dataloader.dataset, runner.val_dataloader.dataset
            media = save_pairs(request.output, draw(bare(runner.model), test))
            images = {"train": len(train), "test": len(test)}
            framework.leave(request.output, metrics=metrics_of(watch.metrics), images=images, media=media)


def _registered(output: Path) -> Config:
    """The config of the run in `output`, with everything that it may name."""
    register_all_modules(init_default_scope=False)
    init_default_scope("mmseg")
    return Config.fromfile(output / "config.py")


def prove_loaded(backbone: nn.Module, weights: Path) -> str:
    """`backbone` holds exactly the tensors of the weights file, bit for bit; their digest."""
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("backbone."): t for name, t in loaded.get("state_dict", loaded).items()}
    state = backbone.state_dict()
    return framework.prove_loaded("MMSegmentation", tensors, state, expected=set(state))


def metrics_of(measured: dict[str, float]) -> dict[str, float]:
    """mmseg's IoU metric under the names of `twist.contracts.metrics`."""
    metrics = {name: float(measured[key]) for name, key in _METRICS.items()}
    if not all(map(math.isfinite, metrics.values())):
        raise UserError(f"{metrics}: no labelled pixel was evaluated; `twist data check` looks at the masks.")
    return {name: round(value, 4) for name, value in metrics.items()}  # two decimals, gathered as float32 over ranks


@torch.no_grad()
def draw(model: Any, dataset: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Truth and prediction of the images of the validation set."""
    names = {"classes": dataset.metainfo["classes"], "palette": dataset.metainfo["palette"]}
    model.eval()
    for item in dataset:
        found = _test(model, item)
        image = mmcv.imread(found.img_path, channel_order="rgb")
        image = mmcv.imrescale(image, (PANEL_PIXELS, PANEL_PIXELS))  # so that the names of classes can be read
        truth, prediction = item["data_samples"].gt_sem_seg, found.pred_sem_seg
        yield drawn(image, truth.data, names), drawn(image, prediction.data, names)


def _test(model: Any, item: dict[str, Any]) -> Any:
    (found,) = model.test_step({"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]})
    return found


def drawn(image: np.ndarray, classes: Tensor, names: dict[str, Any]) -> np.ndarray:
    """`image` (H, W, 3) RGB with the `classes` (1, h, w) of its parts over it; `names` are mmseg's classes, palette."""
    map_ = torch.nn.functional.interpolate(classes[None].float().cpu(), image.shape[:2], mode="nearest")
    return SegLocalVisualizer(alpha=0.5)._draw_sem_seg(image, PixelData(data=map_[0].long()), **names)


def bare(model: nn.Module) -> Any:
    return model.module if is_model_wrapper(model) else model


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of the run in `output`, None before the first; `UserError` when it is not there."""
    # mmengine notes its whole path, which after the folder was moved or copied is another run's, or nobody's.
    noted = find_latest_checkpoint(str(output))
    file = output / Path(noted).name if noted else None
    if file is not None and not file.is_file():
        raise UserError(f"{output} holds no {file.name}, its newest checkpoint: put it back, or start in a new folder.")
    return file


class _Runner(Runner):
    """mmengine's Runner on the device that was asked for, with its log at `log.txt`, and a manifest a checkpoint."""

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        return super().build_logger(log_level, log_file or str(Path(self.work_dir) / "log.txt"), **kwargs)

    def save_checkpoint(self, out_dir: str, filename: str, *arguments: Any, **settings: Any) -> None:
        super().save_checkpoint(out_dir, filename, *arguments, **settings)
        if is_main_process():
            framework.seal(Path(out_dir) / filename)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        # mmengine moves every model to the GPU it sees; a run that asked for the CPU stays there.
        return model if self.cfg.device == "cpu" else super().wrap_model(model_wrapper_cfg, model)


class _Watch(Hook):
    """Proof before the first iteration, curves and progress during, the metrics of the last evaluation after."""

    def __init__(self, output: Path, weights: Path | None, logger: Logger | None = None) -> None:
        """`weights` are proven to be there before the first iteration, None in a run that continues."""
        self._output, self._weights, self._logger = output, weights, logger
        self.metrics: dict[str, float] = {}
        self._log: TrainingLog | None = None

    def before_train(self, runner: Runner) -> None:
        if self._weights is not None:
            digests = all_gather_object(prove_loaded(bare(runner.model).backbone, self._weights))
            framework.agree(self._output, digests, leads=is_main_process())
        if is_main_process():
            self._log = TrainingLog(self._output, start=runner.iter, total=runner.max_iters, logger=self._logger)

    def after_train_iter(self, runner: Runner, *, outputs: dict[str, Tensor], **_: Any) -> None:
        def values() -> dict[str, float]:
            losses = {name: float(value.detach()) for name, value in outputs.items() if "loss" in name}
            return {**losses, "lr": runner.optim_wrapper.get_lr()["lr"][0]}

        if self._log is not None:
            self._log.step(runner.iter + 1, values)

    def after_train(self, _runner: Runner) -> None:
        if self._log is not None:
            self._log.close()

    def before_val_epoch(self, runner: Runner) -> None:
        # One bar at a time: an evaluation in the middle of the training stays silent.
        quiet = not is_main_process() or (self._log is not None and not self._log.finished)
        total = len(runner.val_dataloader)
        self._evaluation = Progress("evaluate", total=total, unit="image", quiet=quiet).__enter__()

    def after_val_iter(self, _runner: Runner, **_: Any) -> None:
        self._evaluation.advance()

    def after_val_epoch(self, _runner: Runner, *, metrics: dict[str, float]) -> None:
        self._evaluation.__exit__(None, None, None)
        self.metrics = dict(metrics)


@torch.no_grad()
def predict(run: Path, pictures: Iterable[Picture], output: Path) -> dict[str, Any]:
    """Classes and files of `pictures`; `<name>.png` (an index for each pixel) and `<name>-drawn.png` in `output`."""
    config = _registered(run)
    model = MODELS.build(config.model).eval()
    # mmengine's own loader falls back to unpickling whatever the file names.
    checkpoint = framework.newest_checkpoint(run, "iter") or last_checkpoint(run)
    assert checkpoint is not None, "a finished run has one"
    state = read_contents(checkpoint).value
    model.load_state_dict(as_torch(state["state_dict"]))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names = {key: list(state["meta"]["dataset_meta"][key]) for key in ("classes", "palette")}
    steps = [step for step in config.val_dataloader.dataset.pipeline if not step["type"].startswith("Load")]
    prepare = Compose([{"type": "LoadImageFromNDArray"}, *steps])
    images = []
    for name, path, pixels in pictures:
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        found = _test(model, prepare({"img": image[:, :, ::-1]})).pred_sem_seg.data
        mask = Image.fromarray(found[0].byte().cpu().numpy(), mode="P")
        mask.putpalette([value for colour in names["palette"] for value in colour])
        mask.save(output / f"{name}.png")
        enlarged = mmcv.imrescale(image, max(1.0, PANEL_PIXELS / max(image.shape[:2])))  # names can be read
        Image.fromarray(drawn(enlarged, found, names)).save(output / f"{name}-drawn.png")
        images.append({"file_name": str(path), "mask": f"{name}.png"})
    return {**names, "images": images}
