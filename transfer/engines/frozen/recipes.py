"""The recipes of frozen features, typed: `configs/frozen/*.toml`. Each choice that moved a published number is a key.

One ViT-L scores 47.7 and 41.8 on "ADE20K linear", for masks that were reduced from 448 to 100 pixels: `label_size` is
therefore part of every dense recipe and its hash, and rows of two of them do not meet. `[machine]` only decides how
fast and in how much memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from twist.measure.dense import Layers
from twist.measure.segmentation import Void
from twist.transfer.engines import plain
from twist.transfer.engines.frozen import ENGINE
from twist.transfer.engines.plain import read_recipe


class Machine(plain.Machine):
    feature_batch_size: int = Field(default=32, gt=0)
    keep_features: bool = True
    # GB that one file of features may take.
    max_disk_gb: float = Field(default=100, gt=0)
    # The folder of features; "" is `features` beside the run folders, so that the protocols of one root share it.
    features: str = ""


class Recipe(plain.Recipe):
    """What all share: the layers that are read."""

    layers: Layers = Layers()
    machine: Machine = Machine()


class DenseRecipe(Recipe):
    """Features of whole pictures, their sides squashed to a square, and label maps of `label_size`.

    Predictions are enlarged (bilinear) to the label maps and compared pixel by pixel.
    """

    # Side of the network's input.
    size: int = Field(gt=0)
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


class DiscoveryRecipe(Recipe):
    """LOST: see `twist.measure.segmentation`. Pictures keep their size, a ViT's are padded to whole patches."""

    kind: Literal["corloc"]
    candidates: int = Field(gt=0)
    # An object is found where the overlap is at least this.
    overlap: float = Field(gt=0, le=1)
    # Boxes marked difficult or truncated (VOC) count.
    hard_objects: bool = True
    # A longer side than this is reduced first; 0 keeps all sizes.
    longest_side: int = Field(default=0, ge=0)
    precision: Literal["fp32"] = "fp32"


class ImageRecipe(Recipe, plain.ImageRecipe):
    """One row of features an image: the network's own output (`pooled`)."""


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


def load_recipe(name: str, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read `<name>.toml`: see `read_recipe`."""
    recipe: AnyRecipe = read_recipe(ENGINE.folder / f"{name}.toml", AnyRecipe, overrides)
    return recipe
