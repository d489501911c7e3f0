"""A cheap look at a running backbone: weighted k-NN, NMI of the head's classes and RankMe, on labelled images.

They are in an ImageNet-like folder, or a data card names them; of the card's masks patch labels are retrieved (knn-seg
at the views' size). Features are those of eval mode at the global crops' size. The recipe of the k-NN is InstDist's
(k = 20, temperature 0.07, arXiv 1805.01978).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from twist.catalog.card import Role, find_card
from twist.catalog.card_data import CardData, labelled_images, require_card_data
from twist.catalog.class_folders import LabelledImages
from twist.catalog.masks import Pair, read_mask
from twist.contracts.errors import UserError
from twist.contracts.images import read_image
from twist.contracts.weights import Backbone
from twist.measure.dense import DenseExtractor, Layers
from twist.measure.features import Batch, Extractor, centre_crop, effective_rank
from twist.measure.knn import nearest, plan_blocks, top_percent, vote_ranks
from twist.measure.segmentation import Confusion, patch_labels, predict, retrieved_labels, sample_patches
from twist.pretrain import distributed
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import Twist

NEIGHBOURS, TEMPERATURE, BATCH = 20, 0.07, 64
# configs/frozen/knn-seg.toml, with a memory of a tenth.
PATCH_NEIGHBOURS, PATCH_TEMPERATURE, PATCH_MEMORY = 30, 0.02, 10240
# Of a header only the pixels' mean and std count here, and those of all our networks are ImageNet's.
HEADER = Backbone(architecture="resnet50", method="twist")
# The published evaluations resize to 256 and cut the central 224.
RESIZE_RATIO = 256 / 224


def open_data(root: str) -> tuple[dict[Role, LabelledImages] | None, CardData | None]:
    """Labelled images, and pictures with masks, below a data root or on a card; `UserError` for what is not usable."""
    card = find_card(Path(root))
    images: dict[Role, LabelledImages] | None = None
    if card is None or card.classification is not None:
        images = dict(zip(("train", "val"), labelled_images(root), strict=True))
    masks = None if card is None or card.segmentation is None else require_card_data(card, "segmentation")
    if images is None and masks is None:
        raise UserError(f"{root} has neither [classification] nor [segmentation]: nothing to evaluate on.")
    return images, masks


@torch.no_grad()
def evaluate(model: Twist, config: PretrainConfig, *, device: torch.device) -> dict[str, float]:
    """Of labelled images `knn_top1_percent` of val against train, `nmi_percent` of the head's arg-max and `rankme` of
    the features on val; of masks `miou_percent`. Every rank must call it, and takes its share of the labelled
    images."""
    assert config.run.online_eval_root is not None
    images, masks = open_data(config.run.online_eval_root)
    found: dict[str, float] = {}
    was_training, size = model.training, config.views.global_size
    distributed.take_buffers_of_main_rank(model)  # so that no number depends on the rank, nor on a resume in between
    model.eval()
    try:
        if images is not None:
            found |= _images(model, images, size=size, device=device)
        if masks is not None:
            found |= _patches(model, masks, size=size, device=device)
    finally:
        model.train(was_training)
    return found


def _images(model: Twist, images: dict[Role, LabelledImages], *, size: int, device: torch.device) -> dict[str, float]:
    from twist.measure.clusters import cluster_metrics  # scikit-learn takes seconds to import, and few runs need it

    bank, bank_labels, _ = _features(model, images["train"], size=size, device=device)
    queries, labels, classes = _features(model, images["val"], size=size, device=device)
    # In 512 MiB, so that all of ImageNet fits.
    blocks = plan_blocks(len(queries), len(bank), bank.shape[1], neighbours=NEIGHBOURS, max_memory_mb=512)
    near = nearest(queries, bank, neighbours=NEIGHBOURS, blocks=blocks, quiet=True)
    ranks = vote_ranks(*near, bank_labels, labels, classes=len(images["train"].classes), temperature=TEMPERATURE)
    nmi = cluster_metrics(labels.cpu().numpy(), classes.cpu().numpy())["nmi_percent"]
    return {"knn_top1_percent": top_percent(ranks, 1), "nmi_percent": nmi, "rankme": effective_rank(queries)}


def _patches(model: Twist, data: CardData, *, size: int, device: torch.device) -> dict[str, float]:
    """The labels that val's patches take from train's; every rank does all of it, for such sets are small."""
    section, pairs = data.card.segmentation, data.pairs or {}
    assert section is not None
    extractor = DenseExtractor(model.backbone, HEADER, device, Layers())
    classes, generator = len(section.names), torch.Generator().manual_seed(0)
    resize = v2.Resize([size, size], antialias=True)

    def seen(pair: Pair) -> tuple[Tensor, Tensor]:
        """A picture's map (D, h, w) and its labels (S, S)."""
        mask = torch.from_numpy(read_mask(pair.mask, section)).float()[None, None]
        labels = F.interpolate(mask, size=(size, size), mode="nearest-exact")[0, 0].long()
        return extractor.maps(resize(read_image(pair.image))[None])[0], labels

    rows, shares = [], []
    for features, labels in map(seen, pairs["train"]):
        of_patches = patch_labels(labels, *features.shape[1:], classes=classes, void="left out")
        chosen = sample_patches(of_patches, max(1, PATCH_MEMORY // len(pairs["train"])), generator=generator)
        rows.append(features.flatten(1).T[chosen.to(device)])
        shares.append(of_patches[chosen])
    memory, memory_labels = torch.cat(rows), torch.cat(shares).to(device)
    confusion, k = Confusion(classes), min(PATCH_NEIGHBOURS, len(memory))
    for features, labels in map(seen, pairs["val"]):
        queries = features.flatten(1).T
        blocks = plan_blocks(len(queries), len(memory), queries.shape[1], neighbours=k, max_memory_mb=512)
        near = nearest(queries, memory, neighbours=k, blocks=blocks, device=device, quiet=True)
        scores = retrieved_labels(*near, memory_labels, temperature=PATCH_TEMPERATURE)
        confusion.add(labels, predict(scores.T.view(classes, *features.shape[1:]), (size, size)).cpu())
    return {"miou_percent": confusion.metrics()["miou_percent"]}


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

    extractor = Extractor(model.backbone, HEADER, device)
    parts = [(rows, labels, model.head(rows).argmax(1)) for rows, labels in extractor.batches(decoded())]
    gathered = [distributed.gathered(torch.cat(part)).flatten(0, 1)[: len(images)] for part in zip(*parts, strict=True)]
    return gathered[0], gathered[1], gathered[2]
