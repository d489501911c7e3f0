"""The input pipeline on made photographs of ImageNet's size: PIL chain, CPU mode, device mode, side by side.

    python -m benchmarks.data [--images 32] [--json FILE]

Makes 500 × 375 JPEGs (quality 90, a photograph's spectrum, about 105 kB each) and runs the measurement of
`twist pretrain CONFIG --bench-data` on them for the published 2 × 224 + 12 × 96 views, for two views, and for large
images, where the decode is reduced. Goals: at least 8 times the PIL chain's images/s a core in device mode and 3 times
in CPU mode, with 14 views.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import write
from tests.photographs import write_folder
from twist.pretrain.config import DataConfig, PretrainConfig, RunConfig, ViewsConfig
from twist.pretrain.data.bench_data import bench, render

CASES: dict[str, tuple[ViewsConfig, tuple[int, int]]] = {
    "14 views": (ViewsConfig(), (375, 500)),
    "2 views": (ViewsConfig(kind="barlow", local_count=0), (375, 500)),
    "14 views of 3 megapixels": (ViewsConfig(), (1500, 2000)),
}


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
            config = PretrainConfig(data=DataConfig(root=folder), run=RunConfig(epochs=1), views=views)
            results[name] = bench(config, images=count)
        print(f"— {name} —\n{render(results[name])}\n", flush=True)
    write(arguments.json, results)


if __name__ == "__main__":
    main()
