"""A Hugging Face data set read as a stream (`streaming = true`): for sets that lie in object stores or tar shards.

What a stream can and cannot promise, beside a folder or a memory-mapped set:
- Order: shards are shuffled by (seed, epoch), then images within a buffer of `data.stream_shuffle_buffer`; that is less
  mixed than a permutation. It is the same again for the same number of ranks, whatever the workers.
- Ranks: each reads its own shards (every W-th image when the shards do not divide), and starts its part anew when it
  is shorter than the epoch; so an image may appear twice in an epoch, and another not at all.
- Resume within an epoch: the same batches with the same number of ranks, but the images before are read and thrown
  away, undecoded: it takes time in proportion. With another number of ranks the epoch's remaining images are others.
- An image's number, on which its views depend, is a digest of its bytes, because a stream has no numbers.

Shapes: `B` images a rank, `W` ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from twist.contracts.errors import UserError
from twist.contracts.images import UnreadableImage, decode
from twist.pretrain.config import DataConfig
from twist.pretrain.data.sampler import steps
from twist.pretrain.data.source import class_column, image_bytes, load_rows
from twist.pretrain.data.view_maker import Request
from twist.pretrain.data.views import ORDER_STREAM, Philox, Stage

# Batches that the reading thread is ahead of the workers.
BATCHES_AHEAD = 2


class ImageStream:
    """Encoded images in the order of a shuffled stream, cut into requests for the workers."""

    def __init__(self, config: DataConfig) -> None:
        self._rows = load_rows(config)
        self._column = config.image_column
        self._label = class_column(self._rows)
        self._buffer = config.stream_shuffle_buffer
        self._length = config.stream_images or _known_length(self._rows)
        if self._length is None:
            raise UserError(
                f"The stream {config.root} does not say how many images it has: set data.stream_images to the images "
                "of an epoch."
            )

    def __len__(self) -> int:
        """Images of an epoch, over all ranks."""
        assert self._length is not None
        return self._length

    def requests(
        self,
        *,
        seed: int,
        epoch: int,
        stage: Stage,
        batch_size: int,
        rank: int,
        world_size: int,
        start_sample: int = 0,
    ) -> Iterator[Request]:
        """This rank's requests of an epoch, read by a thread of their own a few batches ahead."""
        count = steps(len(self), batch_size=batch_size, world_size=world_size, start_sample=start_sample)
        rows = self._examples(seed, epoch, rank, world_size, skip=start_sample // world_size)
        return _ahead(
            _request(list(itertools.islice(rows, batch_size)), epoch=epoch, stage=stage) for _ in range(count)
        )

    def first(self, count: int) -> HeldImages:
        """The first images, unshuffled, as a source by number: for a contact sheet or a measurement."""
        rows = itertools.islice(self._rows, count)
        return HeldImages([self._example(row) for row in rows])

    def _examples(
        self, seed: int, epoch: int, rank: int, world_size: int, *, skip: int
    ) -> Iterator[tuple[bytes, int | None]]:
        from datasets.distributed import split_dataset_by_node

        # One number for seed and epoch; the library's own epoch is not kept by all that is done to a stream.
        order = int(Philox().at(seed, ORDER_STREAM, epoch=epoch).integers(2**63))
        shuffled = self._rows.shuffle(seed=order, buffer_size=self._buffer)
        rows = split_dataset_by_node(shuffled, rank=rank, world_size=world_size)
        while True:
            seen = 0
            for row in rows:
                seen += 1
                # Counted by us over the restarts, so that a resume in the second round is a resume too.
                if skip:
                    skip -= 1
                    continue
                yield self._example(row)
            if not seen:
                raise UserError(
                    f"The stream has no image for rank {rank} of {world_size}: it needs more shards or images."
                )

    def _example(self, row: dict[str, Any]) -> tuple[bytes, int | None]:
        if self._column not in row:
            raise UserError(
                f"The stream has no column {self._column} (it has {', '.join(row)}): set data.image_column."
            )
        try:
            data = image_bytes(row[self._column], name="of the stream")
        except UnreadableImage:
            data = b""  # the worker names it and puts another in its place, as it does with any other damage
        label = None if self._label is None else row[self._label]
        return data, None if label is None else int(label)


class HeldImages:
    """A few encoded images in memory, by number."""

    def __init__(self, examples: list[tuple[bytes, int | None]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def name(self, index: int) -> str:
        return f"image {index} of the stream"

    def label(self, index: int) -> int | None:
        return self._examples[index][1]

    def encoded(self, index: int) -> bytes:
        return self._examples[index][0]

    def decode(self, index: int) -> Tensor:
        return decode(self.encoded(index), name=self.name(index))


def image_number(data: bytes) -> int:
    """63 bits of the bytes' BLAKE2b digest: what an image of a stream is called by."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def _request(examples: list[tuple[bytes, int | None]], *, epoch: int, stage: Stage) -> Request:
    encoded = tuple(data for data, _ in examples)
    labels = tuple(label for _, label in examples if label is not None)
    numbers = np.array([image_number(data) for data in encoded], dtype=np.int64)
    return Request(epoch, stage, numbers, encoded, labels if len(labels) == len(examples) else None)


def _known_length(rows: Any) -> int | None:
    split = (rows.info.splits or {}).get(str(rows.split))
    return None if split is None else split.num_examples or None


def _ahead(requests: Iterator[Request]) -> Iterator[Request]:
    """`requests`, produced by a thread: reading from a network must not hold up the training process."""
    filled: queue.Queue[Request | BaseException | None] = queue.Queue(maxsize=BATCHES_AHEAD)
    left = threading.Event()

    def put(item: Request | BaseException | None) -> bool:
        while not left.is_set():
            try:
                filled.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for request in requests:
                if not put(request):
                    return
            put(None)
        except BaseException as error:  # handed to the thread that waits, whatever it is
            put(error)

    thread = threading.Thread(target=read, name="image stream", daemon=True)
    thread.start()
    try:
        while (item := filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join(timeout=5)
