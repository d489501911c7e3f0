"""What a run is going to do, resolved from its config, the images and the ranks, and printed before it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from twist.contracts import machine
from twist.pretrain import distributed
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data.loader import BUFFERS
from twist.pretrain.data.views import plan_views, resolutions
from twist.pretrain.precision import Precision, precision_on
from twist.pretrain.schedule import Schedule, scaled_lr, warmup_epochs


@dataclass(frozen=True)
class Plan:
    """The numbers that follow from the config and from where it runs."""

    config: PretrainConfig
    images: int
    world_size: int
    steps_per_epoch: int
    ranks_per_bunch: int
    precision: Precision
    schedule: Schedule
    # Which images, by names and sizes (`pretrain.data.source.fingerprint`), and by names in their order.
    images_sha256: str | None = None
    names_sha256: str | None = None

    @property
    def total_batch(self) -> int:
        """Images a step, over all ranks."""
        return self.config.run.batch_size * self.world_size

    @property
    def loader_bytes(self) -> int:
        """Shared memory that the data workers of one rank hold: `BUFFERS` batches of views each."""
        values = sum(count * 3 * side**2 for count, side in resolutions(plan_views(self.config.views)))
        per_value = 1 if self.config.data.pipeline == "device" else 4  # bytes, or float32
        return self.config.data.workers * BUFFERS * self.config.run.batch_size * values * per_value

    def lack_of_shared_memory(self) -> str | None:
        """A sentence where shared memory has less room than all workers of this machine may take, or None."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = machine.free_shared_memory()
        if free is None or self.loader_bytes * ranks <= free:
            return None
        return (
            f"The data workers of {ranks} rank(s) may take {_gigabytes(self.loader_bytes * ranks)} of shared memory, "
            f"and {machine.SHARED_MEMORY} has {_gigabytes(free)} free: give the container more (docker run "
            "--shm-size), or lower data.workers."
        )

    def render(self) -> str:
        """The plan for a person, one line a subject."""
        config, run, optim = self.config, self.config.run, self.config.optim
        views = " + ".join(f"{count} × {side} px" for count, side in resolutions(plan_views(config.views)))
        second = run.epochs - run.mutual_information_epochs
        stages = f"{run.mutual_information_epochs} mutual information" + (
            f" + {second} self-labelling" if second else ""
        )
        rates = f"{optim.name}, lr {optim.lr:g} × {self.total_batch}/256 = {self.schedule.lr:g}"
        if second:
            rates += f", then {config.self_label.lr:g} × {self.total_batch}/256 = {self.schedule.self_label_lr:g}"
        teacher = "none" if not config.model.teacher else "momentum {} to {}".format(*config.model.teacher_momentum)
        lines = {
            "images": f"{self.images:,} in {config.data.root}",
            "views": f"{views} ({config.views.kind}), cut by {config.data.workers} worker(s) a rank, "
            f"{config.data.pipeline} pipeline"
            + (f", {_gigabytes(self.loader_bytes)} of shared memory a rank" if config.data.workers else ""),
            "network": f"{config.model.backbone}{f' × {config.model.width}' if config.model.width > 1 else ''}, head "
            f"{config.model.hidden_dim}-{config.model.hidden_dim}-{config.model.classes}",
            "teacher": teacher,
            "batch": f"{run.batch_size} images × {self.world_size} rank(s) = {self.total_batch}",
            "bunch norm": f"over {self.ranks_per_bunch * run.batch_size} images ({self.ranks_per_bunch} rank(s))",
            "epochs": f"{run.epochs} ({stages}), {self.steps_per_epoch:,} steps each, {self.schedule.steps:,} in all",
            "optimiser": f"{rates}; warm-up {warmup_epochs(config)} epoch(s), weight decay {optim.weight_decay:g}"
            + (f" to {optim.weight_decay_end:g}" if optim.weight_decay_end is not None else ""),
            "precision": self.precision
            + (", channels last" if run.channels_last else "")
            + (", compiled" if run.compile else "")
            + (", deterministic" if run.deterministic else ""),
            "checkpoints": f"every {run.checkpoint_every_epochs} epoch(s)"
            + (f" and {run.checkpoint_every_steps} steps" if run.checkpoint_every_steps else "")
            + f", the last {run.keep_checkpoints} kept",
        }
        return "TWIST pretraining\n" + "".join(f"  {name:<12}{text}\n" for name, text in lines.items())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def resolve(
    config: PretrainConfig,
    *,
    images: int,
    world_size: int,
    device: torch.device,
    images_sha256: str | None = None,
    names_sha256: str | None = None,
) -> Plan:
    """The plan of `config` for this many images and ranks.

    Raises:
        UserError: the bunch does not divide over the ranks.
    """
    total_batch = config.run.batch_size * world_size
    steps_per_epoch = images // total_batch
    return Plan(
        config,
        images,
        world_size,
        steps_per_epoch,
        distributed.ranks_per_bunch(config.model.bunch_size, batch_size=config.run.batch_size, world_size=world_size),
        precision_on(device, config.run.precision),
        Schedule(
            config,
            steps_per_epoch,
            lr=scaled_lr(config.optim.lr, total_batch),
            self_label_lr=scaled_lr(config.self_label.lr, total_batch),
        ),
        images_sha256,
        names_sha256,
    )
