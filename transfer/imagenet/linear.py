"""The linear protocol: a linear classifier on a backbone that is proven not to change.

TWIST's evaluate.py for ResNets, DINO's probe for ViTs. With `augment` every epoch sees new crops, as published;
without, the features of each training image are taken once. Validation features are taken once in both: a frozen
backbone gives the same ones every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contracts.networks import network_of
from contracts.weights import Backbone
from transfer.imagenet.dataset import Batches, LabelledImages, epoch_batches
from transfer.imagenet.features import FeatureFile, extract, feature_batches, feature_dimension, frozen
from transfer.imagenet.processes import Rank
from transfer.imagenet.recipes import LinearRecipe
from transfer.imagenet.training import Source, new_classifier, train_classifier


def train_linear(
    rank: Rank,
    header: Backbone,
    tensors: dict[str, Tensor],
    train: LabelledImages,
    val: LabelledImages,
    recipe: LinearRecipe,
    seed: int,
    output: Path,
    identity: dict[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """`{"history": rows of train_classifier, "backbone": digest before = after}`.

    Raises:
        FrozenBackboneChanged: the backbone's state is not bit-equal at the end.
    """
    network = network_of(header, tensors).to(rank.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with frozen(network) as digest:
        if recipe.augment:
            source = _crops(rank, network, header, train, val, recipe, seed=seed)
        else:
            source = _fixed(rank, network, header, train, val, recipe, seed=seed, folder=output / "features")
        classifier = new_classifier(
            feature_dimension(network, last_blocks=recipe.last_blocks), len(train.classes), seed=seed
        )
        history = train_classifier(
            classifier,
            {"classifier": (recipe.lr_classifier, classifier.parameters())},
            source,
            recipe,
            rank=rank,
            title="linear",
            output=output,
            identity=identity,
            resume=resume,
        )
    return {"history": history, "backbone": digest}


def _crops(
    rank: Rank,
    network: torch.nn.Module,
    header: Backbone,
    train: LabelledImages,
    val: LabelledImages,
    recipe: LinearRecipe,
    *,
    seed: int,
) -> Source:
    """New crops each epoch, their features computed as they come."""
    cuda = rank.device.type == "cuda"
    batches = Batches(
        train,
        recipe,
        batch_size=recipe.batch_size,
        augment=True,
        seed=seed,
        rank=rank.index,
        world_size=rank.count,
        pin_memory=cuda,
    )
    held_out = Batches(
        val,
        recipe,
        batch_size=recipe.machine.feature_batch_size * rank.count,
        rank=rank.index,
        world_size=rank.count,
        pin_memory=cuda,
    )
    options = {"device": rank.device, "last_blocks": recipe.last_blocks}
    validation = list(feature_batches(network, header, held_out.ordered(), recipe, **options))  # type: ignore[arg-type]

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        return feature_batches(network, header, batches.epoch(number), recipe, **options)  # type: ignore[arg-type]

    return Source(epoch=epoch, validation=lambda: validation, steps_per_epoch=batches.steps_per_epoch)


def _fixed(
    rank: Rank,
    network: torch.nn.Module,
    header: Backbone,
    train: LabelledImages,
    val: LabelledImages,
    recipe: LinearRecipe,
    *,
    seed: int,
    folder: Path,
) -> Source:
    """Features of each image once; the first process extracts them, the others find the files."""

    def files() -> tuple[FeatureFile, FeatureFile]:
        def one(images: LabelledImages, title: str) -> FeatureFile:
            return extract(
                network,
                header,
                images,
                recipe,
                folder=folder,
                title=title,
                device=rank.device,
                last_blocks=recipe.last_blocks,
            )

        return one(train, "train features"), one(val, "val features")

    if rank.first:
        files()
    rank.wait()
    train_file, val_file = files()
    rows = train_file.mapped()

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in epoch_batches(
            len(train),
            batch_size=recipe.batch_size,
            seed=seed,
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

    return Source(epoch=epoch, validation=validation, steps_per_epoch=-(-len(train) // recipe.batch_size))
