"""Images of a recipe: those that have labels, their order, batches as the network sees them, and frozen features.

Order and random crops are pure functions of (seed, epoch, image), whatever the number of workers, so a run continues
exactly where it stopped. `B` images of one process, `S` the input's side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from twist.catalog.class_folders import SUBSETS, LabelledImages, draw_subset, find_subset, read_subset
from twist.contracts.errors import UserError
from twist.contracts.failures import explained
from twist.contracts.images import UnreadableImage
from twist.contracts.machine import cores
from twist.measure.features import Batch, Extractor, FeatureFile, centre_crop
from twist.transfer.engines.imagenet.recipes import FEATURES, ClassifierRecipe, Recipe


@dataclass(frozen=True)
class Rank:
    """This process: its number, how many there are, and its device."""

    index: int
    count: int
    device: torch.device


ALONE = Rank(0, 1, torch.device("cpu"))


def labelled_subset(train: LabelledImages, recipe: ClassifierRecipe) -> LabelledImages:
    """The training images that have labels under `recipe`; `UserError` for a list that is missing or wrong."""
    if recipe.labels == "all":
        return train
    list_name, share = SUBSETS[recipe.labels]
    if recipe.labels_from == "seed":
        return draw_subset(train, share, seed=recipe.labels_seed)
    path = listed_labels(train, recipe)
    if path is not None:
        return read_subset(train, path)
    raise UserError(
        f"There is no {list_name} in {train.folder.parent}: write it with `twist data prepare imagenet`, or draw a "
        "class-balanced subset with labels_from=seed, which is another recipe."
    )


def listed_labels(train: LabelledImages, recipe: ClassifierRecipe) -> Path | None:
    """The list of labelled images beside the training images, where `recipe` wants one and it is there."""
    return None if recipe.labels == "all" else find_subset(train.folder.parent, SUBSETS[recipe.labels][0])


def epoch_batches(
    count: int, *, batch_size: int, seed: int, epoch: int, rank: Rank = ALONE, groups: int | None = None
) -> list[np.ndarray]:
    """One process's image indices, batch by batch, of a shuffled epoch; the last total batch may be smaller.

    Ranks take equal parts of each total batch; where it does not divide, its first images are seen twice. With `groups`
    a total batch has as many equal parts, the same for any number of ranks, and a rank's lie one after the other.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    totals = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    parts = groups or rank.count
    whole = [np.resize(total, (-(-len(total) // parts), parts)) for total in totals]
    return [total.T[rank.index :: rank.count].reshape(-1) for total in whole]


def ordered_batches(count: int, *, batch_size: int, rank: Rank = ALONE) -> list[np.ndarray]:
    """Every image once in order, ranks interleaved, in batches of `batch_size` a process."""
    own = np.arange(rank.index, count, rank.count)
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def decoded(
    images: LabelledImages,
    recipe: Recipe,
    batches: Sequence[np.ndarray],
    *,
    device: torch.device = ALONE.device,
    crops: tuple[int, int] | None = None,
) -> Iterator[Batch]:
    """(images (B, 3, S, S) uint8 RGB, labels (B,)) of the index `batches`, in main memory; `device` is for later use.

    `crops` (seed, epoch) takes random crops, else images are seen as at test time.

    Raises:
        UserError: an image is unreadable, or a process that decodes died.
    """
    # At most one process a core: more would wait for each other, and torch warns.
    workers = min(recipe.machine.workers, cores(), len(batches))
    loader = DataLoader(
        _Decoded(images, recipe, crops),
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # Its own: without, each pass would draw a number from the generator of the whole process.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except UnreadableImage as error:  # of a worker with its traceback, which ends in the sentence
        sentence = str(error).strip().splitlines()[-1].rpartition("UnreadableImage: ")[2]
        raise UnreadableImage(f"{sentence}; delete or replace it.") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A process that decodes images died ({str(error).splitlines()[0]}): it ran out of memory or was killed; "
            f"go on with fewer by --resume machine.workers={workers // 2}."
        ) from None


class _Decoded(Dataset[tuple[Tensor, int]]):
    """Index → uint8 image at the input's size and its label."""

    def __init__(self, images: LabelledImages, recipe: Recipe, crops: tuple[int, int] | None) -> None:
        self.images, self.crops = images, crops
        self.transform = centre_crop(size=recipe.size, resize=recipe.resize, interpolation=recipe.interpolation)
        if crops is not None:
            mode = InterpolationMode(recipe.interpolation)
            crop = _RandomResizedCrop(recipe.size, interpolation=mode, antialias=True)
            self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images.read(index), int(self.images.labels[index])
        if self.crops is None:
            return self.transform(image), label
        seeds = np.random.SeedSequence([*self.crops, index]).generate_state(1, np.uint64)
        # Not by `fork_rng`, which looks for devices first, half as long as a crop takes.
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(int(seeds[0] >> np.uint64(1)))
        try:
            return self.transform(image), label
        finally:
            torch.default_generator.set_state(before)


class _RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, to the bit, but faster: its resize is vectorised only for pixels that lie together in memory."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        crop = F.crop(inpt, params["top"], params["left"], params["height"], params["width"])
        together = crop[None].contiguous(memory_format=torch.channels_last)[0]
        return F.resize(together, list(self.size), interpolation=self.interpolation, antialias=self.antialias)


def extract(extractor: Extractor, images: LabelledImages, recipe: Recipe, *, folder: Path, title: str) -> FeatureFile:
    """Features of `images` as at test time, in a file below `folder`: see `Extractor.to_file`."""
    batches = ordered_batches(len(images), batch_size=recipe.machine.feature_batch_size)
    transform = recipe.model_dump(mode="json", include={"size", "resize", "interpolation"})
    with explained(memory=FEATURES):
        return extractor.to_file(
            decoded(images, recipe, batches, device=extractor.device),
            images.labels,
            key={"images": images.stamp(), "transform": transform},
            folder=folder,
            title=title,
        )
