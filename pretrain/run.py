"""What a run consists of: networks, optimiser, position; how it learns, reports, stops, is saved and restored."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twist.contracts.errors import UserError
from twist.contracts.weights import Backbone, stem_of, write_backbone
from twist.pretrain import checkpoint, distributed
from twist.pretrain.checkpoint import Manifest, Position
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data.loader import Batch
from twist.pretrain.loss import Loss
from twist.pretrain.model import build_model, update_teacher, warm_start
from twist.pretrain.monitor import STREAK, Monitor, observe
from twist.pretrain.online_eval import evaluate
from twist.pretrain.optim import NonFiniteGuard, build_optimizer, set_rates
from twist.pretrain.plan import Plan, StepSettings
from twist.pretrain.slurm import Requeue, StopFlag


def say(text: str) -> None:
    """Text for the person who started the run, from rank 0."""
    if text and distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


class Run:
    """A run that can be stepped, saved and restored. `student` is trained; `teacher` is None in most recipes."""

    def __init__(self, config: PretrainConfig, plan: Plan, output: Path, *, device: torch.device) -> None:
        self.config, self.plan, self.output, self.device = config, plan, output, device
        self.student, self.teacher = build_model(config, device=device)
        self.optimizer = build_optimizer(config.optim, self.student)
        self.scaler = torch.amp.GradScaler(device.type) if plan.precision == "fp16" else None
        self.guard = NonFiniteGuard([n for n in (self.student, self.teacher) if n is not None], device=device)
        # Whatever has a state, by its name in checkpoints; the guard, which looks at the networks, is loaded last.
        self._parts: dict[str, Any] = {
            "model": self.student,
            "teacher": self.teacher,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "nonfinite": self.guard,
        }
        self.position = Position()
        self._saved: tuple[Path, int] | None = None  # the newest state that this process has written, and its step
        self._header("backbone")  # a network that could not be exported is not trained

    # --- a step -------------------------------------------------------------------------------------------------------

    def begin_step(self, epoch: int) -> StepSettings:
        """The settings of the next step, in force."""
        settings = self.plan.settings(epoch, self.position.samples)
        set_rates(self.optimizer, lr=settings.lr, weight_decay=settings.weight_decay)
        torch.manual_seed(settings.seed)  # for drop path, the only randomness in the network
        return settings

    def learn(self, loss: Tensor) -> Tensor:
        """Backward pass and update; a step with a non-finite loss or gradient changes nothing. Returns the norm."""
        self.optimizer.zero_grad()
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward(self.guard.backward_start(loss))
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)
        # GradScaler's protocol, used for every precision: the optimiser skips by a flag that stays on the device.
        self.optimizer.grad_scale, self.optimizer.found_inf = None, self.guard.settle(norm)  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        return norm

    @torch.no_grad()
    def teacher_logits(self, views: list[Tensor]) -> Tensor | None:
        """(2, B, K) of the global views, or None without a teacher."""
        return None if self.teacher is None else self.teacher(views[:1])

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student; also after a skipped step, when the student is finite and unchanged."""
        if self.teacher is not None:
            update_teacher(self.teacher, self.student, momentum=momentum)

    # --- around the steps ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reporting(self, stop: StopFlag) -> Iterator[None]:
        """Inside the `with`, steps are reported to the run's folder, and `stop` is looked at."""
        self._stop, self._vote, at = stop, distributed.Vote(), self.position
        classes, logger, steps = self.config.model.classes, self.config.run.logger, self.plan.steps
        with Monitor(
            self.output, classes=classes, steps=steps, first_step=at.steps, first_epoch=at.epoch, logger=logger
        ) as self._monitor:
            # A run that was killed while it evaluated has that epoch's checkpoint, and no evaluation of it.
            if at.epoch > 0 and not at.samples:
                self._evaluate(at.epoch - 1)
            yield
            self._vote.close()

    def after_step(
        self, settings: StepSettings, batch: Batch, logits: Tensor, loss: Loss, gradient_norm: Tensor
    ) -> None:
        """Count and report the step; save and stop where that is due: `Requeue` when a signal asked for it, `UserError`
        after too many skipped steps in a row, or when predictions collapsed and the config says to stop."""
        config = self.config.run
        skipped = {"nonfinite_steps": self.guard.total, STREAK: self.guard.streak}
        observed = observe(logits, {**loss._asdict(), "gradient_norm": gradient_norm, **skipped})
        row = {"step": self.position.steps, "epoch": settings.epoch, "stage": settings.stage, "lr": settings.lr}
        wait_s, bad = batch.data_wait_s, batch.bad_images
        self._monitor.note(row, observed, images=config.batch_size, data_wait_s=wait_s, bad_images=bad)
        self.position = Position(self.position.steps + 1, settings.epoch, self.position.samples + self.plan.total_batch)
        stopping = self._vote.any(self._stop.raised)
        every = config.checkpoint_every_steps
        saving = stopping or (every is not None and self.position.steps % every == 0)
        # The epoch's end waits for the device anyway.
        waiting = saving or (settings.step + 1) % self.plan.steps_per_epoch == 0
        if waiting or self.position.steps % config.log_every_steps == 0:
            self._heed(self._monitor.flush() if waiting else self._monitor.pass_on())
        if saving:
            self.save()
        if stopping:
            self._vote.close()
            distributed.barrier()
            ends = "; torchrun makes exit status 1 of our 75" if "TORCHELASTIC_RUN_ID" in os.environ else ""
            raise Requeue(
                f"Stopped by a signal after step {self.position.steps}; the state is saved. Start the same command "
                f"with --resume to go on{ends}."
            )

    def after_epoch(self, epoch: int) -> None:
        """Report what is left; save and evaluate where that is due."""
        # After a resume on other ranks, an epoch may end where its steps do not say so.
        self._heed(self._monitor.flush())
        self.position = Position(self.position.steps, epoch + 1, 0)
        if self._is_due(epoch, self.config.run.checkpoint_every_epochs):
            self.save()
        if self._saved is not None:
            self._keep_first_stage(self._saved[0])
        self._evaluate(epoch)

    def _heed(self, alarm: str | None) -> None:
        """Stop after a streak of skipped steps, whose last ones the monitor may not have seen yet; say the alarm."""
        most = self.config.run.max_nonfinite_steps
        if self._monitor.nonfinite_streak >= most and (streak := int(self.guard.streak.item())) >= most:
            raise UserError(
                f"Loss or gradient was not finite in the last {streak} steps; the weights are those before, and "
                "--resume comes to the same steps again. Start a new run (another --output) with a lower optim.lr or "
                "run.precision=fp32."
            )
        if alarm is not None and self.config.run.on_collapse == "stop":
            raise UserError(f"{alarm} The run stops, as run.on_collapse says.")
        if alarm is not None:
            say(f"ALARM: {alarm}")

    def _is_due(self, epoch: int, every: int) -> bool:
        """Every so many epochs, and at the last one of each stage."""
        run = self.config.run
        return epoch + 1 in (run.mutual_information_epochs, run.epochs) or (epoch + 1) % every == 0

    def _evaluate(self, epoch: int) -> None:
        run = self.config.run
        due = run.online_eval_root is not None and self._is_due(epoch, run.online_eval_every_epochs)
        if due and not self._monitor.has_evaluation(epoch):
            self._monitor.note_evaluation(evaluate(self.student, self.config, device=self.device), epoch=epoch)

    # --- states -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Tensors and plain values: what a checkpoint holds."""
        return {name: None if part is None else part.state_dict() for name, part in self._parts.items()}

    def save(self) -> None:
        if distributed.rank() != 0:
            return
        if self._saved is not None and self._saved[1] == self.position.steps:
            # Saved at this step already, and since then only the epoch has ended: the state is not written again.
            checkpoint.move(self._saved[0], self.position)
            return
        plan = self.plan
        manifest = Manifest(
            self.position,
            plan.images,
            plan.world_size,
            images_sha256=plan.images_sha256,
            names_sha256=plan.names_sha256,
        )
        folder, keep = self.output / "checkpoints", self.config.run.keep_checkpoints
        self._saved = checkpoint.save(folder, self.state(), manifest, keep=keep), self.position.steps

    def _keep_first_stage(self, path: Path) -> None:
        """Keep the state at `path` for good when it is the end of the first of two stages."""
        run = self.config.run
        at_end = 0 < self.position.epoch == run.mutual_information_epochs < run.epochs and self.position.samples == 0
        if at_end and distributed.rank() == 0:
            checkpoint.keep_as(path, checkpoint.FIRST_STAGE)

    def restore(self, *, asked: bool) -> None:
        """Load the newest valid checkpoint, or stay at the start; `UserError` when the run has seen other images."""
        found = distributed.on_main_rank(lambda: checkpoint.newest_valid(self.output / "checkpoints", say=say))
        if found is None:
            if self.config.run.warm_start is not None:
                warm_start(self.config.run.warm_start, self.student, self.teacher)
                self.guard.refresh()
            if asked:
                say(f"There is no checkpoint in {self.output} to resume from: starting from scratch.")
            return
        path, manifest = found
        before, now = manifest.names_sha256, self.plan.names_sha256
        if manifest.images != self.plan.images or (None not in (before, now) and before != now):
            raise UserError(
                f"{path} was trained on {manifest.images} images, and data.root has {self.plan.images} now, others, or "
                "in another order: give the same images, or another --output."
            )
        state = checkpoint.load(path, device=self.device)
        for name, part in self._parts.items():
            if part is not None and state[name] is not None:
                part.load_state_dict(state[name])
        self.position = manifest.position
        self._keep_first_stage(path)  # a kill may have come between that state and its copy
        say(f"Resuming from {path}: {self.position.steps} steps done, epoch {self.position.epoch}.")

    def export(self) -> Path:
        """Write the result, the student's backbone, and the teacher's where there is one; returns the student's."""
        path = self.output / "backbone.safetensors"
        if distributed.rank() == 0:
            write_backbone(path, self.student.backbone.state_dict(), self._header("backbone"))
            if self.teacher is not None:
                teacher = self.output / "teacher_backbone.safetensors"
                write_backbone(teacher, self.teacher.backbone.state_dict(), self._header("teacher"))
        distributed.barrier()
        return path

    def _header(self, branch: str) -> Backbone:
        model = self.config.model
        return Backbone(
            architecture=model.backbone,
            width=model.width,
            stem=stem_of(model.backbone),
            image_size=self.config.views.global_size if model.is_vit else None,
            vit=model.vit,
            method="twist",
            epochs=self.config.run.epochs,
            source_branch=branch,
            config_hash=checkpoint.recipe_hash(self.config),
            seed=self.config.run.seed,
            images_sha256=self.plan.images_sha256,
        )
