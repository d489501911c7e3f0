"""The input pipeline on made photographs of ImageNet's size: PIL chain, CPU mode, device mode, side by side.

    python -m benchmarks.data [--images 32] [--json FILE]

Makes 500 × 375 JPEGs (quality 90, a photograph's spectrum, about 105 kB each) and measures on them a data worker of
ours and the published PIL chain, for the published 2 × 224 + 12 × 96 views, for two views, and for large images, where
the decode is reduced. The chain's batches end in fresh shared memory, as
torch's collation makes it; ours in one of a few buffers in turn, as for a run on a GPU. Goals: at least 8 times the PIL
chain's images/s a core in device mode and 3 times in CPU mode, with 14 views.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import heading, rates_a_core, rates_table, write
from tests import pil_reference
from tests.photographs import write_folder
from twist.pretrain.config import DataConfig, ViewsConfig
from twist.pretrain.data.loader import BUFFERS, ViewMaker
from twist.pretrain.data.source import Images, Request, open_images
from twist.pretrain.data.views import ViewSampler, plan_views, resolutions

BATCH, ROUNDS = 16, 7
CASES: dict[str, tuple[ViewsConfig, tuple[int, int]]] = {
    "14 views": (ViewsConfig(), (375, 500)),
    "2 views": (ViewsConfig(kind="barlow", local_count=0), (375, 500)),
    "14 views of 3 megapixels": (ViewsConfig(), (1500, 2000)),
}


def pil(images: Images, requests: Sequence[Request], views: ViewsConfig) -> Callable[[], None]:
    """The published chain on the images of `requests`, in the same batches."""
    plan = plan_views(views)
    sampler, sizes = ViewSampler(plan), [view.size for view in plan]

    def work() -> None:
        for request in requests:
            draw = sampler.draw(0, epoch=0, indices=request.indices)
            made = []
            for place, index in enumerate(request.indices.tolist()):
                image = pil_reference.decode(images.encoded(index))
                records = draw.place(place, height=image.height, width=image.width)
                made.append(pil_reference.views_of(image, records, sizes))
            for view in zip(*made):
                shape = (len(view), *view[0].shape)
                storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
                torch.stack(view, out=torch.empty(0).set_(storage).view(shape))

    return work


def ours(images: Images, requests: Sequence[Request], views: ViewsConfig, pipeline: Any) -> Callable[[], None]:
    """What a worker of ours does for `requests`, its batches in one of the few buffers of a run on a GPU."""
    maker = ViewMaker(images, views, seed=0, pipeline=pipeline, shared=True, recycled=BUFFERS)

    def work() -> None:
        for request in requests:
            made = maker[request]
            assert made.failure is None, made.failure

    return work


def figures(folder: Path, views: ViewsConfig, *, count: int, rounds: int = ROUNDS) -> dict[str, Any]:
    images = open_images(DataConfig(root=str(folder)))
    numbers = np.array_split(np.arange(count), -(-count // BATCH))
    requests = [Request(0, "mutual_information", indices) for indices in numbers]
    torch.set_num_threads(1)
    works = {"pil": pil(images, requests, views)}
    works |= {pipeline: ours(images, requests, views, pipeline) for pipeline in ("cpu", "device")}
    found = rates_a_core(works, count=count, rounds=rounds)
    rates = found["images_per_s_core"]
    groups = [{"count": number, "size": size} for number, size in resolutions(plan_views(views))]
    return {**found, "speedup": {name: rates[name] / rates["pil"] for name in ("cpu", "device")}, "views": groups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name, (views, (height, width)) in CASES.items():
        # An image of 3 megapixels costs as much as ten of the others.
        count = arguments.images if height < 1000 else max(arguments.images // 8, 2)
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), count, height=height, width=width)
            results[name] = figures(Path(folder), views, count=count)
        print(f"{heading(name)}\n{rates_table(results[name])}\n", flush=True)
    write(arguments.json, results)


if __name__ == "__main__":
    main()
