"""Fashion-MNIST, all 70,000 images, as an ImageNet-like tree: real images with labels that a CPU can go through.

    python -m benchmarks.fashion_mnist.prepare ROOT [--images-per-class N]
    twist pretrain CONFIG data.root=ROOT/imagenet/train --output runs/fashion-mnist/twist
    twist suite benchmarks/fashion_mnist/suite.toml --data ROOT

The images come from the Debian package `dataset-fashion-mnist` (Zalando SE, Expat licence), fetched without root into
the user's cache; nothing is installed and no image is committed. 28 × 28 grey pixels get two black ones on every side
and three equal channels. Written once and whole: ROOT is absent or complete, and a second call finds it.
"""

import argparse
import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twist.catalog.sample.photos import fetch
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.files import cache_folder
from twist.contracts.progress import Progress

PACKAGE, CACHE = "dataset-fashion-mnist", "fashion-mnist"
FOLDER = Path("usr/share/datasets/fashion-mnist")
# The data set's own names (package, README, "Labels"), in label order, as folder names.
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
SPLITS = {"train": ("train", 60_000), "val": ("t10k", 10_000)}
BORDER = 2
# Label subsets: class-balanced, from this seed; the 1 % images are among the 10 % ones.
SUBSETS, SUBSET_SEED = {"1percent.txt": 0.01, "10percent.txt": 0.10}, 0
ABOUT = "fashion_mnist.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--images-per-class", type=int, help="the first so many of each class, in both splits")
    arguments = parser.parse_args()
    try:
        source, package = fetch_package()
        about = write_tree(source, arguments.root, package=package, images_per_class=arguments.images_per_class)
    except UserError as error:
        parser.exit(error.exit_status, f"{error}\n")
    print(f"{arguments.root}: {about['counts']['train']} training and {about['counts']['val']} validation images.")


def fetch_package() -> tuple[Path, dict[str, Any]]:
    """The folder with the four idx files in the user's cache, and the package's name, version and SHA-256."""
    target = cache_folder() / CACHE
    about = target / "package.json"
    if not about.exists():
        target.mkdir(parents=True, exist_ok=True)
        (package,) = fetch([PACKAGE], target)
        files.write_json(about, package)
    return target / "root" / FOLDER, json.loads(about.read_text())


def write_tree(
    source: Path, root: Path, *, package: dict[str, Any], images_per_class: int | None = None
) -> dict[str, Any]:
    """Write ROOT/imagenet/{train,val}/<class>/<split>_<index>.png, the subset lists and ROOT/fashion_mnist.json.

    Returns what the JSON holds: package, settings and counts.

    Raises:
        UserError: ROOT holds something else, or a file of the package is not what it should be.
    """
    settings = {"package": package, "images_per_class": images_per_class, "border": BORDER, "subset_seed": SUBSET_SEED}
    if (root / ABOUT).exists():
        about = json.loads((root / ABOUT).read_text())
        if {key: about.get(key) for key in settings} != settings:
            raise UserError(f"{root} holds Fashion-MNIST with other settings ({ABOUT}): give another folder.")
        return about
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty and holds no {ABOUT}: give another folder.")
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        counts = {split: _write_split(source, work / "imagenet", split, images_per_class) for split in SPLITS}
        for name, share in SUBSETS.items():
            _write_subset(work / "imagenet", name, share)
        about = {**settings, "counts": counts, "classes": list(CLASSES)}
        files.write_json(work / ABOUT, about)
        work.chmod(0o755)  # mkdtemp's is for the owner alone
        if root.exists():
            root.rmdir()
        work.rename(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return about


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes (MNIST's format: two zeros, type 8, dimensions, big-endian sizes, data)."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove {cache_folder() / CACHE} and run the command again."
        ) from None
    dimensions = data[3]
    shape = np.frombuffer(data, dtype=">u4", count=dimensions, offset=4).astype(int)
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions)
    if data[:3] != b"\0\0\x08" or values.size != shape.prod():
        raise UserError(f"{path} is no idx file of bytes: remove {cache_folder() / CACHE} and run the command again.")
    return values.reshape(shape)


def _write_split(source: Path, folder: Path, split: str, images_per_class: int | None) -> int:
    prefix, expected = SPLITS[split]
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    if images.shape != (expected, 28, 28) or labels.shape != (expected,):
        raise UserError(
            f"{source}: {split} has {images.shape} images and {labels.shape} labels, not {expected} of 28×28."
        )
    for name in CLASSES:
        (folder / split / name).mkdir(parents=True)
    chosen = np.arange(expected)
    if images_per_class is not None:
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == k)[:images_per_class] for k in range(len(CLASSES))]))
    with Progress(f"fashion-mnist {split}", total=len(chosen), unit="image") as progress:
        for index in chosen:
            grey = np.pad(images[index], BORDER)
            path = folder / split / CLASSES[labels[index]] / f"{split}_{index:05d}.png"
            Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(path)
            progress.advance()
    return len(chosen)


def _write_subset(folder: Path, name: str, share: float) -> None:
    rng = np.random.Generator(np.random.Philox(key=SUBSET_SEED))
    lines = []
    for label in CLASSES:
        names = sorted(path.name for path in (folder / "train" / label).iterdir())
        order = rng.permutation(len(names))
        lines += sorted(names[i] for i in order[: max(1, round(share * len(names)))])
    files.write_text(folder / name, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
