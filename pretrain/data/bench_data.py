"""How fast the input pipeline makes views: the published PIL chain, CPU mode and device mode, on the same images.

The figure is images a second a core: images over the CPU seconds of this one process, so what else the machine does
hardly counts. For device mode that is the workers' part alone (decode and crops), because the photometric part runs on
the training device. Every batch ends in shared memory, as a worker's does: fresh for the PIL chain, as torch's
collation makes it; one of a few buffers in turn for ours, as for a run on a GPU. The three take turns, round by round,
and the median of the rounds is given with its spread.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from twist.contracts import machine
from twist.contracts.errors import UserError
from twist.contracts.images import UnreadableImage
from twist.pretrain.config import PretrainConfig, ViewsConfig
from twist.pretrain.data import photometric_cpu, pil_reference
from twist.pretrain.data.loader import BUFFERS, ImageStream, open_images
from twist.pretrain.data.source import ImageSource
from twist.pretrain.data.view_maker import PipelineName, Request, ViewMaker, picture
from twist.pretrain.data.views import ViewSampler, cut, plan_views, resolutions

ROUNDS = 7
WARM_UP_ROUNDS = 1
IMAGES = 32
BATCH = 16
# What GPUs take: `cores_for_gpu` answers for these.
GPU_IMAGES_PER_S = (500, 1000, 2000)


def bench(config: PretrainConfig, *, images: int | None = None) -> dict[str, Any]:
    """Measure on the first `images` (default 32) readable images of `config.data` with `config.views`.

    Returns:
        `images_per_s_core`: {"pil", "cpu", "device"}, medians; `spread`: least and most of the rounds; `speedup` over
        the PIL chain; `shares` of each mode's CPU time in read_and_decode, draw_and_crop, photometric;
        `cores_for_gpu`: for a GPU that takes N images/s, cores by mode; and what was measured on.

    Raises:
        UserError: there are no readable images.
    """
    images = images or IMAGES
    source = open_images(config.data)
    if isinstance(source, ImageStream):
        source = source.first(images)
    chosen = _readable(source, images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        works = modes(source, chosen, config.views)
        rounds = [{name: _cpu_s(work) for name, work in works.items()} for _ in range(WARM_UP_ROUNDS + ROUNDS)]
        shares = {"pil": _pil_shares(source, chosen, config.views), **shares_of_ours(source, chosen, config.views)}
    finally:
        torch.set_num_threads(threads)
    rates = {name: [len(chosen) / once[name] for once in rounds[WARM_UP_ROUNDS:]] for name in works}
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "images_per_s_core": median,
        "spread": {name: [min(values), max(values)] for name, values in rates.items()},
        "speedup": {name: median[name] / median["pil"] for name in ("cpu", "device")},
        "shares": shares,
        "cores_for_gpu": {
            str(rate): {name: math.ceil(rate / value) for name, value in median.items()} for rate in GPU_IMAGES_PER_S
        },
        "views": [{"count": count, "size": size} for count, size in resolutions(plan_views(config.views))],
        "images": len(chosen),
        "median_size": _median_size(source, chosen),
        "rounds": ROUNDS,
        "seconds": "CPU time of one process with one thread",
        "hardware": machine.hardware(),
        "software": machine.software(),
    }


def render(result: dict[str, Any]) -> str:
    """The result of `bench` as a few lines for a terminal."""
    size, hardware, software = result["median_size"], result["hardware"], result["software"]
    views = " + ".join(f"{group['count']} × {group['size']}²" for group in result["views"])
    lines = [
        f"{hardware['processor']}, torch {software['torch']}; {result['images']} images (median {size['height']} × "
        f"{size['width']}, {size['kilobytes']:.0f} kB), {views} views each, median of {result['rounds']} rounds",
        "",
        "            images/s a core    of PIL    decode   crops   photometric",
    ]
    titles = {"pil": "PIL chain", "cpu": "cpu", "device": "device"}
    for name, title in titles.items():
        low, high = result["spread"][name]
        rate = f"{result['images_per_s_core'][name]:.0f} ({low:.0f}–{high:.0f})"
        times = f"{result['speedup'][name]:.1f} ×" if name in result["speedup"] else "1 ×"
        share = result["shares"][name]
        photometric_share = f"{share['photometric']:.0%}" if "photometric" in share else "on the device"
        lines.append(
            f"{title:<10}  {rate:>15}  {times:>8}  {share['read_and_decode']:>8.0%}  {share['draw_and_crop']:>6.0%}  "
            f"{photometric_share:>12}"
        )
    lines.append("")
    for rate, cores in result["cores_for_gpu"].items():
        plural = "" if cores["device"] == 1 else "s"
        lines.append(
            f"A GPU that takes {rate} images/s needs {cores['device']} core{plural} in device mode, {cores['cpu']} in "
            f"cpu mode, {cores['pil']} with PIL."
        )
    return "\n".join(lines)


def _readable(source: ImageSource, wanted: int) -> np.ndarray:
    """The numbers of the first `wanted` images that decode; the measurement is not one of error handling."""
    found: list[int] = []
    for index in range(len(source)):
        if len(found) == wanted:
            break
        try:
            source.decode(index)
        except UnreadableImage:
            continue
        found.append(index)
    if not found:
        raise UserError(f"None of the {len(source)} images can be read: check data.root.")
    return np.array(found)


def modes(source: ImageSource, chosen: np.ndarray, views: ViewsConfig) -> dict[str, Callable[[], None]]:
    """What is measured, by name: each makes the views of all chosen images once."""
    return {
        "pil": lambda: _pil(source, chosen, views),
        "cpu": _maker(source, chosen, views, "cpu"),
        "device": _maker(source, chosen, views, "device"),
    }


def _maker(source: ImageSource, chosen: np.ndarray, views: ViewsConfig, pipeline: PipelineName) -> Callable[[], None]:
    """What a worker of this mode does for the chosen images, in small batches."""
    maker = ViewMaker(source, views, seed=0, pipeline=pipeline, shared=True, recycled=BUFFERS)

    def work() -> None:
        for begin in range(0, len(chosen), BATCH):
            made = maker[Request(0, "mutual_information", chosen[begin : begin + BATCH])]
            assert made.failure is None, made.failure

    return work


def _pil(source: ImageSource, chosen: np.ndarray, views: ViewsConfig) -> None:
    plan = plan_views(views)
    sampler, sizes = ViewSampler(plan), [view.size for view in plan]
    for begin in range(0, len(chosen), BATCH):
        batch = chosen[begin : begin + BATCH]
        draw = sampler.draw(0, epoch=0, indices=batch)
        made = []
        for place, index in enumerate(batch.tolist()):
            image = pil_reference.decode(source.encoded(index))
            records = draw.place(place, height=image.height, width=image.width)
            made.append(
                [
                    pil_reference.normalise(
                        pil_reference.photometric(pil_reference.crop(image, record["box"], size), record)
                    )
                    for record, size in zip(records, sizes)
                ]
            )
        # A worker's last work: each view of all images into one tensor of shared memory, as torch's collation does.
        for view in zip(*made):
            shape = (len(view), *view[0].shape)
            storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
            torch.stack(view, out=torch.empty(0).set_(storage).view(shape))


class _Stopwatch:
    """CPU seconds by part of the work."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, part: str) -> None:
        now = time.process_time()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def shares(self, *parts: str) -> dict[str, float]:
        total = sum(self._seconds[part] for part in parts)
        return {part: self._seconds[part] / total for part in parts}


def shares_of_ours(source: ImageSource, chosen: np.ndarray, views: ViewsConfig) -> dict[str, dict[str, float]]:
    """Where CPU and device mode spend their time, by taking the same steps one after the other.

    The draws are those of the modes, so the same large images are decoded at the same part of their size.
    """
    plan = plan_views(views)
    sampler = ViewSampler(plan)
    finished = [torch.empty(count, 3, size, size) for count, size in resolutions(plan)]
    cropped = [torch.empty(view.size, view.size, 3, dtype=torch.uint8).permute(2, 0, 1) for view in plan]
    sizes = np.array([view.size for view in plan])
    watch = _Stopwatch()
    draw = sampler.draw(0, epoch=0, indices=chosen)
    watch.lap("draw_and_crop")

    def placed(row: int, **size: int) -> np.ndarray:
        # In the middle of the decode: how far a large image may be reduced depends on its boxes.
        watch.lap("read_and_decode")
        records = draw.place(row, **size)
        watch.lap("draw_and_crop")
        return records

    for row, index in enumerate(chosen.tolist()):
        image, records = picture(source.encoded(index), source.name(index), functools.partial(placed, row), sizes)
        watch.lap("read_and_decode")
        crops = [cut(image, box, out=crop) for box, crop in zip(records["box"].tolist(), cropped)]
        watch.lap("draw_and_crop")
        begin = 0
        for out in finished:
            views_of_group = slice(begin, begin + len(out))
            photometric_cpu.apply_each(crops[views_of_group], records[views_of_group], out)
            begin += len(out)
        watch.lap("photometric")
    return {
        "cpu": watch.shares("read_and_decode", "draw_and_crop", "photometric"),
        "device": watch.shares("read_and_decode", "draw_and_crop"),
    }


def _pil_shares(source: ImageSource, chosen: np.ndarray, views: ViewsConfig) -> dict[str, float]:
    plan = plan_views(views)
    sampler = ViewSampler(plan)
    watch = _Stopwatch()
    for index in chosen.tolist():
        image = pil_reference.decode(source.encoded(index))
        watch.lap("read_and_decode")
        draw = sampler.draw(0, epoch=0, indices=np.array([index]))
        records = draw.place(0, height=image.height, width=image.width)
        crops = [pil_reference.crop(image, record["box"], view.size) for record, view in zip(records, plan)]
        watch.lap("draw_and_crop")
        for crop, record in zip(crops, records):
            pil_reference.normalise(pil_reference.photometric(crop, record))
        watch.lap("photometric")
    return watch.shares("read_and_decode", "draw_and_crop", "photometric")


def _median_size(source: ImageSource, chosen: np.ndarray) -> dict[str, float]:
    shapes = [source.decode(index).shape for index in chosen.tolist()]
    sizes = [len(source.encoded(index)) / 1000 for index in chosen.tolist()]
    return {
        "height": round(statistics.median(shape[1] for shape in shapes)),
        "width": round(statistics.median(shape[2] for shape in shapes)),
        "kilobytes": statistics.median(sizes),
    }


def _cpu_s(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
