"""A cheap look at a running backbone: weighted k-NN and NMI of the head's classes, on a labelled folder.

The folder is ImageNet-like (train/<class>/, val/<class>/). Features are those of eval mode at the global crops' size.
The recipe of the k-NN is InstDist's (k = 20, temperature 0.07, arXiv 1805.01978); the transfer stage has the full one.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from twist.catalog.class_folders import open_tree
from twist.contracts.images import read_image
from twist.contracts.weights import IMAGENET_MEAN, IMAGENET_STD
from twist.pretrain import distributed
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import Twist

NEIGHBOURS = 20
TEMPERATURE = 0.07
# The published evaluations resize to 256 and cut the central 224.
RESIZE_RATIO = 256 / 224
BATCH = 64
# At a time, 256 MiB of them: all those of ImageNet's images would be as many GB.
SIMILARITIES = 2**26


@torch.no_grad()
def evaluate(model: Twist, config: PretrainConfig, *, device: torch.device) -> dict[str, float]:
    """`knn_top1_percent` of val against train, and `nmi_percent` of the head's arg-max on val.

    Every rank must call it; each takes its share of the images.

    Raises:
        UserError: `run.online_eval_root` has no train/ and val/ with class folders, or an image cannot be read.
    """
    from sklearn.metrics import normalized_mutual_info_score  # scipy comes with it: seconds that few runs need

    assert config.run.online_eval_root is not None
    train, val = labelled(Path(config.run.online_eval_root))
    was_training = model.training
    model.eval()
    size = config.views.global_size
    try:
        bank, bank_labels, _ = _features(model, train, size=size, device=device)
        features, labels, predictions = _features(model, val, size=size, device=device)
    finally:
        model.train(was_training)
    votes = knn_votes(features, bank, bank_labels, classes=1 + max(label for _, label in train))
    correct = (votes.argmax(1) == labels).float().mean().item()
    nmi = normalized_mutual_info_score(labels.cpu().numpy(), predictions.cpu().numpy())
    return {"knn_top1_percent": 100 * correct, "nmi_percent": 100 * float(nmi)}


def labelled(root: Path) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """(image, class) of train/ and of val/ below `root`; `UserError` when they do not have the same classes."""
    train, val = (
        [(images.path(index), int(label)) for index, label in enumerate(images.labels)] for images in open_tree(root)
    )
    return train, val


def knn_votes(features: Tensor, bank: Tensor, bank_labels: Tensor, *, classes: int) -> Tensor:
    """(N, classes) votes: each of the nearest by cosine counts exp(similarity / temperature) for its label."""
    bank = F.normalize(bank)
    votes = features.new_zeros(len(features), classes)
    rows = max(1, SIMILARITIES // len(bank))
    for part, part_votes in zip(F.normalize(features).split(rows), votes.split(rows)):
        weights, nearest = (part @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        part_votes.scatter_add_(1, bank_labels[nearest], (weights / TEMPERATURE).exp())
    return votes


def _features(
    model: Twist, images: list[tuple[Path, int]], *, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Backbone features (N, D), labels (N,) and the head's arg-max (N,) of all images, the work shared by the ranks."""
    rank, ranks = distributed.rank(), distributed.world_size()
    # Equal shares: the last ones are filled up with the first image and dropped again below.
    share = -(-len(images) // ranks)
    mine = [images[i] if i < len(images) else images[0] for i in range(rank * share, (rank + 1) * share)]
    features, predictions = [], []
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock, and training's workers are idle meanwhile
        for begin in range(0, share, BATCH):
            pictures = pool.map(_prepared, (path for path, _ in mine[begin : begin + BATCH]), itertools.repeat(size))
            feature = model.backbone(torch.stack([*pictures]).to(device))
            features.append(feature.float())
            predictions.append(model.head(feature).argmax(1))
    labels = torch.tensor([label for _, label in mine], device=device)
    gathered = [
        distributed.gathered(part).flatten(0, 1)[: len(images)]
        for part in (torch.cat(features), labels, torch.cat(predictions))
    ]
    return gathered[0], gathered[1], gathered[2]


def _prepared(path: Path, size: int) -> Tensor:
    image = vision.resize(read_image(path), [round(size * RESIZE_RATIO)], antialias=True)
    image = vision.to_dtype(vision.center_crop(image, [size, size]), torch.float32, scale=True)
    return vision.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))
