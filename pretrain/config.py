"""The config of a pretraining run, frozen once it is read. Files: `configs/pretrain/*.toml`.

Defaults are the published ResNet-50 recipe (TWIST repository, commit 796d36e); each config states the rest.
`batch_size` is images a rank; the total batch is that times the number of ranks, and learning rates scale with it.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from twist.contracts.config import Config, added
from twist.contracts.errors import MOST_SEED
from twist.contracts.images import MAX_PIXELS
from twist.contracts.trackers import Logger
from twist.contracts.weights import Architecture, Resize, Vit, is_vit, stem_of, usual_vit

Precision = Literal["bf16", "fp16", "fp32"]
Share = Annotated[float, Field(ge=0, le=1)]


def _range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"{list(value)} is no range: 0 < low ≤ high")
    return value


Range = Annotated[tuple[float, float], AfterValidator(_range)]
Scale = Annotated[tuple[Share, Share], AfterValidator(_range)]  # shares of the image's area
# Global crops of the kinds without local ones: torchvision's default, and MoCo's.
PUBLISHED_SCALES = {"barlow": (0.08, 1.0), "moco": (0.2, 1.0)}


class DataConfig(Config):
    """Where the images are and how they reach the device."""

    # A folder (any depth, no classes needed), a data card, a text file with one path a line, Parquet or tar shards
    # (their folder, or a pattern as `s3://bucket/*.tar`), a hub's set as `hf://datasets/NAME`, or with
    # `format = "datasets"` whatever Hugging Face `datasets.load_dataset` takes.
    root: str = Field(min_length=1)
    format: Literal["folder", "list", "datasets"] = "folder"
    # For shards and `datasets`: keyword arguments of load_dataset (data_files, split, streaming, …) and the column.
    dataset_options: dict[str, Any] = Field(default_factory=dict)
    image_column: str = "image"
    # For `streaming = true` in the options: images of an epoch, where the set does not say; and how many encoded images
    # (some 0.1 MB each) a rank holds to shuffle among. What a stream cannot promise: `data/source.py`.
    stream_images: int | None = Field(default=None, gt=0)
    stream_shuffle_buffer: int = Field(default=2000, gt=0)
    # `device` cuts uint8 crops in workers and does the photometric part for the whole batch on the training device;
    # `cpu` does both in workers. The pictures are the same up to float rounding.
    pipeline: Literal["device", "cpu"] = "device"
    workers: int = Field(default=8, ge=0)
    # The run stops when more than this share of an epoch's images (and at least 20, unless the share is 0) cannot be
    # read; fewer are named, replaced and counted, on each rank.
    bad_image_share: float = Field(default=0.001, ge=0, lt=1)
    # Left out of a folder: names or patterns of paths below it (`val/*`, `*.gif`). Of a data card val is left out.
    exclude: tuple[str, ...] = added(())
    # A picture of more pixels is not decoded, and counts as unreadable.
    max_pixels: int = added(MAX_PIXELS, gt=0)


class ViewsConfig(Config):
    """Which views of an image are made. The photometric numbers of each kind are the method's: `data/views.py`."""

    kind: Literal["multicrop", "barlow", "moco"] = "multicrop"
    global_size: int = Field(default=224, gt=0)
    global_scale: Scale = (0.4, 1.0)
    local_count: int = Field(default=12, ge=0)
    local_size: int = Field(default=96, gt=0)
    local_scale: Scale = (0.05, 0.4)
    # None: the kind's own (`data/views.py`). The published blur, σ of 0.1 to 2 pixels, is meant for views of 96
    # pixels and more: at 40 it wipes out what a view shows. More greyscale keeps colour from being all that is learned.
    blur_sigma: Range | None = None  # pixels of the view
    grey_probability: Share | None = None
    # Harder crops of the self-labelling stage.
    self_label_global_scale: Scale = (0.14, 1.0)
    self_label_local_scale: Scale = (0.05, 0.14)

    @model_validator(mode="before")
    @classmethod
    def _published_scale(cls, values: Any) -> Any:
        # A kind without local crops has its own published scale; filled in here, so it stands in every written config.
        if isinstance(values, dict) and values.get("kind") in PUBLISHED_SCALES:
            return {"global_scale": PUBLISHED_SCALES[values["kind"]], **values}
        return values


class ModelConfig(Config):
    """Backbone, head and teacher."""

    backbone: Architecture = "resnet50"
    width: Literal[1, 2, 4] = 1
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    # How a ViT's position table is made smaller for the local crops (`Vit.resize` in contracts/weights.py): with
    # antialiasing, or as the published code does, "offset".
    resize: Resize = added("antialias")
    hidden_dim: int = Field(default=4096, gt=0)
    # K, the outputs of the head: 4096 with multi-crop, 32768 without, 1000 for unsupervised classification.
    classes: int = Field(default=4096, gt=1)
    activation: Literal["relu", "gelu"] = "relu"
    # Images over which the last batch norm takes its statistics, in groups of consecutive ranks (0: all ranks).
    bunch_size: int = Field(default=256, ge=0)
    # Momentum teacher (ViT recipes).
    teacher: bool = False
    teacher_momentum: tuple[Share, Share] = (0.996, 1.0)
    # Trade compute for memory in the backbone.
    activation_checkpointing: bool = False

    @property
    def is_vit(self) -> bool:
        return is_vit(self.backbone)

    @property
    def patch_size(self) -> int:
        """Side of a ViT's patches in pixels."""
        return int(stem_of(self.backbone).removeprefix("patch"))

    @property
    def vit(self) -> Vit | None:
        """The description of a ViT that is not the usual one of its name (`Backbone.vit`)."""
        if not self.is_vit or self.resize == "antialias":
            return None
        return usual_vit(self.backbone).model_copy(update={"resize": self.resize})


class LossConfig(Config):
    """Weights of sharpness (1 + lam1) and diversity (lam2), temperature, and what is added inside every logarithm."""

    lam1: float = 0.0
    lam2: float = 1.0
    tau: float = Field(default=1.0, gt=0)
    eps: float = Field(default=1e-5, gt=0)


class SelfLabelConfig(Config):
    """The second stage: the share of images that label themselves goes from `quantile_start` to `quantile_end`."""

    quantile_start: float = Field(default=0.5, ge=0, lt=1)
    quantile_end: float = Field(default=0.6, ge=0, lt=1)
    # lr before scaling, and the warm-up at the stage's start.
    lr: float = Field(default=0.05, gt=0)
    warmup_epochs: int = Field(default=5, ge=0)


class OptimConfig(Config):
    name: Literal["lars", "adamw"] = "lars"
    # Before scaling with (total batch) / 256.
    lr: float = Field(default=0.5, gt=0)
    weight_decay: float = Field(default=1.5e-6, ge=0)
    # Cosine from weight_decay to this over the run; None keeps it constant.
    weight_decay_end: float | None = Field(default=None, ge=0)
    momentum: float = Field(default=0.9, gt=0, lt=1)
    # LARS trust coefficient.
    eta: float = Field(default=0.001, gt=0)
    # None takes the published rule: 10, or 5 when epochs ≤ 50, or 3 when epochs ≤ 20.
    warmup_epochs: int | None = Field(default=None, ge=0)
    # The cosine ends at this share of the base rate.
    final_lr_ratio: float = Field(default=0.001, ge=0, le=1)
    clip_norm: float | None = Field(default=None, gt=0)
    # Only 1: diversity and the last batch norm are statistics of the whole batch.
    accumulate_steps: int = 1


class RunConfig(Config):
    """Length, precision, checkpoints and checks."""

    epochs: int = Field(gt=0)
    # Epochs of the first stage; the rest is self-labelling. Left out: all of them.
    mutual_information_epochs: int = Field(ge=0)
    # Images a rank.
    batch_size: int = Field(default=128, gt=0)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    # `auto` takes the GPU when there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # A full checkpoint of the published code: backbone, head and (when the recipe has one) teacher start from it.
    warm_start: str | None = None
    # What a device does not do well is done in float32 (`pretrain/plan.py`), and so is the loss, always.
    precision: Precision = "bf16"
    channels_last: bool = True
    compile: bool = False
    # Bit-identical continuation needs it; costs some speed on GPU.
    deterministic: bool = False
    log_every_steps: int = Field(default=10, gt=0)
    # Checkpoints at every epoch's end, and within epochs every so many steps (None: not).
    checkpoint_every_epochs: int = Field(default=1, gt=0)
    checkpoint_every_steps: int | None = Field(default=None, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    # Steps in a row with a non-finite loss or gradient after which the run stops with a replayable capture.
    max_nonfinite_steps: int = Field(default=10, gt=0)
    # Say so ("warn") or stop when predictions collapse.
    on_collapse: Literal["warn", "stop"] = "warn"
    # Every so many epochs, k-NN, NMI and RankMe on a labelled folder with train/ and val/, or on a data card; of its
    # masks knn-seg (None: never).
    online_eval_root: str | None = None
    online_eval_every_epochs: int = Field(default=10, gt=0)
    # An experiment tracker beside TensorBoard; it gets nothing unless it is named here.
    logger: Logger | None = added(None)

    @model_validator(mode="before")
    @classmethod
    def _one_stage(cls, values: Any) -> Any:
        # Filled in here, so that `run.epochs=2` alone shortens a run, and the number stands in every written config.
        if isinstance(values, dict) and "epochs" in values:
            return {"mutual_information_epochs": values["epochs"], **values}
        return values


class PretrainConfig(Config):
    """A whole run. One section a table in the TOML file."""

    data: DataConfig
    run: RunConfig
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    self_label: SelfLabelConfig = SelfLabelConfig()
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _together(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """What does not go together, a sentence each."""
        run, model, optim, views = self.run, self.model, self.optim, self.views
        is_vit, lars = model.is_vit, optim.name == "lars"
        first, second = run.mutual_information_epochs, run.epochs - run.mutual_information_epochs
        if views.kind != "multicrop" and views.local_count:
            yield f'views of kind "{views.kind}" have no local crops: set views.local_count = 0'
        if optim.accumulate_steps != 1:
            yield (
                "gradient accumulation is not possible with TWIST, whose diversity and last batch norm are statistics "
                "of the whole batch: lower run.batch_size, or set model.activation_checkpointing = true"
            )
        if second < 0:
            yield f"run.mutual_information_epochs = {first} is more than run.epochs = {run.epochs}: lower it too"
        if first == 0 and run.warm_start is None:
            yield (
                "self-labelling needs a network that has learnt classes: with run.mutual_information_epochs = 0 set "
                "run.warm_start to a whole checkpoint, as RUN/checkpoints/first_stage.pt"
            )
        for table, warmup, epochs in (
            ("optim", optim.warmup_epochs or 0, first),
            ("self_label", self.self_label.warmup_epochs, second),
        ):
            if 0 < epochs <= warmup:
                yield (
                    f"{table}.warmup_epochs = {warmup} is not less than the {epochs} epochs of its stage: pass "
                    f"{table}.warmup_epochs={epochs // 2}"
                )
        patch = model.patch_size if is_vit else 1
        if views.global_size % patch or views.local_size % patch:
            yield f"a ViT with {patch}-pixel patches needs view sizes that are multiples of {patch}"
        if run.compile and model.activation_checkpointing and not is_vit:
            # The second resolution moves the running statistics that the first one's second forward would start from.
            yield "run.compile and model.activation_checkpointing do not go together with batch norms: keep one of them"
        for table, name, has_effect, where in (
            ("model", "width", not is_vit, "in ResNets"),
            ("model", "drop_path", is_vit, "in ViTs"),
            ("model", "resize", is_vit, "in ViTs"),
            ("model", "teacher_momentum", model.teacher, "with model.teacher = true"),
            ("optim", "momentum", lars, "with LARS"),
            ("optim", "eta", lars, "with LARS"),
        ):
            value, fields = getattr(getattr(self, table), name), type(getattr(self, table)).model_fields
            if not has_effect and value != fields[name].default:
                yield f"{table}.{name} = {value} would have no effect, only {where}: leave it out"
