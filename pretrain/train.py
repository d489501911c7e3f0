"""TWIST pretraining: one loop of named steps. Read this file first, then `loss.py`.

    views of a batch ─▶ backbone ─▶ head ─▶ logits (V, B, K) ─▶ loss ─▶ gradient ─▶ LARS ─▶ (teacher)

Stage one maximises the mutual information between views and predicted classes (`loss.py`); in stage two, when the
recipe has one, confident images label themselves (`self_label.py`). A run can be killed at any step and goes on bit by
bit: everything random is a pure function of (seed, step), so a checkpoint holds tensors and a position, no generators.

Shapes: `B` images a rank, `V` views, `K` classes, `W` ranks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twist.contracts.errors import UserError
from twist.pretrain import distributed, run_folder
from twist.pretrain.checkpoint import Position
from twist.pretrain.config import PretrainConfig
from twist.pretrain.curves_picture import draw_curves
from twist.pretrain.data.loader import ViewLoader, open_images
from twist.pretrain.data.source import fingerprint_of, order_of
from twist.pretrain.data.views import Stage
from twist.pretrain.loss import teacher_loss, twist_loss
from twist.pretrain.model import Twist, update_teacher
from twist.pretrain.monitor import Monitor, StepNote, observe
from twist.pretrain.online_eval import evaluate, labelled
from twist.pretrain.optim import set_rates
from twist.pretrain.plan import Plan, resolve
from twist.pretrain.precision import autocast
from twist.pretrain.run import Run, say, teacher_path
from twist.pretrain.self_label import self_label_loss
from twist.pretrain.signals import Requeue, StopFlag, stop_flag

__all__ = ["Requeue", "pretrain"]


def pretrain(config: PretrainConfig, *, output: Path, resume: bool = False) -> Path:
    """Run `config` in the folder `output`, as one rank or as one of torchrun's; returns backbone.safetensors.

    Args:
        resume: go on from the newest valid checkpoint in `output`; with none there, start and say so. A restart by
            torchrun (--max-restarts) resumes by itself.

    Raises:
        UserError: the folder is another run's or in use, there are too few or too many bad images, the numbers do not
            divide, losses stay non-finite, or predictions collapse with `run.on_collapse = "stop"`.
        Requeue: a signal asked to stop; the state is saved.
    """
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(distributed.process_group(config.run.device))
        stack.enter_context(_reproducible(config, device))
        stop = stack.enter_context(stop_flag())
        loader, plan = _plan(config, device=device)  # before the folder: what cannot run leaves nothing behind
        stack.enter_context(contextlib.closing(loader))
        distributed.on_main_rank(lambda: _take_folder(stack, output, config, resume=resume))
        run = Run.build(config, plan, output, device=device)
        run.restore(asked=resume)
        result = _train(config, plan, loader, run, stop=stop)
    if distributed.rank() == 0:
        _show_curves(output, config)
        if run.teacher is None:
            say(f"The backbone is {result}: `twist convert` and `twist transfer` take it from there.")
        else:
            say(
                f"The teacher's backbone is {teacher_path(output)}, the one to evaluate; the student's is {result}: "
                "`twist convert` and `twist transfer` take it from there."
            )
    return result


def _train(config: PretrainConfig, plan: Plan, loader: ViewLoader, run: Run, *, stop: StopFlag) -> Path:
    schedule, output, device = plan.schedule, run.output, run.device
    _announce(plan, output, run.position)
    model = distributed.data_parallel(run.student, device)
    vote = distributed.Vote()

    with _monitor(config, output, schedule.steps, run.position) as monitor:
        before = run.position.epoch - 1
        # A run that was killed while it evaluated has the checkpoint of that epoch's end, and no evaluation of it.
        if run.position.samples == 0 and _is_evaluated(before, config) and not monitor.has_evaluation(before):
            monitor.note_evaluation(evaluate(run.student, config, device=device), epoch=before)
        for epoch in range(run.position.epoch, config.run.epochs):
            stage = _stage(config, epoch)
            for batch in loader.epoch(epoch, stage=stage, start_sample=run.position.samples):
                step = epoch * plan.steps_per_epoch + run.position.samples // plan.total_batch
                lr = schedule.learning_rate(step)
                quantile = schedule.self_label_quantile(step) if stage == "self_label" else 0.0
                seed = _step_seed(config.run.seed, step)
                set_rates(run.optimizer, lr=lr, weight_decay=schedule.weight_decay(step))
                torch.manual_seed(seed)  # drop path, the only thing random in the network

                views = in_layout(batch.views, config)
                with autocast(device, config.run.precision):
                    loss = objective(model, run.teacher, views, config=config, stage=stage, quantile=quantile)
                gradient_norm = run.learn(loss.total)
                if run.teacher is not None:  # also after a skipped step: the student is finite, and what it was
                    update_teacher(run.teacher, run.student, momentum=schedule.teacher_momentum(step))

                monitor.note(
                    StepNote(
                        run.position.steps, epoch, stage, lr, config.run.batch_size, batch.data_wait_s, batch.bad_images
                    ),
                    observe(
                        loss.logits,
                        {
                            **loss.terms,
                            "gradient_norm": gradient_norm,
                            "nonfinite_steps": run.guard.total,
                            "nonfinite_streak": run.guard.streak,
                        },
                    ),
                )
                run.advance(epoch)
                stopping = vote.any(stop.raised)
                saving = stopping or run.is_due()
                # The epoch's end waits for the device anyway.
                waiting = saving or (step + 1) % plan.steps_per_epoch == 0
                if waiting or run.position.steps % config.run.log_every_steps == 0:
                    _heed(monitor.flush() if waiting else monitor.pass_on(), config)
                    if monitor.nonfinite_streak >= config.run.max_nonfinite_steps:
                        run.stop_if_nonfinite(batch, views, stage=stage, quantile=quantile, seed=seed)
                if saving:
                    run.save()
                if stopping:
                    vote.close()
                    distributed.barrier()
                    raise Requeue(
                        f"Stopped by a signal after step {run.position.steps}; the state is saved. Start the same "
                        "command with --resume to go on."
                    )

            # After a resume on other ranks, an epoch may end where its steps do not say so.
            _heed(monitor.flush(), config)
            run.end_epoch(epoch)
            if _is_last(epoch, config) or (epoch + 1) % config.run.checkpoint_every_epochs == 0:
                run.save()
            if _is_evaluated(epoch, config):
                monitor.note_evaluation(evaluate(run.student, config, device=device), epoch=epoch)
        vote.close()
    return run.export()


class Loss(NamedTuple):
    """What a step minimises, what it is made of (scalars by name), and the logits (V, B, K) it was computed from."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


def objective(
    model: nn.Module,
    teacher: Twist | None,
    views: Sequence[Tensor],
    *,
    config: PretrainConfig,
    stage: Stage,
    quantile: float,
) -> Loss:
    """Forward pass and loss of one batch of views, in the given stage. The loss is float32 whatever the precision."""
    logits = model(views)  # (V, B, K)
    with torch.no_grad():
        teacher_logits = None if teacher is None else teacher(views[:1])  # (2, B, K)
    if stage == "self_label":
        total, threshold = self_label_loss(logits, quantile=quantile, teacher=teacher_logits)
        return Loss(total, {"total": total, "self_label_threshold": threshold}, logits)
    weights = {**config.loss.model_dump(), "mean_over_ranks": distributed.mean_over_ranks}
    terms = twist_loss(logits, **weights) if teacher_logits is None else teacher_loss(logits, teacher_logits, **weights)
    return Loss(terms.total, terms._asdict(), logits)


def _plan(config: PretrainConfig, *, device: torch.device) -> tuple[ViewLoader, Plan]:
    """The loader, and the numbers that follow from images and ranks; `UserError` when they do not go together."""
    images = open_images(config.data)
    if config.run.online_eval_root is not None:  # before hours of training, not after
        labelled(Path(config.run.online_eval_root))
    loader = ViewLoader(
        images,
        config.views,
        batch_size=config.run.batch_size,
        seed=config.run.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=config.data.workers,
        pipeline=config.data.pipeline,
        device=device,
        bad_image_share=config.data.bad_image_share,
    )
    return loader, resolve(
        config,
        images=len(images),
        images_sha256=distributed.on_main_rank(lambda: fingerprint_of(images)),
        names_sha256=order_of(images),
        world_size=distributed.world_size(),
        device=device,
    )


def _show_curves(output: Path, config: PretrainConfig) -> None:
    try:
        picture = draw_curves(output, classes=config.model.classes)
    except (OSError, ImportError) as error:  # the result is there; a picture is not worth a failed run
        say(f"There is no picture of the curves: {getattr(error, 'strerror', None) or error}.")
        return
    say(f"How it went: {picture}, and step by step `tensorboard --logdir {output / 'tensorboard'}`.")


def _take_folder(stack: contextlib.ExitStack, output: Path, config: PretrainConfig, *, resume: bool) -> None:
    run_folder.refuse_foreign(output, type(config))
    start = config.run.warm_start
    if start is not None and not Path(start).is_file() and not any(output.glob("checkpoints/step_*.json")):
        raise UserError(f"There is no checkpoint at {start}: check run.warm_start.")
    stack.enter_context(run_folder.locked(output))
    run_folder.prepare(output, config, resume=resume)


def _announce(plan: Plan, output: Path, position: Position) -> None:
    if distributed.rank() == 0:
        text = plan.render()
        (output / "plan.txt").write_text(text)
        if position.steps == 0:
            say(text)
        lack = plan.lack_of_shared_memory()
        if lack is not None:
            say(lack)


def _monitor(config: PretrainConfig, output: Path, steps: int, position: Position) -> Monitor:
    return Monitor(
        output, classes=config.model.classes, steps=steps, first_step=position.steps, first_epoch=position.epoch
    )


def _heed(alarm: str | None, config: PretrainConfig) -> None:
    if alarm is None:
        return
    if config.run.on_collapse == "stop":
        raise UserError(f"{alarm} The run stops, as run.on_collapse says.")
    if distributed.rank() == 0:
        say(f"ALARM: {alarm}")


def _stage(config: PretrainConfig, epoch: int) -> Stage:
    return "mutual_information" if epoch < config.run.mutual_information_epochs else "self_label"


def _is_last(epoch: int, config: PretrainConfig) -> bool:
    """The last epoch of a stage: of the run, or the one before the crops and the loss change."""
    return epoch + 1 in (config.run.mutual_information_epochs, config.run.epochs)


def _is_evaluated(epoch: int, config: PretrainConfig) -> bool:
    if config.run.online_eval_root is None or epoch < 0:
        return False
    return _is_last(epoch, config) or (epoch + 1) % config.run.online_eval_every_epochs == 0


def _step_seed(seed: int, step: int) -> int:
    """A seed for each (seed, rank, step); spread by the constants of SplitMix64, so near steps are not alike."""
    value = (seed * 0x9E3779B97F4A7C15 + distributed.rank() * 0xBF58476D1CE4E5B9 + step) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 27)) & 0x7FFFFFFFFFFFFFFF


def in_layout(views: Sequence[Tensor], config: PretrainConfig) -> list[Tensor]:
    """The views in the memory layout the networks have."""
    layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
    return [view.contiguous(memory_format=layout) for view in views]


@contextlib.contextmanager
def _reproducible(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """With `run.deterministic`, torch's deterministic algorithms for the time of the run; else its fastest ones."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if config.run.deterministic:
        # cuBLAS reads it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.run.deterministic and device.type == "cuda"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
