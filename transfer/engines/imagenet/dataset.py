"""Labelled images on disk: ROOT/[imagenet/]{train,val}/<class>/…, the 1 % and 10 % subsets, and batches of both.

Paths are kept as one array of bytes: a Python list of 1.28 million strings is copied page by page into every worker.
Batches come in a stated order whatever the number of workers, and a random crop is a pure function of (seed, epoch,
image), so a run continues exactly where it stopped. `B` images of one process, `S` the input's side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from twist.catalog.class_folders import SUBSETS, LabelledImages, draw_subset, find_subset, read_subset
from twist.contracts.errors import UserError
from twist.contracts.images import UnreadableImage, read_image
from twist.contracts.machine import cores
from twist.transfer.engines.imagenet.recipes import ClassifierRecipe, Recipe


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
    path = find_subset(tree, list_name)
    if path is not None:
        return read_subset(train, path)
    raise UserError(
        f"There is no {list_name} in {tree}: `twist data prepare imagenet` writes it from SimCLR's published list, or "
        "labels_from=seed draws a class-balanced subset (another protocol: its rows stand apart)."
    )


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
