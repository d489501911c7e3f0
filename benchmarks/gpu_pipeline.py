"""The input pipeline with the device in it: is the photometric part right there, what does it cost, do data keep up?

Parts of `benchmarks/gpu.py`. The run is `twist pretrain`'s own, on made photographs of ImageNet's size: loader, step,
log. What is read is its `metrics.jsonl`. Shapes: `B` images, `V` views, `S` side.
"""

import json
import os
import runpy
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import step
from benchmarks.side_by_side import measure
from twist.contracts.weights import IMAGENET_STD
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data import photometric
from twist.pretrain.data.loader import Made, ViewMaker, finish_on_cpu
from twist.pretrain.data.source import Request, open_images
from twist.pretrain.train import pretrain

# Read as a file: `tests` is no package, and a machine may have an installed one of that name.
PHOTOGRAPHS = Path(__file__).resolve().parent.parent / "tests" / "photographs.py"
# Levels of 255. Float32 rounds a level by 1.5e-5 at most, some fifty times on the way through all operations; a device
# that multiplied in TF32 would be off by a tenth of a level and more.
LARGEST_DIFFERENCE = 0.01
# Log windows that count for nothing: in the first the algorithms are chosen, and what the log calls a window's time
# is, from the second on, the time the device took for the window before.
WARM_UP_WINDOWS = 2


def check_photometric(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The photometric part on this device against the CPU's, on the same crops with the same draws;
    it never waits."""
    batch = 4 if tiny else 16
    with tempfile.TemporaryDirectory() as folder:
        config = _config(
            "multi-crop", Path(folder), photographs=batch, images=batch, batch=batch, tiny=tiny, device=device
        )
        made = _made(config)
    apart: list[float] = []
    expected = finish_on_cpu(made)
    for group, part, right in zip(*_on(device, made), expected):
        photometric.apply(group, part)  # the first call copies constants to the device, which waits
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours = photometric.apply(group, part)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        in_levels = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
        apart.append(float(((ours.cpu() - right).abs() * in_levels).max()))
    assert max(apart) < LARGEST_DIFFERENCE, apart
    return {"largest_difference_levels": apart, "views": sum(len(group) for group in made.groups)}


def photometric_of_two_views(device: torch.device, tiny: bool) -> dict[str, Any]:
    """`times`: seconds of the photometric part of a step with the published two views."""
    batch, photographs = (4, 4) if tiny else (256, 32)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(
            "two-views", Path(folder), photographs=photographs, images=batch, batch=batch, tiny=tiny, device=device
        )
        times = _photometric_times(config, device, calls=1 if tiny else 10)
    return {"times": times, "batch_size": batch}


def run(device: torch.device, tiny: bool, *, compiled: bool) -> dict[str, Any]:
    """A short run of `twist pretrain` for the published 14 views: images/s, data wait, the photometric part's share.

    Returns:
        `images_per_s` and `data_wait_share`: median, least, most of `n` log windows. `times`: seconds of a step's
        photometric part alone on the device, where it runs beside the step before; `photometric_share`: of the time of
        a step.
    """
    batch, photographs, windows, every = (4, 8, 2, 3) if tiny else (128, 256, 5, 8)
    images = batch * every * (WARM_UP_WINDOWS + windows)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(
            "multi-crop", Path(folder), photographs=photographs, images=images, batch=batch, tiny=tiny, device=device,
            run__log_every_steps=every, run__compile=compiled,
        )  # fmt: skip
        times = _photometric_times(config, device, calls=1 if tiny else 10)
        pretrain(config, output=Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[WARM_UP_WINDOWS * every :: every]]  # one of each window
    rates = [row["images_per_s"] for row in rows]
    assert len(rates) == windows, (len(lines), every)
    return {
        "times": times,
        "images_per_s": _spread(rates),
        "data_wait_share": _spread([row["data_wait_share"] for row in rows]),
        "photometric_share": times["photometric part"].median_s / (batch / statistics.median(rates)),
        "batch_size": batch,
        "steps_a_window": every,
        "workers": config.data.workers,
        "photographs": photographs,
        "compile": compiled,
    }


def _config(
    case: str,
    folder: Path,
    *,
    photographs: int,
    images: int,
    batch: int,
    tiny: bool,
    device: torch.device,
    **changes: Any,
) -> PretrainConfig:
    """`case`, two-views or multi-crop, for one epoch of `images` images: `photographs` made ones over and over."""
    size = {"height": 60, "width": 80} if tiny else {"height": 375, "width": 500}
    made = runpy.run_path(str(PHOTOGRAPHS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a tenth of a second each, and `write_folder` finds them made
        list(pool.map(lambda seed: made["jpeg"](seed, **size), range(photographs)))
    made["write_folder"](folder / "images", photographs, **size)
    names = sorted(str(path.relative_to(folder)) for path in (folder / "images").rglob("*.jpg"))
    # One long epoch, as real ones are: at an epoch's end the loader runs dry.
    listing = folder / "images.txt"
    listing.write_text("".join(f"{names[number % len(names)]}\n" for number in range(images)))
    return step.case(
        case, batch=batch, tiny=tiny, data__root=str(listing), data__format="list",
        data__workers=2 if tiny else max(2, min(len(os.sched_getaffinity(0)) - 2, 14)),
        run__epochs=1, run__device=device.type, **changes,
    )  # fmt: skip


def _made(config: PretrainConfig) -> Made:
    """What a data worker makes of the first batch: uint8 crops, and the draws of their photometric part."""
    images = open_images(config.data)
    maker = ViewMaker(images, config.views, seed=0, pipeline="device")
    made = maker[Request(0, "mutual_information", np.arange(config.run.batch_size))]
    assert made.failure is None, made.failure
    return made


def _on(device: torch.device, made: Made) -> tuple[list[Tensor], list[photometric.Photometric]]:
    crops = [group.to(device) for group in made.groups]
    return crops, [photometric.prepare(records).to(device) for records in made.records]


def _photometric_times(config: PretrainConfig, device: torch.device, *, calls: int) -> dict[str, Any]:
    crops, parameters = _on(device, _made(config))
    return measure(
        {"photometric part": lambda: [photometric.apply(*group) for group in zip(crops, parameters)]},
        rounds=5,
        calls=calls,
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}
