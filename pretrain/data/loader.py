"""The loader of the pretrainer: every image decoded once a step, V views cut from it, on the device and normalised.

Which images, which views and which pixels are a pure function of (seed, epoch, stage, image), so a run continues at any
sample at once, with any number of workers. Streams promise less (`data/source.py`).

Two pipelines make the same pictures: `device` sends uint8 crops and does the photometric part for the whole batch on
the training device, on a CUDA stream of its own and one batch ahead; `cpu` does everything in workers. On CPU both give
the same bits; on a GPU they differ by float rounding.

Shapes: `B` images a rank, `L` local views, `G` and `l` sides of a global and a local view, `W` ranks.
"""

import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from twist.contracts.errors import UserError
from twist.contracts.failures import describe
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data import photometric, source
from twist.pretrain.data.source import Images, RankShare, Request
from twist.pretrain.data.view_maker import Made, ViewMaker, finish_on_cpu
from twist.pretrain.data.views import Stage

# Batches that a worker may have made or in the making and not handed over.
PREFETCH = 2
# Buffers that a worker writes into in turn, where batches are pinned: what has been handed over has then been copied.
BUFFERS = PREFETCH + 1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """One step's input of this rank.

    `views`: a tensor a resolution, view-major: (2·B, 3, G, G), then (L·B, 3, l, l); float32, normalised, on the device.
    `indices` (B,) int64: of the images shown, on the CPU. `data_wait_s`: how long the caller waited for it.
    `bad_images`: unreadable images met by this loader so far.
    """

    views: list[Tensor]
    indices: Tensor
    data_wait_s: float
    bad_images: int


class _Requests:
    """The DataLoader's sampler: yields what `plan` was last set to. It stays in the training process."""

    plan: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.plan


# Unreadable images below which a run goes on, whatever their share.
FEW_BAD = 20


class ViewLoader:
    """Batches of views of `images`, on `device`; workers are started once and stay until `close()`.

    Raises:
        UserError: there are fewer images than one total batch.
    """

    def __init__(
        self, images: Images, config: PretrainConfig, *, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> None:
        data, batch_size, on_gpu = config.data, config.run.batch_size, device.type == "cuda"
        self._share = RankShare(config.run.seed, batch_size, rank, world_size)
        steps = source.steps(len(images), self._share)
        if not steps:
            raise UserError(
                f"There are {len(images)} images, fewer than one total batch of {batch_size * world_size} "
                f"({batch_size} on each of {world_size} rank(s)): lower run.batch_size to "
                f"{max(len(images) // world_size, 1)} or less, or add images."
            )
        self._images, self._device, self._pipeline = images, device, data.pipeline
        self._bad_share = data.bad_image_share
        self._images_per_epoch = steps * batch_size
        # At least 19, unless none at all is allowed.
        allowed = int(self._bad_share * self._images_per_epoch)
        self._bad_limit = max(FEW_BAD - 1, allowed) if self._bad_share else 0
        self._bad: set[int] = set()
        self._requests = _Requests()
        self._copy_stream = torch.cuda.Stream(device) if on_gpu else None
        recycled = BUFFERS if on_gpu else 0
        self._loader: DataLoader[Made] = DataLoader(
            ViewMaker(images, config.views, seed=config.run.seed, pipeline=data.pipeline, recycled=recycled),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._requests,
            collate_fn=_unchanged,
            num_workers=data.workers,
            prefetch_factor=PREFETCH if data.workers else None,
            persistent_workers=data.workers > 0,
            pin_memory=on_gpu,
            worker_init_fn=_start_worker,
        )

    def epoch(self, epoch: int, *, stage: Stage = "mutual_information", start_sample: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from position `start_sample` of its permutation (over all ranks).

        Raises:
            UserError: more than `data.bad_image_share` of them cannot be read, or a data worker died.
        """
        self._requests.plan = self._images.requests(self._share, epoch=epoch, stage=stage, start_sample=start_sample)
        bad: set[int] = set()
        if self._copy_stream is None:
            for made, wait_s in self._made(bad):
                yield Batch(self._on_cpu(made), made.indices, wait_s, len(self._bad))
            return
        # One batch ahead: while step t trains, batch t + 1 is copied and coloured on the other stream.
        ahead: tuple[list[Tensor], torch.cuda.Event, Tensor] | None = None
        for coming, wait_s in itertools.chain(self._made(bad), [(None, 0.0)]):
            sent = None if coming is None else (*self._on_gpu(coming), coming.indices)
            if ahead is not None:
                yield Batch(self._arrived(*ahead[:2]), ahead[2], wait_s, len(self._bad))
            ahead = sent

    def close(self) -> None:
        """Stop the workers; the loader can be used again, which starts new ones."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _made(self, bad: set[int]) -> Iterator[tuple[Made, float]]:
        """What the workers made, with the seconds waited for it; unreadable images are named and counted here."""
        began = time.perf_counter()
        try:
            for made in self._iterator():
                wait_s = time.perf_counter() - began
                if made.failure is not None:
                    raise UserError(made.failure)
                self._count_unreadable(made.unreadable, bad)
                yield made, wait_s
                began = time.perf_counter()
        except (RuntimeError, OSError, EOFError) as error:
            if not self._loader.num_workers:
                raise
            # A worker that is killed while it hands over a batch shows as a broken connection.
            lost = RuntimeError(f"DataLoader worker: {str(error) or type(error).__name__}")
            remedy = "lower data.workers, or give the container more (docker run --shm-size), then --resume"
            raise UserError(describe(lost, worker=remedy)) from error

    def _iterator(self) -> Iterator[Made]:
        """The loader's iterator, without torch's SIGCHLD handler, which raises in the middle of anything.

        Without it a dead worker is found where its batch is waited for, at most five seconds later.
        """
        before = signal.getsignal(signal.SIGCHLD)
        if getattr(before, "__module__", "").startswith("torch."):  # another loader's
            before = signal.SIG_DFL
        iterator = iter(self._loader)
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)
        return iterator

    def _count_unreadable(self, unreadable: dict[int, str], bad: set[int]) -> None:
        for index in sorted(unreadable.keys() - self._bad):
            print(f"{unreadable[index].rstrip('.')}; another image takes its place.", file=sys.stderr, flush=True)
        self._bad.update(unreadable)
        bad.update(unreadable)
        if len(bad) > self._bad_limit:
            raise UserError(
                f"{len(bad)} images of this epoch cannot be read (named above), more than data.bad_image_share = "
                f"{self._bad_share} allows ({self._bad_limit} of {self._images_per_epoch} on a rank): repair them, or "
                "raise the share, and go on with --resume."
            )

    def _on_cpu(self, made: Made) -> list[Tensor]:
        return made.groups if self._pipeline == "cpu" else finish_on_cpu(made)

    def _on_gpu(self, made: Made) -> tuple[list[Tensor], torch.cuda.Event]:
        """Copy and finish a batch on the loader's own stream; only the first batch waits."""
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


def _unchanged(made: Any) -> Any:
    return made


def _start_worker(_: int) -> None:
    """Leave signals to the training process; a worker that dies early would look like a crash."""
    torch.set_num_threads(1)
    gc.freeze()  # what the fork brought along is never garbage; collecting would only copy its pages
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The first SIGTERM is the scheduler's, to the whole group; a second one is meant for this process.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
