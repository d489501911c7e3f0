"""The ImageNet-style protocols: `resolve` says what will be done, `run` goes from weights and images to metrics.

linear · semi-1pct, semi-10pct, finetune-100pct · knn · cluster, and their sample twins. Recipes: `recipes.py`; images
and their features: `images.py`; what trains: `training.py`; k-NN and clusters themselves: `twist.measure`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from twist.catalog.class_folders import LabelledImages, open_tree
from twist.contracts import files
from twist.contracts.curves import CURVES
from twist.contracts.errors import UsageError, UserError
from twist.contracts.failures import explained
from twist.contracts.files import sha256_json
from twist.contracts.networks import network_of
from twist.contracts.weights import Backbone
from twist.measure.features import Batch, Extractor, FeatureFile, frozen
from twist.measure.knn import nearest, plan_blocks, top_percent, vote_ranks
from twist.transfer.engines.framework import leave
from twist.transfer.engines.imagenet import recipes, training
from twist.transfer.engines.imagenet.head import head_classes, read_head
from twist.transfer.engines.imagenet.images import decoded, extract, labelled_subset, listed_labels
from twist.transfer.engines.imagenet.journal import log
from twist.transfer.engines.imagenet.panel import cluster_panel, neighbour_panel, prediction_panel
from twist.transfer.pictures import plot_losses
from twist.transfer.recipe import departures
from twist.transfer.request import RANDOM_FILE, Request, Result, Weights

if TYPE_CHECKING:
    from twist.transfer.protocols import Protocol

# ILSVRC 2012's training images by which of them have labels: all, or the lines of SimCLR's lists.
_IMAGENET_TRAIN = {"all": 1_281_167, "10percent": 128_116, "1percent": 12_811}
_IMAGENET_VAL = 50_000


@dataclass(frozen=True)
class Setup:
    """A run, resolved: recipe and images, what the record keeps of them, the plan's text, and whether it is reduced.

    `labelled` are the training images whose labels the recipe may use, `held` those of them that a grid of rates is
    chosen on. Reduced means another recipe than the
    protocol's own, or another data set than ImageNet-1k.
    """

    request: Request
    weights: Weights
    config: recipes.AnyRecipe
    train: LabelledImages
    labelled: LabelledImages
    val: LabelledImages
    recipe: dict[str, Any]
    plan: str
    reduced: bool
    notes: tuple[str, ...]
    held: LabelledImages | None = None

    def extractor(self, device: torch.device) -> Extractor:
        """The network with its weights, as the recipe reads its features."""
        blocks = self.config.last_blocks if isinstance(self.config, recipes.LinearRecipe) else 1
        network = network_of(self.weights.header, self.weights.tensors)
        network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Extractor(network, self.weights.header, device, self.config.precision, blocks)

    def crops(self, batches: Sequence[np.ndarray], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Random crops of the labelled images."""
        return decoded(self.labelled, self.config, batches, device=device, crops=(self.request.seed, epoch))


def resolve(request: Request, weights: Weights) -> Setup:
    """Recipe, images and plan of a request; nothing is built and nothing is written.

    `UserError` for data that are missing, an override that is none, or a batch that does not fit images and GPUs.
    """
    protocol, header, gpus = request.protocol, weights.header, request.gpus
    if request.controls.iterations or request.controls.nodes > 1:
        raise UserError(f"{protocol.name} is counted in epochs on one machine: iterations and nodes are no keys of it.")
    config = recipes.load_recipe(protocol.config, architecture=header.architecture, overrides=request.overrides)
    if isinstance(config, recipes.LinearRecipe) and config.last_blocks > 1 and not header.is_vit:
        raise UsageError(f"last_blocks = {config.last_blocks} is for ViTs, not for a {header.display_name}.")
    if request.own is not None:
        assert request.own.labelled is not None
        train, val = request.own.labelled["train"], request.own.labelled["val"]
    else:
        train, val = open_tree(request.data)
    labelled, warnings = train, []
    if isinstance(config, recipes.ClassifierRecipe):
        if request.own is not None and config.labels != "all" and listed_labels(train, config) is None:
            config = config.model_copy(update={"labels_from": "seed"})
        labelled = labelled_subset(train, config)
        warnings = batch_warnings(config, len(labelled), processes=max(gpus, 1))
    where = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "1 process on the CPU"
    how = _plan(config, train, labelled, val, processes=max(gpus, 1))
    if isinstance(config, recipes.ClassifierRecipe) and request.eval_only:
        how = " → the stored weights are evaluated, nothing is trained\n  "
    plan = f"plan: {where}{how}{len(val)} validation images of {len(val.classes)} classes at {config.size} pixels"
    recipe = recorded_recipe(config, labelled, val)
    changed = changes(protocol, header, recipe)
    reduced = bool(changed) or not is_imagenet(recipe)
    if request.own is None and protocol.scale == "full" and len(train.classes) == 1000 and not is_imagenet(recipe):
        changed.append(f"{len(train)} + {len(val)} images are not ImageNet's: see `twist data check imagenet`")
    own = [request.own.summary()] if request.own is not None else []
    notes = (*own, *warnings, *changed)
    plan = "\n".join([plan, *notes])
    labelled, held = _hold_out(labelled, config)
    return Setup(request, weights, config, train, labelled, val, recipe, plan, reduced, notes, held)


def _hold_out(labelled: LabelledImages, config: recipes.AnyRecipe) -> tuple[LabelledImages, LabelledImages | None]:
    """The images that are trained on, and those of them that choose among a grid of rates; None without a grid."""
    if not isinstance(config, recipes.LinearRecipe) or not config.rate_factors:
        return labelled, None
    held = np.arange(len(labelled)) % config.holdout_every == config.holdout_every - 1
    if not held.any():
        raise UserError(
            f"{len(labelled)} labelled images leave none to choose the rate on: pass a smaller holdout_every."
        )
    return labelled.only(np.flatnonzero(~held)), labelled.only(np.flatnonzero(held))


def batch_warnings(config: recipes.ClassifierRecipe, images: int, *, processes: int) -> list[str]:
    """Where a step would see fewer images than its rates are meant for, a sentence with overrides that fit.

    `UsageError` for batches that do not divide over the processes, or that end in a single image for each.
    """
    size, groups = config.batch_size, config.groups
    if size % processes:
        raise UsageError(f"batch_size = {size} does not divide over --gpus {processes}.")
    if groups and groups % processes:
        raise UsageError(
            f"Batch norm takes {groups} groups of the {size} images of a step, which do not divide over --gpus "
            f"{processes}: take fewer GPUs, or batch_norm_images={size // processes}, which is another recipe."
        )
    last = -(-(images % size or size) // (groups or processes))
    # Where the last map is one pixel, as a ResNet's is up to 32 pixels.
    if isinstance(config, recipes.FinetuneRecipe) and config.size <= 32 and last == 1:
        raise UsageError(
            f"{images} images in batches of {size} leave a last batch of one image for batch norm, which has no "
            "statistics of it at this size: choose another batch_size."
        )
    if size <= images:
        return []
    fitting = max(images - images % processes, processes)
    # In proportion to the batch: Goyal et al. 2017, arXiv 1706.02677.
    fit = " ".join(f"{name}={rate * fitting / size:.3g}" for name, rate in config.rates.items())
    if groups and -(-fitting * groups // size) % processes:
        fit += f" batch_norm_images={fitting // processes}"
    return [
        f"warning: batch_size {size} is more than the {images} labelled images: batch_size={fitting} {fit} would fit"
    ]


def _plan(
    config: recipes.AnyRecipe, train: LabelledImages, labelled: LabelledImages, val: LabelledImages, *, processes: int
) -> str:
    """What is measured, and on how many images, up to the validation images."""
    if isinstance(config, recipes.ClassifierRecipe):
        steps, batch = -(-len(labelled) // config.batch_size), min(config.batch_size, len(labelled))
        rates = ", ".join(f"{name} {rate:g}" for name, rate in config.rates.items())
        norm = f", batch norm over {batch / config.groups:g} images" if config.groups else ""
        return (
            f"{' share the batch' * (processes > 1)}\n  images a step {batch} ({batch / processes:g} a process), "
            f"{rates}, {config.epochs} epochs of {steps} step{'s' * (steps > 1)}{norm}\n"
            f"  {len(labelled)} labelled images of {len(train)}; "
        )
    if isinstance(config, recipes.NeighboursRecipe):
        how = f"the {min(config.neighbours, len(train))} nearest of {len(train)} training images vote"
    elif config.by == "head":
        how = f"TWIST's own head of {config.head}"
    else:
        found_on = f"{len(train)} training" if config.fit_on == "train" else f"{len(val)} validation"
        how = f"k-means ({config.algorithm}), {config.clusters or len(val.classes)} clusters on {found_on} images"
    return f" → {how}\n  "


def recorded_recipe(config: recipes.AnyRecipe, train: LabelledImages, val: LabelledImages) -> dict[str, Any]:
    """What decides the number: the recipe and *which* images by name and label (the record's `data` says more)."""
    digest = sha256_json([train.digest(), val.digest()])
    images = {"classes": len(train.classes), "train": len(train), "val": len(val), "sha256": digest}
    return {**config.recorded(), "images": images}


def changes(protocol: Protocol, header: Backbone, recipe: dict[str, Any]) -> list[str]:
    """How a recorded recipe differs from the protocol's own, a line each."""
    # A head is another way of the same protocol, and the published one.
    overrides = ("by=head", "head=given") if recipe.get("by") == "head" else ()
    own = recipes.load_recipe(protocol.config, architecture=header.architecture, overrides=overrides).recorded()
    return departures(own, {key: recipe[key] for key in own}, free=())


def is_imagenet(recipe: dict[str, Any]) -> bool:
    """Whether the images of a recorded recipe are ImageNet-1k's, with the labels that the recipe asks for."""
    images, train = recipe["images"], _IMAGENET_TRAIN[recipe.get("labels", "all")]
    return (images["classes"], images["train"], images["val"]) == (1000, train, _IMAGENET_VAL)


def run(request: Request, weights: Weights, setup: Setup) -> Result:  # noqa: ARG001 (they are in `setup`)
    """Measure the weights as resolved; everything written lies in the request's folder.

    With `resume` it goes on from the last finished epoch of a training. `UserError` for an unreadable image, a folder
    with another run or, to evaluate, an unfinished one, a diverged training, memory that ran out, a dead process.
    """
    config, output = setup.config, request.output
    output.mkdir(parents=True, exist_ok=True)
    # With the machine's part, which the record leaves out: what to type again.
    whole = {
        "config": setup.request.protocol.config,
        **config.model_dump(mode="json"),
        "images": setup.recipe["images"],
    }
    files.write_json(output / "recipe.json", whole)
    log(output, setup.plan)
    try:
        if isinstance(config, recipes.ClassifierRecipe) and setup.request.eval_only:
            training.require_finished(output, config)  # before features are extracted
        finetunes = isinstance(config, recipes.FinetuneRecipe)
        result = _classify(setup, training.train_finetune) if finetunes else _on_frozen_features(setup)
    except Exception as error:
        log(output, f"stopped: {error}")
        raise
    log(output, "result: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))
    notes, classes = [*result.notes, *setup.notes], len(setup.train.classes)
    if classes <= 5 and any("top5" in name for name in result.metrics):
        notes.append(f"Top-5 of {classes} classes is 100 whatever the weights: it says nothing here.")
    return replace(result, notes=notes)


def _on_frozen_features(setup: Setup) -> Result:
    """Linear probe, k-NN and clusters: features of a backbone that is proven not to change, then what reads them."""
    device = torch.device("cuda", 0) if setup.request.gpus else torch.device("cpu")
    with explained(memory=recipes.START):
        extractor = setup.extractor(device)

        shared = setup.request.controls.shared
        folder = (Path(shared) if shared else setup.request.output) / "features"

        def features(split: str) -> FeatureFile:
            images = {"train": setup.labelled, "val": setup.val, "held": setup.held}[split]
            assert images is not None
            return extract(extractor, images, setup.config, folder=folder, title=f"{split} features")

        with frozen(extractor.network) as digest:
            measure = {"linear": _linear, "knn": _neighbours, "cluster": _clusters}[setup.config.kind]
            result = measure(setup, features)
    if not (setup.config.machine.keep_features or shared):
        shutil.rmtree(folder, ignore_errors=True)
    note = f"The frozen backbone is bit-equal before and after: state SHA-256 {digest[:16]}."
    return replace(result, notes=[*result.notes, note], loaded=digest)


_Features = Callable[[str], FeatureFile]  # of the images of a split: "train", "val" or "held"


def _linear(setup: Setup, features: _Features) -> Result:
    assert isinstance(setup.config, recipes.LinearRecipe)
    train = None if setup.config.augment or setup.request.eval_only else features("train")
    held = features("held") if setup.held is not None else None
    return _classify(setup, training.train_linear, features("val"), held, train)


def _classify(setup: Setup, work: Callable[..., Any], *arguments: Any) -> Result:
    """A classifier trained by `work(rank, setup, *arguments)`: one process a GPU, the recipe's total batch kept."""
    config, output = setup.config, setup.request.output
    assert isinstance(config, recipes.ClassifierRecipe)
    device = "cuda" if setup.request.gpus else "cpu"
    done = training.run_ranks(
        work, setup, *arguments, processes=max(setup.request.gpus, 1), device=device, output=output
    )
    request, header = setup.request, setup.weights.header.model_dump(mode="json")
    given = {"file": str(request.checkpoint or RANDOM_FILE), "sha256": request.sha256, "reading": request.reading}
    leave(output, classes=list(setup.train.classes), chosen=done["chosen"], header=header, weights=given)
    history = done["history"]
    best = max((row for row in history if "top1_percent" in row), key=lambda row: row["top1_percent"])
    images = f"{len(setup.labelled)} labelled images of {len(setup.train)}"
    notes = [
        f"{images}; total batch {config.batch_size} on any number of GPUs.",
        f"Top-1 is the last epoch's; the best was {best['top1_percent']:.2f} in epoch {best['epoch'] + 1} of "
        f"{config.epochs} (TWIST's evaluate.py prints the best so far).",
    ]
    if done["held"] and setup.held is not None:
        rates, of = [*config.rates.values()], ", ".join(f"{top1:.1f}" for top1 in done["held"])
        notes.append(
            f"Learning rate {rates[done['chosen']]:g} of {len(rates)} ({', '.join(f'{rate:g}' for rate in rates)}), "
            f"chosen on {len(setup.held)} held-out training images (top-1 of each: {of})."
        )
    if setup.request.eval_only:
        end = f"at the end of the training top-1 was {history[-1]['top1_percent']:.2f}"
        notes.append(f"Evaluated from the stored weights, nothing was trained; {end}.")
    media = [
        prediction_panel(output / "predictions.png", setup.val.spread(training.PICTURED), done["predicted"]),
        plot_losses(output / CURVES, output / "losses.png", title=setup.request.protocol.name),
    ]
    return Result(done["metrics"], setup.recipe, media, curves=output / CURVES, notes=notes)


def _neighbours(setup: Setup, features: _Features) -> Result:
    config = setup.config
    assert isinstance(config, recipes.NeighboursRecipe)
    bank, queries = features("train"), features("val")
    neighbours, limit = min(config.neighbours, len(bank)), config.machine.max_memory_mb
    blocks = plan_blocks(len(queries), len(bank), bank.dimension, neighbours=neighbours, max_memory_mb=limit)
    device = torch.device("cuda", 0) if setup.request.gpus else None
    with explained(memory=recipes.SEARCH):
        similarity, index = nearest(queries, bank, neighbours=neighbours, blocks=blocks, device=device)
        similarity, index = similarity.cpu(), index.cpu()
    classes, labels = len(setup.train.classes), (bank.labels, queries.labels)
    ranks = vote_ranks(similarity, index, *labels, classes=classes, temperature=config.temperature)
    return Result(
        metrics={f"knn_top{k}_percent": top_percent(ranks, k) for k in (1, 5)},
        recipe=setup.recipe,
        media=[neighbour_panel(setup.request.output / "neighbours.png", setup.train, setup.val, index)],
    )


def _clusters(setup: Setup, features: _Features) -> Result:
    # Here, because scikit-learn takes seconds to import and only this protocol needs it.
    from twist.measure.clusters import cluster_metrics, kmeans

    config = setup.config
    assert isinstance(config, recipes.ClusterRecipe)
    if config.head is not None:
        # Before the features: a wrong checkpoint should be said at once.
        head = read_head(Path(config.head), setup.weights.tensors, activation=config.head_activation)
        held_out, size = features("val"), config.machine.feature_batch_size
        with explained(memory=recipes.FEATURES):
            blocks = [held_out[start : start + size] for start in range(0, len(held_out), size)]
            assignment = torch.cat([head_classes(head, block) for block in blocks]).numpy()
        how = f"TWIST's own head with {head.output.out_features} outputs"
    else:
        held_out, fit_on = features("val"), features(config.fit_on)
        clusters = config.clusters or len(setup.train.classes)
        settings = config.model_dump(include={"algorithm", "restarts", "max_passes", "step_size", "normalise"})
        settings["seed"] = setup.request.seed
        with explained(memory="take algorithm=minibatch restarts=1 and a small step_size"):
            assignment = kmeans(fit_on.mapped(), held_out.mapped(), clusters=clusters, **settings)
        how = f"k-means with {clusters} clusters, found on the {config.fit_on} images"
    used = len(np.unique(assignment))
    return Result(
        metrics=cluster_metrics(setup.val.labels, assignment),
        recipe=setup.recipe,
        media=[cluster_panel(setup.request.output / "clusters.png", setup.val, assignment)],
        notes=[f"{how}; the {len(setup.val)} validation images fall into {used} of them."],
    )
