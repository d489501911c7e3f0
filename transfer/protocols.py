"""THE table: every way this suite can measure a backbone. `twist transfer --list` prints it, the engines run it.

One row a protocol: which engine, which config, which data, which metrics (the main ones first), on how many GPUs the
recipe is stated, and what others published under it or, marked, under a recipe close to it. Rows that look alike and
are not: VOC C4 and VOC FPN are two detectors, FPN with MoCo's 2-fc head and with InfoMin's 4conv-1fc head differ by
about one box AP (MoCo v1 38.5 and 39.4, PyContrast `pycontrast/detection/README.md`), and FCN d8 and d16 are two
segmentation heads.

The published numbers are in `published.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from twist.contracts.errors import UsageError, did_you_mean
from twist.contracts.metrics import METRICS
from twist.contracts.record import Task
from twist.transfer.published import (
    CITYSCAPES_D16_PUBLISHED,
    CITYSCAPES_INSTANCE_PUBLISHED,
    CITYSCAPES_INSTANCES,
    CLASSIFICATION,
    CLUSTER_PUBLISHED,
    CLUSTERING,
    COCO,
    COCO_C4_1X,
    COCO_C4_2X,
    COCO_FPN_1X,
    COCO_FPN_2X,
    COCO_INFOMIN_1X,
    COCO_INFOMIN_2X,
    FINETUNE_PUBLISHED,
    KNN_PUBLISHED,
    LINEAR_PUBLISHED,
    NEIGHBOURS,
    SEGMENTATION,
    SEMI_1_PUBLISHED,
    SEMI_10_PUBLISHED,
    VOC,
    VOC_C4_PUBLISHED,
    VOC_D8_PUBLISHED,
    VOC_D16_PUBLISHED,
    VOC_FPN_PUBLISHED,
    Neighbour,
)

Engine = Literal["detectron2", "mmseg", "imagenet"]
DataSet = Literal["coco", "voc2007", "voc2012", "voc2012-aug", "cityscapes", "imagenet"]


@dataclass(frozen=True)
class Protocol:
    """One row. `config` lies under `configs/<engine>/`; `gpus` is the recipe's count (0: one process, CPU will do).

    `hours` is wall time on the named `gpus` where we measured it, None where nobody here did.
    """

    name: str
    engine: Engine
    task: Task
    config: str
    data: tuple[DataSet, ...]
    metrics: tuple[str, ...]
    gpus: int
    recipe: str
    scale: Literal["full", "sample"] = "full"
    hours: float | None = None
    expected: tuple[Neighbour, ...] = field(default=())

    @property
    def main_metric(self) -> str:
        return self.metrics[0]


def find_protocol(name: str) -> Protocol:
    """The row called `name`; `UsageError` with the near match when there is none."""
    if name not in PROTOCOLS:
        raise UsageError(f'There is no protocol "{name}".{did_you_mean(name, PROTOCOLS)} See `twist transfer --list`.')
    return PROTOCOLS[name]


def find_neighbours(protocol: Protocol, method: str, epochs: int | None, architecture: str) -> list[Neighbour]:
    """The published rows of `method` on `architecture`: those of the same epochs when any, else those without any."""
    rows = [row for row in protocol.expected if (row.method, row.architecture) == (method, architecture)]
    same = [row for row in rows if row.epochs == epochs and epochs is not None]
    return same or [row for row in rows if row.epochs is None]


def list_protocols() -> str:
    """The table as `twist transfer --list` prints it: one block a row, full protocols first."""
    blocks = []
    for title, scale in (("Full protocols", "full"), ("Sample twins (the same engines, minutes on a CPU)", "sample")):
        blocks.append(f"{title}\n{'=' * len(title)}")
        blocks += [_block(row) for row in PROTOCOLS.values() if row.scale == scale]
    return "\n\n".join(blocks)


def _block(row: Protocol) -> str:
    hardware = f"{row.gpus} GPUs" if row.gpus > 1 else "1 GPU" if row.gpus else "CPU"
    hours = "hours not measured" if row.hours is None else _hours(row.hours)
    lines = [
        f"{row.name}   [{row.engine}, {row.task}]",
        f"  recipe     {row.recipe}",
        f"  data       {', '.join(row.data)}",
        f"  hardware   {hardware}, {hours}",
        f"  metrics    {', '.join(METRICS[name].label for name in row.metrics)}",
    ]
    labels = ""
    for neighbour in row.expected:
        if labels != (labels := " / ".join(METRICS[name].label for name in neighbour.values)):
            lines.append(f"  published  {'':18} {labels}")
        epochs = f" {neighbour.epochs} ep" if neighbour.epochs else ""
        values = " / ".join(f"{value:.1f}" for value in neighbour.values.values())
        architecture = "" if neighbour.architecture == "resnet50" else f", {neighbour.architecture}"
        differs = f"; {neighbour.differs}" if neighbour.differs else ""
        lines.append(
            f"             {neighbour.method + epochs:18} {values}   [{neighbour.source}{architecture}{differs}]"
        )
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return (
        f"{hours:g} hours" if hours >= 1 else f"{round(hours * 60)} min" if hours > 1 / 60 else f"{hours * 3600:.0f} s"
    )


_VOC_SETS: tuple[DataSet, ...] = ("voc2007", "voc2012")


def _detection(
    name: str, config: str, data: tuple[DataSet, ...], metrics: tuple[str, ...], recipe: str, **more
) -> Protocol:  # type: ignore[no-untyped-def]
    task: Task = "detection" if metrics == VOC else "instance-segmentation"
    more = {"gpus": 8, **more}
    return Protocol(name, "detectron2", task, config, data, metrics, recipe=recipe, **more)


def _segmentation(name: str, data: tuple[DataSet, ...], gpus: int, recipe: str, **more) -> Protocol:  # type: ignore[no-untyped-def]
    config = name.replace("-", "_") + ".py"
    return Protocol(name, "mmseg", "segmentation", config, data, SEGMENTATION, gpus, recipe, **more)


def _imagenet(name: str, task: Task, metrics: tuple[str, ...], gpus: int, recipe: str, **more) -> Protocol:  # type: ignore[no-untyped-def]
    return Protocol(name, "imagenet", task, name, ("imagenet",), metrics, gpus, recipe, **more)


PROTOCOLS: dict[str, Protocol] = {
    row.name: row
    for row in (
        _detection(
            "voc-frcnn-c4-24k",
            "voc_frcnn_c4_24k.yaml",
            _VOC_SETS,
            VOC,
            "MoCo's Faster R-CNN R50-C4 with extra norm, 24k iterations, trainval 07+12 → test 07",
            expected=VOC_C4_PUBLISHED,
        ),
        _detection(
            "voc-frcnn-fpn-24k",
            "voc_frcnn_fpn_24k.yaml",
            _VOC_SETS,
            VOC,
            "TWIST's Faster R-CNN R50-FPN, 4conv-1fc head, SyncBN everywhere, 24k iterations, trainval 07+12 → test 07",
            expected=VOC_FPN_PUBLISHED,
        ),
        _detection(
            "coco-mrcnn-c4-1x",
            "coco_mrcnn_c4_1x.yaml",
            ("coco",),
            COCO,
            "MoCo's Mask R-CNN R50-C4 with extra norm, 90k iterations",
            expected=COCO_C4_1X,
        ),
        _detection(
            "coco-mrcnn-c4-2x",
            "coco_mrcnn_c4_2x.yaml",
            ("coco",),
            COCO,
            "MoCo's Mask R-CNN R50-C4 with extra norm, 180k iterations",
            expected=COCO_C4_2X,
        ),
        _detection(
            "coco-mrcnn-fpn-1x",
            "coco_mrcnn_fpn_1x.yaml",
            ("coco",),
            COCO,
            "MoCo-protocol Mask R-CNN R50-FPN, 2-fc head, 90k iterations",
            expected=COCO_FPN_1X,
        ),
        _detection(
            "coco-mrcnn-fpn-2x",
            "coco_mrcnn_fpn_2x.yaml",
            ("coco",),
            COCO,
            "MoCo-protocol Mask R-CNN R50-FPN, 2-fc head, 180k iterations",
            expected=COCO_FPN_2X,
        ),
        _detection(
            "coco-mrcnn-fpn-infomin-1x",
            "coco_mrcnn_fpn_infomin_1x.yaml",
            ("coco",),
            COCO,
            "TWIST's (InfoMin's) Mask R-CNN R50-FPN, 4conv-1fc head, SyncBN everywhere, 90k iterations",
            expected=COCO_INFOMIN_1X,
        ),
        _detection(
            "coco-mrcnn-fpn-infomin-2x",
            "coco_mrcnn_fpn_infomin_2x.yaml",
            ("coco",),
            COCO,
            "TWIST's (InfoMin's) Mask R-CNN R50-FPN, 4conv-1fc head, SyncBN everywhere, 180k iterations",
            expected=COCO_INFOMIN_2X,
        ),
        _detection(
            "cityscapes-mrcnn-fpn-24k",
            "cityscapes_mrcnn_fpn_24k.yaml",
            ("cityscapes",),
            CITYSCAPES_INSTANCES,
            "DetCo's Mask R-CNN R50-FPN on Cityscapes instances, 24k iterations",
            expected=CITYSCAPES_INSTANCE_PUBLISHED,
        ),
        _segmentation(
            "voc12aug-fcn-d8-20k",
            ("voc2012-aug",),
            4,
            "DenseCL's and mmselfsup's FCN R50-d8, 512×512, 20k iterations, train_aug → val 2012",
            expected=VOC_D8_PUBLISHED,
        ),
        _segmentation(
            "cityscapes-fcn-d8-40k",
            ("cityscapes",),
            4,
            "DenseCL's and mmselfsup's FCN R50-d8, 769×769, 40k iterations, train_fine → val",
        ),
        _segmentation(
            "voc12aug-fcn-d16-30k",
            ("voc2012-aug",),
            2,
            "MoCo paper's FCN R50-d16, dilation-6 head, 513×513, 30k iterations, train_aug → val 2012",
            expected=VOC_D16_PUBLISHED,
        ),
        _segmentation(
            "cityscapes-fcn-d16-90k",
            ("cityscapes",),
            2,
            "MoCo paper's FCN R50-d16, dilation-6 head, 769×769, 90k iterations, train_fine → val",
            expected=CITYSCAPES_D16_PUBLISHED,
        ),
        _imagenet(
            "linear",
            "classification",
            CLASSIFICATION,
            8,
            "TWIST's linear probe on frozen features, 100 epochs",
            expected=LINEAR_PUBLISHED,
        ),
        _imagenet(
            "semi-1pct",
            "classification",
            CLASSIFICATION,
            8,
            "TWIST's fine-tuning on SimCLR's 1 % list (12,811 images), 20 epochs",
            expected=SEMI_1_PUBLISHED,
        ),
        _imagenet(
            "semi-10pct",
            "classification",
            CLASSIFICATION,
            8,
            "TWIST's fine-tuning on SimCLR's 10 % list (128,116 images), 20 epochs",
            expected=SEMI_10_PUBLISHED,
        ),
        _imagenet(
            "finetune-100pct",
            "classification",
            CLASSIFICATION,
            8,
            "TWIST's fine-tuning on all labels, 30 epochs",
            expected=FINETUNE_PUBLISHED,
        ),
        _imagenet(
            "knn",
            "classification",
            NEIGHBOURS,
            1,
            "weighted nearest neighbours on frozen features (k 20, temperature 0.07, as DINO)",
            expected=KNN_PUBLISHED,
        ),
        _imagenet(
            "cluster",
            "clustering",
            CLUSTERING,
            1,
            "unsupervised classification: TWIST's own head, or k-means on frozen features",
            expected=CLUSTER_PUBLISHED,
        ),
        # The sample twins: small data from `twist data sample`, small images, a ResNet-18 within minutes on a CPU.
        # Their times are medians of the records in results/photos, on two CPU cores with other work beside them.
        _detection(
            "sample-coco-mrcnn-fpn",
            "sample_coco_mrcnn_fpn.yaml",
            ("coco",),
            COCO,
            "coco-mrcnn-fpn-1x at sample size",
            gpus=0,
            hours=130 / 3600,
            scale="sample",
        ),
        _detection(
            "sample-voc-frcnn-fpn",
            "sample_voc_frcnn_fpn.yaml",
            _VOC_SETS,
            VOC,
            "voc-frcnn-fpn-24k at sample size",
            gpus=0,
            scale="sample",
        ),
        _detection(
            "sample-voc-frcnn-c4",
            "sample_voc_frcnn_c4.yaml",
            _VOC_SETS,
            VOC,
            "voc-frcnn-c4-24k at sample size",
            gpus=0,
            scale="sample",
        ),
        _segmentation(
            "sample-voc-fcn-d8",
            ("voc2012-aug",),
            0,
            "voc12aug-fcn-d8-20k at sample size",
            hours=115 / 3600,
            scale="sample",
        ),
        _segmentation(
            "sample-cityscapes-fcn-d8",
            ("cityscapes",),
            0,
            "cityscapes-fcn-d8-40k at sample size",
            hours=110 / 3600,
            scale="sample",
        ),
        _imagenet(
            "sample-linear",
            "classification",
            CLASSIFICATION,
            0,
            "linear at sample size",
            hours=8 / 3600,
            scale="sample",
        ),
        _imagenet("sample-knn", "classification", NEIGHBOURS, 0, "knn at sample size", hours=13 / 3600, scale="sample"),
        _imagenet(
            "sample-semi-1pct",
            "classification",
            CLASSIFICATION,
            0,
            "semi-1pct at sample size",
            hours=14 / 3600,
            scale="sample",
        ),
        _imagenet(
            "sample-semi-10pct",
            "classification",
            CLASSIFICATION,
            0,
            "semi-10pct at sample size",
            hours=27 / 3600,
            scale="sample",
        ),
        _imagenet(
            "sample-cluster", "clustering", CLUSTERING, 0, "cluster at sample size", hours=14 / 3600, scale="sample"
        ),
    )
}
