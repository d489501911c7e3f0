"""TWIST pretraining: one loop of named steps. Read this file first, then `loss.py`.

    views of a batch ─▶ backbone ─▶ head ─▶ logits (V, B, K) ─▶ loss ─▶ gradient ─▶ LARS ─▶ (teacher)

Stage one maximises the mutual information between views and predicted classes; in stage two, when the recipe has one,
confident images label themselves. A run can be killed at any step and continues bit by bit: everything random is a pure
function of (seed, step), so a checkpoint holds tensors and a position, no generators.

Shapes: `B` images a rank, `V` views, `K` classes.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twist.contracts.errors import UserError
from twist.contracts.machine import code_sha256
from twist.contracts.progress import is_quiet
from twist.contracts.ranks import require_equal
from twist.contracts.run_folder import locked
from twist.pretrain import checkpoint, distributed
from twist.pretrain.config import LossConfig, PretrainConfig
from twist.pretrain.data.loader import ViewLoader
from twist.pretrain.data.source import Images, open_images
from twist.pretrain.data.views import Stage
from twist.pretrain.loss import Loss, self_label_loss, teacher_loss, twist_loss
from twist.pretrain.model import in_layout
from twist.pretrain.monitor import draw_curves
from twist.pretrain.online_eval import open_data
from twist.pretrain.plan import Plan, autocast
from twist.pretrain.run import Run, say
from twist.pretrain.slurm import Requeue, StopFlag, end_with_torchrun, refuse_bare_tasks, stop_flag

__all__ = ["Requeue", "pretrain"]

# What may be another on each machine of a run: where the files lie, and how fast they come.
PLACES: dict[str, set[str]] = {"data": {"root", "workers"}, "run": {"online_eval_root", "warm_start"}}
# The rooms whose code trains.
ROOMS = ("contracts", "measure", "catalog", "pretrain")


def pretrain(config: PretrainConfig, *, output: Path, resume: bool = False) -> Path:
    """Run `config` in the folder `output`, as one rank or as one of torchrun's; returns backbone.safetensors.

    `resume` continues from the newest valid checkpoint in `output`; with none there, it starts and says so. A restart
    by torchrun (--max-restarts) always resumes. `Requeue` when a signal asked to stop: the state is saved then.
    `UserError` for a folder, images or numbers that do not fit, and for losses that stay non-finite.
    """
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    refuse_bare_tasks()
    end_with_torchrun()
    with contextlib.ExitStack() as stack:
        # First: a rank that ended at a signal while the others wait for it to join would keep them waiting.
        stop = stack.enter_context(stop_flag())
        device = stack.enter_context(distributed.process_group(config.run.device))
        stack.enter_context(_reproducible(config, device))
        loader, plan = _plan(config, device=device)  # before the folder: a run that cannot start leaves nothing behind
        stack.enter_context(contextlib.closing(loader))
        distributed.on_main_rank(lambda: _take_folder(stack, output, config, resume=resume))
        run = Run(config, plan, output, device=device)
        run.restore(asked=resume)
        if distributed.rank() == 0:
            text = plan.render()
            (output / "plan.txt").write_text(text)
            say("\n".join(plan.warnings() if is_quiet() or run.position.steps else [text, *plan.warnings()]))
        result = _train(run, loader, stop)
    if distributed.rank() == 0:
        _show_result(run)
    return result


def print_plan(config: PretrainConfig) -> None:
    """Print what a run of `config` in these processes would do; nothing is written."""
    with distributed.process_group(config.run.device) as device:
        loader, plan = _plan(config, device=device)
        loader.close()
    if distributed.rank() == 0:
        print(plan.render(), *plan.warnings(), sep="\n")


def _train(run: Run, loader: ViewLoader, stop: StopFlag) -> Path:
    config, student = run.config, distributed.data_parallel(run.student, run.device)
    with run.reporting(stop):
        for epoch in range(run.position.epoch, config.run.epochs):
            for batch in loader.epoch(epoch, stage=run.plan.stage(epoch), start_sample=run.position.samples):
                now = run.begin_step(epoch)
                views = in_layout(batch.views, config)
                with autocast(run.device, config.run.precision):
                    logits = student(views)  # (V, B, K)
                    teacher_logits = run.teacher_logits(views)  # (2, B, K)
                    loss = objective(logits, teacher_logits, config.loss, stage=now.stage, quantile=now.quantile)
                gradient_norm = run.learn(loss.total)
                run.update_teacher(now.teacher_momentum)
                run.after_step(now, batch, logits, loss, gradient_norm)
            run.after_epoch(epoch)
    return run.export()


def objective(
    logits: Tensor, teacher_logits: Tensor | None, weights: LossConfig, *, stage: Stage, quantile: float
) -> Loss:
    """The loss of a batch from logits (V, B, K) and the teacher's (2, B, K); float32 whatever the precision."""
    if stage == "self_label":
        return self_label_loss(logits, quantile=quantile, teacher=teacher_logits)
    if teacher_logits is None:
        return twist_loss(logits, weights, mean_over_ranks=distributed.mean_over_ranks)
    return teacher_loss(logits, teacher_logits, weights, mean_over_ranks=distributed.mean_over_ranks)


def _plan(config: PretrainConfig, *, device: torch.device) -> tuple[ViewLoader, Plan]:
    """The loader, and the numbers that follow from images and ranks; `UserError` when they do not fit together."""
    opened: list[Images] = []

    def describe() -> dict[str, Any]:
        images = open_images(config.data)
        opened.append(images)
        if config.run.online_eval_root is not None:  # before hours of training, not after
            open_data(config.run.online_eval_root)
        refuse_held_out(config)
        code = {"torch": torch.__version__, "twist": code_sha256(*ROOMS)}
        settings = config.model_dump(mode="json", exclude=PLACES)
        return {"images": len(images), "names_sha256": images.order, "code": code, **settings}

    require_equal(describe)
    (images,) = opened
    rank, ranks = distributed.rank(), distributed.world_size()
    say("\n".join(images.remarks))
    loader = ViewLoader(images, config, rank=rank, world_size=ranks, device=device)
    return loader, Plan(
        config,
        images=len(images),
        world_size=ranks,
        device=device,
        images_sha256=distributed.on_main_rank(images.fingerprint),
        names_sha256=images.order,
    )


def refuse_held_out(config: PretrainConfig) -> None:
    """`UserError` where the folder to train on contains labelled validation images, its own or online evaluation's."""
    if config.data.format != "folder":  # a list says itself which images it means
        return
    root = Path(config.data.root).resolve()
    trees = [root, root / "imagenet"]
    if config.run.online_eval_root is not None:
        trees += [Path(config.run.online_eval_root).resolve() / part for part in ("", "imagenet")]
    for tree in trees:
        train, val = tree / "train", tree / "val"
        if train.is_dir() and val.is_dir() and (val == root or root in val.parents):
            raise UserError(
                f"data.root = {config.data.root} contains {val}, on which backbones are measured: pass "
                f'data.root={train}; to train on all of them, name them in a list (data.format="list").'
            )


def _take_folder(stack: contextlib.ExitStack, output: Path, config: PretrainConfig, *, resume: bool) -> None:
    checkpoint.refuse_foreign(output, type(config))
    start = config.run.warm_start
    if start is not None and not Path(start).is_file() and not any(output.glob("checkpoints/step_*.json")):
        raise UserError(f"There is no checkpoint at {start}: check run.warm_start.")
    stack.enter_context(locked(output))
    checkpoint.prepare(output, config, resume=resume)


def _show_result(run: Run) -> None:
    try:
        picture = draw_curves(run.output, classes=run.config.model.classes)
        say(f"How it went: {picture}, and step by step `tensorboard --logdir {run.output / 'tensorboard'}`.")
    except (OSError, ImportError) as error:  # the result is there; a picture is not worth a failed run
        say(f"There is no picture of the curves: {getattr(error, 'strerror', None) or error}.")
    name = "backbone.safetensors" if run.teacher is None else "teacher_backbone.safetensors"
    say(f"The backbone to evaluate is {run.output / name}: `twist convert` and `twist transfer` take it.")


@contextlib.contextmanager
def _reproducible(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """With `run.deterministic`, torch's deterministic algorithms for the time of the run; else its fastest ones."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.run.deterministic and device.type == "cuda"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
