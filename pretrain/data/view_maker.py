"""What a data worker does: read a batch of images once each, cut their views, and in CPU mode finish them.

A request carries everything that decides the pixels (epoch, stage, image numbers), so workers hold no state that
changes. An image that cannot be read is replaced by one that depends on (seed, epoch, index) alone, and is named to the
loader.

A JPEG of several megapixels is decoded at a half, a quarter or an eighth of its size when every crop of it still has
pixels to spare: libjpeg can leave out the fine ones of its 8 × 8 cosine coefficients. torchvision has no such decode,
Pillow does (`draft`). The rule is Pillow's own `reducing_gap` of 2: at least two decoded pixels for each pixel of the
view, in both directions; crop edges move by at most a quarter of a pixel.

Shapes: `B` images a rank, `V` views, `S` side; view-major: row v·B + b is view v of image b.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info

from twist.contracts.errors import UserError
from twist.contracts.images import MAX_PIXELS, UnreadableImage, decode, open_picture
from twist.pretrain.config import ViewsConfig
from twist.pretrain.data.source import Images, Request, replacements
from twist.pretrain.data.views import STAGES, VIEW, Draw, ViewSampler, cut, plan_views, resolutions

PipelineName = Literal["device", "cpu"]

# Pillow's recommendation for `reducing_gap`: the decoded pixels kept for each that is wanted.
GAP = 2
# JPEGs below this many bytes are hardly ever large enough; their header is not read twice.
PROBE_FROM_BYTES = 150_000
_ORIENTATION = 0x0112
_JPEG = b"\xff\xd8\xff"


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

    def pin_memory(self) -> Made:
        """For the DataLoader's pinning thread."""
        self.groups = [group.pin_memory() for group in self.groups]
        return self


class ViewMaker:
    """The DataLoader's data set: `maker[request]` is the batch.

    It is in shared memory when a worker makes it, or always with `shared` (to measure what a worker does). With
    `recycled`, that memory is one of so many buffers in turn, because the kernel clears fresh pages, which takes as
    long as writing them; a batch must then be copied before another `recycled` of them are asked for.
    """

    def __init__(
        self,
        images: Images,
        views: ViewsConfig,
        *,
        seed: int,
        pipeline: PipelineName,
        shared: bool = False,
        recycled: int = 0,
    ) -> None:
        self._images, self._seed, self._shared, self._finished = images, seed, shared, pipeline == "cpu"
        self._buffers = itertools.cycle([_Buffers() for _ in range(recycled)]) if recycled else None
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
        if shared and self._buffers is not None:
            return next(self._buffers).like(shapes, dtype)
        return [_empty(shape, dtype, shared=shared) for shape in shapes]

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
        """Pixels, records (V,) and number of the image at `place`, or of the first readable replacement.

        The replacement is cut with the numbers of the image it replaces: shown twice, it is not the same twice.
        """
        asked, encoded = int(request.indices[place]), request.encoded
        # Of a stream, another image of the batch takes the place.
        pool = len(self._images) if encoded is None else len(encoded)
        others = replacements(pool, seed=self._seed, epoch=request.epoch, index=asked)
        for candidate in itertools.chain([asked if encoded is None else place], others):
            index = candidate if encoded is None else int(request.indices[candidate])
            try:
                data = self._images.encoded(index) if encoded is None else encoded[candidate]
                name = self._images.name(index) if encoded is None else f"{index:016x} of the stream"
                return *picture(
                    data, name, functools.partial(draw.place, place), self._sizes, self._images.max_pixels
                ), index
            except UnreadableImage as error:
                unreadable[index] = str(error)
        raise UserError(
            f"{len(unreadable)} unreadable images were met while one batch was made, and no readable one in their "
            f"place; the first: {next(iter(unreadable.values()))}. Check data.root."
        )


def picture(
    data: bytes, name: str, place: Callable[..., np.ndarray], sizes: np.ndarray, max_pixels: int = MAX_PIXELS
) -> tuple[Tensor, np.ndarray]:
    """Decoded pixels (3, H, W), of a large JPEG perhaps fewer than it has, and the records (V,) whose boxes fit them.

    `place` is `Draw.place` of this image, which takes `height` and `width`; `sizes` are the sides of the views (V,).
    """
    size = upright_size(data)
    if size is not None and size[0] * size[1] <= max_pixels:
        views = place(height=size[0], width=size[1])
        reduction = divisor(views["box"], sizes)
        image = decode_reduced(data, reduction) if reduction > 1 else None
        if image is not None:
            views["box"] = shrink_boxes(views["box"], size, (image.shape[1], image.shape[2]))
            return image, views
    image = decode(data, name=name, max_pixels=max_pixels)
    return image, place(height=image.shape[1], width=image.shape[2])


def upright_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) as shown of a JPEG that may be large, from its header; None for everything else."""
    if len(data) < PROBE_FROM_BYTES or not data.startswith(_JPEG):
        return None
    try:
        with open_picture(data) as image:
            if image.mode != "RGB":
                return None
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except UnreadableImage:  # the full decode says what is wrong with the file
        return None
    return (width, height) if turned else (height, width)


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
    """The photometric part of device mode when the device is the CPU.

    Image by image, as CPU mode does it: the same shapes in the same order give the same bits.
    """
    finished, batch = [torch.empty(crops.shape, dtype=torch.float32) for crops in made.groups], len(made.indices)
    for out, crops, drawn in zip(finished, made.groups, made.records):
        for place in range(batch):
            rows = slice(place, None, batch)
            _photometric_cpu().apply_each(crops[rows], drawn[rows], out[rows])
    return finished


class _Buffers:
    """Shared memory for one batch, made when it is first asked for and the same from then on."""

    _made: tuple[Tensor, ...] = ()

    def like(self, shapes: list[tuple[int, int, int, int]], dtype: torch.dtype) -> list[Tensor]:
        if [tuple(made.shape) for made in self._made] != shapes:
            self._made = tuple(_empty(shape, dtype, shared=True) for shape in shapes)
        return [made.view_as(made) for made in self._made]  # only the memory is shared with the caller


def _photometric_cpu() -> ModuleType:
    """Importing the compiler takes a second, which a run on a GPU does not need."""
    from twist.pretrain.data import photometric_cpu

    photometric_cpu.compile_it()
    return photometric_cpu


def _empty(shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool) -> Tensor:
    """An uninitialised tensor; uint8 with channels last in memory, as crops come.

    Shared memory is mapped by the training process, as with torch's own collation, but without a copy of the batch.
    """
    count, channels, height, width = shape
    size = count * channels * height * width * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size) if shared else torch.UntypedStorage(size)
    channels_last = (1, width * channels, channels)
    strides = channels_last if dtype == torch.uint8 else (height * width, width, 1)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, (channels * height * width, *strides))
