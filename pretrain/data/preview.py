"""The input pipeline without training: `--show-views`, a picture of the views, and `--bench-data`, its speed."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision
from torchvision.utils import draw_bounding_boxes, make_grid

from twist.contracts import machine
from twist.contracts.errors import UserError
from twist.contracts.files import atomic_path
from twist.contracts.images import decode
from twist.pretrain.config import PretrainConfig, ViewsConfig
from twist.pretrain.data.loader import BUFFERS
from twist.pretrain.data.photometric import denormalise
from twist.pretrain.data.source import Images, RankShare, Request, open_images
from twist.pretrain.data.view_maker import Made, PipelineName, ViewMaker
from twist.pretrain.data.views import ViewSampler, plan_views, resolutions

GAP, FRAME = 8, 3  # pixels between pictures, and around each
COLUMNS = 8
LEAST_SIDE = 96  # small views are enlarged to this
# Frames of the views and outlines of their crops: first global, second global, local.
COLOURS = ((214, 69, 65), (38, 110, 188), (245, 190, 65))
PAPER = 255

ROUNDS = 7
BATCH = 16
IMAGES = 32
# What GPUs take: `cores_for_gpu` answers for these.
GPU_IMAGES_PER_S = (500, 1000, 2000)


def contact_sheet(config: PretrainConfig, count: int, path: Path) -> Path:
    """Write a PNG: each of `count` images with its crops outlined, then its V views, framed in the crops' colours.

    The views are made as in training (first epoch, the run's seed): they are the run's own pixels.

    Raises:
        UserError: there are fewer images, or `path` is no .png.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: a contact sheet is a PNG, give it a name that ends in .png.")
    images, seed = open_images(config.data), config.run.seed
    if not 0 < count <= len(images):
        raise UserError(f"{config.data.root} holds {len(images)} images: ask for 1 to {len(images)}, not {count}.")
    request = next(images.requests(RankShare(seed, count), epoch=0, stage="mutual_information"))
    made = _made(ViewMaker(images, config.views, seed=seed, pipeline="cpu"), request)
    plan = plan_views(config.views)
    draw = ViewSampler(plan).draw(seed, epoch=0, indices=request.indices)
    of_stream = dict(zip(request.indices.tolist(), request.encoded or ()))
    side = max(plan[0].size, LEAST_SIDE)
    lines = -(-(1 + len(plan)) // COLUMNS)
    columns = -(-(1 + len(plan)) // lines)
    cells = []
    for place, index in enumerate(made.indices.tolist()):
        image = decode(of_stream[index] if of_stream else images.encoded(index), name=str(index))
        boxes = draw.place(place, height=image.shape[1], width=image.shape[2])["box"]
        views = [view for group in made.groups for view in denormalise(group[place::count])]
        row = [_framed(_outlined(image, boxes, side), (PAPER,) * 3, side)]
        row += [_framed(_fitted(view, side), COLOURS[min(number, 2)], side) for number, view in enumerate(views)]
        cells += row + [torch.full_like(row[0], PAPER)] * (lines * columns - len(row))
    sheet = make_grid(cells, nrow=columns, padding=GAP, pad_value=PAPER)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(temporary, "PNG", optimize=True)
    return path


def _outlined(image: Tensor, boxes: np.ndarray, side: int) -> Tensor:
    """`image` with the outlines of its crops (top, left, height, width), at most `side` high and wide."""
    small = _fitted(image, side)
    top, left, height, width = torch.from_numpy(boxes * (max(small.shape) / max(image.shape))).T
    corners = torch.stack([left, top, left + width - 1, top + height - 1], dim=1)
    for number in reversed(range(len(boxes))):  # the global ones on top
        colour, pen = COLOURS[min(number, 2)], 3 if number < 2 else 1
        small = draw_bounding_boxes(small, corners[number, None], colors=[colour], width=pen)
    return small


def _fitted(image: Tensor, side: int) -> Tensor:
    """`image` resized so that its longer side is `side`; pixels of a small one stay visible."""
    ratio = side / max(image.shape)
    size = [max(1, round(length * ratio)) for length in image.shape[1:]]
    return vision.resize(image, size, InterpolationMode.NEAREST if ratio >= 1 else InterpolationMode.BILINEAR)


def _framed(image: Tensor, colour: tuple[int, int, int], side: int) -> Tensor:
    """(3, side + 2·FRAME, side + 2·FRAME), the rest of which is paper."""
    cell = torch.full((3, side + 2 * FRAME, side + 2 * FRAME), PAPER, dtype=torch.uint8)
    height, width = image.shape[1:]
    cell[:, : height + 2 * FRAME, : width + 2 * FRAME] = torch.tensor(colour).view(3, 1, 1)
    cell[:, FRAME : FRAME + height, FRAME : FRAME + width] = image
    return cell


def bench(config: PretrainConfig, *, images: int = IMAGES) -> dict[str, Any]:
    """How fast one core makes the views of `config`, on so many of its images; in device mode decode and crops alone.

    Returns `images_per_s_core` (medians) and `spread` by mode, `cores_for_gpu` (for a GPU that takes N images/s, cores
    by mode), and what was measured on. `benchmarks/data.py` compares with the published PIL chain.
    """
    source = open_images(config.data)
    order = source.requests(RankShare(0, min(BATCH, len(source))), epoch=0, stage="mutual_information")
    requests = [*itertools.islice(order, -(-images // BATCH))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        count = sum(len(request.indices) for request in requests)
        found = rates_a_core(modes(source, requests, config.views), count=count, rounds=ROUNDS)
    finally:
        torch.set_num_threads(threads)
    rates = found["images_per_s_core"]
    return {
        **found,
        "cores_for_gpu": {
            str(wanted): {name: math.ceil(wanted / rate) for name, rate in rates.items()} for wanted in GPU_IMAGES_PER_S
        },
        "views": [{"count": count, "size": size} for count, size in resolutions(plan_views(config.views))],
        "seconds": "CPU time of one process with one thread",
        "hardware": machine.hardware(),
        "software": machine.software(),
    }


def render(result: dict[str, Any]) -> str:
    """The result of `bench` as a few lines for a terminal."""
    views = " + ".join(f"{group['count']} × {group['size']}²" for group in result["views"])
    processor, version = result["hardware"]["processor"], result["software"]["torch"]
    lines = [f"{processor}, torch {version}; {result['images']} images, {views} views each"]
    for name, rate in result["images_per_s_core"].items():
        low, high = result["spread"][name]
        lines.append(f"  {name:<8}{rate:6.0f} images/s a core ({low:.0f}–{high:.0f} in {result['rounds']} rounds)")
    for wanted, cores in result["cores_for_gpu"].items():
        needed = ", ".join(f"{count} cores in {name} mode" for name, count in cores.items())
        lines.append(f"A GPU that takes {wanted} images/s needs {needed}.")
    return "\n".join(lines)


def modes(images: Images, requests: Sequence[Request], views: ViewsConfig) -> dict[str, Callable[[], Any]]:
    """By name, what a worker does for `requests`."""

    def work(pipeline: PipelineName) -> Callable[[], Any]:
        maker = ViewMaker(images, views, seed=0, pipeline=pipeline, shared=True, recycled=BUFFERS)
        return lambda: [_made(maker, request) for request in requests]

    return {"cpu": work("cpu"), "device": work("device")}


def _made(maker: ViewMaker, request: Request) -> Made:
    made = maker[request]
    if made.failure is not None:
        raise UserError(made.failure)
    return made


def rates_a_core(
    alternatives: Mapping[str, Callable[[], Any]], *, count: int, rounds: int, warm_up: int = 1
) -> dict[str, Any]:
    """Images over the CPU seconds of this process, for calls that each make `count` images: median and spread.

    The alternatives take turns, round by round, so that a slow minute affects all alike.
    """
    rates: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(warm_up + rounds):
        for name, work in alternatives.items():
            began = time.process_time()
            work()
            if number >= warm_up:
                rates[name].append(count / (time.process_time() - began))
    return {
        "images_per_s_core": {name: statistics.median(values) for name, values in rates.items()},
        "spread": {name: [min(values), max(values)] for name, values in rates.items()},
        "images": count,
        "rounds": rounds,
    }
