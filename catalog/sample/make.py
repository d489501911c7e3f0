"""The built-in sample: a small world in the real on-disk layouts, made from a seed.

`make_sample(root)` writes unlabelled images and small COCO, VOC, Cityscapes and ImageNet trees below one root, which
serves as Detectron2's `DETECTRON2_DATASETS` and as MMSegmentation's data root. Two sources: `shapes` (drawn, no
download) and `photos` (real cut-outs on real photographs, from Debian packages). Equal source, size and seed give equal
bytes with equal versions of numpy and Pillow.
"""

import functools
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twist.catalog.data_sets import SAMPLE_JSON, read_sample
from twist.catalog.sample.photos import prepare_photos
from twist.catalog.sample.writers import SOURCES, Size, World, open_source, sets, write_common_files, write_image
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.machine import cores
from twist.contracts.progress import Progress
from twist.contracts.run_folder import LOCK, temporary_folder

FORMAT_VERSION = 2
SIZES = {
    "tiny": Size(40, 64, 24, 16, 96, 4, 2),
    "small": Size(2000, 128, 240, 80, 192, 60, 30),
    "medium": Size(10000, 128, 1200, 400, 192, 300, 100),
}
# Below this many images a second process costs more than it saves.
ALONE_BELOW = 400


@dataclass(frozen=True)
class Sample:
    """A complete sample on disk. `info` is the content of its sample.json: settings, classes, counts, provenance."""

    root: Path
    info: dict[str, Any]

    def summary(self) -> str:
        """One line: what was made, of how many images, where."""
        total = sum(self.info["counts"].values())
        return (
            f"Sample of {self.info['source']} ({self.info['size']}, seed {self.info['seed']}): {total} images of "
            f"{', '.join(self.info['classes'])} in {self.root}"
        )


def make_sample(
    root: str | os.PathLike[str], *, source: str = "shapes", size: str = "small", seed: int = 0, progress: bool = True
) -> Sample:
    """Write a sample to `root`, or return the one that is there if it was made with the same settings.

    `source` and `size` are keys of `SOURCES` and `SIZES`. It is written beside `root` and moved there when it is whole;
    an empty folder is filled, its sample.json last.

    Raises:
        UsageError: no such source or size.
        UserError: `root` holds something else; for `photos`, the packages cannot be had.
    """
    for kind, value, known in (("source", source, SOURCES), ("size", size, SIZES)):
        if value not in known:
            raise UsageError(f'There is no sample {kind} "{value}".{did_you_mean(value, known)}')
    root = Path(root)
    settings = {"format_version": FORMAT_VERSION, "source": source, "size": size, "seed": seed}
    info = read_sample(root) if root.is_dir() else None
    if info is not None:
        differing = [key for key in settings if info.get(key) != settings[key]]
        if differing:
            what = ", ".join(f"{key} {info.get(key)} and not {settings[key]}" for key in differing)
            raise UserError(f"{root} holds another sample, of {what}: choose another folder, or remove that one.")
        return Sample(root, info)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists and is no sample: choose an empty or new folder, nothing is overwritten.")
    return _write(root, settings, progress=progress)


def _write(root: Path, settings: dict[str, Any], *, progress: bool) -> Sample:
    if settings["source"] == "photos":
        prepare_photos(progress=progress)  # downloads, before anything is written
    source = open_source(settings["source"])
    size = SIZES[settings["size"]]
    with temporary_folder(root.resolve()) as temporary:
        world = World(temporary, settings["source"], settings["seed"], size, source.classes)
        counts = sets(size)
        returned: dict[str, list[Any]] = {name: [] for name in counts}
        with Progress(f"sample of {world.source}", total=sum(counts.values()), unit="image", quiet=not progress) as bar:
            for (set_name, _), value in _write_images(
                world, [(name, i) for name, n in counts.items() for i in range(n)]
            ):
                returned[set_name].append(value)
                bar.advance()
        write_common_files(world, returned)
        info = {**settings, "classes": list(source.classes), "counts": counts, **source.provenance()}
        files.write_json(temporary / SAMPLE_JSON, info)
        (temporary / LOCK).unlink()
        if root.exists():  # empty; a working directory or a mounted one cannot be replaced, so this is not at once
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == SAMPLE_JSON):
                shutil.move(path, root)
        else:
            temporary.replace(root)
    return Sample(root, info)


def _write_images(world: World, items: list[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], Any]]:
    """Write every image, in as many processes as there are cores; yields in the order of `items`."""
    workers = min(cores(), 16) if len(items) >= ALONE_BELOW else 1
    write = functools.partial(write_image, world)
    if workers == 1:
        yield from ((item, write(item)) for item in items)
        return
    # As torch's DataLoader does: fork where it exists, so that a caller needs no `if __name__ == "__main__"`.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method))
    try:
        yield from zip(items, pool.map(write, items, chunksize=16))
    finally:
        pool.shutdown(cancel_futures=True)
