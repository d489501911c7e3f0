"""A cheap look at a running backbone: weighted k-NN and NMI of the head's classes, on labelled images.

They are in an ImageNet-like folder (train/<class>/, val/<class>/), or a data card names them. Features are those of
eval mode at the global crops' size. The recipe of the k-NN is InstDist's (k = 20, temperature 0.07, arXiv 1805.01978);
the transfer stage has the full one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from twist.catalog.card_data import labelled_images
from twist.catalog.class_folders import LabelledImages
from twist.contracts.weights import Backbone
from twist.measure.features import Batch, Extractor, centre_crop
from twist.measure.knn import nearest, plan_blocks, top_percent, vote_ranks
from twist.pretrain import distributed
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import Twist

NEIGHBOURS, TEMPERATURE, BATCH = 20, 0.07, 64
# The published evaluations resize to 256 and cut the central 224.
RESIZE_RATIO = 256 / 224


@torch.no_grad()
def evaluate(model: Twist, config: PretrainConfig, *, device: torch.device) -> dict[str, float]:
    """`knn_top1_percent` of val against train, and `nmi_percent` of the head's arg-max on val.

    Every rank must call it; each takes its share of the images. `UserError` for a folder or an image that is unusable.
    """
    from twist.measure.clusters import cluster_metrics  # scikit-learn takes seconds to import, and few runs need it

    assert config.run.online_eval_root is not None
    train, val = labelled_images(config.run.online_eval_root)
    was_training, size = model.training, config.views.global_size
    distributed.take_buffers_of_main_rank(model)  # so that no number depends on the rank, nor on a resume in between
    model.eval()
    try:
        bank, bank_labels, _ = _features(model, train, size=size, device=device)
        queries, labels, found = _features(model, val, size=size, device=device)
    finally:
        model.train(was_training)
    # In 512 MiB, so that all of ImageNet fits.
    blocks = plan_blocks(len(queries), len(bank), bank.shape[1], neighbours=NEIGHBOURS, max_memory_mb=512)
    near = nearest(queries, bank, neighbours=NEIGHBOURS, blocks=blocks, quiet=True)
    ranks = vote_ranks(*near, bank_labels, labels, classes=len(train.classes), temperature=TEMPERATURE)
    nmi = cluster_metrics(labels.cpu().numpy(), found.cpu().numpy())["nmi_percent"]
    return {"knn_top1_percent": top_percent(ranks, 1), "nmi_percent": nmi}


def _features(
    model: Twist, images: LabelledImages, *, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Backbone features (N, D), labels (N,) and the head's arg-max (N,) of all images, the work shared by the ranks."""
    # Equal shares: the last ones are filled up with the first image and dropped again below.
    share = -(-len(images) // distributed.world_size())
    first = distributed.rank() * share
    mine = [index if index < len(images) else 0 for index in range(first, first + share)]
    view = centre_crop(size=size, resize=round(size * RESIZE_RATIO))

    def decoded() -> Iterator[Batch]:
        with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock, and training's workers are idle meanwhile
            for part in (mine[start : start + BATCH] for start in range(0, share, BATCH)):
                pixels = pool.map(lambda index: view(images.read(index)), part)
                yield torch.stack([*pixels]), torch.from_numpy(images.labels[part])

    # Of the header only the pixels' mean and std count, and those of all our networks are ImageNet's.
    extractor = Extractor(model.backbone, Backbone(architecture="resnet50", method="twist"), device)
    parts = [(rows, labels, model.head(rows).argmax(1)) for rows, labels in extractor.batches(decoded())]
    gathered = [distributed.gathered(torch.cat(part)).flatten(0, 1)[: len(images)] for part in zip(*parts, strict=True)]
    return gathered[0], gathered[1], gathered[2]
