"""THE table: every way this suite can measure a backbone. `twist transfer --list` prints it, the engines run it.

One row a protocol: which engine, which config, which data, which metrics (the main ones first), on how many GPUs the
recipe is stated, and what others published under it or, marked, under a recipe close to it. Rows that look alike and
are not: VOC C4 and VOC FPN are two detectors, FPN with MoCo's 2-fc head and with InfoMin's 4conv-1fc head differ by
about one box AP (MoCo v1 38.5 and 39.4, PyContrast `pycontrast/detection/README.md`), and FCN d8 and d16 are two
segmentation heads.

Numbers are percent, ResNet-50 where nothing else is said. Sources name repository, file and commit where the number
was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from contracts.errors import UsageError, did_you_mean
from contracts.metrics import METRICS
from contracts.record import Task

Engine = Literal["detectron2", "mmseg", "imagenet"]
DataSet = Literal["coco", "voc2007", "voc2012", "voc2012-aug", "cityscapes", "imagenet"]


@dataclass(frozen=True)
class Neighbour:
    """One published row; a run of the same method on the same architecture (and of the same epochs) is held against it.

    `tolerance` is what the field knows about run-to-run spread, in percent points for the metrics named; a run further
    away than that deserves a look. `epochs` None: the source doesn't say, or there is none (random, supervised).
    `differs` says how the published recipe is another one than the protocol's, or may be: the difference is then shown,
    and nothing is made of it.
    """

    method: str
    values: Mapping[str, float]
    source: str
    epochs: int | None = None
    tolerance: float = 1.0
    architecture: str = "resnet50"
    differs: str = ""


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


# ---------------------------------------------------------------------------------------------------------------------
# Published neighbours. Column order is AP / AP50 / AP75 everywhere (MoCo's own tables print AP50 first).

_VOC = ("voc07_box_ap_percent", "voc07_box_ap50_percent", "voc07_box_ap75_percent")
_COCO = (
    "coco_box_ap_percent",
    "coco_mask_ap_percent",
    "coco_box_ap50_percent",
    "coco_box_ap75_percent",
    "coco_mask_ap50_percent",
    "coco_mask_ap75_percent",
)
_CITYSCAPES_INSTANCES = ("cityscapes_mask_ap_percent", "cityscapes_mask_ap50_percent")
_SEGMENTATION = ("miou_percent", "macc_percent", "aacc_percent")
_CLASSIFICATION = ("top1_percent", "top5_percent")
_NEIGHBOURS = ("knn_top1_percent", "knn_top5_percent")
_CLUSTERING = ("nmi_percent", "ami_percent", "ari_percent", "cluster_accuracy_percent")


def _rows(
    metrics: tuple[str, ...],
    source: str,
    *rows: tuple[str, int | None, tuple[float, ...]],
    tolerance: float,
    architecture: str = "resnet50",
    differs: str = "",
) -> tuple[Neighbour, ...]:
    return tuple(
        Neighbour(method, dict(zip(metrics, values, strict=False)), source, epochs, tolerance, architecture, differs)
        for method, epochs, values in rows
    )


# Spread: "mean of 5 trials, std AP50 0.2, AP 0.2, AP75 0.4 in most cases" (moco detection/README.md @132aea9); one run
# may lie three of the small ones away.
_VOC_C4_PUBLISHED = (
    *_rows(
        _VOC,
        "moco detection/README.md @132aea9, mean of 5",
        ("supervised", None, (53.5, 81.3, 58.8)),
        ("moco-v1", 200, (55.9, 81.5, 62.6)),
        ("moco-v2", 200, (57.0, 82.4, 63.6)),
        ("moco-v2", 800, (57.4, 82.5, 64.0)),
        tolerance=0.6,
    ),
    *_rows(
        _VOC,
        "DetCo Table 6 @adf4947, SimSiam Table 5",
        ("random", None, (33.8, 60.2, 33.1)),
        tolerance=0.6,
    ),
    *_rows(_VOC, "DetCo Table 6 @adf4947", ("swav", 800, (56.1, 82.6, 62.7)), tolerance=0.6),
    # BYOL spreads from 49.0 (OpenSelfSup, default lr) to this.
    *_rows(_VOC, "SimSiam Table 5", ("byol", 200, (55.3, 81.4, 61.1)), tolerance=0.6, differs="lr searched"),
    *_rows(_VOC, "PixPro README @e390d6b", ("simclr", 1000, (56.3, 81.9, 62.5)), tolerance=0.6),
)
_VOC_FPN_PUBLISHED = _rows(
    # TWIST's own row; no other method's VOC FPN-24k row was found. Trials and std not stated.
    _VOC,
    "TWIST README @796d36e",
    ("twist", None, (58.1, 84.2, 65.4)),
    tolerance=0.6,
)

# Spread on COCO: differences of 0.3 AP are noise (moco issue #39).
_BOX_MASK = ("coco_box_ap_percent", "coco_mask_ap_percent")
_DETCO = "DetCo Tables 4 and 13 @adf4947"
_COCO_C4_1X = _rows(
    _BOX_MASK,
    _DETCO,
    ("random", None, (26.4, 29.3)),  # mask above box: the MoCo paper's own values, no misprint of ours
    ("supervised", None, (38.2, 33.3)),
    ("moco-v1", None, (38.5, 33.6)),
    ("moco-v2", None, (38.9, 34.2)),
    tolerance=0.3,
) + _rows(_BOX_MASK, "SimSiam Table 5", ("byol", 200, (37.9, 33.2)), tolerance=0.3, differs="lr searched")
_COCO_C4_2X = _rows(
    _BOX_MASK,
    _DETCO,
    ("random", None, (35.6, 31.4)),
    ("supervised", None, (40.0, 34.7)),
    ("moco-v1", None, (40.7, 35.4)),
    ("moco-v2", None, (41.0, 35.6)),
    tolerance=0.3,
) + _rows(_BOX_MASK, "OpenSelfSup docs/MODEL_ZOO.md @1db69ec", ("byol", None, (40.2, 34.9)), tolerance=0.3)
_COCO_FPN_1X = _rows(
    _BOX_MASK,
    _DETCO,
    ("random", None, (31.0, 28.5)),
    ("supervised", None, (38.9, 35.4)),
    ("moco-v1", None, (38.5, 35.1)),
    ("moco-v2", None, (38.9, 35.5)),
    tolerance=0.3,
)
_COCO_FPN_2X = _rows(
    _BOX_MASK,
    _DETCO,
    ("random", None, (36.7, 33.7)),
    ("supervised", None, (40.6, 36.8)),
    ("moco-v1", None, (40.8, 36.9)),
    ("moco-v2", None, (40.9, 37.0)),
    tolerance=0.3,
)
_PYCONTRAST = "PyContrast detection/README.md @84f94ea"
_INSTANCELOC = "InstanceLoc MODELZOO @a419bb6"
_COCO_INFOMIN_1X = (
    *_rows(
        _BOX_MASK,
        _PYCONTRAST,
        ("random", None, (32.8, 29.9)),
        ("supervised", None, (39.7, 35.9)),
        ("moco-v1", None, (39.4, 35.6)),
        ("infomin", 200, (40.6, 36.7)),
        tolerance=0.3,
    ),
    *_rows(
        _BOX_MASK,
        _INSTANCELOC,
        ("moco-v2", 200, (39.8, 36.1)),
        ("moco-v2", 800, (40.4, 36.4)),
        tolerance=0.3,
    ),
    *_rows(_BOX_MASK, "PixPro README @e390d6b", ("simclr", 1000, (39.8, 35.9)), tolerance=0.3),
    *_rows(
        _BOX_MASK,
        "TWIST README @796d36e",
        ("twist", None, (41.9, 37.9)),
        tolerance=0.3,
        differs="schedule not printed, 1x is its README's command",
    ),
)
_COCO_INFOMIN_2X = _rows(
    _BOX_MASK,
    _PYCONTRAST,
    ("random", None, (38.4, 34.7)),
    ("supervised", None, (41.6, 37.6)),
    ("moco-v1", None, (41.7, 37.5)),
    ("moco-v2", 200, (41.7, 37.6)),
    ("infomin", 200, (42.5, 38.4)),
    tolerance=0.3,
)
_CITYSCAPES_INSTANCE_PUBLISHED = _rows(
    _CITYSCAPES_INSTANCES,
    "DetCo Table 7 @adf4947",
    ("random", None, (25.4, 51.1)),
    ("supervised", None, (32.9, 59.6)),
    ("moco-v1", None, (32.3, 59.3)),
    ("moco-v2", None, (33.9, 60.8)),
    tolerance=0.6,
)

# Spread of segmentation: the same MoCo v2 weights gave 67.5 (DenseCL), 67.55 (mmselfsup) and 68.49 (EasyCV).
_VOC_D8_PUBLISHED = _rows(
    _SEGMENTATION,
    "mmselfsup method READMEs @80bb3f45",
    ("moco-v2", 200, (67.55,)),
    ("byol", 200, (67.16,)),
    ("simclr", 200, (64.03,)),
    ("swav", 200, (63.73,)),
    ("densecl", 200, (69.47,)),
    tolerance=1.0,
) + _rows(_SEGMENTATION, "DenseCL README @5d1c456", ("supervised", None, (67.7,)), tolerance=1.0)
_VOC_D16_PUBLISHED = _rows(
    _SEGMENTATION,
    "BYOL Table 4 (secondary copy)",
    ("supervised", None, (74.4,)),
    ("moco-v1", None, (72.5,)),
    tolerance=1.0,
) + _rows(
    _SEGMENTATION, "BYOL Table 4 (secondary copy)", ("byol", None, (76.3,)), tolerance=1.0, differs="BYOL's own FCN"
)
_CITYSCAPES_D16_PUBLISHED = _rows(
    _SEGMENTATION,
    "DetCo Table 7 @adf4947; moco issues #55 and #65 report about 67 with dilation 6",
    ("random", None, (65.3,)),
    ("supervised", None, (74.6,)),
    ("moco-v1", None, (75.3,)),
    ("moco-v2", None, (75.7,)),
    tolerance=1.0,
)

# Spread of a linear probe: MoCo v1 60.8 ± 0.2, v2 67.5 ± 0.1 (moco README @132aea9).
_TWIST = "TWIST README @796d36e"
_AUTHORS = "its authors' own probe"
_LINEAR_PUBLISHED = (
    *_rows(_CLASSIFICATION, _TWIST, ("twist", 850, (75.5,)), ("twist", 800, (72.6,)), tolerance=0.5),
    *_rows(_CLASSIFICATION, _TWIST, ("twist", 250, (77.7,)), tolerance=0.5, architecture="resnet50w2"),
    *_rows(_CLASSIFICATION, _TWIST, ("twist", 300, (76.3,)), tolerance=0.5, architecture="vit_small_patch16"),
    *_rows(_CLASSIFICATION, _TWIST, ("twist", 300, (78.4,)), tolerance=0.5, architecture="vit_base_patch16"),
    *_rows(
        _CLASSIFICATION,
        "moco README @132aea9",
        ("moco-v2", 200, (67.7,)),
        ("moco-v2", 800, (71.1,)),
        tolerance=0.5,
        differs=_AUTHORS,
    ),
    *_rows(_CLASSIFICATION, "BYOL paper (secondary copy)", ("byol", 1000, (74.3,)), tolerance=0.5, differs=_AUTHORS),
    *_rows(_CLASSIFICATION, "swav README", ("swav", 800, (75.3,)), tolerance=0.5, differs=_AUTHORS),
)
_SEMI_SOURCE = "BYOL Table 2 (secondary copy)"
_SEMI_DIFFERS = "its authors' own rates and epochs"
_SEMI_1_PUBLISHED = (
    *_rows(_CLASSIFICATION, f"{_TWIST}; the paper's abstract v4 says 61.2", ("twist", None, (61.5,)), tolerance=0.5),
    *_rows(_CLASSIFICATION, _TWIST, ("twist", None, (67.2,)), tolerance=0.5, architecture="resnet50w2"),
    *_rows(
        _CLASSIFICATION,
        _SEMI_SOURCE,
        ("supervised", None, (25.4, 48.4)),
        ("byol", None, (53.2, 78.4)),
        ("simclr", None, (48.3, 75.5)),
        tolerance=0.5,
        differs=_SEMI_DIFFERS,
    ),
)
_SEMI_10_PUBLISHED = (
    *_rows(_CLASSIFICATION, _TWIST, ("twist", None, (71.7,)), tolerance=0.5),
    *_rows(_CLASSIFICATION, _TWIST, ("twist", None, (75.3,)), tolerance=0.5, architecture="resnet50w2"),
    *_rows(
        _CLASSIFICATION,
        _SEMI_SOURCE,
        ("supervised", None, (56.4, 80.4)),
        ("byol", None, (68.8, 89.0)),
        ("simclr", None, (65.6, 87.8)),
        tolerance=0.5,
        differs=_SEMI_DIFFERS,
    ),
)
_FINETUNE_PUBLISHED = (
    *_rows(_CLASSIFICATION, _TWIST, ("twist", None, (78.4,)), tolerance=0.5),
    *_rows(_CLASSIFICATION, _TWIST, ("twist", None, (80.3,)), tolerance=0.5, architecture="resnet50w2"),
    *_rows(_CLASSIFICATION, _SEMI_SOURCE, ("byol", None, (77.7,)), tolerance=0.5, differs=_SEMI_DIFFERS),
)
_KNN_PUBLISHED = _rows(_NEIGHBOURS, "dino README", ("dino", None, (67.5,)), tolerance=0.5)
_CLUSTER_PUBLISHED = _rows(
    _CLUSTERING,
    _TWIST,
    ("twist", 800, (74.4, 57.7, 30.1, 40.5)),
    tolerance=0.5,
    differs="TWIST's own head of 1000 classes: by=head with a full checkpoint",
) + _rows(
    _CLUSTERING,
    "Self-Classifier README @3935138",
    ("moco-v2", 800, (66.6, 45.3, 12.0, 30.6)),
    ("swav", 800, (64.1, 38.8, 13.4, 28.1)),
    ("barlow-twins", None, (68.8, 48.3, 14.7, 33.2)),
    tolerance=0.5,
    differs="its own k-means",
)

# ---------------------------------------------------------------------------------------------------------------------

_VOC_SETS: tuple[DataSet, ...] = ("voc2007", "voc2012")


def _detection(
    name: str, config: str, data: tuple[DataSet, ...], metrics: tuple[str, ...], recipe: str, **more
) -> Protocol:  # type: ignore[no-untyped-def]
    task: Task = "detection" if metrics == _VOC else "instance-segmentation"
    more = {"gpus": 8, **more}
    return Protocol(name, "detectron2", task, config, data, metrics, recipe=recipe, **more)


def _segmentation(name: str, data: tuple[DataSet, ...], gpus: int, recipe: str, **more) -> Protocol:  # type: ignore[no-untyped-def]
    config = name.replace("-", "_") + ".py"
    return Protocol(name, "mmseg", "segmentation", config, data, _SEGMENTATION, gpus, recipe, **more)


def _imagenet(name: str, task: Task, metrics: tuple[str, ...], gpus: int, recipe: str, **more) -> Protocol:  # type: ignore[no-untyped-def]
    return Protocol(name, "imagenet", task, name, ("imagenet",), metrics, gpus, recipe, **more)


PROTOCOLS: dict[str, Protocol] = {
    row.name: row
    for row in (
        _detection(
            "voc-frcnn-c4-24k",
            "voc_frcnn_c4_24k.yaml",
            _VOC_SETS,
            _VOC,
            "MoCo's Faster R-CNN R50-C4 with extra norm, 24k iterations, trainval 07+12 → test 07",
            expected=_VOC_C4_PUBLISHED,
        ),
        _detection(
            "voc-frcnn-fpn-24k",
            "voc_frcnn_fpn_24k.yaml",
            _VOC_SETS,
            _VOC,
            "TWIST's Faster R-CNN R50-FPN, 4conv-1fc head, SyncBN everywhere, 24k iterations, trainval 07+12 → test 07",
            expected=_VOC_FPN_PUBLISHED,
        ),
        _detection(
            "coco-mrcnn-c4-1x",
            "coco_mrcnn_c4_1x.yaml",
            ("coco",),
            _COCO,
            "MoCo's Mask R-CNN R50-C4 with extra norm, 90k iterations",
            expected=_COCO_C4_1X,
        ),
        _detection(
            "coco-mrcnn-c4-2x",
            "coco_mrcnn_c4_2x.yaml",
            ("coco",),
            _COCO,
            "MoCo's Mask R-CNN R50-C4 with extra norm, 180k iterations",
            expected=_COCO_C4_2X,
        ),
        _detection(
            "coco-mrcnn-fpn-1x",
            "coco_mrcnn_fpn_1x.yaml",
            ("coco",),
            _COCO,
            "MoCo-protocol Mask R-CNN R50-FPN, 2-fc head, 90k iterations",
            expected=_COCO_FPN_1X,
        ),
        _detection(
            "coco-mrcnn-fpn-2x",
            "coco_mrcnn_fpn_2x.yaml",
            ("coco",),
            _COCO,
            "MoCo-protocol Mask R-CNN R50-FPN, 2-fc head, 180k iterations",
            expected=_COCO_FPN_2X,
        ),
        _detection(
            "coco-mrcnn-fpn-infomin-1x",
            "coco_mrcnn_fpn_infomin_1x.yaml",
            ("coco",),
            _COCO,
            "TWIST's (InfoMin's) Mask R-CNN R50-FPN, 4conv-1fc head, SyncBN everywhere, 90k iterations",
            expected=_COCO_INFOMIN_1X,
        ),
        _detection(
            "coco-mrcnn-fpn-infomin-2x",
            "coco_mrcnn_fpn_infomin_2x.yaml",
            ("coco",),
            _COCO,
            "TWIST's (InfoMin's) Mask R-CNN R50-FPN, 4conv-1fc head, SyncBN everywhere, 180k iterations",
            expected=_COCO_INFOMIN_2X,
        ),
        _detection(
            "cityscapes-mrcnn-fpn-24k",
            "cityscapes_mrcnn_fpn_24k.yaml",
            ("cityscapes",),
            _CITYSCAPES_INSTANCES,
            "DetCo's Mask R-CNN R50-FPN on Cityscapes instances, 24k iterations",
            expected=_CITYSCAPES_INSTANCE_PUBLISHED,
        ),
        _segmentation(
            "voc12aug-fcn-d8-20k",
            ("voc2012-aug",),
            4,
            "DenseCL's and mmselfsup's FCN R50-d8, 512×512, 20k iterations, train_aug → val 2012",
            expected=_VOC_D8_PUBLISHED,
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
            expected=_VOC_D16_PUBLISHED,
        ),
        _segmentation(
            "cityscapes-fcn-d16-90k",
            ("cityscapes",),
            2,
            "MoCo paper's FCN R50-d16, dilation-6 head, 769×769, 90k iterations, train_fine → val",
            expected=_CITYSCAPES_D16_PUBLISHED,
        ),
        _imagenet(
            "linear",
            "classification",
            _CLASSIFICATION,
            8,
            "TWIST's linear probe on frozen features, 100 epochs",
            expected=_LINEAR_PUBLISHED,
        ),
        _imagenet(
            "semi-1pct",
            "classification",
            _CLASSIFICATION,
            8,
            "TWIST's fine-tuning on SimCLR's 1 % list (12,811 images), 20 epochs",
            expected=_SEMI_1_PUBLISHED,
        ),
        _imagenet(
            "semi-10pct",
            "classification",
            _CLASSIFICATION,
            8,
            "TWIST's fine-tuning on SimCLR's 10 % list (128,116 images), 20 epochs",
            expected=_SEMI_10_PUBLISHED,
        ),
        _imagenet(
            "finetune-100pct",
            "classification",
            _CLASSIFICATION,
            8,
            "TWIST's fine-tuning on all labels, 30 epochs",
            expected=_FINETUNE_PUBLISHED,
        ),
        _imagenet(
            "knn",
            "classification",
            _NEIGHBOURS,
            1,
            "weighted nearest neighbours on frozen features (k 20, temperature 0.07, as DINO)",
            expected=_KNN_PUBLISHED,
        ),
        _imagenet(
            "cluster",
            "clustering",
            _CLUSTERING,
            1,
            "unsupervised classification: TWIST's own head, or k-means on frozen features",
            expected=_CLUSTER_PUBLISHED,
        ),
        # The sample twins: small data from `twist data sample`, small images, a ResNet-18 within minutes on a CPU.
        # Their times are medians of the records in results/photos, on two CPU cores with other work beside them.
        _detection(
            "sample-coco-mrcnn-fpn",
            "sample_coco_mrcnn_fpn.yaml",
            ("coco",),
            _COCO,
            "coco-mrcnn-fpn-1x at sample size",
            gpus=0,
            hours=130 / 3600,
            scale="sample",
        ),
        _detection(
            "sample-voc-frcnn-fpn",
            "sample_voc_frcnn_fpn.yaml",
            _VOC_SETS,
            _VOC,
            "voc-frcnn-fpn-24k at sample size",
            gpus=0,
            scale="sample",
        ),
        _detection(
            "sample-voc-frcnn-c4",
            "sample_voc_frcnn_c4.yaml",
            _VOC_SETS,
            _VOC,
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
            _CLASSIFICATION,
            0,
            "linear at sample size",
            hours=8 / 3600,
            scale="sample",
        ),
        _imagenet(
            "sample-knn", "classification", _NEIGHBOURS, 0, "knn at sample size", hours=13 / 3600, scale="sample"
        ),
        _imagenet(
            "sample-semi-1pct",
            "classification",
            _CLASSIFICATION,
            0,
            "semi-1pct at sample size",
            hours=14 / 3600,
            scale="sample",
        ),
        _imagenet(
            "sample-semi-10pct",
            "classification",
            _CLASSIFICATION,
            0,
            "semi-10pct at sample size",
            hours=27 / 3600,
            scale="sample",
        ),
        _imagenet(
            "sample-cluster", "clustering", _CLUSTERING, 0, "cluster at sample size", hours=14 / 3600, scale="sample"
        ),
    )
}
