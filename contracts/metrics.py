"""The vocabulary of metrics: every name that a record may hold, its unit, and its definition.

The unit stands in the name, and so does the definition where the field uses one word for two things: VOC07's 11-point
AP50 is not COCO's AP50.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from twist.contracts.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Metric:
    """One metric: full name with unit, short label for a column head, definition in a sentence.

    `lowest` is the least value it can take: AMI and ARI can be negative. All of them are percent.
    """

    name: str
    label: str
    definition: str
    lowest: float = 0.0
    unit: str = "percent"


def _percent(name: str, label: str, definition: str, *, lowest: float = 0.0) -> Metric:
    return Metric(f"{name}_percent", label, definition, lowest)


_COCO = "COCO evaluation (101-point, IoU .50:.95, at most 100 detections an image)"
_VOC07 = "VOC 2007 evaluation, 11-point interpolation, difficult objects ignored"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # Detection and instance segmentation, COCO definition.
        _percent("coco_box_ap", "box AP", f"Box AP, {_COCO}"),
        _percent("coco_box_ap50", "box AP50", "Box AP at IoU .50, COCO evaluation"),
        _percent("coco_box_ap75", "box AP75", "Box AP at IoU .75, COCO evaluation"),
        _percent("coco_mask_ap", "mask AP", f"Mask AP, {_COCO}"),
        _percent("coco_mask_ap50", "mask AP50", "Mask AP at IoU .50, COCO evaluation"),
        _percent("coco_mask_ap75", "mask AP75", "Mask AP at IoU .75, COCO evaluation"),
        # Detection, VOC definition.
        _percent("voc07_box_ap", "AP (VOC07)", f"Mean over IoU .50:.95 of box AP, {_VOC07}"),
        _percent("voc07_box_ap50", "AP50 (VOC07)", f"Box AP at IoU .50, {_VOC07}"),
        _percent("voc07_box_ap75", "AP75 (VOC07)", f"Box AP at IoU .75, {_VOC07}"),
        # Cityscapes instances, the data set's own evaluation.
        _percent("cityscapes_mask_ap", "mask AP (Cityscapes)", "Instance AP, cityscapesScripts evaluation"),
        _percent("cityscapes_mask_ap50", "mask AP50 (Cityscapes)", "Instance AP at overlap .50, cityscapesScripts"),
        # Semantic segmentation.
        _percent("miou", "mIoU", "Mean over classes of intersection over union, all validation pixels together"),
        _percent("macc", "mAcc", "Mean over classes of pixel accuracy"),
        _percent("aacc", "aAcc", "Accuracy over all labelled pixels"),
        # Classification.
        _percent("top1", "top-1", "Share of validation images whose highest-scoring class is the label"),
        _percent("top5", "top-5", "Share of validation images whose label is among the five highest scores"),
        _percent("knn_top1", "k-NN top-1", "Top-1 of the weighted nearest-neighbour vote on frozen features"),
        _percent("knn_top5", "k-NN top-5", "Top-5 of the weighted nearest-neighbour vote on frozen features"),
        # Other data sets classified from ImageNet backbones, as papers print them; only published rows have them.
        _percent("food101_accuracy", "Food-101", "Accuracy on Food-101, top-1"),
        _percent("cifar10_accuracy", "CIFAR-10", "Accuracy on CIFAR-10, top-1"),
        _percent("cifar100_accuracy", "CIFAR-100", "Accuracy on CIFAR-100, top-1"),
        _percent("birdsnap_accuracy", "Birdsnap", "Accuracy on Birdsnap, top-1"),
        _percent("sun397_accuracy", "SUN397", "Accuracy on SUN397, top-1"),
        _percent("cars_accuracy", "Cars", "Accuracy on Stanford Cars, top-1"),
        _percent("aircraft_accuracy", "Aircraft", "Accuracy on FGVC Aircraft; the field prints the class mean"),
        _percent("dtd_accuracy", "DTD", "Accuracy on the Describable Textures Dataset, top-1"),
        _percent("pets_accuracy", "Pets", "Accuracy on Oxford-IIIT Pets; the field prints the class mean"),
        _percent("caltech101_accuracy", "Caltech-101", "Accuracy on Caltech-101; the field prints the class mean"),
        _percent("flowers102_accuracy", "Flowers", "Accuracy on 102 Flowers; the field prints the class mean"),
        _percent("places205_accuracy", "Places205", "Accuracy on Places205, top-1"),
        _percent("inat18_accuracy", "iNat18", "Accuracy on iNaturalist 2018, top-1"),
        _percent("voc07_classification_map", "VOC07 mAP", "Mean AP of image classification on VOC 2007"),
        _percent("voc07_svm_map", "VOC07 SVM mAP", "Mean AP of linear SVMs on frozen features, VOC 2007"),
        *(
            _percent(
                f"voc07_svm_k{k}_map",
                f"SVM mAP k={k}",
                f"Mean AP of linear SVMs from {k} positive image{'s' * (k > 1)} a class, VOC 2007",
            )
            for k in (1, 2, 4, 8, 16, 32, 64, 96)
        ),
        _percent("corloc", "CorLoc", "Share of images where the one predicted box overlaps an object (IoU ≥ .50)"),
        # Clustering against labels.
        _percent("nmi", "NMI", "Normalised mutual information of clusters and labels, arithmetic mean"),
        _percent("ami", "AMI", "Mutual information of clusters and labels, adjusted for chance", lowest=-100.0),
        _percent("ari", "ARI", "Rand index of clusters and labels, adjusted for chance", lowest=-100.0),
        _percent("cluster_accuracy", "cluster acc", "Accuracy under the best one-to-one match of clusters and labels"),
    )
}


def check_metrics(names: Iterable[str], *, where: str) -> None:
    """Raise `UserError` when a name is not in the vocabulary."""
    for name in names:
        if name not in METRICS:
            raise UserError(f'{where}: unknown metric "{name}".{did_you_mean(name, METRICS)}')


def check_values(metrics: dict[str, float]) -> None:
    """Raise `UserError` when there is no value, or one that its metric cannot take (NaN, a mIoU of 150 %)."""
    if not metrics:
        raise UserError("metrics is empty: a record holds at least one value; run it again")
    for name, value in metrics.items():
        metric = METRICS[name]
        if not (math.isfinite(value) and metric.lowest <= value <= 100):
            raise UserError(f"{name} is {value:g}, which {metric.label} cannot be; run it again")
