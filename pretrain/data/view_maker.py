"""What a data worker does: read a batch of images once each, cut their views, and in CPU mode finish them.

A request carries everything that decides the pixels (epoch, stage, image numbers), so workers hold no state that
changes and live through all epochs. An image that cannot be read is replaced by one found on a walk that depends on
(seed, epoch, index) alone; it is named to the loader, which counts.

Shapes: `B` images a rank, `V` views, `S` side; view-major: row v·B + b is view v of image b.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from twist.contracts.errors import UserError
from twist.contracts.images import UnreadableImage, decode
from twist.pretrain.config import ViewsConfig
from twist.pretrain.data.reduced_decode import decode_reduced, divisor, shrink_boxes, upright_size
from twist.pretrain.data.sampler import replacements
from twist.pretrain.data.source import ImageSource
from twist.pretrain.data.views import STAGES, VIEW, Draw, Stage, ViewSampler, cut, plan_views, resolutions

PipelineName = Literal["device", "cpu"]


@dataclass(frozen=True)
class Request:
    """One batch to make: image numbers (B,), and for a stream the encoded images themselves."""

    epoch: int
    stage: Stage
    indices: np.ndarray
    encoded: tuple[bytes, ...] | None = None
    labels: tuple[int, ...] | None = None


@dataclass
class Made:
    """What comes back. `groups`: a tensor a resolution, uint8 crops (device mode) or finished float32 (CPU mode).

    `records`: the views' parameters a resolution, (v·B,) of dtype VIEW. `failure`: the sentence of a `UserError`,
    because an exception that crosses processes arrives with the worker's traceback in its message.
    """

    groups: list[Tensor] = field(default_factory=list)
    records: list[np.ndarray] = field(default_factory=list)
    indices: Tensor | None = None
    labels: Tensor | None = None
    unreadable: dict[int, str] = field(default_factory=dict)
    failure: str | None = None

    def pin_memory(self) -> Made:
        """What the DataLoader's pinning thread calls."""
        self.groups = [group.pin_memory() for group in self.groups]
        return self


class ViewMaker:
    """The DataLoader's data set: `maker[request]` is the batch.

    It lies in shared memory when a worker makes it, or always with `shared` (to measure what a worker does). With
    `recycled`, that memory is one of so many buffers in turn: the kernel clears fresh pages, which takes as long as
    writing them. Whoever takes the batches must then have copied one before it asks for another `recycled` of them.
    """

    def __init__(
        self,
        images: ImageSource | None,
        views: ViewsConfig,
        *,
        seed: int,
        pipeline: PipelineName,
        shared: bool = False,
        recycled: int = 0,
    ) -> None:
        self._images = images
        self._shared = shared
        self._buffers = itertools.cycle([_Buffers() for _ in range(recycled)]) if recycled else None
        self._seed = seed
        self._pipeline = pipeline
        self._samplers = {stage: ViewSampler(plan_views(views, stage)) for stage in STAGES}
        self._groups = resolutions(plan_views(views))
        self._sizes = np.array([size for count, size in self._groups for _ in range(count)])  # (V,)
        if pipeline == "cpu":
            _photometric_cpu()  # compiled here, once, before there are workers that would each do it

    def __getitem__(self, request: Request) -> Made:
        try:
            return self._make(request)
        except UserError as error:
            return Made(failure=str(error))

    def _make(self, request: Request) -> Made:
        batch = len(request.indices)
        finished = self._pipeline == "cpu"
        shared = self._shared or get_worker_info() is not None
        dtype = torch.float32 if finished else torch.uint8
        shapes = [(count * batch, 3, size, size) for count, size in self._groups]
        if shared and self._buffers is not None:
            groups = next(self._buffers).like(shapes, dtype)
        else:
            groups = [_empty(shape, dtype, shared=shared) for shape in shapes]
        made = Made(
            groups=groups,
            records=[np.empty(count * batch, dtype=VIEW) for count, _ in self._groups],
        )
        shown = np.empty(batch, dtype=np.int64)
        labels = np.empty(batch, dtype=np.int64)
        labelled = True
        draw = self._samplers[request.stage].draw(self._seed, epoch=request.epoch, indices=request.indices)
        for place in range(batch):
            image, views, shown[place], label = self._readable(request, draw, place, made.unreadable)
            labelled &= label is not None
            labels[place] = -1 if label is None else label
            boxes = views["box"].tolist()
            begin = 0
            for group, (count, size) in enumerate(self._groups):
                drawn = views[begin : begin + count]
                rows = slice(place, None, batch)
                made.records[group][rows] = drawn
                boxes_of_group = boxes[begin : begin + count]
                begin += count
                out = made.groups[group][rows]  # (count, 3, S, S)
                if finished:
                    # One crop at a time, and all in one place: it is coloured while it is in the cache.
                    crop = _empty((1, 3, size, size), torch.uint8, shared=False)[0]
                    crops = (cut(image, box, out=crop) for box in boxes_of_group)
                    _photometric_cpu().apply_each(crops, drawn, out)
                else:
                    for view, box in zip(out, boxes_of_group):
                        cut(image, box, out=view)
        made.indices = torch.from_numpy(shown)
        made.labels = torch.from_numpy(labels) if labelled else None
        return made

    def _readable(
        self, request: Request, draw: Draw, place: int, unreadable: dict[int, str]
    ) -> tuple[Tensor, np.ndarray, int, int | None]:
        """Pixels, records (V,), number and label of the image at `place`, or of the first readable one in its stead.

        The replacement is cut with the numbers of the image it stands for: shown twice, it is not the same twice.
        """
        for candidate in self._candidates(request, place):
            try:
                data, name, label, index = self._encoded(request, candidate)
            except UnreadableImage as error:
                unreadable[candidate] = str(error)
                continue
            try:
                image, views = picture(data, name, functools.partial(draw.place, place), self._sizes)
            except UnreadableImage as error:
                unreadable[index] = str(error)
                continue
            return image, views, index, label
        raise UserError(
            f"{len(unreadable)} unreadable images were met while one batch was made, and no readable one in their "
            f"place; the first: {next(iter(unreadable.values()))}. Check data.root."
        )

    def _candidates(self, request: Request, place: int) -> Iterator[int]:
        """Where to look: image numbers, or for a stream places in the batch; the asked one first."""
        asked = int(request.indices[place])
        yield asked if request.encoded is None else place
        pool = len(self._images) if self._images is not None else len(request.indices)
        yield from replacements(pool, seed=self._seed, epoch=request.epoch, index=asked)

    def _encoded(self, request: Request, candidate: int) -> tuple[bytes, str, int | None, int]:
        """Bytes, name, label and image number of a candidate."""
        if request.encoded is not None:
            index = int(request.indices[candidate])
            label = None if request.labels is None else request.labels[candidate]
            return request.encoded[candidate], f"{index:016x} of the stream", label, index
        assert self._images is not None
        return self._images.encoded(candidate), self._images.name(candidate), self._images.label(candidate), candidate


def picture(data: bytes, name: str, place: Callable[..., np.ndarray], sizes: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Decoded pixels (3, H, W), of a large JPEG perhaps fewer than it has, and the records (V,) whose boxes fit them.

    Args:
        place: `Draw.place` of this image, which takes `height` and `width`. sizes: sides of the views (V,).
    """
    size = upright_size(data)
    if size is not None:
        views = place(height=size[0], width=size[1])
        reduction = divisor(views["box"], sizes)
        image = decode_reduced(data, reduction) if reduction > 1 else None
        if image is not None:
            views["box"] = shrink_boxes(views["box"], size, (image.shape[1], image.shape[2]))
            return image, views
    image = decode(data, name=name)
    return image, place(height=image.shape[1], width=image.shape[2])


def finish_on_cpu(groups: list[Tensor], records: list[np.ndarray], *, batch: int) -> list[Tensor]:
    """The photometric part of device mode when the device is the CPU: image by image, as CPU mode does it.

    The same shapes in the same order, so both modes give the same bits, and one image's views stay in the cache.
    """
    finished = []
    for crops, drawn in zip(groups, records):
        out = torch.empty(crops.shape, dtype=torch.float32)
        for place in range(batch):
            rows = slice(place, None, batch)
            _photometric_cpu().apply_each(crops[rows], drawn[rows], out[rows])
        finished.append(out)
    return finished


class _Buffers:
    """Shared memory for one batch, made when it is first asked for and the same from then on."""

    def __init__(self) -> None:
        self._made: list[Tensor] = []

    def like(self, shapes: list[tuple[int, int, int, int]], dtype: torch.dtype) -> list[Tensor]:
        if [tuple(made.shape) for made in self._made] != shapes:
            self._made = [_empty(shape, dtype, shared=True) for shape in shapes]
        # Tensors of their own: a caller may do with them what it wants, only the memory is lent.
        return [made.view_as(made) for made in self._made]


def _photometric_cpu() -> ModuleType:
    """The compiler that it needs takes a second to import: not for those whose GPU does that part."""
    from twist.pretrain.data import photometric_cpu

    photometric_cpu.compile_it()
    return photometric_cpu


def _empty(shape: tuple[int, int, int, int], dtype: torch.dtype, *, shared: bool) -> Tensor:
    """An uninitialised tensor; uint8 with channels last in memory, as crops come."""
    count, channels, height, width = shape
    bytes_ = count * channels * height * width * dtype.itemsize
    # Shared is the memory that the training process maps: what torch's own collation does, and what saves one copy of
    # the batch.
    storage = torch.UntypedStorage._new_shared(bytes_) if shared else torch.UntypedStorage(bytes_)
    strides = (channels * height * width, 1, width * channels, channels)
    if dtype != torch.uint8:
        strides = (channels * height * width, height * width, width, 1)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)
