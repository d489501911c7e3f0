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
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.files import cache_folder, sha256_file
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
TIMEOUT_S = 900  # of one call of apt


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


# Debian packages as plain archives: no root is needed, and nothing is installed. apt gets private folders for its lists
# and its cache, and keeps checking signatures and digests with the system's keys.


def fetch(packages: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Download `packages` into `folder` and unpack them to `folder`/root; yields name, version and SHA-256 of each.

    Raises:
        UserError: apt or dpkg is missing, the machine's sources do not have a package, or the network does not answer.
    """
    absent = [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]
    if absent:
        raise UserError(
            f"This data comes from Debian packages and needs {absent[0]}, which is not on this machine: copy "
            "~/.cache/twist-suite from a Debian or Ubuntu machine that has made it."
        )
    downloads, root = folder / "packages", folder / "root"
    for needed in (folder / "lists" / "partial", folder / "cache" / "archives" / "partial", downloads, root):
        needed.mkdir(parents=True, exist_ok=True)
    private = [f"Dir::State::Lists={folder / 'lists'}", f"Dir::Cache={folder / 'cache'}", "Acquire::Languages=none"]
    # As root, apt would drop to a user who may not write here; as anyone else this changes nothing.
    private.append("APT::Sandbox::User=root")
    apt = ["apt-get", "--quiet", *(part for option in private for part in ("-o", option))]
    _run([*apt, "update"], downloads)
    for package in packages:
        _run([*apt, "download", package], downloads)
        archive = next(downloads.glob(f"{package}_*.deb"))
        version = _run(["dpkg-deb", "--field", archive.name, "Version"], downloads).strip()
        _run(["dpkg-deb", "--extract", archive.name, str(root)], downloads)
        yield {"package": package, "version": version, "sha256": sha256_file(archive)}
        archive.unlink()


def _run(command: Sequence[str], folder: Path) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    given = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "timeout": TIMEOUT_S}
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, **given).stdout  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not finish in {TIMEOUT_S} s: check the network and try again.") from None
    except subprocess.CalledProcessError as error:
        errors = [line for line in error.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        raise UserError(
            f"{command[0]} {command[-1]} failed ({(errors or [f'exit status {error.returncode}'])[0]}): check the "
            "network and that Debian's main section is among this machine's apt sources."
        ) from None


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
