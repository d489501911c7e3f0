"""What others published under a protocol or, marked, under a recipe close to it: a run is held against these rows.

Numbers are percent, ResNet-50 where nothing else is said. Sources name repository, file and commit where the number
was read. The order is AP / AP50 / AP75 everywhere (MoCo's own tables print AP50 first).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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


VOC = ("voc07_box_ap_percent", "voc07_box_ap50_percent", "voc07_box_ap75_percent")
COCO = (
    "coco_box_ap_percent",
    "coco_mask_ap_percent",
    "coco_box_ap50_percent",
    "coco_box_ap75_percent",
    "coco_mask_ap50_percent",
    "coco_mask_ap75_percent",
)
CITYSCAPES_INSTANCES = ("cityscapes_mask_ap_percent", "cityscapes_mask_ap50_percent")
SEGMENTATION = ("miou_percent", "macc_percent", "aacc_percent")
CLASSIFICATION = ("top1_percent", "top5_percent")
NEIGHBOURS = ("knn_top1_percent", "knn_top5_percent")
CLUSTERING = ("nmi_percent", "ami_percent", "ari_percent", "cluster_accuracy_percent")


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
VOC_C4_PUBLISHED = (
    *_rows(
        VOC,
        "moco detection/README.md @132aea9, mean of 5",
        ("supervised", None, (53.5, 81.3, 58.8)),
        ("moco-v1", 200, (55.9, 81.5, 62.6)),
        ("moco-v2", 200, (57.0, 82.4, 63.6)),
        ("moco-v2", 800, (57.4, 82.5, 64.0)),
        tolerance=0.6,
    ),
    *_rows(
        VOC,
        "DetCo Table 6 @adf4947, SimSiam Table 5",
        ("random", None, (33.8, 60.2, 33.1)),
        tolerance=0.6,
    ),
    *_rows(VOC, "DetCo Table 6 @adf4947", ("swav", 800, (56.1, 82.6, 62.7)), tolerance=0.6),
    # BYOL spreads from 49.0 (OpenSelfSup, default lr) to this.
    *_rows(VOC, "SimSiam Table 5", ("byol", 200, (55.3, 81.4, 61.1)), tolerance=0.6, differs="lr searched"),
    *_rows(VOC, "PixPro README @e390d6b", ("simclr", 1000, (56.3, 81.9, 62.5)), tolerance=0.6),
)
VOC_FPN_PUBLISHED = _rows(
    # TWIST's own row; no other method's VOC FPN-24k row was found. Trials and std not stated.
    VOC,
    "TWIST README @796d36e",
    ("twist", None, (58.1, 84.2, 65.4)),
    tolerance=0.6,
)

# Spread on COCO: differences of 0.3 AP are noise (moco issue #39).
_BOX_MASK = ("coco_box_ap_percent", "coco_mask_ap_percent")
_DETCO = "DetCo Tables 4 and 13 @adf4947"
COCO_C4_1X = _rows(
    _BOX_MASK,
    _DETCO,
    ("random", None, (26.4, 29.3)),  # mask above box: the MoCo paper's own values, no misprint of ours
    ("supervised", None, (38.2, 33.3)),
    ("moco-v1", None, (38.5, 33.6)),
    ("moco-v2", None, (38.9, 34.2)),
    tolerance=0.3,
) + _rows(_BOX_MASK, "SimSiam Table 5", ("byol", 200, (37.9, 33.2)), tolerance=0.3, differs="lr searched")
COCO_C4_2X = _rows(
    _BOX_MASK,
    _DETCO,
    ("random", None, (35.6, 31.4)),
    ("supervised", None, (40.0, 34.7)),
    ("moco-v1", None, (40.7, 35.4)),
    ("moco-v2", None, (41.0, 35.6)),
    tolerance=0.3,
) + _rows(_BOX_MASK, "OpenSelfSup docs/MODEL_ZOO.md @1db69ec", ("byol", None, (40.2, 34.9)), tolerance=0.3)
COCO_FPN_1X = _rows(
    _BOX_MASK,
    _DETCO,
    ("random", None, (31.0, 28.5)),
    ("supervised", None, (38.9, 35.4)),
    ("moco-v1", None, (38.5, 35.1)),
    ("moco-v2", None, (38.9, 35.5)),
    tolerance=0.3,
)
COCO_FPN_2X = _rows(
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
COCO_INFOMIN_1X = (
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
COCO_INFOMIN_2X = _rows(
    _BOX_MASK,
    _PYCONTRAST,
    ("random", None, (38.4, 34.7)),
    ("supervised", None, (41.6, 37.6)),
    ("moco-v1", None, (41.7, 37.5)),
    ("moco-v2", 200, (41.7, 37.6)),
    ("infomin", 200, (42.5, 38.4)),
    tolerance=0.3,
)
CITYSCAPES_INSTANCE_PUBLISHED = _rows(
    CITYSCAPES_INSTANCES,
    "DetCo Table 7 @adf4947",
    ("random", None, (25.4, 51.1)),
    ("supervised", None, (32.9, 59.6)),
    ("moco-v1", None, (32.3, 59.3)),
    ("moco-v2", None, (33.9, 60.8)),
    tolerance=0.6,
)

# Spread of segmentation: the same MoCo v2 weights gave 67.5 (DenseCL), 67.55 (mmselfsup) and 68.49 (EasyCV).
VOC_D8_PUBLISHED = _rows(
    SEGMENTATION,
    "mmselfsup method READMEs @80bb3f45",
    ("moco-v2", 200, (67.55,)),
    ("byol", 200, (67.16,)),
    ("simclr", 200, (64.03,)),
    ("swav", 200, (63.73,)),
    ("densecl", 200, (69.47,)),
    tolerance=1.0,
) + _rows(SEGMENTATION, "DenseCL README @5d1c456", ("supervised", None, (67.7,)), tolerance=1.0)
VOC_D16_PUBLISHED = _rows(
    SEGMENTATION,
    "BYOL Table 4 (secondary copy)",
    ("supervised", None, (74.4,)),
    ("moco-v1", None, (72.5,)),
    tolerance=1.0,
) + _rows(
    SEGMENTATION, "BYOL Table 4 (secondary copy)", ("byol", None, (76.3,)), tolerance=1.0, differs="BYOL's own FCN"
)
CITYSCAPES_D16_PUBLISHED = _rows(
    SEGMENTATION,
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
LINEAR_PUBLISHED = (
    *_rows(CLASSIFICATION, _TWIST, ("twist", 850, (75.5,)), ("twist", 800, (72.6,)), tolerance=0.5),
    *_rows(CLASSIFICATION, _TWIST, ("twist", 250, (77.7,)), tolerance=0.5, architecture="resnet50w2"),
    *_rows(CLASSIFICATION, _TWIST, ("twist", 300, (76.3,)), tolerance=0.5, architecture="vit_small_patch16"),
    *_rows(CLASSIFICATION, _TWIST, ("twist", 300, (78.4,)), tolerance=0.5, architecture="vit_base_patch16"),
    *_rows(
        CLASSIFICATION,
        "moco README @132aea9",
        ("moco-v2", 200, (67.7,)),
        ("moco-v2", 800, (71.1,)),
        tolerance=0.5,
        differs=_AUTHORS,
    ),
    *_rows(CLASSIFICATION, "BYOL paper (secondary copy)", ("byol", 1000, (74.3,)), tolerance=0.5, differs=_AUTHORS),
    *_rows(CLASSIFICATION, "swav README", ("swav", 800, (75.3,)), tolerance=0.5, differs=_AUTHORS),
)
_SEMI_SOURCE = "BYOL Table 2 (secondary copy)"
_SEMI_DIFFERS = "its authors' own rates and epochs"
SEMI_1_PUBLISHED = (
    *_rows(CLASSIFICATION, f"{_TWIST}; the paper's abstract v4 says 61.2", ("twist", None, (61.5,)), tolerance=0.5),
    *_rows(CLASSIFICATION, _TWIST, ("twist", None, (67.2,)), tolerance=0.5, architecture="resnet50w2"),
    *_rows(
        CLASSIFICATION,
        _SEMI_SOURCE,
        ("supervised", None, (25.4, 48.4)),
        ("byol", None, (53.2, 78.4)),
        ("simclr", None, (48.3, 75.5)),
        tolerance=0.5,
        differs=_SEMI_DIFFERS,
    ),
)
SEMI_10_PUBLISHED = (
    *_rows(CLASSIFICATION, _TWIST, ("twist", None, (71.7,)), tolerance=0.5),
    *_rows(CLASSIFICATION, _TWIST, ("twist", None, (75.3,)), tolerance=0.5, architecture="resnet50w2"),
    *_rows(
        CLASSIFICATION,
        _SEMI_SOURCE,
        ("supervised", None, (56.4, 80.4)),
        ("byol", None, (68.8, 89.0)),
        ("simclr", None, (65.6, 87.8)),
        tolerance=0.5,
        differs=_SEMI_DIFFERS,
    ),
)
FINETUNE_PUBLISHED = (
    *_rows(CLASSIFICATION, _TWIST, ("twist", None, (78.4,)), tolerance=0.5),
    *_rows(CLASSIFICATION, _TWIST, ("twist", None, (80.3,)), tolerance=0.5, architecture="resnet50w2"),
    *_rows(CLASSIFICATION, _SEMI_SOURCE, ("byol", None, (77.7,)), tolerance=0.5, differs=_SEMI_DIFFERS),
)
KNN_PUBLISHED = _rows(NEIGHBOURS, "dino README", ("dino", None, (67.5,)), tolerance=0.5)
CLUSTER_PUBLISHED = _rows(
    CLUSTERING,
    _TWIST,
    ("twist", 800, (74.4, 57.7, 30.1, 40.5)),
    tolerance=0.5,
    differs="TWIST's own head of 1000 classes: by=head with a full checkpoint",
) + _rows(
    CLUSTERING,
    "Self-Classifier README @3935138",
    ("moco-v2", 800, (66.6, 45.3, 12.0, 30.6)),
    ("swav", 800, (64.1, 38.8, 13.4, 28.1)),
    ("barlow-twins", None, (68.8, 48.3, 14.7, 33.2)),
    tolerance=0.5,
    differs="its own k-means",
)
