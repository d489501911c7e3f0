"""The loader of the pretrainer: every image decoded once a step, V views cut from it, on the device and normalised.

Which images, which views and which pixels are a pure function of (seed, epoch, stage, image), so a run continues at any
sample at once, with any number of workers. Streams promise less (`data/source.py`). An image that cannot be read is
replaced by one that depends on (seed, epoch, index) alone, and named.

Two pipelines: `device` sends uint8 crops and does the photometric part for the whole batch on the training device, on a
CUDA stream of its own; `cpu` does everything in workers. On CPU both give the same bits.

Shapes: `B` images a rank, `V` views, `L` local ones, `S` side of a view, `G` and `l` sides of a global and a local one;
view-major: row v·B + b is view v of image b.
"""

import functools
import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from twist.contracts.errors import UserError
from twist.contracts.failures import describe
from twist.contracts.images import UnreadableImage, decode, open_picture, upright
from twist.pretrain.config import PretrainConfig, ViewsConfig
from twist.pretrain.data import photometric, source
from twist.pretrain.data.source import Images, RankShare, Request, replacements
from twist.pretrain.data.views import STAGES, VIEW, Draw, Stage, ViewSampler, cut, plan_views, resolutions

# A JPEG of several megapixels is decoded at a half, a quarter or an eighth of its size, which libjpeg can do by leaving
# out fine coefficients, where every crop keeps so many decoded pixels for each of the view's, in both directions
# (Pillow's own `reducing_gap`); crop edges move by at most a quarter of a pixel. torchvision has no such decode.
GAP = 2
# JPEGs below this many bytes are hardly ever large enough; their header is not read twice.
PROBE_FROM_BYTES = 150_000
_JPEG = b"\xff\xd8\xff"
# Batches that a worker may have made or in the making and not handed over.
PREFETCH = 2
# Buffers that a worker writes into in turn, where batches are pinned: what has been handed over has then been copied.
BUFFERS = PREFETCH + 1
# Unreadable images below which a run goes on, whatever their share.
FEW_BAD = 20
CPU = torch.device("cpu")


# --- in a worker ------------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """A batch. `groups`: a tensor a resolution, uint8 crops (device mode) or finished float32 (CPU mode).

    `records`: the views' parameters a resolution, (v·B,) of dtype VIEW. `indices` (B,): of the images shown. `failure`:
    the sentence of a `UserError`, because an exception that crosses processes arrives with the worker's traceback.
    """

    groups: list[Tensor]
    records: list[np.ndarray]
    indices: Tensor
    unreadable: dict[int, str] = field(default_factory=dict)
    failure: str | None = None

    def pin_memory(self) -> Self:
        """For the DataLoader's pinning thread."""
        self.groups = [group.pin_memory() for group in self.groups]
        return self


class ViewMaker:
    """The DataLoader's data set: `maker[request]` is the batch, in shared memory when a worker makes it, or when
    `shared`.

    With `recycled`, that memory is one of so many buffers in turn, because the kernel clears fresh pages, which takes
    as long as writing them; a batch must then be copied before another `recycled` of them are asked for.
    """

    def __init__(
        self,
        images: Images,
        views: ViewsConfig,
        *,
        seed: int,
        pipeline: Literal["device", "cpu"],
        shared: bool = False,
        recycled: int = 0,
    ) -> None:
        self._images, self._seed, self._shared, self._finished = images, seed, shared, pipeline == "cpu"
        self._buffers = itertools.cycle([dict[Any, list[Tensor]]() for _ in range(recycled)]) if recycled else None
        self._samplers = {stage: ViewSampler(plan_views(views, stage)) for stage in STAGES}
        self._groups = resolutions(plan_views(views))
        self._sizes = np.array([size for count, size in self._groups for _ in range(count)])  # (V,)
        if self._finished:
            _photometric_cpu()  # compiled here, once, before there are workers that would each do it

    def __getitem__(self, request: Request) -> Made:
        batch = len(request.indices)
        records = [np.empty(count * batch, dtype=VIEW) for count, _ in self._groups]
        made = Made(self._empty_groups(batch), records, torch.empty(batch, dtype=torch.int64))
        draw = self._samplers[request.stage].draw(self._seed, epoch=request.epoch, indices=request.indices)
        try:
            for place in range(batch):
                image, views, made.indices[place] = self._readable(request, draw, place, made.unreadable)
                rows, begin = slice(place, None, batch), 0
                for group, records_of_group in zip(made.groups, made.records):
                    out = group[rows]  # (count, 3, S, S)
                    records_of_group[rows] = drawn = views[begin : begin + len(out)]
                    begin += len(out)
                    self._cut(image, drawn, out)
        except UserError as error:
            made.failure = str(error)
        return made

    def _empty_groups(self, batch: int) -> list[Tensor]:
        shared = self._shared or get_worker_info() is not None
        dtype = torch.float32 if self._finished else torch.uint8
        shapes = [(count * batch, 3, size, size) for count, size in self._groups]
        if not shared or self._buffers is None:
            return [_empty(shape, dtype, shared=shared) for shape in shapes]
        buffer = next(self._buffers)
        if batch not in buffer:
            buffer[batch] = [_empty(shape, dtype, shared=True) for shape in shapes]
        return [made.view_as(made) for made in buffer[batch]]  # only the memory is shared with the caller

    def _cut(self, image: Tensor, drawn: np.ndarray, out: Tensor) -> None:
        """The views `drawn` of `image` into `out` (count, 3, S, S), finished in CPU mode."""
        boxes = drawn["box"].tolist()
        if not self._finished:
            for view, box in zip(out, boxes):
                cut(image, box, out=view)
            return
        # One crop at a time, and all in one place: it is coloured while it is in the cache.
        crop = _empty((1, *out.shape[1:]), torch.uint8, shared=False)[0]
        _photometric_cpu().apply_each((cut(image, box, out=crop) for box in boxes), drawn, out)

    def _readable(
        self, request: Request, draw: Draw, place: int, unreadable: dict[int, str]
    ) -> tuple[Tensor, np.ndarray, int]:
        """Pixels, records (V,) and number of the image at `place`, or of the first readable replacement, which is cut
        with the numbers of the image it replaces: shown twice, it is not the same twice."""
        asked, encoded = int(request.indices[place]), request.encoded
        # Of a stream, another image of the batch takes the place.
        pool = len(self._images) if encoded is None else len(encoded)
        others = replacements(pool, seed=self._seed, epoch=request.epoch, index=asked)
        for candidate in itertools.chain([asked if encoded is None else place], others):
            index = candidate if encoded is None else int(request.indices[candidate])
            try:
                data = self._images.encoded(index) if encoded is None else encoded[candidate]
                name = self._images.name(index) if encoded is None else f"{index:016x} of the stream"
                return *self._picture(data, name, functools.partial(draw.place, place)), index
            except UnreadableImage as error:
                unreadable[index] = str(error)
        raise UserError(
            f"{len(unreadable)} unreadable images were met while one batch was made, and no readable one in their "
            f"place; the first: {next(iter(unreadable.values()))}. Check data.root."
        )

    def _picture(self, data: bytes, name: str, place: Callable[..., np.ndarray]) -> tuple[Tensor, np.ndarray]:
        """Pixels (3, H, W), of a large JPEG perhaps fewer than it has, and the records (V,) whose boxes fit them."""
        most, size = self._images.max_pixels, upright_size(data)
        if size is not None and size[0] * size[1] <= most:
            views = place(height=size[0], width=size[1])
            reduction = divisor(views["box"], self._sizes)
            image = decode_reduced(data, reduction) if reduction > 1 else None
            if image is not None:
                views["box"] = shrink_boxes(views["box"], size, (image.shape[1], image.shape[2]))
                return image, views
        image = decode(data, name=name, max_pixels=most)
        return image, place(height=image.shape[1], width=image.shape[2])


def upright_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) as shown of a JPEG that may be large, from its header; None for everything else."""
    if len(data) < PROBE_FROM_BYTES or not data.startswith(_JPEG):
        return None
    try:
        with open_picture(data) as image:
            return upright(image)[::-1] if image.mode == "RGB" else None
    except UnreadableImage:  # the full decode says what is wrong with the file
        return None


def divisor(boxes: np.ndarray, sizes: np.ndarray) -> int:
    """The largest of 8, 4, 2 that leaves `GAP` pixels a view pixel for all boxes (V, 4) and view sides (V,), else 1."""
    spare = (boxes[:, 2:].min(axis=1) / (GAP * sizes)).min()
    return next((reduction for reduction in (8, 4, 2) if spare >= reduction), 1)


def decode_reduced(data: bytes, reduction: int) -> Tensor | None:
    """uint8 RGB (3, ⌈H/reduction⌉, ⌈W/reduction⌉), upright; None when Pillow cannot, and the full decode decides."""
    try:
        with open_picture(data) as image:
            image.draft("RGB", (image.width // reduction, image.height // reduction))
            pixels = np.array(ImageOps.exif_transpose(image))
    except UnreadableImage:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)  # channels stay last in memory, as `cut` wants them


def shrink_boxes(boxes: np.ndarray, full: tuple[int, int], reduced: tuple[int, int]) -> np.ndarray:
    """The boxes (V, 4) of an image of size `full` in its decode of size `reduced`, edges rounded to whole pixels."""
    ratio = np.array(reduced) / np.array(full)  # (2,): height, width
    begin = np.rint(boxes[:, :2] * ratio).astype(np.int32)
    end = np.minimum(np.rint((boxes[:, :2] + boxes[:, 2:]) * ratio), reduced).astype(np.int32)
    return np.concatenate([begin, end - begin], axis=1)


def finish_on_cpu(made: Made) -> list[Tensor]:
    """The photometric part of device mode when the device is the CPU: image by image, as CPU mode does it, because the
    same shapes in the same order give the same bits."""
    finished, batch = [torch.empty(crops.shape, dtype=torch.float32) for crops in made.groups], len(made.indices)
    for out, crops, drawn in zip(finished, made.groups, made.records):
        for place in range(batch):
            rows = slice(place, None, batch)
            _photometric_cpu().apply_each(crops[rows], drawn[rows], out[rows])
    return finished


def _photometric_cpu() -> ModuleType:
    """Importing the compiler takes a second, which a run on a GPU does not need."""
    from twist.pretrain.data import photometric_cpu

    photometric_cpu.compile_it()
    return photometric_cpu


def _empty(shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool) -> Tensor:
    """An uninitialised tensor; uint8 with channels last in memory, as crops come. Shared memory is mapped by the
    training process, as with torch's own collation, but without a copy of the batch."""
    count, channels, height, width = shape
    size = count * channels * height * width * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size) if shared else torch.UntypedStorage(size)
    channels_last = (1, width * channels, channels)
    strides = channels_last if dtype == torch.uint8 else (height * width, width, 1)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, (channels * height * width, *strides))


# --- in the training process ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One step's input of this rank.

    `views`: a tensor a resolution, view-major: (2·B, 3, G, G), then (L·B, 3, l, l); float32, normalised, on the device.
    `indices` (B,) int64, on the CPU. `bad_images`: unreadable ones that this loader has met so far.
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


class ViewLoader:
    """Batches of views of `images`, on `device`; workers are started once and stay until `close()`. `UserError` when
    there are fewer images than one total batch."""

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
        self._images, self._device, self._data = images, device, data
        # At least 19 in an epoch, unless none at all is allowed.
        allowed = int(data.bad_image_share * steps * batch_size)
        self._bad_limit = max(FEW_BAD - 1, allowed) if data.bad_image_share else 0
        self._bad: set[int] = set()
        self._requests = _Requests()
        self._copy_stream = torch.cuda.Stream(device) if on_gpu else None
        recycled = BUFFERS if on_gpu else 0
        self._loader: DataLoader[Made] = DataLoader(
            ViewMaker(images, config.views, seed=config.run.seed, pipeline=data.pipeline, recycled=recycled),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._requests,
            num_workers=data.workers,
            prefetch_factor=PREFETCH if data.workers else None,
            persistent_workers=data.workers > 0,
            pin_memory=on_gpu,
            worker_init_fn=_start_worker,
        )

    def epoch(self, epoch: int, *, stage: Stage = "mutual_information", start_sample: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from position `start_sample` of its permutation (over all ranks);
        `UserError` when more than `data.bad_image_share` of them cannot be read, or a data worker died."""
        self._requests.plan = self._images.requests(self._share, epoch=epoch, stage=stage, start_sample=start_sample)
        if self._copy_stream is None:
            for made, wait_s in self._made():
                views = made.groups if self._data.pipeline == "cpu" else finish_on_cpu(made)
                yield Batch(views, made.indices, wait_s, len(self._bad))
            return
        # One batch ahead: while step t trains, batch t + 1 is copied and coloured on the other stream.
        ahead: tuple[list[Tensor], torch.cuda.Event, Tensor] | None = None
        for coming, wait_s in itertools.chain(self._made(), [(None, 0.0)]):
            sent = None if coming is None else (*self._on_gpu(coming, self._copy_stream), coming.indices)
            if ahead is not None:
                views, ready, indices = ahead
                # The training stream waits, not the host, and the allocator is told who uses the memory now.
                current = torch.cuda.current_stream(self._device)
                current.wait_event(ready)
                for view in views:
                    view.record_stream(current)
                yield Batch(views, indices, wait_s, len(self._bad))
            ahead = sent

    def close(self) -> None:
        """Stop the workers; the loader can be used again, which starts new ones."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _made(self) -> Iterator[tuple[Made, float]]:
        """What the workers made, with the seconds waited for it; unreadable images are named and counted here."""
        began, bad = time.perf_counter(), set[int]()
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
        """The loader's iterator, without torch's SIGCHLD handler, which raises in the middle of anything. Without it a
        dead worker is found where its batch is waited for, at most five seconds later."""
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
                f"{self._data.bad_image_share} allows ({self._bad_limit} on a rank): repair them, or raise the share, "
                "and go on with --resume."
            )

    def _on_gpu(self, made: Made, stream: torch.cuda.Stream) -> tuple[list[Tensor], torch.cuda.Event]:
        """Copy and finish a batch on the loader's own stream; only the first batch waits."""
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            views = [group.to(self._device, non_blocking=True) for group in made.groups]
            if self._data.pipeline == "device":
                parameters = [photometric.prepare(records).to(self._device) for records in made.records]
                views = [photometric.apply(crops, part) for crops, part in zip(views, parameters)]
            ready = torch.cuda.Event()
            ready.record(stream)
        return views, ready


def _start_worker(_: int) -> None:
    """Leave signals to the training process; a worker that dies early would look like a crash."""
    torch.set_num_threads(1)
    gc.freeze()  # what the fork brought along is never garbage; collecting would only copy its pages
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The first SIGTERM is the scheduler's, to the whole group; a second one is meant for this process.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
