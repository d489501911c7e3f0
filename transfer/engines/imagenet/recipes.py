"""The ImageNet-style recipes, typed: `configs/imagenet/*.toml`, one file a recipe, every number with its source.

A recipe holds what decides the number. What only decides how fast and in how much memory is in its `[machine]` section
and never enters the recipe hash, so a laptop's row and a server's row can meet in one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from twist.contracts.config import SHIPPED, Config, added, identity_of, load_config, read_toml
from twist.contracts.errors import UsageError, did_you_mean
from twist.transfer.request import Controls

FOLDER = SHIPPED / "imagenet"
# What needs less memory, by phase.
FEATURES = "go on with --resume and a lower machine.feature_batch_size"
SEARCH = "go on with --resume and a lower machine.max_memory_mb"
# Another batch is another recipe, which a resumed run may not take.
TRAINING = "go on with --resume on more GPUs, or lower batch_size and every lr_* by the same factor in another --output"
# Where a network does not even lie in memory yet: another process most likely holds the rest of it.
START = "free the device of other processes, then --resume with a lower machine.feature_batch_size"


class Machine(Config):
    """What may differ between machines without changing the number."""

    # Processes that decode images, at most one a core; 0 decodes in the main process.
    workers: int = Field(default=8, ge=0)
    # Images a forward pass where no gradient is kept.
    feature_batch_size: int = Field(default=256, gt=0)
    # MiB that the k-NN search may need; features on disk are not counted, nor what the system caches of their files.
    max_memory_mb: int = Field(default=2048, gt=0)
    # Keep extracted features in the run folder, keyed by weights, images and transform; a later run reuses them.
    keep_features: bool = False
    # Accuracy on the validation images every so many epochs; the last epoch is always evaluated.
    evaluate_every_epochs: int = Field(default=1, gt=0)


class Recipe(Config):
    """What all recipes share: how an image becomes the network's input at test time."""

    # Side of the network's input, and the shorter side before the central crop is taken.
    size: int = Field(gt=0)
    resize: int = Field(gt=0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    # On CUDA; on CPU everything is float32.
    precision: Literal["fp32", "bf16"] = "fp32"
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _crop_fits(self) -> Recipe:
        if self.resize < self.size:
            raise ValueError(f"resize = {self.resize} is smaller than size = {self.size}: the central crop cannot fit")
        return self

    def recorded(self) -> dict[str, Any]:
        """The part that decides the number, for the record's recipe hash."""
        values = identity_of(self)
        del values["machine"]
        return values


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
        if not self.rate_factors:
            return super().rates
        rates = [self.lr_classifier * factor for factor in self.rate_factors]
        return {f"lr_classifier_{rate:g}": rate for rate in rates}


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
_KINDS: dict[str, type[AnyRecipe]] = {
    "linear": LinearRecipe,
    "finetune": FinetuneRecipe,
    "knn": NeighboursRecipe,
    "cluster": ClusterRecipe,
}


def load_recipe(name: str, *, architecture: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read `<name>-<architecture>.toml` where there is one, else `<name>.toml`, and apply `key=value` overrides.

    `UsageError` for a recipe or a key that is unknown (with the near match), and a value that does not fit.
    """
    path = FOLDER / f"{name}-{architecture}.toml"
    path = path if path.exists() else FOLDER / f"{name}.toml"
    if not path.exists():
        shipped = [path.stem for path in FOLDER.glob("*.toml")]
        raise UsageError(f'There is no ImageNet recipe "{name}".{did_you_mean(name, shipped)}')
    return load_config(path, _KINDS[read_toml(path)["kind"]], overrides, extra_keys=Controls.model_fields)
