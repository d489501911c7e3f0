"""The ImageNet-style protocols: `resolve` says what will be done, `run` goes from weights and images to metrics.

linear · semi-1pct, semi-10pct, finetune-100pct · knn · cluster, and their sample twins. Recipes: `recipes.py`; images:
`dataset.py`; frozen features: `features.py`; then one file a protocol.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from twist.catalog.labelled import LabelledImages, open_tree
from twist.contracts import files
from twist.contracts.curves import CURVES
from twist.contracts.errors import UsageError
from twist.contracts.failures import explained
from twist.contracts.files import sha256_json
from twist.contracts.networks import network_of
from twist.contracts.weights import Backbone
from twist.transfer.engines.imagenet.accuracy import top_percent
from twist.transfer.engines.imagenet.dataset import labelled_subset
from twist.transfer.engines.imagenet.features import extract, frozen, state_digest
from twist.transfer.engines.imagenet.finetune import train_finetune
from twist.transfer.engines.imagenet.head import head_classes, read_head
from twist.transfer.engines.imagenet.journal import log
from twist.transfer.engines.imagenet.linear import train_linear
from twist.transfer.engines.imagenet.neighbours import nearest, plan_blocks, vote_ranks
from twist.transfer.engines.imagenet.panel import Tile, write_panel
from twist.transfer.engines.imagenet.plan import batch_too_large, render_plan
from twist.transfer.engines.imagenet.processes import run_ranks
from twist.transfer.engines.imagenet.recipes import (
    FEATURES,
    SEARCH,
    START,
    AnyRecipe,
    ClassifierRecipe,
    ClusterRecipe,
    FinetuneRecipe,
    LinearRecipe,
    NeighboursRecipe,
    load_recipe,
)
from twist.transfer.engines.imagenet.training import PICTURED, Job, require_finished
from twist.transfer.pictures import plot_losses
from twist.transfer.recipe import departures
from twist.transfer.request import Result

if TYPE_CHECKING:
    from twist.transfer.protocols import Protocol

RECIPE = "recipe.json"
# ILSVRC 2012's training images by which of them have labels: all, or the lines of SimCLR's lists.
_IMAGENET_TRAIN = {"all": 1_281_167, "10percent": 128_116, "1percent": 12_811}


@dataclass(frozen=True)
class Resolved:
    """What will run: recipe and images, what the record keeps of them, the plan's text, and whether it is reduced.

    `labelled` are the training images whose labels the recipe may use. Reduced means another recipe than the
    protocol's own, or another data set than ImageNet-1k.
    """

    protocol: Protocol
    config: AnyRecipe
    header: Backbone
    train: LabelledImages
    labelled: LabelledImages
    val: LabelledImages
    gpus: int
    eval_only: bool
    recipe: dict[str, Any]
    plan: str
    reduced: bool
    notes: tuple[str, ...]


def resolve(
    protocol: Protocol,
    header: Backbone,
    *,
    data: Path,
    overrides: Sequence[str] = (),
    gpus: int = 0,
    eval_only: bool = False,
) -> Resolved:
    """Recipe, images and plan for weights that `header` describes; nothing is built and nothing is written.

    Args:
        protocol: its `config` names a recipe in `configs/imagenet/`.
        overrides: `key=value` on the recipe.
        gpus: processes with a GPU each; 0 runs on the CPU.

    Raises:
        UsageError: an override, or a number of GPUs that does not divide the batch.
        UserError: data that are missing.
    """
    config = load_recipe(protocol.config, architecture=header.architecture, overrides=overrides)
    if isinstance(config, ClassifierRecipe) and config.batch_size % max(gpus, 1):
        raise UsageError(f"batch_size = {config.batch_size} does not divide over --gpus {gpus}.")
    if isinstance(config, LinearRecipe) and config.last_blocks > 1 and not header.is_vit:
        raise UsageError(
            f"last_blocks = {config.last_blocks} is for ViTs, and these weights are a {header.display_name}."
        )
    train, val = open_tree(data)
    labelled = labelled_subset(train, config) if isinstance(config, ClassifierRecipe) else train
    if isinstance(config, FinetuneRecipe):
        _check_last_batch(config, images=len(labelled), processes=max(gpus, 1))
    recipe = recorded_recipe(config, labelled, val)
    plan = render_plan(config, train=train, labelled=labelled, val=val, gpus=gpus, eval_only=eval_only)
    notes = (
        *batch_too_large(config, labelled, processes=max(gpus, 1)),
        *_departures(protocol, header, recipe),
        *_torn(protocol, train, val),
    )
    return Resolved(
        protocol, config, header, train, labelled, val, gpus, eval_only, recipe, "\n".join([plan, *notes]),
        reduced=not at_full_scale(protocol, header, recipe), notes=notes,
    )  # fmt: skip


def _check_last_batch(config: FinetuneRecipe, *, images: int, processes: int) -> None:
    """Batch norm has no statistics of one image whose map is one pixel, as a ResNet's last is up to 32 pixels."""
    last = -(-(images % config.batch_size or config.batch_size) // processes)
    if last == 1 and config.size <= 32:
        raise UsageError(
            f"{images} images in batches of {config.batch_size} leave a process one for the last, of which batch norm "
            "has no statistics at this size: choose another batch_size."
        )


def run(resolved: Resolved, tensors: dict[str, Tensor], *, seed: int, output: Path, resume: bool = False) -> Result:
    """Measure `tensors` by `resolved`; everything written lies in `output`.

    Args:
        resume: go on from the last finished epoch (linear and fine-tuning); k-NN and clusters start anew.

    Raises:
        UserError: data that are unreadable, a run folder with another run, one to evaluate that is not finished, a
            diverged training, memory that ran out, a process that died.
    """
    output.mkdir(parents=True, exist_ok=True)
    config = resolved.config
    # Whole, with the machine's part: what to type again. The record keeps `resolved.recipe`.
    written = {
        "config": resolved.protocol.config,
        **config.model_dump(mode="json"),
        "images": resolved.recipe["images"],
    }
    files.write_json(output / RECIPE, written)
    log(output, resolved.plan)
    try:
        if isinstance(config, ClassifierRecipe):
            result = _classify(config, resolved, tensors, seed=seed, output=output, resume=resume)
        else:
            device = torch.device("cuda", 0) if resolved.gpus else torch.device("cpu")
            with explained(memory=START):
                if isinstance(config, NeighboursRecipe):
                    result = _neighbours(config, resolved, tensors, output=output, device=device)
                else:
                    result = _cluster(config, resolved, tensors, seed=seed, output=output, device=device)
    except Exception as error:
        log(output, f"stopped: {error}")
        raise
    log(output, "result: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))
    return dataclasses.replace(result, notes=[*result.notes, *_empty_top5(resolved, result), *resolved.notes])


def _empty_top5(resolved: Resolved, result: Result) -> list[str]:
    """Of at most five classes every answer is among the first five; the record keeps its protocol's metrics."""
    classes = len(resolved.train.classes)
    if classes > 5 or not any("top5" in name for name in result.metrics):
        return []
    return [f"Top-5 of {classes} classes is 100 whatever the weights: it says nothing here."]


def recorded_recipe(recipe: AnyRecipe, train: LabelledImages, val: LabelledImages) -> dict[str, Any]:
    """What decides the number: the recipe and *which* images by name and label, wherever they lie.

    What is in them is not looked at: other pictures of the same names are told apart by the record's `data`.
    """
    return {
        **recipe.recorded(),
        "images": {
            "classes": len(train.classes),
            "train": len(train),
            "val": len(val),
            "sha256": sha256_json([train.digest(), val.digest()]),
        },
    }


def at_full_scale(protocol: Protocol, backbone: Backbone, recipe: dict[str, Any]) -> bool:
    """Whether a recorded recipe is the protocol's own, on ImageNet-1k: only then are published rows its peers."""
    unchanged = _own_recipe(protocol, backbone, recipe)
    images = recipe["images"]
    train = _IMAGENET_TRAIN[recipe.get("labels", "all")]
    imagenet = (images["classes"], images["train"], images["val"]) == (1000, train, 50_000)
    return imagenet and {key: value for key, value in recipe.items() if key in unchanged} == unchanged


def _own_recipe(protocol: Protocol, backbone: Backbone, recipe: dict[str, Any]) -> dict[str, Any]:
    # A head is another way of the same protocol, and the published one.
    overrides = ("by=head", "head=given") if recipe.get("by") == "head" else ()
    return load_recipe(protocol.config, architecture=backbone.architecture, overrides=overrides).recorded()


def _departures(protocol: Protocol, backbone: Backbone, recipe: dict[str, Any]) -> list[str]:
    own = _own_recipe(protocol, backbone, recipe)
    return departures(own, {key: value for key, value in recipe.items() if key in own}, free=())


def _torn(protocol: Protocol, train: LabelledImages, val: LabelledImages) -> Iterator[str]:
    """A thousand classes with other counts than ImageNet's: half an archive, mostly, and never comparable."""
    if protocol.scale == "full" and len(train.classes) == 1000:
        for name, images, count in (("train", train, _IMAGENET_TRAIN["all"]), ("val", val, 50_000)):
            if len(images) != count:
                yield (
                    f"{name} holds {len(images):,} images of 1,000 classes, and ImageNet {count:,}: `twist data check "
                    "imagenet` says what is missing"
                )


def _classify(
    config: LinearRecipe | FinetuneRecipe,
    resolved: Resolved,
    tensors: dict[str, Tensor],
    *,
    seed: int,
    output: Path,
    resume: bool,
) -> Result:
    """Linear and fine-tuning: one process a GPU, the recipe's total batch kept."""
    if resolved.eval_only:
        require_finished(output, config)  # said before processes are started and features taken
    header, labelled, val = resolved.header, resolved.labelled, resolved.val
    weights = state_digest(network_of(header, tensors))
    identity = {"recipe": sha256_json(resolved.recipe), "seed": seed, "weights": weights}
    job = Job(header, tensors, labelled, val, config, seed, output, identity, resume, resolved.eval_only)
    done = run_ranks(
        train_linear if isinstance(config, LinearRecipe) else train_finetune,
        (job,),
        processes=max(resolved.gpus, 1),
        device="cuda" if resolved.gpus else "cpu",
        output=output,
    )
    _clear_features(config, output)
    history = done["history"]
    best = max((row for row in history if "top1_percent" in row), key=lambda row: row["top1_percent"])
    notes = [
        f"{len(labelled)} labelled images of {len(resolved.train)}; total batch {config.batch_size} on any number of "
        "GPUs.",
        f"Top-1 is the last epoch's; the best was {best['top1_percent']:.2f} in epoch {best['epoch'] + 1} of "
        f"{config.epochs} (TWIST's evaluate.py prints the best so far).",
    ]
    if resolved.eval_only:
        notes.append(
            "Evaluated from the stored weights, nothing was trained; at the end of the training top-1 was "
            f"{history[-1]['top1_percent']:.2f}."
        )
    if "backbone" in done:
        notes.append(f"The frozen backbone is bit-equal before and after: state SHA-256 {done['backbone'][:16]}.")
    return Result(
        metrics=done["metrics"],
        recipe=resolved.recipe,
        media=[
            _prediction_panel(output / "predictions.png", val.spread(PICTURED), done["predicted"]),
            plot_losses(output / CURVES, output / "losses.png", title=resolved.protocol.name),
        ],
        curves=output / CURVES,
        notes=notes,
    )


def _neighbours(
    config: NeighboursRecipe, resolved: Resolved, tensors: dict[str, Tensor], *, output: Path, device: torch.device
) -> Result:
    header, train, val = resolved.header, resolved.train, resolved.val
    network = network_of(header, tensors).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with frozen(network) as digest:
        folder = output / "features"
        bank = extract(network, header, train, config, folder=folder, title="train features", device=device)
        queries = extract(network, header, val, config, folder=folder, title="val features", device=device)
    neighbours = min(config.neighbours, len(bank))
    blocks = plan_blocks(
        queries=len(queries),
        bank=len(bank),
        dimension=bank.dimension,
        neighbours=neighbours,
        max_memory_mb=config.machine.max_memory_mb,
    )
    with explained(memory=SEARCH):
        similarity, index = nearest(
            queries.rows,
            bank.rows,
            query_count=len(queries),
            bank_count=len(bank),
            neighbours=neighbours,
            blocks=blocks,
            device=device,
        )
        similarity, index = similarity.cpu(), index.cpu()
    ranks = vote_ranks(
        similarity,
        index,
        bank.labels,
        queries.labels,
        classes=len(train.classes),
        temperature=config.temperature,
    )
    _clear_features(config, output)
    top1, top5 = top_percent(ranks)
    return Result(
        metrics={"knn_top1_percent": top1, "knn_top5_percent": top5},
        recipe=resolved.recipe,
        media=[_neighbour_panel(output / "neighbours.png", train, val, index)],
        notes=[f"The frozen backbone is bit-equal before and after: state SHA-256 {digest[:16]}."],
    )


def _cluster(
    config: ClusterRecipe,
    resolved: Resolved,
    tensors: dict[str, Tensor],
    *,
    seed: int,
    output: Path,
    device: torch.device,
) -> Result:
    # Here, because scikit-learn takes seconds to import and only this protocol needs it.
    from twist.transfer.engines.imagenet.cluster import cluster_metrics, kmeans

    header, train, val = resolved.header, resolved.train, resolved.val
    network = network_of(header, tensors).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Before the features: a wrong checkpoint should be said at once.
    head = None
    if config.head is not None:
        head = read_head(Path(config.head), tensors, activation=config.head_activation)
    with frozen(network) as digest:
        folder = output / "features"
        held_out = extract(network, header, val, config, folder=folder, title="val features", device=device)
        found_on = held_out
        if head is None and config.fit_on == "train":
            found_on = extract(network, header, train, config, folder=folder, title="train features", device=device)
    if head is not None:
        classes = head.output.out_features
        blocks = range(0, len(held_out), config.machine.feature_batch_size)
        rows = (held_out.rows(start, start + config.machine.feature_batch_size) for start in blocks)
        with explained(memory=FEATURES):
            assignment = torch.cat([head_classes(head, block) for block in rows]).numpy()
        how = f"TWIST's own head with {classes} outputs"
    else:
        clusters = config.clusters or len(train.classes)
        with explained(memory="take algorithm=minibatch restarts=1 and a small step_size"):
            assignment = kmeans(found_on.mapped(), held_out.mapped(), clusters=clusters, recipe=config, seed=seed)
        how = f"k-means with {clusters} clusters, found on the {config.fit_on} images"
    _clear_features(config, output)
    return Result(
        metrics=cluster_metrics(val.labels, assignment),
        recipe=resolved.recipe,
        media=[_cluster_panel(output / "clusters.png", val, assignment)],
        notes=[
            f"{how}; the {len(val)} validation images fall into {len(np.unique(assignment))} of them.",
            f"The frozen backbone is bit-equal before and after: state SHA-256 {digest[:16]}.",
        ],
    )


def _clear_features(config: AnyRecipe, output: Path) -> None:
    if not config.machine.keep_features:
        shutil.rmtree(output / "features", ignore_errors=True)


def _prediction_panel(path: Path, shown: LabelledImages, predicted: Sequence[int]) -> Path:
    """Validation images with the truth and, below it, the prediction; the frame says whether they agree."""
    tiles = [
        Tile(shown.path(index), shown.classes[label], right=found == label, predicted=shown.classes[found])
        for index, (label, found) in enumerate(zip(shown.labels.tolist(), predicted, strict=True))
    ]
    rows = [tiles[start : start + 6] for start in range(0, len(tiles), 6)]
    return write_panel(path, rows, legend="truth, below it the prediction: blue frame right, broken orange frame wrong")


def _neighbour_panel(path: Path, train: LabelledImages, val: LabelledImages, index: Tensor) -> Path:
    """Six validation images, spread over the classes, each with its six nearest training images."""
    rows = []
    for query in np.linspace(0, len(val) - 1, num=min(6, len(val)), dtype=int):
        label = int(val.labels[query])
        row = [Tile(val.path(int(query)), val.classes[label])]
        for position in index[int(query), :6].tolist():
            other = int(train.labels[position])
            row.append(Tile(train.path(position), train.classes[other], right=other == label))
        rows.append(row)
    legend = "left the query, then its nearest: blue frame of its class, broken orange frame of another"
    return write_panel(path, rows, first_apart=True, legend=legend)


def _cluster_panel(path: Path, val: LabelledImages, assignment: np.ndarray) -> Path:
    """The six largest clusters, seven images each, framed by whether an image is of its cluster's commonest class."""
    names, counts = np.unique(assignment, return_counts=True)
    rows = []
    for cluster in names[np.argsort(-counts, kind="stable")][:6]:
        members = np.flatnonzero(assignment == cluster)
        commonest = int(np.bincount(val.labels[members]).argmax())
        shown = members[np.linspace(0, len(members) - 1, num=min(7, len(members)), dtype=int)]
        rows.append(
            [Tile(val.path(int(i)), val.classes[val.labels[i]], right=int(val.labels[i]) == commonest) for i in shown]
        )
    return write_panel(
        path, rows, legend="a row a cluster: blue frame its commonest class, broken orange frame another"
    )
