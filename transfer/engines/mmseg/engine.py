"""Semantic segmentation by real MMSegmentation: its models, pipelines, Runner and IoU metric.

What this file adds is what a comparison needs and MMSegmentation leaves to its user: configs that stand on the
installed ones, a data root a run, the linear rule stated before the start, proof that the backbone's weights really
arrived (mmengine only prints a warning), curves, pictures, and one sentence for everything that goes wrong.
"""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint
from mmseg.utils import register_all_modules
from torch import Tensor, nn

from twist.contracts.errors import UserError
from twist.contracts.failures import explained, raise_reported
from twist.contracts.progress import Progress
from twist.transfer.curves import Curves
from twist.transfer.engines.mmseg.config import resolve
from twist.transfer.engines.mmseg.outcome import bare, draw, metrics_of, prove_loaded
from twist.transfer.evaluation import CURVES, Resolved, collect, leave, require_finished
from twist.transfer.quiet import frameworks_quiet
from twist.transfer.request import Request
from twist.transfer.result import EngineResult

__all__ = ["resolve", "run"]
MEMORY = (
    "lower train_dataloader.batch_size and optim_wrapper.optimizer.lr by one factor and raise iterations by it, "
    "or use more GPUs with keep_batch=true"
)


def run(request: Request, resolved: Resolved) -> EngineResult:
    """Train and evaluate by `resolved`; files go to `request.output`.

    Raises:
        UserError: memory ran out, a worker died, the data or the weights are not what they should be.
    """
    resolved.config.dump(request.output / "config.py")
    with raise_reported(request.output):
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
    with explained(report=request.output, memory=MEMORY), frameworks_quiet():
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
            media = draw(runner, request.output)
            leave(
                request.output,
                metrics_of(watch.metrics),
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
            prove_loaded(bare(runner.model).backbone, self.request.weights)
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
