"""The ImageNet-style protocols: one call from weights and a folder of images to metrics.

linear · semi-1pct, semi-10pct, finetune-100pct · knn · cluster, and their sample twins. Recipes: `recipes.py`; images:
`dataset.py`; frozen features: `features.py`; then one file a protocol.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from contracts.errors import UsageError
from contracts.hashing import sha256_json
from contracts.networks import network_of
from contracts.weights import Backbone
from transfer.imagenet.accuracy import top_percent
from transfer.imagenet.dataset import LabelledImages, labelled_subset, open_tree
from transfer.imagenet.features import extract, frozen, state_digest
from transfer.imagenet.finetune import train_finetune
from transfer.imagenet.head import head_classes, read_head
from transfer.imagenet.linear import train_linear
from transfer.imagenet.neighbours import nearest, plan_blocks, vote_ranks
from transfer.imagenet.panel import Tile, write_panel
from transfer.imagenet.processes import run_ranks
from transfer.imagenet.recipes import (
    AnyRecipe,
    ClassifierRecipe,
    ClusterRecipe,
    FinetuneRecipe,
    LinearRecipe,
    NeighboursRecipe,
    load_recipe,
)
from transfer.imagenet.training import CURVES
from transfer.result import EngineResult

if TYPE_CHECKING:
    from transfer.protocols import Protocol

# ILSVRC 2012's training images, and the lines of SimCLR's 10 % and 1 % lists.
_IMAGENET_TRAIN = (1_281_167, 128_116, 12_811)


def run(
    protocol: Protocol,
    tensors: dict[str, Tensor],
    backbone: Backbone,
    *,
    data: Path,
    seed: int,
    output: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    gpus: int = 0,
) -> EngineResult:
    """Measure `tensors` under `protocol` on the tree below `data`; everything written lies in `output`.

    Args:
        protocol: its `config` names a recipe in `configs/imagenet/`.
        tensors, backbone: an artefact's two halves.
        overrides: `key=value` on the recipe.
        resume: go on from the last finished epoch (linear and fine-tuning); k-NN and clusters start anew.
        gpus: processes with a GPU each; 0 runs on the CPU.

    Raises:
        UsageError: an override, or a number of GPUs that does not divide the batch.
        UserError: data that are missing or unreadable, a run folder with another run, a diverged training.
    """
    recipe = load_recipe(protocol.config, architecture=backbone.architecture, overrides=overrides)
    train, val = open_tree(data)
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(recipe, ClassifierRecipe):
        return _classify(recipe, tensors, backbone, train, val, seed=seed, output=output, resume=resume, gpus=gpus)
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    if isinstance(recipe, NeighboursRecipe):
        return _neighbours(recipe, tensors, backbone, train, val, output=output, device=device)
    return _cluster(recipe, tensors, backbone, train, val, seed=seed, output=output, device=device)


def recorded_recipe(recipe: AnyRecipe, train: LabelledImages, val: LabelledImages) -> dict[str, Any]:
    """What decides the number: the recipe and *which* images (not where they lie), so other data have another hash."""
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
    unchanged = load_recipe(protocol.config, architecture=backbone.architecture).recorded()
    # A head is another way of the same protocol, and the published one.
    if recipe.get("by") == "head":
        unchanged = load_recipe(
            protocol.config, architecture=backbone.architecture, overrides=("by=head", "head=given")
        ).recorded()
    images = recipe["images"]
    imagenet = (images["classes"], images["val"]) == (1000, 50_000) and images["train"] in _IMAGENET_TRAIN
    return imagenet and {key: value for key, value in recipe.items() if key in unchanged} == unchanged


def _classify(
    recipe: LinearRecipe | FinetuneRecipe,
    tensors: dict[str, Tensor],
    header: Backbone,
    train: LabelledImages,
    val: LabelledImages,
    *,
    seed: int,
    output: Path,
    resume: bool,
    gpus: int,
) -> EngineResult:
    """Linear and fine-tuning: one process a GPU, the recipe's total batch kept."""
    processes = max(gpus, 1)
    if recipe.batch_size % processes:
        raise UsageError(f"batch_size = {recipe.batch_size} does not divide over --gpus {gpus}.")
    if isinstance(recipe, LinearRecipe) and recipe.last_blocks > 1 and not header.is_vit:
        raise UsageError(
            f"last_blocks = {recipe.last_blocks} is for ViTs, and these weights are a {header.display_name}."
        )
    labelled = labelled_subset(train, recipe)
    recorded = recorded_recipe(recipe, labelled, val)
    weights = state_digest(network_of(header, tensors))
    identity = {"recipe": sha256_json(recorded), "seed": seed, "weights": weights}
    done = run_ranks(
        train_linear if isinstance(recipe, LinearRecipe) else train_finetune,
        (header, tensors, labelled, val, recipe, seed, output, identity, resume),
        processes=processes,
        device="cuda" if gpus else "cpu",
    )
    _clear_features(recipe, output)
    history = done["history"]
    last = history[-1]
    best = max((row for row in history if "top1_percent" in row), key=lambda row: row["top1_percent"])
    notes = [
        f"{len(labelled)} labelled images of {len(train)}; total batch {recipe.batch_size} on any number of GPUs.",
        f"Top-1 is the last epoch's; the best was {best['top1_percent']:.2f} in epoch {best['epoch'] + 1} of "
        f"{recipe.epochs} (TWIST's evaluate.py prints the best so far).",
    ]
    if "backbone" in done:
        notes.append(f"The frozen backbone is bit-equal before and after: state SHA-256 {done['backbone'][:16]}.")
    return EngineResult(
        metrics={name: last[name] for name in ("top1_percent", "top5_percent")},
        recipe=recorded,
        curves=output / CURVES,
        notes=notes,
    )


def _neighbours(
    recipe: NeighboursRecipe,
    tensors: dict[str, Tensor],
    header: Backbone,
    train: LabelledImages,
    val: LabelledImages,
    *,
    output: Path,
    device: torch.device,
) -> EngineResult:
    network = network_of(header, tensors).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with frozen(network) as digest:
        folder = output / "features"
        bank = extract(network, header, train, recipe, folder=folder, title="train features", device=device)
        queries = extract(network, header, val, recipe, folder=folder, title="val features", device=device)
    neighbours = min(recipe.neighbours, len(bank))
    blocks = plan_blocks(
        queries=len(queries),
        bank=len(bank),
        dimension=bank.dimension,
        neighbours=neighbours,
        max_memory_mb=recipe.machine.max_memory_mb,
    )
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
        temperature=recipe.temperature,
    )
    _clear_features(recipe, output)
    top1, top5 = top_percent(ranks)
    return EngineResult(
        metrics={"knn_top1_percent": top1, "knn_top5_percent": top5},
        recipe=recorded_recipe(recipe, train, val),
        media=[_neighbour_panel(output / "neighbours.png", train, val, index)],
        notes=[f"The frozen backbone is bit-equal before and after: state SHA-256 {digest[:16]}."],
    )


def _cluster(
    recipe: ClusterRecipe,
    tensors: dict[str, Tensor],
    header: Backbone,
    train: LabelledImages,
    val: LabelledImages,
    *,
    seed: int,
    output: Path,
    device: torch.device,
) -> EngineResult:
    # Here, because scikit-learn takes seconds to import and only this protocol needs it.
    from transfer.imagenet.cluster import cluster_metrics, kmeans

    network = network_of(header, tensors).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Before the features: a wrong checkpoint should be said at once.
    head = None
    if recipe.head is not None:
        head = read_head(Path(recipe.head), tensors, activation=recipe.head_activation)
    with frozen(network) as digest:
        folder = output / "features"
        held_out = extract(network, header, val, recipe, folder=folder, title="val features", device=device)
        found_on = held_out
        if head is None and recipe.fit_on == "train":
            found_on = extract(network, header, train, recipe, folder=folder, title="train features", device=device)
    if head is not None:
        classes = head.output.out_features
        blocks = range(0, len(held_out), recipe.machine.feature_batch_size)
        rows = (held_out.rows(start, start + recipe.machine.feature_batch_size) for start in blocks)
        assignment = torch.cat([head_classes(head, block) for block in rows]).numpy()
        how = f"TWIST's own head with {classes} outputs"
    else:
        clusters = recipe.clusters or len(train.classes)
        assignment = kmeans(found_on.mapped(), held_out.mapped(), clusters=clusters, recipe=recipe, seed=seed)
        how = f"k-means with {clusters} clusters, found on the {recipe.fit_on} images"
    _clear_features(recipe, output)
    return EngineResult(
        metrics=cluster_metrics(val.labels, assignment),
        recipe=recorded_recipe(recipe, train, val),
        media=[_cluster_panel(output / "clusters.png", val, assignment)],
        notes=[
            f"{how}; the {len(val)} validation images fall into {len(np.unique(assignment))} of them.",
            f"The frozen backbone is bit-equal before and after: state SHA-256 {digest[:16]}.",
        ],
    )


def _clear_features(recipe: AnyRecipe, output: Path) -> None:
    if not recipe.machine.keep_features:
        shutil.rmtree(output / "features", ignore_errors=True)


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
    return write_panel(path, rows, first_apart=True)


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
    return write_panel(path, rows)
