"""What a run consists of: networks, optimiser, position; how they learn, are saved, restored and exported."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twist.contracts.errors import UserError
from twist.contracts.weights import Backbone, write_backbone
from twist.pretrain import checkpoint, distributed
from twist.pretrain.checkpoint import Position
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data.loader import Batch
from twist.pretrain.data.views import Stage
from twist.pretrain.model import Twist, build_model
from twist.pretrain.nonfinite import NonFiniteGuard, write_capture
from twist.pretrain.optim import build_optimizer
from twist.pretrain.plan import Plan
from twist.pretrain.run_folder import recipe_hash
from twist.pretrain.warm_start import warm_start


def say(text: str) -> None:
    """A line for the person who started the run, beside the progress display."""
    print(text, file=sys.stderr, flush=True)


def teacher_path(output: Path) -> Path:
    return output / "teacher_backbone.safetensors"


@dataclasses.dataclass
class Run:
    """What a run consists of, and how it is moved, saved and restored."""

    config: PretrainConfig
    plan: Plan
    output: Path
    device: torch.device
    student: Twist
    teacher: Twist | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    guard: NonFiniteGuard
    position: Position = Position()  # noqa: RUF009 (frozen)
    _saved: tuple[Path, int] | None = None  # the newest state that this process has written, and its step

    @classmethod
    def build(cls, config: PretrainConfig, plan: Plan, output: Path, *, device: torch.device) -> Run:
        student, teacher = build_model(config, device=device)
        run = cls(
            config,
            plan,
            output,
            device,
            student,
            teacher,
            build_optimizer(config.optim, student),
            torch.amp.GradScaler(device.type) if plan.precision == "fp16" else None,
            NonFiniteGuard([student] if teacher is None else [student, teacher], device=device),
        )
        run._header("backbone")  # what could not be exported is not trained
        return run

    def learn(self, loss: Tensor) -> Tensor:
        """Backward pass and update; a step with a non-finite loss or gradient changes nothing. Returns the norm."""
        self.optimizer.zero_grad()
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward(self.guard.seed(loss))
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

    def advance(self, epoch: int) -> None:
        self.position = Position(self.position.steps + 1, epoch, self.position.samples + self.plan.total_batch)

    def end_epoch(self, epoch: int) -> None:
        self.position = Position(self.position.steps, epoch + 1, 0)

    def is_due(self) -> bool:
        every = self.config.run.checkpoint_every_steps
        return every is not None and self.position.steps % every == 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.student.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "nonfinite": {"total": self.guard.total, "streak": self.guard.streak},
        }

    def save(self) -> None:
        if distributed.rank() != 0:
            return
        if self._saved is not None and self._saved[1] == self.position.steps:
            # Saved at this step already, and since then only the epoch has ended. To write it again under its name
            # would put the one that is there at risk.
            checkpoint.place(self._saved[0], self.position)
        else:
            path = checkpoint.save(
                self.output / "checkpoints",
                self.state(),
                self.position,
                images=self.plan.images,
                images_sha256=self.plan.images_sha256,
                names_sha256=self.plan.names_sha256,
                world_size=self.plan.world_size,
                keep=self.config.run.keep_checkpoints,
            )
            self._saved = path, self.position.steps

    def restore(self, *, asked: bool) -> None:
        """Go to where the newest valid checkpoint stands; stay at the start when there is none, and say so if asked.

        Raises:
            UserError: the run has seen other images.
        """
        found = distributed.on_main_rank(lambda: checkpoint.newest_valid(self.output / "checkpoints", say=say))
        if found is None:
            if self.config.run.warm_start is not None:
                warm_start(self.config.run.warm_start, self.student, self.teacher)
                self.guard.refresh()
            if asked and distributed.rank() == 0:
                say(f"There is no checkpoint in {self.output} to resume from: starting from scratch.")
            return
        path, manifest = found
        if manifest.images != self.plan.images:
            raise UserError(
                f"{path} was trained on {manifest.images} images, and data.root has {self.plan.images} now: give the "
                "same images, or another --output."
            )
        if None not in (manifest.names_sha256, self.plan.names_sha256):
            if manifest.names_sha256 != self.plan.names_sha256:
                raise UserError(
                    f"{path} was trained on other images: as many, but of other names, or in another order, than those "
                    "of data.root now. Give the same images, or another --output."
                )
            if manifest.images_sha256 != self.plan.images_sha256 and distributed.rank() == 0:
                say("Some images have another size than when the run began (mended, perhaps): it goes on with them.")
        state = checkpoint.load(path, device=self.device)
        self.student.load_state_dict(state["model"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.guard.total, self.guard.streak = state["nonfinite"]["total"], state["nonfinite"]["streak"]
        self.guard.refresh()
        self.position = manifest.position
        if distributed.rank() == 0:
            say(f"Resuming from {path}: {self.position.steps} steps done, epoch {self.position.epoch}.")

    def stop_if_nonfinite(
        self, batch: Batch, views: Sequence[Tensor], *, stage: Stage, quantile: float, seed: int
    ) -> None:
        """End the run with a capture when the last `run.max_nonfinite_steps` steps were all skipped."""
        streak = int(self.guard.streak.item())
        if streak < self.config.run.max_nonfinite_steps:
            return
        path = write_capture(
            self.output / f"nonfinite_rank{distributed.rank()}.pt",
            config=self.config.model_dump(mode="json"),
            state=self.state(),
            batch={
                "views": list(views),
                "indices": batch.indices,
                "position": dataclasses.asdict(self.position),
                "stage": stage,
                "quantile": quantile,
                "seed": seed,
            },
        )
        raise UserError(
            f"Loss or gradient was not finite in the last {streak} steps; weights are those before. The failing batch "
            f"is in {path}: `python -m twist.pretrain.replay {path}` replays it. A new run (another --output) with a "
            "lower optim.lr or run.precision=fp32 helps most often."
        )

    def export(self) -> Path:
        """Write the result: the student's backbone, and the teacher's beside it."""
        path = self.output / "backbone.safetensors"
        if distributed.rank() == 0:
            self._write(path, self.student)
            if self.teacher is not None:
                self._write(teacher_path(self.output), self.teacher, branch="teacher")
        distributed.barrier()
        return path

    def _write(self, path: Path, network: Twist, *, branch: str = "backbone") -> None:
        write_backbone(path, network.backbone.state_dict(), self._header(branch))

    def _header(self, branch: str) -> Backbone:
        is_vit = self.config.model.backbone.startswith("vit_")
        return Backbone(
            architecture=self.config.model.backbone,
            width=self.config.model.width,
            stem="patch16" if is_vit else "conv7x7",
            image_size=self.config.views.global_size if is_vit else None,
            method="twist",
            epochs=self.config.run.epochs,
            source_branch=branch,
            config_hash=recipe_hash(self.config),
            seed=self.config.run.seed,
            images_sha256=self.plan.images_sha256,
        )
