"""The loader of the pretrainer: every image decoded once a step, V views cut from it, on the device and normalised.

`ViewLoader.epoch(e)` yields this rank's batches. Which images, which views and which pixels are a pure function of
(seed, epoch, stage, image), so a run continues at any sample at once, with any number of workers. Streams promise less:
`pretrain/data/stream.py`.

Two pipelines, the same pictures: `device` sends uint8 crops and does the photometric part for the whole batch on the
training device, on a stream of its own and one batch ahead; `cpu` does everything in workers. On CPU both give the
same bits; on a GPU they differ by float rounding.

Shapes: `B` images a rank, `L` local views, `G` and `l` sides of a global and a local view, `W` ranks.
"""

from __future__ import annotations

import gc
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from twist.contracts.errors import UserError
from twist.contracts.failures import describe
from twist.pretrain.config import DataConfig, ViewsConfig
from twist.pretrain.data import photometric, sampler
from twist.pretrain.data.source import ImageSource, is_stream
from twist.pretrain.data.source import open_images as open_by_number
from twist.pretrain.data.stream import ImageStream
from twist.pretrain.data.view_maker import Made, PipelineName, Request, ViewMaker, finish_on_cpu
from twist.pretrain.data.views import STAGES, Stage

__all__ = ["Batch", "ImageSource", "ImageStream", "ViewLoader", "open_images"]


# Batches that a worker may have made or in the making and not handed over.
PREFETCH = 2
# Buffers that a worker writes into in turn, where batches are pinned: what has been handed over has then been copied.
BUFFERS = PREFETCH + 1

# How long a broken connection to a worker may precede the worker's end.
DEATH_S = 2.0


def open_images(config: DataConfig) -> ImageSource | ImageStream:
    """The images that `config` names; `UserError` in one sentence when there are none or they cannot be opened."""
    return ImageStream(config) if is_stream(config) else open_by_number(config)


@dataclass(frozen=True)
class Batch:
    """One step's input of this rank.

    `views`: a tensor a resolution, view-major: (2·B, 3, G, G), then (L·B, 3, l, l); float32, normalised, on the device.
    `indices` (B,) int64 and `labels` (B,) or None: of the images shown, on the CPU.
    `data_wait_s`: how long the caller stood still for it. `bad_images`: unreadable images met by this loader so far.
    """

    views: list[Tensor]
    indices: Tensor
    labels: Tensor | None
    data_wait_s: float
    bad_images: int


class _Requests:
    """The DataLoader's sampler: yields what `plan` was last set to. Lives in the training process only."""

    def __init__(self) -> None:
        self.plan: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.plan


class ViewLoader:
    """Batches of views, epoch by epoch; workers are started once and stay until `close()` or the program's end.

    Args:
        images: where the images are (`open_images`).
        views: which views are made.
        batch_size: B, images a rank. seed: of the run.
        pipeline: "device" or "cpu". device: where the views are wanted.
        bad_image_share: a rank stops with `UserError` when, of the images it takes in an epoch, more than this share
            (and more than one) cannot be read.

    Raises:
        UserError: there are fewer images than one total batch.
    """

    def __init__(
        self,
        images: ImageSource | ImageStream,
        views: ViewsConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pipeline: PipelineName = "device",
        device: torch.device = torch.device("cpu"),  # noqa: B008
        bad_image_share: float = 0.001,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        sampler.require_one_batch(len(images), batch_size=batch_size, world_size=world_size)
        self._images, self._seed, self._device, self._pipeline = images, seed, device, pipeline
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.steps_per_epoch = sampler.steps(len(images), batch_size=batch_size, world_size=world_size)
        allowed = math.floor(bad_image_share * self.steps_per_epoch * batch_size)
        self._bad_limit = max(1, allowed) if bad_image_share else 0  # one, unless none at all is asked for
        self._bad_share = bad_image_share
        self._bad: set[int] = set()
        self._requests = _Requests()
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._loader: DataLoader[Made] = DataLoader(
            ViewMaker(  # type: ignore[arg-type]
                None if isinstance(images, ImageStream) else images,
                views,
                seed=seed,
                pipeline=pipeline,
                recycled=BUFFERS if device.type == "cuda" else 0,
            ),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
        )

    def epoch(self, epoch: int, *, stage: Stage = "mutual_information", start_sample: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from position `start_sample` of its permutation (over all ranks).

        Raises:
            UserError: too many images cannot be read, or a data worker died.
        """
        assert stage in STAGES, stage
        self._requests.plan = self._plan(epoch, stage, start_sample)
        bad: set[int] = set()
        if self._copy_stream is None:
            for made, wait_s in self._made(bad):
                yield self._batch(self._on_cpu(made), made, wait_s)
            return
        # One batch ahead: while step t trains, batch t + 1 is copied and coloured on the other stream.
        ahead: tuple[list[Tensor], torch.cuda.Event, Made] | None = None
        for made, wait_s in self._made(bad):
            coming = (*self._on_gpu(made), made)
            if ahead is not None:
                yield self._batch(self._arrived(*ahead[:2]), ahead[2], wait_s)
            ahead = coming
        if ahead is not None:
            yield self._batch(self._arrived(*ahead[:2]), ahead[2], 0.0)

    def close(self) -> None:
        """Stop the workers; the loader can be used again, which starts new ones."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _plan(self, epoch: int, stage: Stage, start_sample: int) -> Iterator[Request]:
        if isinstance(self._images, ImageStream):
            return self._images.requests(
                seed=self._seed,
                epoch=epoch,
                stage=stage,
                batch_size=self._batch_size,
                rank=self._rank,
                world_size=self._world_size,
                start_sample=start_sample,
            )
        batches = sampler.batches(
            len(self._images),
            seed=self._seed,
            epoch=epoch,
            batch_size=self._batch_size,
            rank=self._rank,
            world_size=self._world_size,
            start_sample=start_sample,
        )
        return (Request(epoch, stage, indices) for indices in batches)

    def _made(self, bad: set[int]) -> Iterator[tuple[Made, float]]:
        """What the workers made, with the seconds waited for it; unreadable images are named and counted here."""
        began = time.perf_counter()
        try:
            iterator = self._iterator()
            while True:
                made = next(iterator)
                wait_s = time.perf_counter() - began
                if made.failure is not None:
                    raise UserError(made.failure)
                self._count_unreadable(made.unreadable, bad)
                yield made, wait_s
                began = time.perf_counter()
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # Killed in the middle of handing over a batch, a worker shows as a broken connection.
            if "DataLoader worker" not in str(error) and not self._worker_is_dead():
                raise
            remedy = (
                "lower data.workers, or give the container more (docker run --shm-size), then start again with "
                "--resume; a smaller run.batch_size, in a new run, takes less too"
            )
            lost = RuntimeError(
                f"DataLoader worker: {str(error) or type(error).__name__}"
            )  # a torn pipe looks like any
            raise UserError(describe(lost, worker=remedy)) from None

    def _worker_is_dead(self) -> bool:
        workers = getattr(getattr(self._loader, "_iterator", None), "_workers", [])
        # A broken connection is seen before the process is gone.
        until = time.monotonic() + (DEATH_S if workers else 0)
        while all(worker.is_alive() for worker in workers):
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        return True

    def _iterator(self) -> Iterator[Made]:
        """The loader's iterator, without torch's SIGCHLD handler.

        That handler raises wherever the program happens to be, in the middle of a checkpoint or of the logging. Without
        it a dead worker is found where its batch is waited for, at most five seconds later.
        """
        ours = signal.getsignal(signal.SIGCHLD)
        if getattr(ours, "__module__", "").startswith("torch."):  # another loader's, from before
            ours = signal.SIG_DFL
        iterator = iter(self._loader)
        if threading.current_thread() is threading.main_thread() and ours is not None:
            signal.signal(signal.SIGCHLD, ours)
        return iterator

    def _count_unreadable(self, unreadable: dict[int, str], bad: set[int]) -> None:
        for index, message in unreadable.items():
            if index not in self._bad:
                print(f"{message.rstrip('.')}; another image takes its place.", file=sys.stderr, flush=True)
        self._bad.update(unreadable)
        bad.update(unreadable)
        if len(bad) > self._bad_limit:
            raise UserError(
                f"{len(bad)} images of this epoch cannot be read (named above), more than data.bad_image_share = "
                f"{self._bad_share} allows ({self._bad_limit} of {self.steps_per_epoch * self._batch_size} on a rank): "
                "mend them, or raise the share, and go on with --resume; without them it is a new run."
            )

    def _batch(self, views: list[Tensor], made: Made, wait_s: float) -> Batch:
        assert made.indices is not None
        return Batch(views, made.indices, made.labels, wait_s, len(self._bad))

    def _on_cpu(self, made: Made) -> list[Tensor]:
        views = (
            made.groups if self._pipeline == "cpu" else finish_on_cpu(made.groups, made.records, batch=self._batch_size)
        )
        return [view.to(self._device) for view in views]

    def _on_gpu(self, made: Made) -> tuple[list[Tensor], torch.cuda.Event]:
        """Copy and finish a batch on the loader's own stream; nothing here waits, but for the first batch."""
        assert self._copy_stream is not None
        with torch.cuda.device(self._device), torch.cuda.stream(self._copy_stream):
            views = [group.to(self._device, non_blocking=True) for group in made.groups]
            if self._pipeline == "device":
                parameters = [photometric.prepare(records).to(self._device) for records in made.records]
                views = [photometric.apply(crops, part) for crops, part in zip(views, parameters)]
            ready = torch.cuda.Event()
            ready.record(self._copy_stream)
        return views, ready

    def _arrived(self, views: list[Tensor], ready: torch.cuda.Event) -> list[Tensor]:
        """Make the training stream wait (not the host), and tell the allocator who uses the memory now."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ready)
        for view in views:
            view.record_stream(current)
        return views


def _as_it_is(made: Any) -> Any:
    return made


def _start_worker(_: int) -> None:
    """Let the training process alone decide what a signal means; a worker that dies early would look like a crash."""
    torch.set_num_threads(1)
    gc.freeze()  # what the fork brought along is never garbage; collecting would only copy its pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)


def _ignore_once(_: int, __: FrameType | None) -> None:
    # The first SIGTERM is the scheduler's, sent to the whole group: the training process saves and ends the workers.
    # A second one is meant for this process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
