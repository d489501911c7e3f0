"""Protocols on frozen features: linear-seg · knn-seg · cluster-seg · corloc · fewshot · svm."""

import contextlib
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twist.catalog.card import Role
from twist.catalog.class_folders import open_tree
from twist.catalog.data_sets import find_data_set, read_sample
from twist.catalog.masks import voc_palette
from twist.contracts.curves import CURVES, Curves
from twist.contracts.errors import UsageError, UserError
from twist.contracts.failures import explained
from twist.contracts.networks import network_of
from twist.contracts.progress import Progress
from twist.measure import segmentation
from twist.measure.dense import DenseExtractor, DenseFile
from twist.measure.features import Extractor, frozen
from twist.measure.segmentation import (
    VOID,
    Box,
    Confusion,
    layer_normalised,
    lost_box,
    overlaps,
    patch_labels,
    retrieved_labels,
    sample_patches,
)
from twist.transfer.engines import plain
from twist.transfer.engines.frozen import classify, linear_seg, recipes
from twist.transfer.engines.frozen.images import Pictures, open_card_split, open_split, squashed
from twist.transfer.engines.plain import BIT_EQUAL, FEATURES, extract, search
from twist.transfer.pictures import PICTURES, plot_losses, save_pairs
from twist.transfer.recipe import departures
from twist.transfer.request import Request, Result, Weights

# Query patches of one search, whose neighbours are in memory together.
QUERIES = 16384


@dataclass(frozen=True, kw_only=True)
class Setup(plain.Setup):
    @property
    def features(self) -> Path:
        """The folder of features: beside the run folders, where every protocol of these weights finds them."""
        machine, output = self.config.machine, self.request.output
        if not machine.keep_features:  # removed at the end, so no other run may have its features there
            return output / "features"
        if machine.features:
            return Path(machine.features).expanduser()
        if self.request.controls.shared:
            return Path(self.request.controls.shared) / "features"
        runs = output.parent.parent if output.parent.name == self.request.protocol.name else output.parent
        return runs / "features"


def resolve(request: Request, weights: Weights) -> Setup:
    """Recipe, pictures and plan of a request; nothing is built and nothing is written."""
    protocol, own, iterations = request.protocol, request.own, request.controls.iterations
    if request.processes > 1:
        raise UsageError(f"{protocol.name} runs in one process: pass --gpus 1 or 0, and no nodes.")
    published = recipes.load_recipe(protocol.config)
    config: Any = recipes.load_recipe(protocol.config, request.overrides)
    if iterations:
        if not isinstance(config, recipes.LinearRecipe):
            raise UsageError(f"iterations={iterations}: {protocol.name} has none.")
        warmup = round(config.warmup_iterations * iterations / config.iterations)
        config = config.model_copy(update={"iterations": iterations, "warmup_iterations": warmup})
    train, val = _open(request, config)
    notes = departures(published.recorded(), config.recorded(), free=())
    if protocol.scale == "full" and own is None:
        notes += [
            f"{one.data} has {len(one)} images here and {one.published} as published"
            for one in (train, val)
            if isinstance(one, Pictures) and one.published not in (None, len(one))
        ]
    counts = {"train": len(train) if train is not None else 0, "val": len(val)}
    where = "1 GPU" if request.gpus else "1 process on the CPU"
    plan = f"plan: {where} → {config.kind} on {counts['train']} + {counts['val']} images"
    if config.kind == "linear-seg":
        heads = len(linear_seg.grid_of(config))
        plan += f", {heads} heads together, {config.iterations} steps of {config.batch_size} images"
    plan = "\n  ".join([plan, *([] if own is None else [own.summary()]), *notes])
    names = [one.digest() for one in (train, val) if one is not None]
    recipe = {**config.recorded(), "data": {**counts, "names": names}}
    given: Any = {"request": request, "weights": weights, "train": train, "val": val}
    return Setup(config, recipe, plan, bool(notes), tuple(notes), **given)


def _open(request: Request, config: recipes.AnyRecipe) -> tuple[Any, Any]:
    own = request.own
    if own is not None and own.labelled is not None:
        return own.labelled["train"], own.labelled["val"]
    if config.kind == "fewshot":
        return open_tree(request.data)

    def split(role: Role) -> Pictures:
        if own is not None:
            return open_card_split(own, role)
        return open_split(find_data_set(request.protocol.data[0]), request.data, role, read_sample(request.data))

    if config.kind == "corloc":  # nothing is trained: LOST is measured on the trainval pictures
        return None, split("train")
    return None if config.kind == "cluster-seg" else split("train"), split("val")


def run(request: Request, weights: Weights, setup: Setup) -> Result:
    """Measure the weights as resolved."""
    request.output.mkdir(parents=True, exist_ok=True)
    config: Any = setup.config
    header, device, tensors, notes = weights.header, setup.device, weights.tensors, []
    with explained(memory=FEATURES), contextlib.ExitStack() as stack:
        if config.kind in ("fewshot", "svm"):
            network = network_of(header, tensors).to(device)
            digest = stack.enter_context(frozen(network))
            extractor = Extractor(network, header, device, config.precision)
            where: Any = {"folder": setup.features, "title": "features"}
            train, val = (extract(extractor, one, config, **where) for one in (setup.train, setup.val))
            result = {"fewshot": classify.few_shot, "svm": classify.svm}[config.kind](setup, train, val)
        else:
            network = network_of(header, tensors, output_stride=config.layers.output_stride).to(device)
            digest = stack.enter_context(frozen(network))
            dense = DenseExtractor(network, header, device, config.layers, config.precision)
            measure = {"knn-seg": _knn, "linear-seg": _linear, "cluster-seg": _clusters, "corloc": _corloc}
            result = measure[config.kind](setup, dense)
            notes = [] if config.kind == "corloc" else [f"Features every {dense.stride} pixels."]
    if not config.machine.keep_features:
        shutil.rmtree(setup.features, ignore_errors=True)
    notes = [*result.notes, BIT_EQUAL.format(digest), *notes, *setup.notes]
    return replace(result, notes=notes, loaded=digest)


# ── Segmentation ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _dense(setup: Setup, extractor: DenseExtractor, split: str) -> DenseFile:
    config, pictures = setup.config, getattr(setup, split)
    machine = config.machine
    return extractor.to_file(
        partial(squashed, pictures, config.size, machine.feature_batch_size, machine.workers),
        images=len(pictures),
        size=config.size,
        key={"images": pictures.stamp(), "view": config.view},
        folder=setup.features,
        title=f"{split} features",
        max_disk_gb=machine.max_disk_gb,
    )


def _knn(setup: Setup, extractor: DenseExtractor) -> Result:
    """Memory of labelled training patches, retrieval for every validation patch, IoU over all pixels."""
    config: recipes.NeighboursRecipe = setup.config
    features, labels = _memory(setup, _dense(setup, extractor, "train"))
    val = _dense(setup, extractor, "val")
    confusion = Confusion(len(setup.val.classes))
    shown: list[tuple[Tensor, Tensor]] = []
    together = max(1, QUERIES // val.patches)
    with Progress("retrieval", total=len(setup.val), unit="image") as progress:
        for first in range(0, len(setup.val), together):
            count = min(together, len(setup.val) - first)
            rows = val.rows_of(first, count).to(setup.device)
            near = search(rows, features, config.neighbours, config.machine, device=setup.device, quiet=True)
            scores = retrieved_labels(*near, labels, temperature=config.temperature)
            for image, one in enumerate(scores.view(count, val.height, val.width, -1).permute(0, 3, 1, 2), first):
                truth, predicted = _predicted(setup, image, one)
                confusion.add(truth, predicted)
                shown += [(truth, predicted)] if len(shown) < PICTURES else []
            progress.advance(count)
    notes = [f"{len(features)} patches of {len(setup.train)} training images are in the memory."]
    return Result(confusion.metrics(), setup.recipe, _pictures(setup, shown), notes=notes)


def _predicted(setup: Setup, image: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Truth of a validation image and what the scores (K, h, w) make of it, (H, W) each."""
    truth = setup.val.label_map(image, size=setup.config.label_size)
    return truth, segmentation.predict(scores, tuple(truth.shape)).cpu()


def _memory(setup: Setup, train: DenseFile) -> tuple[Tensor, Tensor]:
    """Features (M, D) and labels (M, K) of the sampled training patches, on the run's device."""
    config: recipes.NeighboursRecipe = setup.config
    generator = torch.Generator().manual_seed(setup.request.seed)
    each = max(1, config.memory_size // len(setup.train))
    features, labels = [], []
    how: dict[str, Any] = {"classes": len(setup.train.classes), "void": config.memory_void}
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
        raise UserError(f"No patch of {setup.train.data}'s training images has a class: check its label maps.")
    return torch.cat(features).to(setup.device), torch.cat(labels).to(setup.device)


def _linear(setup: Setup, extractor: DenseExtractor) -> Result:
    """Heads for every rate and decay, trained together; the best by the chosen split is reported."""
    config: recipes.LinearRecipe = setup.config
    request, classes, device = setup.request, len(setup.val.classes), setup.device
    train, val = _dense(setup, extractor, "train"), _dense(setup, extractor, "val")
    chosen, held = linear_seg.split_holdout(config, train.images)
    train_labels, val_labels = (partial(one.label_map, size=config.label_size) for one in (setup.train, setup.val))
    # What the loss is computed on: the label map as it is evaluated, reduced once more.
    size = (config.loss_size,) * 2 if config.loss_size else (train.height, train.width)
    maps = torch.stack(
        [
            F.interpolate(train_labels(image)[None, None].float(), size=size, mode="nearest-exact")[0, 0].byte()
            for image in range(train.images)
        ]
    )
    path = request.output / CURVES
    with contextlib.closing(Curves(path, start=1, logger=request.controls.logger)) as curves:
        heads = linear_seg.train(
            train, lambda image: maps[image].long(), chosen, config, classes=classes, seed=request.seed, device=device,
            curves=curves,
        )  # fmt: skip
    measure = partial(linear_seg.evaluate, heads, classes=classes, device=device)
    grid, every = linear_seg.grid_of(config), np.arange(val.images)
    found = measure(train, train_labels, held) if len(held) else measure(val, val_labels, every)
    best = max(range(len(grid)), key=lambda head: found[head]["miou_percent"])
    metrics = measure(val, val_labels, every, only=best)[0] if len(held) else found[best]
    on = f"{len(held)} held-out training images" if len(held) else "the validation images that are reported"
    of = ", ".join(f"{one['miou_percent']:.1f}" for one in found)
    how = f"on {on} (mIoU of each: {of})" if len(grid) > 1 else "the only one"
    notes = [f"Learning rate {grid[best][0]:g} and weight decay {grid[best][1]:g} of {len(grid)}, chosen {how}."]
    with torch.no_grad():
        first = range(min(PICTURES, val.images))
        scores = [heads.scores(val.rows_of(one).to(device), val.height, val.width)[best, 0] for one in first]
        media = _pictures(setup, [_predicted(setup, image, one) for image, one in enumerate(scores)])
    media.append(plot_losses(path, request.output / "losses.png", title="linear heads"))
    return Result(metrics, setup.recipe, media, curves=path, notes=notes)


def _clusters(setup: Setup, extractor: DenseExtractor) -> Result:
    """k-means on the validation patches; clusters are named by their pixels, then IoU over all pixels."""
    from twist.measure.clusters import kmeans  # scikit-learn takes seconds to import

    config: recipes.ClustersRecipe = setup.config
    val = _dense(setup, extractor, "val")
    step = max(1, -(-len(val) // config.fitted_patches))
    assigned = kmeans(
        val.mapped()[::step], val.mapped(), clusters=config.clusters, algorithm="minibatch", restarts=1,
        max_passes=config.max_passes, step_size=config.step_size, normalise=True, seed=setup.request.seed,
    )  # fmt: skip
    maps = torch.from_numpy(assigned.astype(np.int64)).view(val.images, val.height, val.width)
    confusion = Confusion(len(setup.val.classes), config.clusters)
    for image, one in enumerate(maps):
        truth = setup.val.label_map(image, size=config.label_size)
        enlarged = F.interpolate(one[None, None].float(), size=tuple(truth.shape), mode="nearest-exact")[0, 0].long()
        confusion.add(truth, enlarged)
    used = len(np.unique(assigned))
    notes = [f"{used} of {config.clusters} clusters are used; each is named by the validation labels themselves."]
    return Result(confusion.matched().metrics(), setup.recipe, notes=notes)


def _pictures(setup: Setup, shown: list[tuple[Tensor, Tensor]]) -> list[Path]:
    """Truth beside prediction, in VOC's colours, of the first images; void is black in both."""
    palette = np.array(voc_palette(), dtype=np.uint8).reshape(256, 3)
    palette[VOID] = 0
    pairs = ((palette[truth.numpy()], palette[predicted.numpy()]) for truth, predicted in shown)
    return [setup.request.output / name for name in save_pairs(setup.request.output, pairs)]


# ── Object discovery ──────────────────────────────────────────────────────────────────────────────────────────────────


def _corloc(setup: Setup, extractor: DenseExtractor) -> Result:
    """LOST's one box an image; the share of images where it overlaps an object."""
    config: recipes.DiscoveryRecipe = setup.config
    found = counted = 0
    with Progress("object discovery", total=len(setup.val), unit="image") as progress:
        for index in range(len(setup.val)):
            truth = [one["bbox"] for one in setup.val.objects(index, hard=config.hard_objects)]
            if truth:
                box, scale = lost_of(extractor, setup.val.read(index), config)
                boxes = scale * np.array([[x, y, x + width, y + height] for x, y, width, height in truth])
                found += int(overlaps(box, boxes).max() >= config.overlap)
                counted += 1
            progress.advance()
    if not counted:
        raise UserError(f"{setup.val.data} has no object: corloc needs boxes.")
    notes = [f"{found} of {counted} images; {len(setup.val) - counted} without an object are left out."]
    return Result({"corloc_percent": 100.0 * found / counted}, setup.recipe, notes=notes)


def lost_of(extractor: DenseExtractor, image: Tensor, config: recipes.DiscoveryRecipe) -> tuple[Box, float]:
    """LOST's box in a picture (3, H, W) uint8, and the scale at which the picture was looked at."""
    longest, scale = max(image.shape[1:]), 1.0
    if config.longest_side and longest > config.longest_side:
        scale = config.longest_side / longest
        sides = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size=sides, mode="bilinear", antialias=True)[0]
        image = image.round().to(torch.uint8)
    height, width = image.shape[1:]
    # To whole patches below and on the right, with the mean colour, which is the network's zero.
    down, right = ((-side) % extractor.multiple for side in (height, width))
    header = extractor.header
    mean = torch.tensor(header.mean) * (255 / header.input_range)
    mean = mean.flip(0) if header.channel_order == "BGR" else mean
    padded = mean.round().to(torch.uint8)[:, None, None].repeat(1, height + down, width + right)
    padded[:, :height, :width] = image
    features = extractor.maps(padded[None])[0]
    if extractor.has_stages:
        features = layer_normalised(features)
    places = (padded.shape[1] / features.shape[1], padded.shape[2] / features.shape[2])
    box = lost_box(features, image_size=(height, width), scale=places, candidates=config.candidates)
    return box, scale
