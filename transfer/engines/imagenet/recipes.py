"""The ImageNet-style recipes, typed: `configs/imagenet/*.toml`, one file a recipe, every number with its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from twist.contracts.config import added
from twist.transfer.engines import plain
from twist.transfer.engines.imagenet import ENGINE
from twist.transfer.engines.plain import ImageRecipe, read_recipe

# What needs less memory, by phase.
SEARCH = "go on with --resume and a lower machine.max_memory_mb"
# Another batch is another recipe, which a resumed run may not take.
TRAINING = "go on with --resume on more GPUs, or lower batch_size and every lr_* by the same factor in another --output"
# Where a network does not even lie in memory yet: another process most likely holds the rest of it.
START = "free the device of other processes, then --resume with a lower machine.feature_batch_size"


class Machine(plain.Machine):
    # Accuracy on the validation images every so many epochs; the last epoch is always evaluated.
    evaluate_every_epochs: int = Field(default=1, gt=0)


class Recipe(ImageRecipe):
    machine: Machine = Machine()


class ClassifierRecipe(Recipe):
    """SGD with momentum on cross-entropy; every rate follows a cosine that steps once an epoch and ends at 0."""

    epochs: int = Field(gt=0)
    # Images over all processes together.
    batch_size: int = Field(gt=0)
    lr_classifier: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    # Which training images have labels: all, or the 1 % / 10 % subsets.
    labels: Literal["all", "1percent", "10percent"] = "all"
    # Where a subset comes from: SimCLR's list beside the images, or a class-balanced draw with `labels_seed`.
    labels_from: Literal["list", "seed"] = "list"
    labels_seed: int = Field(default=0, ge=0)
    # Random resized crop and flip; without, every image is seen as at test time.
    augment: bool = True

    @property
    def groups(self) -> int | None:
        """Into how many equal parts a total batch falls whatever the number of GPUs; None: a part a GPU."""
        return None

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates by their keys."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.startswith("lr_")}


class LinearRecipe(ClassifierRecipe):
    """A linear classifier on the frozen backbone."""

    kind: Literal["linear"]
    # ViTs: class tokens of so many last blocks, side by side, each after the last norm (DINO's probe).
    last_blocks: int = Field(default=1, gt=0)
    # Classifiers that train together, each at `lr_classifier` times one of these; the one that counts is the best on
    # every `holdout_every`th training image, which none of them trains on. Empty: one classifier on all.
    rate_factors: tuple[Annotated[float, Field(gt=0)], ...] = added(())
    holdout_every: int = added(10, gt=1)

    @property
    def rates(self) -> dict[str, float]:
        rates = [self.lr_classifier * factor for factor in self.rate_factors]
        return {f"lr_classifier_{rate:g}": rate for rate in rates} or super().rates


class FinetuneRecipe(ClassifierRecipe):
    """Backbone and linear classifier, trained together at two rates."""

    kind: Literal["finetune"]
    lr_backbone: float = Field(gt=0)
    augment: Literal[True] = True
    # Images over which batch norm takes its training statistics, whatever the number of GPUs (None: a process's own).
    batch_norm_images: int | None = added(None, gt=0)

    @property
    def groups(self) -> int | None:
        """Groups of at most `batch_norm_images`, each with statistics of its own."""
        return self.batch_norm_images and -(-self.batch_size // self.batch_norm_images)


class NeighboursRecipe(Recipe):
    """Weighted k-NN vote with cosine similarity s: each neighbour votes for its class with exp(s / temperature)."""

    kind: Literal["knn"]
    neighbours: int = Field(gt=0)
    temperature: float = Field(gt=0)


class ClusterRecipe(Recipe):
    """Clusters of the validation images against their labels."""

    kind: Literal["cluster"]
    # "kmeans" on features, or "head": the arg-max of TWIST's own head, read from the checkpoint `head`.
    by: Literal["kmeans", "head"] = "kmeans"
    head: str | None = None
    # Of the head's hidden layers, where the checkpoint doesn't say.
    head_activation: Literal["relu", "gelu"] | None = None
    # k-means: how many clusters (None: as many as classes), the images they are found on, restarts (of Lloyd's
    # algorithm; the tightest counts), passes over the images.
    clusters: int | None = Field(default=None, gt=1)
    fit_on: Literal["train", "val"] = "train"
    algorithm: Literal["lloyd", "minibatch"] = "lloyd"
    restarts: int = Field(default=1, gt=0)
    max_passes: int = Field(default=100, gt=0)
    # Images a step of the mini-batch algorithm.
    step_size: int = Field(default=16384, gt=0)
    # Features are scaled to length 1 first, so Euclidean k-means works on cosine distance.
    normalise: bool = True

    @model_validator(mode="after")
    def _head_or_kmeans(self) -> ClusterRecipe:
        if (self.by == "head") != (self.head is not None):
            raise ValueError('by = "head" and head = FILE (a TWIST checkpoint that holds its head) go together')
        if self.algorithm == "minibatch" and self.restarts != 1:
            raise ValueError('restarts belong to algorithm = "lloyd"')
        return self

    def recorded(self) -> dict[str, Any]:
        """Without what belongs to the weights (the head), and without k-means' settings where a head is used."""
        kmeans = {"clusters", "fit_on", "algorithm", "restarts", "max_passes", "step_size", "normalise"}
        left_out = {"head", "head_activation"} | (kmeans if self.by == "head" else set())
        return {name: value for name, value in super().recorded().items() if name not in left_out}


AnyRecipe = LinearRecipe | FinetuneRecipe | NeighboursRecipe | ClusterRecipe


def load_recipe(name: str, *, architecture: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read `<name>-<architecture>.toml` where there is one, else `<name>.toml`: see `read_recipe`."""
    path = ENGINE.folder / f"{name}-{architecture}.toml"
    recipe: AnyRecipe = read_recipe(path if path.exists() else ENGINE.folder / f"{name}.toml", AnyRecipe, overrides)
    return recipe
