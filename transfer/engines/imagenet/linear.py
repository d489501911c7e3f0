"""The linear protocol: a linear classifier on a backbone that is proven not to change.

TWIST's evaluate.py for ResNets, DINO's probe for ViTs. With `augment` every epoch sees new crops, as published;
without, the features of each training image are taken once. Validation features are taken once in both: a frozen
backbone gives the same ones every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twist.catalog.labelled import LabelledImages
from twist.contracts.networks import network_of
from twist.transfer.engines.imagenet.dataset import Batches, epoch_batches
from twist.transfer.engines.imagenet.features import FeatureFile, extract, feature_batches, feature_dimension, frozen
from twist.transfer.engines.imagenet.processes import Rank
from twist.transfer.engines.imagenet.recipes import TRAINING, LinearRecipe
from twist.transfer.engines.imagenet.training import (
    PICTURED,
    Job,
    Source,
    image_batches,
    new_classifier,
    train_classifier,
)


def train_linear(rank: Rank, job: Job) -> dict[str, Any]:
    """What `train_classifier` returns, and `backbone`: its digest before = after.

    Raises:
        FrozenBackboneChanged: the backbone's state is not bit-equal at the end.
    """
    recipe = job.recipe
    assert isinstance(recipe, LinearRecipe)
    network = network_of(job.header, job.tensors)
    network = network.to(rank.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with frozen(network) as digest:
        source = (_crops if recipe.augment else _fixed)(rank, job, recipe, network)
        classifier = new_classifier(
            feature_dimension(network, last_blocks=recipe.last_blocks), len(job.train.classes), seed=job.seed
        )
        done = train_classifier(
            classifier,
            {"classifier": (recipe.lr_classifier, classifier.parameters())},
            source,
            recipe,
            rank=rank,
            title="linear",
            output=job.output,
            identity=job.identity,
            resume=job.resume,
            eval_only=job.eval_only,
        )
    return {**done, "backbone": digest}


def _features(
    rank: Rank, job: Job, recipe: LinearRecipe, network: nn.Module
) -> Callable[..., Iterator[tuple[Tensor, Tensor]]]:
    """`feature_batches` of this run: takes decoded batches, and `remedy` where they are not those of a test."""
    return partial(
        feature_batches, network, job.header, recipe=recipe, device=rank.device, last_blocks=recipe.last_blocks
    )


def _pictured(rank: Rank, job: Job, recipe: LinearRecipe, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    few = Batches(job.val.spread(PICTURED), recipe, batch_size=recipe.machine.feature_batch_size, workers=0)
    return _features(rank, job, recipe, network)(few.ordered())


def _crops(rank: Rank, job: Job, recipe: LinearRecipe, network: nn.Module) -> Source:
    """New crops each epoch, their features computed as they come."""
    batches, held_out = image_batches(rank, job, recipe)
    features = _features(rank, job, recipe, network)
    validation = list(features(held_out.ordered()))
    return Source(
        epoch=lambda number: features(batches.epoch(number), remedy=TRAINING),
        validation=lambda: validation,
        pictured=lambda: _pictured(rank, job, recipe, network),
        steps_per_epoch=batches.steps_per_epoch,
    )


def _fixed(rank: Rank, job: Job, recipe: LinearRecipe, network: nn.Module) -> Source:
    """Features of each image once; the first process extracts them, the others find the files."""

    def features(images: LabelledImages, title: str) -> FeatureFile:
        def find() -> FeatureFile:
            return extract(
                network,
                job.header,
                images,
                recipe,
                folder=job.output / "features",
                title=title,
                device=rank.device,
                last_blocks=recipe.last_blocks,
            )

        if rank.first:
            find()
        rank.wait()
        return find()

    train_file = None if job.eval_only else features(job.train, "train features")
    val_file = features(job.val, "val features")

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        assert train_file is not None, "an evaluation has no epochs"
        rows = train_file.mapped()
        for chosen in epoch_batches(
            len(job.train),
            batch_size=recipe.batch_size,
            seed=job.seed,
            epoch=number,
            rank=rank.index,
            world_size=rank.count,
        ):
            yield torch.from_numpy(rows[chosen]).to(rank.device), train_file.labels[chosen].to(rank.device)

    def validation() -> Iterator[tuple[Tensor, Tensor]]:
        step = recipe.machine.feature_batch_size
        for start in range(rank.index * step, len(val_file), rank.count * step):
            yield (
                val_file.rows(start, start + step).to(rank.device),
                val_file.labels[start : start + step].to(rank.device),
            )

    return Source(
        epoch=epoch,
        validation=validation,
        pictured=lambda: _pictured(rank, job, recipe, network),
        steps_per_epoch=-(-len(job.train) // recipe.batch_size),
    )
