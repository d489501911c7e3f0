"""Which images a step takes: a permutation an epoch, cut into global batches, cut into ranks.

Global batch t of an epoch is positions [start + t·W·B, start + (t+1)·W·B) of the epoch's permutation, which depends
on (seed, epoch) alone; rank r takes its r-th stretch of B. So a resume starts at any position at once, also with
another number of ranks, and each image still appears once an epoch; the last partial global batch is dropped.

Shapes: `N` images, `B` images a rank, `W` ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from twist.contracts.errors import UserError
from twist.pretrain.data.views import ORDER_STREAM, REPLACEMENT_STREAM, Philox

# Unreadable images in a row after which a replacement is no longer looked for.
REPLACEMENT_TRIES = 100


def permutation(images: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of the N images in an epoch, (N,) int64; 20 ms for ImageNet's 1.28 million."""
    return Philox().at(seed, ORDER_STREAM, epoch=epoch).permutation(images)


def steps(images: int, *, batch_size: int, world_size: int, start_sample: int = 0) -> int:
    """Whole global batches from `start_sample` to the end of an epoch."""
    return max(images - start_sample, 0) // (batch_size * world_size)


def batches(
    images: int, *, seed: int, epoch: int, batch_size: int, rank: int, world_size: int, start_sample: int = 0
) -> Iterator[np.ndarray]:
    """This rank's (B,) image numbers, step by step."""
    order = permutation(images, seed=seed, epoch=epoch)
    total = batch_size * world_size
    for step in range(steps(images, batch_size=batch_size, world_size=world_size, start_sample=start_sample)):
        begin = start_sample + step * total + rank * batch_size
        yield order[begin : begin + batch_size]


def require_one_batch(images: int, *, batch_size: int, world_size: int) -> None:
    """`UserError` when an epoch has no whole global batch."""
    if images < batch_size * world_size:
        ranks = f" on {world_size} ranks" if world_size > 1 else ""
        raise UserError(
            f"There are {images} images, fewer than one total batch of {batch_size * world_size} "
            f"({batch_size} a rank{ranks}): lower run.batch_size to "
            f"{max(images // world_size, 1)} or less, or add images."
        )


def replacements(images: int, *, seed: int, epoch: int, index: int) -> Iterator[int]:
    """Where to look when image `index` cannot be read: a walk that depends on (seed, epoch, index) alone."""
    walk = Philox().at(seed, REPLACEMENT_STREAM, epoch=epoch, index=index)
    for _ in range(REPLACEMENT_TRIES):
        yield int(walk.integers(images))
