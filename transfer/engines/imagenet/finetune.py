"""The semi-supervised and fine-tuning protocols: backbone and linear classifier trained together at two rates.

TWIST's evaluate.py `--weights finetune`: batch norm in training mode with each process's own statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from twist.contracts.networks import network_of, normalise
from twist.transfer.engines.imagenet.dataset import Batches
from twist.transfer.engines.imagenet.features import feature_dimension
from twist.transfer.engines.imagenet.processes import Rank
from twist.transfer.engines.imagenet.recipes import FinetuneRecipe
from twist.transfer.engines.imagenet.training import (
    PICTURED,
    Job,
    Source,
    image_batches,
    new_classifier,
    train_classifier,
)


def train_finetune(rank: Rank, job: Job) -> dict[str, Any]:
    """What `train_classifier` returns."""
    recipe, header = job.recipe, job.header
    assert isinstance(recipe, FinetuneRecipe)
    backbone = network_of(header, job.tensors)
    classifier = new_classifier(feature_dimension(backbone), len(job.train.classes), seed=job.seed)
    model = nn.Sequential(backbone, classifier).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches, held_out = image_batches(rank, job, recipe)
    pictured = Batches(job.val.spread(PICTURED), recipe, batch_size=recipe.machine.feature_batch_size, workers=0)

    def inputs(decoded: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in decoded:
            images = normalise(pixels.to(rank.device, non_blocking=True), header)
            yield images.contiguous(memory_format=torch.channels_last), labels.to(rank.device, non_blocking=True)

    return train_classifier(
        model,
        {
            "classifier": (recipe.lr_classifier, classifier.parameters()),
            "backbone": (recipe.lr_backbone, backbone.parameters()),
        },
        Source(
            epoch=lambda number: inputs(batches.epoch(number)),
            validation=lambda: inputs(held_out.ordered()),
            pictured=lambda: inputs(pictured.ordered()),
            steps_per_epoch=batches.steps_per_epoch,
        ),
        recipe,
        rank=rank,
        title="finetune",
        output=job.output,
        identity=job.identity,
        resume=job.resume,
        eval_only=job.eval_only,
    )
