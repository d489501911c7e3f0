"""Dense labels and predictions: patch labels and their retrieval, IoU over all pixels, one object in each image.

Retrieval is open-hummingbird's (Balažević et al. 2023, arXiv 2306.01667; vpariza/open-hummingbird-eval @5e79da2,
hbird_eval.py): each query patch takes the labels of its k most similar memory patches, weighted by a softmax over the
similarities. `Q` query patches, `M` of the memory, `P` patches of one image, `K` classes, `k` neighbours.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

# The label value of pixels that belong to no class.
VOID = 255
Void = Literal["background", "left out"]
Box = tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels, the right and lower edge outside


def patch_labels(labels: Tensor, height: int, width: int, *, classes: int, void: Void, soft: bool = True) -> Tensor:
    """(h·w, K) shares of the classes among a patch's pixels, of a label map (H, W) int64; each row sums to 1.

    Where a patch's border cuts a pixel, that counts for both sides. `void` pixels are class 0 (as open-hummingbird), or
    are left out, and a patch of nothing else is a row of zeros. Not `soft`: the commonest class has 1.
    """
    if void == "background":
        labels = labels.masked_fill(labels == VOID, 0)
    shares = F.one_hot(labels.masked_fill(labels == VOID, classes), classes + 1)[..., :classes].permute(2, 0, 1)
    pooled = F.adaptive_avg_pool2d(shares.float(), (height, width)).flatten(1).T  # (h·w, K)
    total = pooled.sum(dim=1, keepdim=True)
    pooled = pooled / total.clamp_min(1e-12)
    return pooled if soft else F.one_hot(pooled.argmax(dim=1), classes) * (total > 0)


def sample_patches(shares: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """Indices of at most `count` of an image's patches (P, K), those of rare classes more likely.

    A patch's score is the sum, over the classes in it, of how many patches of the image have the class, times a
    uniform random number; the smallest scores are taken. Patches without a class are never taken.
    """
    present = (shares > 0).float()
    score = present @ present.sum(dim=0)
    score = score * torch.rand(len(score), generator=generator)
    labelled = present.any(dim=1)
    order = score.masked_fill(~labelled, torch.inf).argsort(stable=True)
    return order[: min(count, int(labelled.sum()))]


def retrieved_labels(similarity: Tensor, index: Tensor, memory_labels: Tensor, *, temperature: float) -> Tensor:
    """(Q, K) mixture of the neighbours' labels (M, K), weights softmax(similarity / temperature) over the k."""
    weights = (similarity / temperature).softmax(dim=1)
    return torch.einsum("qk,qkc->qc", weights, memory_labels[index])


def predict(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) int64 classes of a map of scores (K, h, w), enlarged bilinearly first."""
    return F.interpolate(scores[None].float(), size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)


class Confusion:
    """Counts of (label, prediction) over all pixels of all images; void pixels count nowhere."""

    def __init__(self, classes: int, predictions: int | None = None) -> None:
        self.counts = np.zeros((classes, predictions or classes), dtype=np.int64)  # (K, predictions)

    def add(self, labels: Tensor, predicted: Tensor) -> None:
        """`labels` and `predicted`, of one shape."""
        valid = labels != VOID
        pairs = labels[valid].long() * self.counts.shape[1] + predicted[valid].long()
        self.counts += torch.bincount(pairs.cpu(), minlength=self.counts.size).numpy().reshape(self.counts.shape)

    def metrics(self) -> dict[str, float]:
        """mIoU, mAcc and aAcc in percent, as MMSegmentation: means over the classes that occur."""
        counts = self.counts.astype(np.float64)
        hits, labelled, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
        union = labelled + predicted - hits
        return {
            "miou_percent": 100.0 * float((hits[union > 0] / union[union > 0]).mean()),
            "macc_percent": 100.0 * float((hits[labelled > 0] / labelled[labelled > 0]).mean()),
            "aacc_percent": 100.0 * float(hits.sum() / max(counts.sum(), 1)),
        }

    def matched(self) -> Confusion:
        """Clusters (the columns) renamed to classes: each to the class most of its pixels have.

        With as many clusters as classes, one to one (Hungarian, by IoU).
        """
        from scipy.optimize import linear_sum_assignment  # not needed where pretraining imports this file

        classes, clusters = self.counts.shape
        if clusters == classes:
            union = self.counts.sum(1, keepdims=True) + self.counts.sum(0, keepdims=True) - self.counts
            rows, columns = linear_sum_assignment(self.counts / np.maximum(union, 1), maximize=True)
            target = np.empty(clusters, dtype=np.int64)
            target[columns] = rows
        else:
            target = self.counts.argmax(axis=0)
        renamed = Confusion(classes)
        for cluster, label in enumerate(target):
            renamed.counts[:, label] += self.counts[:, cluster]
        return renamed


def lost_box(features: Tensor, *, image_size: tuple[int, int], scale: tuple[float, float], candidates: int) -> Box:
    """LOST's box of one image of `image_size` (height, width) from its map (D, h, w).

    The seed is the patch that is similar to the fewest others; patches that resemble it vote for the rest, and the
    seed's connected part is the object (Siméoni et al. 2021, arXiv 2109.14279; valeoai/LOST @fcedbec,
    object_discovery.py). `scale`: pixels of the image in a place of the map, down and across. `candidates`: of so many
    patches with the fewest similar ones, those alike the seed join it.
    """
    from scipy import ndimage  # not needed where pretraining imports this file

    height, width = features.shape[1:]
    rows = features.flatten(1).T  # (h·w, D)
    similarity = rows @ rows.T
    # A patch is not counted as its own neighbour; the sign alone counts, so lengths do not matter.
    degree = (similarity > 0).sum(dim=1) - (similarity.diagonal() > 0).long()
    order = degree.argsort(stable=True)
    seed = int(order[0])
    near = order[:candidates]
    similar = near[similarity[seed, near] > 0]
    vote = similarity[similar].sum(dim=0).view(height, width) > 0
    parts, _ = ndimage.label(vote.cpu().numpy())
    part = parts[divmod(seed, width)]
    if part == 0:  # features of zeros: nothing resembles anything
        return 0.0, 0.0, float(image_size[1]), float(image_size[0])
    down, across = np.nonzero(parts == part)
    y0, y1, x0, x1 = down.min(), down.max() + 1, across.min(), across.max() + 1
    return (
        float(x0 * scale[1]), float(y0 * scale[0]),
        min(float(x1 * scale[1]), float(image_size[1])), min(float(y1 * scale[0]), float(image_size[0])),
    )  # fmt: skip


def layer_normalised(features: Tensor) -> Tensor:
    """(D, h, w) with mean 0 and variance 1 over all its values: what LOST makes of convolutional features."""
    return F.layer_norm(features, features.shape)


def overlaps(box: Box, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of `box` with each of (n, 4) boxes."""
    return box_iou(torch.tensor([box], dtype=torch.float64), torch.from_numpy(truth).double())[0].numpy()
