"""Frozen features: `resolve` says what will be measured, `run` goes from weights and pictures to metrics.

linear-seg · knn-seg · cluster-seg · corloc · fewshot · svm. Recipes: `recipes.py`; pictures and annotations:
`images.py`; what is trained: `linear_seg.py` and `classify.py`; what is computed: `twist.measure`.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twist.catalog.annotations import voc_palette
from twist.catalog.card import Role
from twist.catalog.class_folders import open_tree
from twist.catalog.data_sets import find_data_set, read_sample
from twist.contracts.curves import CURVES, Curves
from twist.contracts.errors import UsageError, UserError
from twist.contracts.failures import explained
from twist.contracts.progress import Progress
from twist.measure import discovery
from twist.measure.dense import DenseExtractor, DenseFile, dense_network
from twist.measure.features import frozen
from twist.measure.knn import nearest, plan_blocks
from twist.measure.segmentation import VOID, Confusion, patch_labels, predict, retrieved_labels, sample_patches
from twist.transfer.engines.frozen import classify, linear_seg, recipes
from twist.transfer.engines.frozen.images import OwnPictures, Pictures, open_split, squashed
from twist.transfer.pictures import PICTURES, plot_losses, save_pairs
from twist.transfer.recipe import departures
from twist.transfer.request import Request, Result, Weights

FEATURES = "go on with --resume and a lower machine.feature_batch_size"
# Query patches of one search, whose neighbours are in memory together.
QUERIES = 16384


@dataclass(frozen=True)
class Setup:
    """A run, resolved; the fields of `twist.transfer.request.Resolved`, and the pictures. `train` None: none needed."""

    request: Request
    weights: Weights
    config: recipes.AnyRecipe
    train: Any
    val: Any
    recipe: dict[str, Any]
    plan: str
    reduced: bool
    notes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.request.gpus else torch.device("cpu")

    @property
    def features(self) -> Path:
        """The folder of features: beside the run folders, where every protocol of these weights finds them."""
        if not self.config.machine.keep_features:  # removed at the end, so no other run may have its features there
            return self.request.output / "features"
        if self.config.machine.features:
            return Path(self.config.machine.features).expanduser()
        if self.request.controls.shared:
            return Path(self.request.controls.shared) / "features"
        output = self.request.output
        runs = output.parent.parent if output.parent.name == self.request.protocol.name else output.parent
        return runs / "features"


def resolve(request: Request, weights: Weights) -> Setup:
    """Recipe, pictures and plan of a request; nothing is built and nothing is written.

    `UserError` for data that are missing, an override that is none, or layers that these weights do not have.
    """
    protocol = request.protocol
    if request.processes > 1:
        raise UsageError(f"{protocol.name} runs in one process: pass --gpus 1 or 0, and no nodes.")
    config = _shortened(recipes.load_recipe(protocol.config, request.overrides), request)
    train, val = _open(request, config)
    own = recipes.load_recipe(protocol.config).recorded()
    changed = departures(own, config.recorded(), free=())
    counts = {"train": len(train) if train is not None else 0, "val": len(val)}
    unlike = _unlike_published(request, train, val)
    where = "1 GPU" if request.gpus else "1 process on the CPU"
    plan = f"plan: {where} → {config.kind} on {counts['train']} + {counts['val']} images, {_how(config)}"
    notes = (*changed, *unlike)
    digests = [one.digest() for one in (train, val) if one is not None]
    recipe = {**config.recorded(), "data": {**counts, "names": digests}}
    own_data = [] if request.own is None else [request.own.summary()]
    plan = "\n  ".join([plan, *own_data, *notes])
    return Setup(request, weights, config, train, val, recipe, plan, bool(notes), notes)


def _shortened(config: recipes.AnyRecipe, request: Request) -> recipes.AnyRecipe:
    """With `iterations=N`, which is one of the suite's own controls; the warm-up moves in proportion."""
    iterations = request.controls.iterations
    if not iterations:
        return config
    if not isinstance(config, recipes.LinearRecipe):
        raise UsageError(f"iterations={iterations}: {request.protocol.name} has none.")
    warmup = round(config.warmup_iterations * iterations / config.iterations)
    return config.model_copy(update={"iterations": iterations, "warmup_iterations": warmup})


def _open(request: Request, config: recipes.AnyRecipe) -> tuple[Any, Any]:
    if request.own is not None and request.own.labelled is not None:
        return request.own.labelled["train"], request.own.labelled["val"]
    if isinstance(config, recipes.FewShotRecipe):
        return open_tree(request.data)

    def split(role: Role) -> Pictures:
        if request.own is not None:
            return OwnPictures.of(request.own, role)
        return open_split(find_data_set(request.protocol.data[0]), request.data, role, read_sample(request.data))

    if isinstance(config, recipes.DiscoveryRecipe):  # nothing is trained: LOST is measured on the trainval pictures
        return None, split("train")
    return None if isinstance(config, recipes.ClustersRecipe) else split("train"), split("val")


def _unlike_published(request: Request, train: Any, val: Any) -> list[str]:
    """Splits of a full protocol that have another number of images than the data set's."""
    if request.protocol.scale != "full" or request.own is not None:
        return []
    return [
        f"{one.row.name} has {len(one)} images here and {one.split.count} as published"
        for one in (train, val)
        if isinstance(one, Pictures) and one.split.count not in (None, len(one))
    ]


def _how(config: recipes.AnyRecipe) -> str:
    if isinstance(config, recipes.LinearRecipe):
        grid = len(config.learning_rates) * len(config.weight_decays)
        return f"{grid} heads together, {config.iterations} steps of {config.batch_size} images"
    if isinstance(config, recipes.NeighboursRecipe):
        return f"{config.neighbours} neighbours among up to {config.memory_size} patches"
    if isinstance(config, recipes.ClustersRecipe):
        return f"{config.clusters} clusters"
    return "features of whole pictures" if isinstance(config, recipes.DiscoveryRecipe) else "one row an image"


def run(request: Request, weights: Weights, setup: Setup) -> Result:  # noqa: ARG001 (they are in `setup`)
    """Measure the weights as resolved. `UserError` for an unreadable image or label, and for too little memory."""
    request.output.mkdir(parents=True, exist_ok=True)
    if isinstance(setup.config, recipes.ImageRecipe):
        result = classify.run(setup)
    else:
        measure = {"knn-seg": _knn, "linear-seg": _linear, "cluster-seg": _clusters, "corloc": _corloc}
        tensors = setup.weights.tensors
        assert tensors is not None
        with explained(memory=FEATURES):
            network = dense_network(setup.weights.header, tensors, setup.config.layers).to(setup.device)
            config = setup.config
            extractor = DenseExtractor(network, setup.weights.header, setup.device, config.layers, config.precision)
            with frozen(network) as digest:
                result = measure[config.kind](setup, extractor)
        place = "" if isinstance(config, recipes.DiscoveryRecipe) else f" Features every {extractor.stride} pixels."
        same = f"The frozen backbone is bit-equal before and after: state SHA-256 {digest[:16]}.{place}"
        result = replace(result, notes=[*result.notes, same], loaded=digest)
    if not setup.config.machine.keep_features:
        shutil.rmtree(setup.features, ignore_errors=True)
    return replace(result, notes=[*result.notes, *setup.notes])


# ── Segmentation ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _dense(setup: Setup, extractor: DenseExtractor, pictures: Pictures, title: str) -> DenseFile:
    config = setup.config
    assert isinstance(config, recipes.DenseRecipe)
    machine = config.machine
    batches = partial(_from, pictures, config.size, machine.feature_batch_size, machine.workers)
    return extractor.to_file(
        batches,
        images=len(pictures),
        size=config.size,
        key={"images": pictures.stamp(), "view": config.view},
        folder=setup.features,
        title=f"{title} features",
        max_disk_gb=machine.max_disk_gb,
    )


def _from(pictures: Pictures, size: int, batch_size: int, workers: int, start: int) -> Iterator[Tensor]:
    return squashed(pictures, size, start=start, batch_size=batch_size, workers=workers)


def _knn(setup: Setup, extractor: DenseExtractor) -> Result:
    """Memory of labelled training patches, retrieval for every validation patch, IoU over all pixels."""
    config = setup.config
    assert isinstance(config, recipes.NeighboursRecipe)
    memory = _memory(setup, _dense(setup, extractor, setup.train, "train"))
    val = _dense(setup, extractor, setup.val, "val")
    confusion = Confusion(setup.val.class_count)
    shown: list[tuple[int, Tensor, Tensor]] = []
    k = min(config.neighbours, len(memory[0]))
    together = max(1, QUERIES // val.patches)
    limits = {"neighbours": k, "max_memory_mb": config.machine.max_memory_mb}
    blocks = plan_blocks(together * val.patches, len(memory[0]), val.dimension, **limits)
    with Progress("retrieval", total=len(setup.val), unit="image") as progress:
        for first in range(0, len(setup.val), together):
            count = min(together, len(setup.val) - first)
            rows = val.rows_of(first, count).to(setup.device)
            near = nearest(rows, memory[0], neighbours=k, blocks=blocks, device=setup.device, quiet=True)
            scores = retrieved_labels(*near, memory[1], temperature=config.temperature)
            for image, one in enumerate(scores.view(count, val.height, val.width, -1).permute(0, 3, 1, 2), first):
                truth = setup.val.label_map(image, size=config.label_size)
                predicted = predict(one, tuple(truth.shape)).cpu()  # type: ignore[arg-type]
                confusion.add(truth, predicted)
                shown += [(image, truth, predicted)] if len(shown) < PICTURES else []
            progress.advance(count)
    notes = [f"{len(memory[0])} patches of {len(setup.train)} training images are in the memory."]
    return Result(confusion.metrics(), setup.recipe, _pictures(setup, shown), notes=notes)


def _memory(setup: Setup, train: DenseFile) -> tuple[Tensor, Tensor]:
    """Features (M, D) and labels (M, K) of the sampled training patches, on the run's device."""
    config = setup.config
    assert isinstance(config, recipes.NeighboursRecipe)
    generator = torch.Generator().manual_seed(setup.request.seed)
    each = max(1, config.memory_size // len(setup.train))
    features, labels = [], []
    how: dict[str, Any] = {"classes": setup.train.class_count, "void": config.memory_void}
    with Progress("memory", total=train.images, unit="image") as progress:
        for image in range(train.images):
            truth = setup.train.label_map(image, size=config.label_size)
            shares = patch_labels(truth, train.height, train.width, **how)
            chosen = sample_patches(shares, each, generator=generator)
            if config.patch_labels == "hard":
                shares = patch_labels(truth, train.height, train.width, **how, soft=False).float()
            features.append(train.rows_of(image)[chosen])
            labels.append(shares[chosen])
            progress.advance()
    if not sum(map(len, features)):
        raise UserError(f"No patch of {setup.train.title}'s training images has a class: check its label maps.")
    return torch.cat(features).to(setup.device), torch.cat(labels).to(setup.device)


def _linear(setup: Setup, extractor: DenseExtractor) -> Result:
    """Heads for every rate and decay, trained together; the best by the chosen split is reported."""
    config, classes = setup.config, setup.val.class_count
    assert isinstance(config, recipes.LinearRecipe)
    train, val = (_dense(setup, extractor, one, name) for one, name in ((setup.train, "train"), (setup.val, "val")))
    chosen, held = linear_seg.split_holdout(config, train.images)
    maps = torch.stack([_loss_map(setup, image, train) for image in range(train.images)])
    curves = Curves(setup.request.output / CURVES, start=1, logger=setup.request.controls.logger)

    def step_done(step: int, values: dict[str, float]) -> None:
        curves.add(step, values)
        curves.plot(step, values)

    try:
        heads = linear_seg.train(
            train, lambda image: maps[image].long(), chosen, config, classes=classes, seed=setup.request.seed,
            device=setup.device, step_done=step_done,
        )  # fmt: skip
    finally:
        curves.close()
    measure = partial(linear_seg.evaluate, heads, classes=classes, device=setup.device)
    val_labels = partial(setup.val.label_map, size=config.label_size)
    every = np.arange(val.images)
    grid = linear_seg.grid_of(config)
    if len(held):
        on_held = measure(train, partial(setup.train.label_map, size=config.label_size), held)
        best = max(range(len(grid)), key=lambda head: on_held[head]["miou_percent"])
        metrics = measure(val, val_labels, every, only=best)[0]
        of = ", ".join(f"{one['miou_percent']:.1f}" for one in on_held)
        how = f"on {len(held)} held-out training images (mIoU of each: {of})"
    else:
        on_val = measure(val, val_labels, every)
        best = max(range(len(grid)), key=lambda head: on_val[head]["miou_percent"])
        metrics = on_val[best]
        of = ", ".join(f"{one['miou_percent']:.1f}" for one in on_val)
        how = f"on the validation images that are reported (mIoU of each: {of})" if len(grid) > 1 else "the only one"
    shown = [_linear_picture(setup, heads, val, image, best) for image in range(min(PICTURES, val.images))]
    notes = [f"Learning rate {grid[best][0]:g} and weight decay {grid[best][1]:g} of {len(grid)}, chosen {how}."]
    media = [*_pictures(setup, shown)]
    media.append(plot_losses(setup.request.output / CURVES, setup.request.output / "losses.png", title="linear heads"))
    return Result(metrics, setup.recipe, media, curves=setup.request.output / CURVES, notes=notes)


def _loss_map(setup: Setup, image: int, train: DenseFile) -> Tensor:
    """(L, L) uint8 labels that the loss is computed on: of the label map as it is evaluated, reduced once more."""
    config = setup.config
    assert isinstance(config, recipes.LinearRecipe)
    labels = setup.train.label_map(image, size=config.label_size)
    size = (config.loss_size,) * 2 if config.loss_size else (train.height, train.width)
    return F.interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(torch.uint8)


@torch.no_grad()
def _linear_picture(
    setup: Setup, heads: linear_seg.HeadGrid, val: DenseFile, image: int, best: int
) -> tuple[int, Tensor, Tensor]:
    truth = setup.val.label_map(image, size=setup.config.label_size)  # type: ignore[union-attr]
    scores = heads.scores(val.rows_of(image).to(setup.device), val.height, val.width)[best, 0]
    return image, truth, predict(scores, tuple(truth.shape)).cpu()  # type: ignore[arg-type]


def _clusters(setup: Setup, extractor: DenseExtractor) -> Result:
    """k-means on the validation patches; clusters are named by their pixels, then IoU over all pixels."""
    from twist.measure.clusters import kmeans  # scikit-learn takes seconds to import

    config = setup.config
    assert isinstance(config, recipes.ClustersRecipe)
    val = _dense(setup, extractor, setup.val, "val")
    step = max(1, -(-len(val) // config.fitted_patches))
    assigned = kmeans(
        val.mapped()[::step], val.mapped(), clusters=config.clusters, algorithm="minibatch", restarts=1,
        max_passes=config.max_passes, step_size=config.step_size, normalise=True, seed=setup.request.seed,
    )  # fmt: skip
    maps = torch.from_numpy(assigned.astype(np.int64)).view(val.images, val.height, val.width)
    confusion = Confusion(setup.val.class_count, config.clusters)
    for image, one in enumerate(maps):
        truth = setup.val.label_map(image, size=config.label_size)
        enlarged = F.interpolate(one[None, None].float(), size=tuple(truth.shape), mode="nearest-exact")[0, 0].long()
        confusion.add(truth, enlarged)
    used = len(np.unique(assigned))
    notes = [f"{used} of {config.clusters} clusters are used; each is named by the validation labels themselves."]
    return Result(confusion.matched().metrics(), setup.recipe, notes=notes)


def _pictures(setup: Setup, shown: list[tuple[int, Tensor, Tensor]]) -> list[Path]:
    """Truth beside prediction, in VOC's colours, of the first images; void is black in both."""
    palette = np.array(voc_palette(), dtype=np.uint8).reshape(256, 3)
    palette[VOID] = 0
    pairs = ((palette[truth.numpy()], palette[predicted.numpy()]) for _, truth, predicted in shown)
    return [setup.request.output / name for name in save_pairs(setup.request.output, pairs)]


# ── Object discovery ──────────────────────────────────────────────────────────────────────────────────────────────────


def _corloc(setup: Setup, extractor: DenseExtractor) -> Result:
    """LOST's one box an image; the share of images where it overlaps an object."""
    config = setup.config
    assert isinstance(config, recipes.DiscoveryRecipe)
    found = counted = 0
    with Progress("object discovery", total=len(setup.val), unit="image") as progress:
        for index in range(len(setup.val)):
            truth, _ = setup.val.boxes(index, hard_objects=config.hard_objects)
            if len(truth):
                box, scale = lost_of(extractor, setup.val.read(index), config)
                found += int(discovery.overlaps(box, truth * scale).max() >= config.overlap)
                counted += 1
            progress.advance()
    if not counted:
        raise UserError(f"{setup.val.title} has no object: corloc needs boxes.")
    notes = [f"{found} of {counted} images; {len(setup.val) - counted} without an object are left out."]
    return Result({"corloc_percent": 100.0 * found / counted}, setup.recipe, notes=notes)


def lost_of(extractor: DenseExtractor, image: Tensor, config: recipes.DiscoveryRecipe) -> tuple[discovery.Box, float]:
    """LOST's box in a picture (3, H, W) uint8, and the scale at which the picture was looked at."""
    longest, scale = max(image.shape[1:]), 1.0
    if config.longest_side and longest > config.longest_side:
        scale = config.longest_side / longest
        sides = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size=sides, mode="bilinear", antialias=True)[0]
        image = image.round().to(torch.uint8)
    height, width = image.shape[1:]
    padded = _padded(image, extractor)
    features = extractor.maps(padded[None])[0]
    if extractor.is_resnet:
        features = discovery.layer_normalised(features)
    places = (padded.shape[1] / features.shape[1], padded.shape[2] / features.shape[2])
    box = discovery.lost_box(features, image_size=(height, width), scale=places, candidates=config.candidates)
    return box, scale


def _padded(image: Tensor, extractor: DenseExtractor) -> Tensor:
    """To whole patches below and on the right, with the mean colour, which is the network's zero."""
    multiple = extractor.multiple
    down, right = ((-side) % multiple for side in image.shape[1:])
    if not down and not right:
        return image
    header = extractor.header
    mean = torch.tensor(header.mean) * (255 / header.input_range)
    mean = mean.flip(0) if header.channel_order == "BGR" else mean
    padded = mean.round().to(torch.uint8)[:, None, None].repeat(1, image.shape[1] + down, image.shape[2] + right)
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded
