"""Every quantity that changes during a run, as a pure function of the step.

Schedules are fvcore's; a stage is a linear warm-up from zero and a cosine. Source of the shapes: the published code
(commit 796d36e, `utils.py`), golden arrays in `tests/goldens/schedules.npz`. `step` counts from 0 over the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler

from twist.pretrain.config import PretrainConfig


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 towards `end` at `steps`, and `end` from there on."""
    if step >= steps:
        return end
    return CosineParamScheduler(start, end)(step / steps)


def warmup_then_cosine(step: int, *, base: float, end: float, warmup_steps: int, steps: int) -> float:
    """Linear from 0 to `base` over `warmup_steps`, then a cosine to `end` over the rest of `steps`."""
    if step < warmup_steps:
        return LinearParamScheduler(0.0, base)(step / warmup_steps)
    return cosine(step - warmup_steps, start=base, end=end, steps=steps - warmup_steps)


def warmup_epochs(config: PretrainConfig) -> int:
    """As configured, or the published rule: 10, or 5 for runs of at most 50 epochs, or 3 for at most 20.

    The rule never takes more than half of the first stage, so that a run of a few epochs still reaches its rate.
    """
    if config.optim.warmup_epochs is not None:
        return config.optim.warmup_epochs
    rule = 3 if config.run.epochs <= 20 else 5 if config.run.epochs <= 50 else 10
    return min(rule, config.run.mutual_information_epochs // 2)


@dataclass(frozen=True)
class Schedule:
    """The schedules of one run.

    `lr` and `self_label_lr` are after scaling with the total batch.
    """

    config: PretrainConfig
    steps_per_epoch: int
    lr: float
    self_label_lr: float

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.run.epochs * self.steps_per_epoch

    @property
    def first_stage_steps(self) -> int:
        """Steps of the mutual-information stage."""
        return self.config.run.mutual_information_epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Warm-up and cosine in each stage; it changes every step."""
        if step < self.first_stage_steps:
            warmup, base, steps = warmup_epochs(self.config), self.lr, self.first_stage_steps
        else:
            step -= self.first_stage_steps
            warmup, base = self.config.self_label.warmup_epochs, self.self_label_lr
            steps = self.steps - self.first_stage_steps
        end = base * self.config.optim.final_lr_ratio
        return warmup_then_cosine(step, base=base, end=end, warmup_steps=warmup * self.steps_per_epoch, steps=steps)

    def weight_decay(self, step: int) -> float:
        """Constant, or a cosine over the whole run when `optim.weight_decay_end` is given."""
        start, end = self.config.optim.weight_decay, self.config.optim.weight_decay_end
        return start if end is None else cosine(step, start=start, end=end, steps=self.steps)

    def teacher_momentum(self, step: int) -> float:
        """Cosine over the first stage; its end value afterwards."""
        start, end = self.config.model.teacher_momentum
        return cosine(step, start=start, end=end, steps=self.first_stage_steps)

    def self_label_quantile(self, step: int) -> float:
        """Cosine over the second stage. `step` counts from the start of the run, as everywhere."""
        stage = self.config.self_label
        return cosine(
            step - self.first_stage_steps,
            start=stage.quantile_start,
            end=stage.quantile_end,
            steps=self.steps - self.first_stage_steps,
        )


def scaled_lr(base: float, total_batch: int) -> float:
    """The published linear rule: `base` is for 256 images a step."""
    return base * total_batch / 256
