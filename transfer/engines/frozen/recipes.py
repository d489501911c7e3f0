"""The recipes of frozen features, typed: `configs/frozen/*.toml`. Each choice that moved a published number is a key.

One ViT-L scores 47.7 and 41.8 on "ADE20K linear", for masks that were reduced from 448 to 100 pixels: `label_size` is
therefore part of every dense recipe and its hash, and rows of two of them do not meet. `[machine]` only decides how
fast and in how much memory.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from twist.contracts.config import Config, load_config, read_toml
from twist.contracts.errors import UsageError, did_you_mean
from twist.measure.dense import Layers
from twist.measure.segmentation import Void
from twist.transfer.engines.frozen import ENGINE
from twist.transfer.request import Controls


class Machine(Config):
    """What may differ between machines without changing the number."""

    # Processes that decode images, at most one a core; 0 decodes in the main process.
    workers: int = Field(default=8, ge=0)
    # Images a forward pass.
    feature_batch_size: int = Field(default=32, gt=0)
    # MiB that a k-NN search may need; features on disk are not counted.
    max_memory_mb: int = Field(default=2048, gt=0)
    # GB that one file of features may take, and whether it stays for the next protocol.
    max_disk_gb: float = Field(default=100, gt=0)
    keep_features: bool = True
    # The folder of features; "" is `features` beside the run folders, so that the protocols of one root share it.
    features: str = ""


class Recipe(Config):
    """What all share: the side of the network's input, the layers, and CUDA's precision (a CPU computes in float32)."""

    size: int = Field(gt=0)
    layers: Layers = Layers()
    precision: Literal["fp32", "bf16"] = "fp32"
    machine: Machine = Machine()

    def recorded(self) -> dict[str, Any]:
        """The part that decides the number, for the record's recipe hash."""
        return self.model_dump(mode="json", exclude={"machine"})


class DenseRecipe(Recipe):
    """Features of whole pictures, their sides squashed to a square, and label maps of `label_size`.

    Predictions are enlarged (bilinear) to the label maps and compared pixel by pixel.
    """

    # Side that label maps are reduced to (nearest), 0 for their own size. This moves published numbers by points.
    label_size: int = Field(ge=0)
    # Said although there is one way here, so that records of other ways will not meet these.
    view: Literal["squash"] = "squash"
    window: Literal["whole"] = "whole"
    multi_scale: Literal[False] = False
    augment: Literal[False] = False


class NeighboursRecipe(DenseRecipe):
    """Retrieval of patch labels: see `twist.measure.segmentation`."""

    kind: Literal["knn-seg"]
    # Patches in the memory, an equal number of each training image.
    memory_size: int = Field(gt=0)
    neighbours: int = Field(gt=0)
    temperature: float = Field(gt=0)
    patch_labels: Literal["soft", "hard"] = "soft"
    memory_void: Void = "left out"


class LinearRecipe(DenseRecipe):
    """Batch norm and a 1×1 convolution, AdamW on cross-entropy of the enlarged scores; one head a rate and decay."""

    kind: Literal["linear-seg"]
    batch_norm: bool = True
    iterations: int = Field(gt=0)
    warmup_iterations: int = Field(ge=0)
    # Images a step.
    batch_size: int = Field(gt=0)
    learning_rates: tuple[float, ...] = Field(min_length=1)
    weight_decays: tuple[float, ...] = Field(min_length=1)
    # Side of the label maps that the loss is computed on; 0 takes the map of features.
    loss_size: int = Field(ge=0)
    # Where the best of the grid is chosen: on training images that were held out, or, as DINOv2 does, on those that
    # are then reported.
    chosen_on: Literal["holdout", "val"] = "holdout"
    # Every so many-th training image is held out.
    holdout_every: int = Field(default=10, gt=1)


class ClustersRecipe(DenseRecipe):
    """k-means on the patches of the validation images, each cluster named by its pixels' commonest class."""

    kind: Literal["cluster-seg"]
    clusters: int = Field(gt=1)
    # Patches that k-means is fitted on, drawn evenly over the images.
    fitted_patches: int = Field(gt=0)
    max_passes: int = Field(default=100, gt=0)
    step_size: int = Field(default=16384, gt=0)


class DiscoveryRecipe(Config):
    """LOST: see `twist.measure.discovery`. Pictures keep their size, a ViT's are padded to whole patches."""

    kind: Literal["corloc"]
    layers: Layers
    candidates: int = Field(gt=0)
    # An object is found where the overlap is at least this.
    overlap: float = Field(gt=0, le=1)
    # Boxes marked difficult or truncated (VOC) count.
    hard_objects: bool = True
    # A longer side than this is reduced first; 0 keeps all sizes.
    longest_side: int = Field(default=0, ge=0)
    precision: Literal["fp32"] = "fp32"
    machine: Machine = Machine()

    def recorded(self) -> dict[str, Any]:
        """The part that decides the number, for the record's recipe hash."""
        return self.model_dump(mode="json", exclude={"machine"})


class ImageRecipe(Recipe):
    """One row of features an image: the mean over the map of `layers`, or the network's own output (`pooled`)."""

    resize: int = Field(gt=0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @model_validator(mode="after")
    def _crop_fits(self) -> ImageRecipe:
        if self.resize < self.size:
            raise ValueError(f"resize = {self.resize} is smaller than size = {self.size}: the central crop cannot fit")
        return self


class FewShotRecipe(ImageRecipe):
    """k-NN and logistic regression from `shots` images a class, the mean over `draws` of them."""

    kind: Literal["fewshot"]
    shots: int = Field(gt=0)
    draws: int = Field(gt=0)
    neighbours: int = Field(gt=0)
    temperature: float = Field(gt=0)
    # scikit-learn's C of the logistic regression, on features of length 1.
    inverse_regularisation: float = Field(gt=0)


class SvmRecipe(ImageRecipe):
    """A linear SVM a class, VOC's way: the cost with the best cross-validated AP of each class."""

    kind: Literal["svm"]
    costs: tuple[float, ...] = Field(min_length=1)
    folds: int = Field(default=3, gt=1)
    # Positive images a class, each the mean over `draws`; () takes all images.
    shots: tuple[int, ...] = ()
    draws: int = Field(default=5, gt=0)
    # "test": the best cost on the test images, as mmselfsup and VISSL report low-shot results.
    cost_chosen_on: Literal["cross-validation", "test"] = "cross-validation"

    @model_validator(mode="after")
    def _one_way(self) -> SvmRecipe:
        if bool(self.shots) != (self.cost_chosen_on == "test"):
            raise ValueError('shots and cost_chosen_on = "test" go together: one image a class cannot be validated')
        return self


AnyRecipe = NeighboursRecipe | LinearRecipe | ClustersRecipe | DiscoveryRecipe | FewShotRecipe | SvmRecipe
KINDS: dict[str, type[AnyRecipe]] = {
    "knn-seg": NeighboursRecipe,
    "linear-seg": LinearRecipe,
    "cluster-seg": ClustersRecipe,
    "corloc": DiscoveryRecipe,
    "fewshot": FewShotRecipe,
    "svm": SvmRecipe,
}


def load_recipe(name: str, overrides: tuple[str, ...] = ()) -> AnyRecipe:
    """Read `<name>.toml` and apply `key=value` overrides.

    `UsageError` for a recipe or a key that is unknown (with the near match), and a value that does not fit.
    """
    path = ENGINE.folder / f"{name}.toml"
    if not path.exists():
        shipped = [path.stem for path in ENGINE.folder.glob("*.toml")]
        raise UsageError(f'There is no recipe "{name}" for frozen features.{did_you_mean(name, shipped)}')
    return load_config(path, KINDS[read_toml(path)["kind"]], overrides, extra_keys=Controls.model_fields)
