"""What a run is going to do: the numbers that follow from its config, its images, its ranks and its device.

What changes during a run is a pure function of the step, which counts from 0 over the whole run. A stage is a linear
warm-up from zero and a cosine, as in the published code (commit 796d36e, `utils.py`).
"""

import contextlib
import math
import os
from typing import Any, NamedTuple

import torch

from twist.contracts import machine
from twist.pretrain import distributed
from twist.pretrain.config import Precision, PretrainConfig
from twist.pretrain.data.loader import BUFFERS
from twist.pretrain.data.views import Stage, plan_views, resolutions

# The shortest published recipe takes 625 steps an epoch; what has fewer than this in all shows only that it runs.
FEW_STEPS = 100


def precision_on(device: torch.device, asked: Precision) -> Precision:
    """CUDA does all three; a CPU bf16 where it has the instructions (`benchmarks/small_views.py`), else float32."""
    if device.type == "cuda":
        return asked
    return "bf16" if asked == "bf16" and machine.cpu_has_bf16() else "fp32"


def autocast(device: torch.device, asked: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context for the forward pass; the loss is float32 in any case (`loss.py`)."""
    precision = precision_on(device, asked)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 towards `end` at `steps`, and `end` from there on."""
    return end if step >= steps else end + (start - end) / 2 * (1 + math.cos(math.pi * (step / steps)))


def warmup_then_cosine(step: int, *, base: float, end: float, warmup_steps: int, steps: int) -> float:
    """Linear from 0 to `base` over `warmup_steps`, then a cosine to `end` over the rest of `steps`."""
    if step < warmup_steps:
        return base * (step / warmup_steps)
    return cosine(step - warmup_steps, start=base, end=end, steps=steps - warmup_steps)


def warmup_epochs(config: PretrainConfig) -> int:
    """As configured, or the published rule: 10, or 5 for runs of at most 50 epochs, or 3 for at most 20; but at most
    half of the first stage, so that a run of a few epochs still reaches its rate."""
    if config.optim.warmup_epochs is not None:
        return config.optim.warmup_epochs
    rule = 3 if config.run.epochs <= 20 else 5 if config.run.epochs <= 50 else 10
    return min(rule, config.run.mutual_information_epochs // 2)


class StepSettings(NamedTuple):
    """What one step is done with; each rank has its own `seed`."""

    step: int
    epoch: int
    stage: Stage
    lr: float
    weight_decay: float
    teacher_momentum: float
    quantile: float
    seed: int


class Plan:
    """The numbers of a run on so many images and ranks. Learning rates are after scaling with the total batch; the two
    digests say which images (`data/source.py`), None where it is unknown."""

    def __init__(
        self,
        config: PretrainConfig,
        *,
        images: int,
        world_size: int,
        device: torch.device,
        images_sha256: str | None = None,
        names_sha256: str | None = None,
    ) -> None:
        run = config.run
        self.config, self.images, self.world_size = config, images, world_size
        self.images_sha256, self.names_sha256 = images_sha256, names_sha256
        self.total_batch = run.batch_size * world_size
        self.ranks_per_bunch = distributed.ranks_per_bunch(
            config.model.bunch_size, batch_size=run.batch_size, world_size=world_size
        )
        self.precision = precision_on(device, run.precision)
        self.steps_per_epoch = images // self.total_batch
        self.steps = run.epochs * self.steps_per_epoch
        self.first_stage_steps = run.mutual_information_epochs * self.steps_per_epoch
        self.lr = config.optim.lr * self.total_batch / 256  # the published linear rule
        self.self_label_lr = config.self_label.lr * self.total_batch / 256

    def stage(self, epoch: int) -> Stage:
        return "mutual_information" if epoch < self.config.run.mutual_information_epochs else "self_label"

    def settings(self, epoch: int, samples: int) -> StepSettings:
        """Of the step of `epoch` that follows `samples` images of all ranks."""
        stage, step = self.stage(epoch), epoch * self.steps_per_epoch + samples // self.total_batch
        return StepSettings(
            step,
            epoch,
            stage,
            self.learning_rate(step),
            self.weight_decay(step),
            self.teacher_momentum(step),
            self.quantile(step) if stage == "self_label" else 0.0,
            _step_seed(self.config.run.seed, step),
        )

    def learning_rate(self, step: int) -> float:
        """Warm-up from 0 and cosine in each stage; it changes every step."""
        epochs, base, steps = warmup_epochs(self.config), self.lr, self.first_stage_steps
        if step >= self.first_stage_steps:
            step -= self.first_stage_steps
            epochs, base = self.config.self_label.warmup_epochs, self.self_label_lr
            steps = self.steps - self.first_stage_steps
        end, warmup_steps = base * self.config.optim.final_lr_ratio, epochs * self.steps_per_epoch
        return warmup_then_cosine(step, base=base, end=end, warmup_steps=warmup_steps, steps=steps)

    def weight_decay(self, step: int) -> float:
        """Constant, or a cosine over the whole run when `optim.weight_decay_end` is given."""
        start, end = self.config.optim.weight_decay, self.config.optim.weight_decay_end
        return start if end is None else cosine(step, start=start, end=end, steps=self.steps)

    def teacher_momentum(self, step: int) -> float:
        """Cosine over the first stage; its end value afterwards."""
        start, end = self.config.model.teacher_momentum
        return cosine(step, start=start, end=end, steps=self.first_stage_steps)

    def quantile(self, step: int) -> float:
        """Of self-labelling: cosine over the second stage."""
        stage, first = self.config.self_label, self.first_stage_steps
        return cosine(step - first, start=stage.quantile_start, end=stage.quantile_end, steps=self.steps - first)

    @property
    def loader_bytes(self) -> int:
        """Shared memory that the data workers of one rank hold: `BUFFERS` batches of views each."""
        values = sum(count * 3 * side**2 for count, side in resolutions(plan_views(self.config.views)))
        per_value = 1 if self.config.data.pipeline == "device" else 4  # bytes, or float32
        return self.config.data.workers * BUFFERS * self.config.run.batch_size * values * per_value

    def warnings(self) -> list[str]:
        """What makes the run useless or ends it early, a sentence each: too few steps, too little shared memory."""
        found = []
        if self.steps < FEW_STEPS:
            found.append(
                f"This run has {self.steps} steps in all ({self.images:,} images, batches of {self.total_batch}): too "
                "few to learn from; lower run.batch_size, raise run.epochs, or give it more images."
            )
        wanted = self.loader_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = machine.free_shared_memory()
        if free is not None and wanted > free:
            found.append(
                f"The data workers may take {_gigabytes(wanted)} of shared memory, and {machine.SHARED_MEMORY} has "
                f"{_gigabytes(free)} free: give the container more (docker run --shm-size), or lower data.workers."
            )
        return found

    def render(self) -> str:
        """The plan for a person, one line a subject."""
        config, run, model, optim = self.config, self.config.run, self.config.model, self.config.optim
        views = " + ".join(f"{count} × {side} px" for count, side in resolutions(plan_views(config.views)))
        second = run.epochs - run.mutual_information_epochs
        rates = f"{optim.name}, lr {optim.lr:g} × {self.total_batch}/256 = {self.lr:g}"
        if second:
            rates += f", then {config.self_label.lr:g} × {self.total_batch}/256 = {self.self_label_lr:g}"
        decay = f"{optim.weight_decay:g}" + (
            f" to {optim.weight_decay_end:g}" if optim.weight_decay_end is not None else ""
        )
        options = [name for name in ("channels_last", "compile", "deterministic") if getattr(run, name)]
        within = f" and {run.checkpoint_every_steps} steps" if run.checkpoint_every_steps else ""
        lines = {
            "images": f"{self.images:,} in {config.data.root}",
            "views": f"{views} ({config.views.kind}), cut by {config.data.workers} worker(s) a rank, "
            f"{config.data.pipeline} pipeline, {_gigabytes(self.loader_bytes)} of shared memory a rank",
            "network": f"{model.backbone}{f' × {model.width}' if model.width > 1 else ''}, head "
            f"{model.hidden_dim}-{model.hidden_dim}-{model.classes}",
            "teacher": "momentum {} to {}".format(*model.teacher_momentum) if model.teacher else "none",
            "batch": f"{run.batch_size} images × {self.world_size} rank(s) = {self.total_batch}",
            "bunch norm": f"over {self.ranks_per_bunch * run.batch_size} images ({self.ranks_per_bunch} rank(s))",
            "epochs": f"{run.epochs} ({run.mutual_information_epochs} mutual information + {second} self-labelling), "
            f"{self.steps_per_epoch:,} steps each, {self.steps:,} in all",
            "optimiser": f"{rates}; warm-up {warmup_epochs(config)} epoch(s), weight decay {decay}",
            "precision": ", ".join([self.precision, *options]),
            "checkpoints": f"every {run.checkpoint_every_epochs} epoch(s){within}, {run.keep_checkpoints} kept",
        }
        return "TWIST pretraining\n" + "".join(f"  {name:<12}{text}\n" for name, text in lines.items())


def _step_seed(seed: int, step: int) -> int:
    """A seed for each (seed, rank, step); spread by the constants of SplitMix64, so near steps are not alike."""
    value = (seed * 0x9E3779B97F4A7C15 + distributed.rank() * 0xBF58476D1CE4E5B9 + step) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 27)) & 0x7FFFFFFFFFFFFFFF


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
