"""What our own engines share, in plain torch: typed recipes, the images as networks see them, and frozen features.

Order and random crops are pure functions of (seed, epoch, image), whatever the number of workers, so a run continues
exactly where it stopped. `B` images of one process, `S` the input's side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from twist.contracts.config import Config, identity_of, load_config, read_toml
from twist.contracts.errors import UserError
from twist.contracts.failures import explained
from twist.contracts.images import UnreadableImage
from twist.contracts.machine import cores
from twist.measure.features import Batch, Extractor, FeatureFile, centre_crop
from twist.measure.knn import Rows, nearest, plan_blocks
from twist.transfer.request import Controls, Request, Resolved, Weights

FEATURES = "go on with --resume and a lower machine.feature_batch_size"
BIT_EQUAL = "The frozen backbone is bit-equal before and after: state SHA-256 {:.16}."


class Machine(Config):
    """What may differ between machines without changing the number; it never enters the recipe hash."""

    # Processes that decode images, at most one a core; 0 decodes in the main process.
    workers: int = Field(default=8, ge=0)
    # Images a forward pass where no gradient is kept.
    feature_batch_size: int = Field(default=256, gt=0)
    # MiB that a k-NN search may need; features on disk are not counted, nor what the system caches of their files.
    max_memory_mb: int = Field(default=2048, gt=0)
    # Keep extracted features, keyed by weights, images and transform; a later run reuses them.
    keep_features: bool = False


class Recipe(Config):
    """What all recipes share; `precision` is CUDA's, a CPU computes in float32."""

    precision: Literal["fp32", "bf16"] = "fp32"
    machine: Any

    def recorded(self) -> dict[str, Any]:
        """The part that decides the number, for the record's recipe hash."""
        values = identity_of(self)
        del values["machine"]
        return values


class ImageRecipe(Recipe):
    """One row of features an image: how the image becomes the network's input at test time."""

    # Side of the network's input, and the shorter side before the central crop is taken.
    size: int = Field(gt=0)
    resize: int = Field(gt=0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @model_validator(mode="after")
    def _crop_fits(self) -> ImageRecipe:
        if self.resize < self.size:
            raise ValueError(f"resize = {self.resize} is smaller than size = {self.size}: the central crop cannot fit")
        return self

    @property
    def view(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include={"size", "resize", "interpolation"})


def read_recipe(path: Path, recipes: Any, overrides: Sequence[str]) -> Any:
    """The recipe in a TOML file with `key=value` overrides: that of the union `recipes` whose `kind` it names."""
    kinds = {get_args(recipe.model_fields["kind"].annotation)[0]: recipe for recipe in get_args(recipes)}
    return load_config(path, kinds[read_toml(path)["kind"]], overrides, extra_keys=Controls.model_fields)


@dataclass(frozen=True, kw_only=True)
class Setup(Resolved):
    """A run, resolved, with its images; `train` is None where none are needed."""

    request: Request
    weights: Weights
    train: Any
    val: Any

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.request.gpus else torch.device("cpu")


def search(
    queries: Rows,
    bank: Rows,
    neighbours: int,
    machine: Machine,
    *,
    device: torch.device | None = None,
    quiet: bool = False,
) -> tuple[Tensor, Tensor]:
    """`nearest` within the memory that the recipe allows: similarities and bank indices, (Q, k)."""
    kept = min(neighbours, len(bank))
    limits = {"neighbours": kept, "max_memory_mb": machine.max_memory_mb}
    blocks = plan_blocks(len(queries), len(bank), queries[0:1].shape[1], **limits)
    return nearest(queries, bank, neighbours=kept, blocks=blocks, device=device, quiet=quiet)


# ── Images ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rank:
    """This process: its number, how many there are, and its device."""

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


ALONE = Rank()


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


def ordered_batches(count: int, *, batch_size: int, start: int = 0, rank: Rank = ALONE) -> list[np.ndarray]:
    """Every image from `start` on once in order, ranks interleaved, in batches of `batch_size` a process."""
    own = np.arange(start + rank.index, count, rank.count)
    return [own[first : first + batch_size] for first in range(0, len(own), batch_size)]


def loaded(
    read: Callable[[int], Any], batches: Sequence[np.ndarray], *, workers: int, pinned: bool = False
) -> Iterator[Any]:
    """What `read` gives of the numbers in each batch, collated; at most one process a core reads."""
    workers = min(workers, cores(), len(batches))  # more would wait for each other, and torch warns
    loader = DataLoader(
        _Read(read),
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        pin_memory=pinned,
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


class _Read(Dataset[Any]):
    def __init__(self, read: Callable[[int], Any]) -> None:
        self.read = read

    def __getitem__(self, index: int) -> Any:
        return self.read(index)


def decoded(
    images: Any,
    recipe: ImageRecipe,
    batches: Sequence[np.ndarray],
    *,
    device: torch.device = ALONE.device,
    crops: tuple[int, int] | None = None,
) -> Iterator[Batch]:
    """(images (B, 3, S, S) uint8 RGB, labels (B,)) of the index `batches`, in main memory; `device` is for later use.

    `crops` (seed, epoch) takes random crops, else images are seen as at test time.
    """
    pinned = device.type == "cuda"
    yield from loaded(_Decoded(images, recipe, crops), batches, workers=recipe.machine.workers, pinned=pinned)


class _Decoded:
    """Index → uint8 image at the input's size and its label."""

    def __init__(self, images: Any, recipe: ImageRecipe, crops: tuple[int, int] | None) -> None:
        self.images, self.crops = images, crops
        self.transform = centre_crop(**recipe.view)
        if crops is not None:
            mode = InterpolationMode(recipe.interpolation)
            crop = _RandomResizedCrop(recipe.size, interpolation=mode, antialias=True)
            self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __call__(self, index: int) -> tuple[Tensor, int]:
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


def extract(extractor: Extractor, images: Any, recipe: ImageRecipe, *, folder: Path, title: str) -> FeatureFile:
    """Features of `images` as at test time, in a file below `folder`: see `Extractor.to_file`."""
    batches = ordered_batches(len(images), batch_size=recipe.machine.feature_batch_size)
    rows = decoded(images, recipe, batches, device=extractor.device)
    key = {"images": images.stamp(), "transform": recipe.view}
    with explained(memory=FEATURES):
        return extractor.to_file(rows, images.labels, key=key, folder=folder, title=title)
