"""Labelled images on disk: ROOT/[imagenet/]{train,val}/<class>/…, the 1 % and 10 % subsets, and batches of both.

Paths are kept as one array of bytes: a Python list of 1.28 million strings is copied page by page into every worker.
Batches come in a stated order whatever the number of workers, and a random crop is a pure function of (seed, epoch,
image), so a run continues exactly where it stopped. `B` images of one process, `S` the input's side.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from twist.contracts.errors import UserError
from twist.contracts.image_files import images_of_classes, refuse_other_classes
from twist.contracts.images import UnreadableImage, read_image
from twist.contracts.machine import cores
from twist.transfer.imagenet.recipes import ClassifierRecipe, Recipe
from twist.transfer.preflight import tree_folder

# Names of SimCLR's lists (google-research/simclr, imagenet_subsets/) and the share of each class a drawn subset has.
SUBSETS = {"1percent": ("1percent.txt", 0.01), "10percent": ("10percent.txt", 0.10)}


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split. `paths` (N,) bytes relative to `folder`, sorted by class and name; `labels` (N,) int64."""

    folder: Path
    classes: tuple[str, ...]
    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(bytes(self.paths[index]))

    def spread(self, count: int) -> LabelledImages:
        """At most `count` of the images, evenly spread over the classes: those that pictures show."""
        return _select(self, np.linspace(0, len(self) - 1, num=min(count, len(self)), dtype=int))

    def digest(self) -> str:
        """SHA-256 of the relative paths and labels: which images, whatever the folder is called."""
        state = hashlib.sha256(self.paths.astype("S").tobytes())
        state.update(self.labels.tobytes())
        return state.hexdigest()

    def stamp(self) -> str:
        """`digest` together with sizes and modification times: changes when a file's content may have."""
        state = hashlib.sha256(self.digest().encode())
        for index in range(len(self)):
            status = self.path(index).stat()
            state.update(f"{status.st_size} {status.st_mtime_ns};".encode())
        return state.hexdigest()


def open_tree(root: str | os.PathLike[str]) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images below `root`, which holds train/ and val/ or a folder imagenet/ that does.

    Raises:
        UserError: a folder is missing, a class is empty, or the two splits do not have the same classes.
    """
    folder = tree_folder(root)
    train, val = read_split(folder / "train"), read_split(folder / "val")
    refuse_other_classes(folder, train.classes, val.classes)
    return train, val


def read_split(folder: Path) -> LabelledImages:
    """Every image of `folder`/<class>/ at any depth, sorted; `UserError` for a class without images."""
    classes = images_of_classes(folder)
    counts = [len(images) for images in classes.values()]
    paths = [os.fsencode(image) for images in classes.values() for image in images]
    return LabelledImages(folder, tuple(classes), np.array(paths), np.repeat(np.arange(len(classes)), counts))


def labelled_subset(train: LabelledImages, recipe: ClassifierRecipe) -> LabelledImages:
    """The training images that have labels under `recipe`.

    Raises:
        UserError: the list is missing, or names files that are not there.
    """
    if recipe.labels == "all":
        return train
    list_name, share = SUBSETS[recipe.labels]
    if recipe.labels_from == "seed":
        return draw_subset(train, share, seed=recipe.labels_seed)
    tree = train.folder.parent
    for folder in (tree, tree / "imagenet_subsets", tree.parent):
        if (folder / list_name).is_file():
            return read_subset(train, folder / list_name)
    raise UserError(
        f"There is no {list_name} in {tree}: `twist data prepare imagenet` writes it from SimCLR's published list, or "
        "labels_from=seed draws a class-balanced subset (another protocol: its rows stand apart)."
    )


def read_subset(train: LabelledImages, list_file: Path) -> LabelledImages:
    """The images that a list names, in its order: a file name a line, with or without its class folder before it."""
    lines = [line.strip() for line in list_file.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{list_file} is empty: it must name one training image a line.")
    by_name: dict[bytes, int] = {}
    ambiguous: set[bytes] = set()
    for index, path in enumerate(train.paths):
        short = path.rsplit(b"/", 1)[-1]
        if short in by_name:
            ambiguous.add(short)
        by_name[short] = by_name[path] = index
    chosen: list[int] = []
    absent: list[str] = []
    for line in lines:
        name = os.fsencode(line)
        if name in ambiguous:
            raise UserError(f"{list_file}: several classes hold a file {line}; write the lines as <class>/<file>.")
        if name in by_name:
            chosen.append(by_name[name])
        else:
            absent.append(line)
    if absent:
        raise UserError(
            f"{list_file} names {len(absent)} files that are not in {train.folder} (first: {absent[0]}): the training "
            "images are incomplete, or the list belongs to another data set."
        )
    if len(set(chosen)) != len(chosen):
        raise UserError(
            f"{list_file} names {len(chosen) - len(set(chosen))} files twice: each line must be another image."
        )
    return _select(train, np.array(chosen))


def list_lines(train: LabelledImages, subset: LabelledImages) -> list[str]:
    """The lines by which `read_subset` finds `subset` in `train` again.

    File names, as in SimCLR's lists; with the class folder before them where two classes share a name.
    """
    unique = len({path.rsplit(b"/", 1)[-1] for path in train.paths}) == len(train)
    return [os.fsdecode(path.rsplit(b"/", 1)[-1] if unique else bytes(path)) for path in subset.paths]


def draw_subset(train: LabelledImages, share: float, *, seed: int) -> LabelledImages:
    """A class-balanced draw: of each class the nearest whole number to `share`, at least one image.

    A recipe with `labels_from = "seed"` takes it, and `twist data prepare imagenet seed=N` writes it down. Of one seed
    a smaller share lies within a larger one.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    chosen = []
    for label in range(len(train.classes)):
        members = np.flatnonzero(train.labels == label)
        count = max(1, round(share * len(members)))
        chosen.append(np.sort(rng.permutation(members)[:count]))
    return _select(train, np.concatenate(chosen))


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` images in an epoch, (count,): a pure function of seed and epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def epoch_batches(
    count: int, *, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """One process's image indices, batch by batch, of a shuffled epoch; the last total batch may be smaller.

    Ranks take equal parts of each total batch; where it does not divide, its first images are seen twice.
    """
    order = epoch_order(count, seed=seed, epoch=epoch)
    totals = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return [np.resize(total, -(-len(total) // world_size) * world_size)[rank::world_size] for total in totals]


class Batches:
    """Decoded batches of one process's share of the images.

    `ordered()` gives every image once in order, ranks interleaved, as at test time; `epoch(e)` gives a shuffled epoch
    of total batches of `batch_size`. Both yield (images (B, 3, S, S) uint8 RGB, labels (B,)), in main memory.
    """

    def __init__(
        self,
        images: LabelledImages,
        recipe: Recipe,
        *,
        batch_size: int,
        augment: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        workers: int | None = None,
    ) -> None:
        """`workers` None takes the recipe's, at most one a core: more would wait for each other, and torch warns."""
        assert batch_size % world_size == 0
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._schedule = _Schedule()
        self._workers = workers = min(recipe.machine.workers if workers is None else workers, cores())
        self._loader = DataLoader(
            _Decoded(images, recipe, augment=augment, seed=seed),
            batch_sampler=self._schedule,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            pin_memory=pin_memory,
            # Its own: without, each pass would draw a number from the generator of the whole process.
            generator=torch.Generator(),
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def ordered(self) -> Iterator[tuple[Tensor, Tensor]]:
        positions = np.arange(self.rank, len(self.images), self.world_size)
        local = self.batch_size // self.world_size
        return self._run([positions[start : start + local] for start in range(0, len(positions), local)], epoch=0)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of a shuffled epoch, see `epoch_batches`."""
        batches = epoch_batches(
            len(self.images),
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._run(batches, epoch=epoch)

    def _run(self, batches: Sequence[np.ndarray], *, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._schedule.batches = [[(epoch, int(index)) for index in batch] for batch in batches]
        try:
            for images, labels, problem in self._loader:
                if problem is not None:
                    raise UnreadableImage(f"{problem}; delete or replace it.")
                yield images, labels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"A process that decodes images died ({str(error).splitlines()[0]}): it ran out of memory or was "
                f"killed; go on with fewer by --resume machine.workers={self._workers // 2}."
            ) from None


def _select(images: LabelledImages, indices: np.ndarray) -> LabelledImages:
    return replace(images, paths=images.paths[indices], labels=images.labels[indices])


class _Schedule(Sampler[list[tuple[int, int]]]):
    """The batches of the next pass, set before it starts; items carry the epoch, so workers keep no state."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Decoded(Dataset[tuple[Tensor | str, int]]):
    """(epoch, index) → uint8 image at the input's size and its label; a message in place of an unreadable image."""

    def __init__(self, images: LabelledImages, recipe: Recipe, *, augment: bool, seed: int) -> None:
        mode = InterpolationMode(recipe.interpolation)
        self.images, self.augment, self.seed = images, augment, seed
        if augment:
            self.transform = v2.Compose(
                [_RandomResizedCrop(recipe.size, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
            )
        else:
            self.transform = v2.Compose(
                [v2.Resize(recipe.resize, interpolation=mode, antialias=True), v2.CenterCrop(recipe.size)]
            )

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor | str, int]:
        epoch, index = item
        label = int(self.images.labels[index])
        try:
            image = read_image(self.images.path(index))
        except UnreadableImage as error:
            # As a value: an exception crosses the process border only with a page of traceback around it.
            return str(error), label
        if not self.augment:
            return self.transform(image), label
        seeds = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
        with _seeded(int(seeds[0] >> np.uint64(1))):
            return self.transform(image), label


class _RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, to the bit; its resize is vectorised for pixels that lie together, and those of a crop do not."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        crop = F.crop(inpt, params["top"], params["left"], params["height"], params["width"])
        together = crop[None].contiguous(memory_format=torch.channels_last)[0]
        return F.resize(together, list(self.size), interpolation=self.interpolation, antialias=self.antialias)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator at `seed`, and back: `fork_rng` asks for devices first, half as long as a crop takes."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _collate(items: Sequence[tuple[Tensor | str, int]]) -> tuple[Tensor, Tensor, str | None]:
    problem = next((image for image, _ in items if isinstance(image, str)), None)
    images = [image for image, _ in items if isinstance(image, Tensor)]
    stacked = torch.stack(images) if images else torch.empty(0)
    return stacked, torch.tensor([label for _, label in items]), problem
