"""The 14 views of one image, made by others' code and ours: lightly on PIL images, torchvision v2 on tensors.

    python -m benchmarks.data_peers [--images 16] [--json FILE]

The views are DINO's, which TWIST's multi-crop shares (2 × 224 + 12 × 96, jitter, greyscale, blur, solarise, with the
same probabilities): lightly's `DINOTransform` as it is, and the same chain put together from
`torchvision.transforms.v2`, whose tensors are resized and coloured as bytes. Each draws its own numbers, so the
pictures differ, and the mean work does not.

All read the same made photographs of ImageNet's size, with one thread, and end in a batch: the peers' in fresh shared
memory, as torch's collation makes it, ours in one of the few buffers of a worker that feeds a GPU. They take turns,
round by round; the figure is images over CPU seconds. `device` leaves the photometric part to the GPU.
"""

import argparse
import io
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks import data
from benchmarks.side_by_side import heading, rates_a_core, rates_table, write
from tests.photographs import write_folder
from twist.contracts.weights import IMAGENET_MEAN, IMAGENET_STD
from twist.pretrain.config import DataConfig, ViewsConfig
from twist.pretrain.data.source import Request, open_images

BATCH = 8
Transform = Callable[[bytes], list[Tensor]]


def lightly() -> Transform:
    from lightly.transforms import DINOTransform

    views = DINOTransform(n_local_views=12)
    return lambda data: views(Image.open(io.BytesIO(data)).convert("RGB"))


def torchvision_v2() -> Transform:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode, v2

    def chain(size: int, scale: tuple[float, float], *, blur: float, solarise: float) -> Callable[[Tensor], Tensor]:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                # Thirteen taps, as many as Pillow's blur has at these strengths.
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarise),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    first = chain(224, (0.4, 1.0), blur=1.0, solarise=0.0)
    second = chain(224, (0.4, 1.0), blur=0.1, solarise=0.2)
    local = chain(96, (0.05, 0.4), blur=0.5, solarise=0.0)

    def views(data: bytes) -> list[Tensor]:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return [first(image), second(image), *(local(image) for _ in range(12))]

    return views


def peer(transform: Transform, encoded: list[bytes]) -> Callable[[], None]:
    def work() -> None:
        for begin in range(0, len(encoded), BATCH):
            batch = [transform(data) for data in encoded[begin : begin + BATCH]]
            for views in zip(*batch):
                storage = torch.UntypedStorage._new_shared(sum(view.nbytes for view in views))
                torch.stack(views, out=torch.empty(0).set_(storage).view(len(views), *views[0].shape))

    # torch's own collation gives the same shapes: one tensor a view.
    assert len(default_collate([transform(encoded[0])])) == 14
    return work


def ours(root: Path, pipeline: Any, count: int) -> Callable[[], None]:
    numbers = np.array_split(np.arange(count), -(-count // BATCH))
    requests = [Request(0, "mutual_information", indices) for indices in numbers]
    return data.ours(open_images(DataConfig(root=str(root))), requests, ViewsConfig(), pipeline)


def figures(root: Path, *, count: int, rounds: int) -> dict[str, Any]:
    encoded = [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]
    random.seed(0)
    torch.manual_seed(0)
    modes = {
        "lightly": peer(lightly(), encoded),
        "torchvision v2": peer(torchvision_v2(), encoded),
        "ours, cpu": ours(root, "cpu", count),
        "ours, device": ours(root, "device", count),
    }
    return rates_a_core(modes, count=count, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), arguments.images, height=375, width=500)
        found = figures(Path(folder), count=arguments.images, rounds=arguments.rounds)
    print(heading("14 views of one image, images/s a core"))
    print(rates_table(found))
    write(arguments.json, found)


if __name__ == "__main__":
    main()
