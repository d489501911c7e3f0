"""The ImageNet-style protocols: linear · semi-1pct, semi-10pct, finetune-100pct · knn · cluster, and sample twins."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from twist.catalog.class_folders import (
    SUBSETS,
    LabelledImages,
    TableImages,
    draw_subset,
    find_subset,
    open_tree,
    read_subset,
)
from twist.contracts import files
from twist.contracts.curves import CURVES
from twist.contracts.errors import UsageError, UserError
from twist.contracts.failures import explained
from twist.contracts.files import sha256_json
from twist.contracts.networks import network_of
from twist.contracts.pickles import read_state
from twist.contracts.weights import Backbone
from twist.converters.read import load_artefact
from twist.measure.features import Batch, Extractor, FeatureFile, centre_crop, frozen
from twist.measure.knn import top_percent, vote_ranks
from twist.transfer.engines import framework, plain
from twist.transfer.engines.imagenet import recipes, training
from twist.transfer.engines.imagenet.head import read_head
from twist.transfer.engines.imagenet.training import log
from twist.transfer.engines.plain import BIT_EQUAL, FEATURES, decoded, extract, search
from twist.transfer.pictures import cluster_sheet, neighbour_sheet, plot_losses, prediction_sheet
from twist.transfer.predict import Picture
from twist.transfer.recipe import departures
from twist.transfer.request import RANDOM_FILE, Request, Result, Weights

if TYPE_CHECKING:
    from twist.transfer.protocols import Protocol

# ILSVRC 2012's training images by which of them have labels: all, or the lines of SimCLR's lists.
_IMAGENET_TRAIN = {"all": 1_281_167, "10percent": 128_116, "1percent": 12_811}
_IMAGENET_VAL = 50_000
# Classes that a prediction shows.
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Setup(plain.Setup):
    """`labelled` are the training images whose labels the recipe may use, `held` those of them that a grid of rates is
    chosen on."""

    labelled: LabelledImages
    held: LabelledImages | None = None

    def extractor(self, device: torch.device) -> Extractor:
        """The network with its weights, as the recipe reads its features."""
        network = network_of(self.weights.header, self.weights.tensors)
        network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        blocks = getattr(self.config, "last_blocks", 1)
        return Extractor(network, self.weights.header, device, self.config.precision, blocks)

    def crops(self, batches: Sequence[np.ndarray], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Random crops of the labelled images."""
        return decoded(self.labelled, self.config, batches, device=device, crops=(self.request.seed, epoch))


def resolve(request: Request, weights: Weights) -> Setup:
    """Recipe, images and plan of a request; nothing is built and nothing is written."""
    protocol, header, processes = request.protocol, weights.header, max(request.gpus, 1)
    if request.controls.iterations or request.controls.nodes > 1:
        raise UserError(f"{protocol.name} is counted in epochs on one machine: iterations and nodes are no keys of it.")
    config: Any = recipes.load_recipe(protocol.config, architecture=header.architecture, overrides=request.overrides)
    if getattr(config, "last_blocks", 1) > 1 and not header.is_vit:
        raise UsageError(f"last_blocks = {config.last_blocks} is for ViTs, not for a {header.display_name}.")
    own = request.own
    train, val = (own.labelled["train"], own.labelled["val"]) if own and own.labelled else open_tree(request.data)
    labelled, warnings = train, []
    trained = isinstance(config, recipes.ClassifierRecipe)
    if trained:
        # The published lists name files: of a card's images without them, and of rows in tables, a subset is drawn.
        if isinstance(train, TableImages) or (own is not None and listed_labels(train, config) is None):
            config = config.model_copy(update={"labels_from": "seed"} if config.labels != "all" else {})
        labelled = labelled_subset(train, config)
        warnings = batch_warnings(config, len(labelled), processes=processes)
    recipe = recorded_recipe(config, labelled, val)
    changed = changes(protocol, header, recipe)
    reduced = bool(changed) or not is_imagenet(recipe)
    if own is None and protocol.scale == "full" and len(train.classes) == 1000 and not is_imagenet(recipe):
        changed.append(f"{len(train)} + {len(val)} images are not ImageNet's: see `twist data check imagenet`")
    notes = (*([own.summary()] if own is not None else []), *warnings, *changed)
    where = f"{request.gpus} GPU{'s' * (request.gpus > 1)}" if request.gpus else "1 process on the CPU"
    how = _plan(config, train, labelled, val, processes=processes)
    if trained and request.eval_only:
        how = " → the stored weights are evaluated, nothing is trained\n  "
    plan = f"plan: {where}{how}{len(val)} validation images of {len(val.classes)} classes at {config.size} pixels"
    held = None
    if getattr(config, "rate_factors", ()):
        chosen = np.arange(len(labelled)) % config.holdout_every == config.holdout_every - 1
        if not chosen.any():
            raise UserError(
                f"{len(labelled)} labelled images leave none to choose the rate on: pass a smaller holdout_every."
            )
        labelled, held = labelled.only(np.flatnonzero(~chosen)), labelled.only(np.flatnonzero(chosen))
    images: Any = {"train": train, "val": val, "labelled": labelled, "held": held}
    given: Any = {"request": request, "weights": weights, **images}
    return Setup(config, recipe, "\n".join([plan, *notes]), reduced, notes, **given)


def labelled_subset(train: LabelledImages, recipe: recipes.ClassifierRecipe) -> LabelledImages:
    """The training images that have labels under `recipe`; `UserError` for a list that is missing or wrong."""
    if recipe.labels == "all":
        return train
    list_name, share = SUBSETS[recipe.labels]
    if recipe.labels_from == "seed":
        return draw_subset(train, share, seed=recipe.labels_seed)
    path = listed_labels(train, recipe)
    if path is None:
        raise UserError(
            f"There is no {list_name} in {train.folder.parent}: write it with `twist data prepare imagenet`, or draw a "
            "class-balanced subset with labels_from=seed, which is another recipe."
        )
    return read_subset(train, path)


def listed_labels(train: LabelledImages, recipe: recipes.ClassifierRecipe) -> Path | None:
    """The list of labelled images beside the training images, where `recipe` wants one and it is there."""
    return None if recipe.labels == "all" else find_subset(train.folder.parent, SUBSETS[recipe.labels][0])


def batch_warnings(config: Any, images: int, *, processes: int) -> list[str]:
    """Where a step would see fewer images than its rates are meant for, a sentence with overrides that fit."""
    size, groups = config.batch_size, config.groups
    if size % processes or (groups and groups % processes):
        of_norm = f" in {groups} groups of batch norm" if groups else ""
        raise UsageError(f"batch_size = {size}{of_norm} does not divide over --gpus {processes}: take fewer GPUs.")
    last = -(-(images % size or size) // (groups or processes))
    # Where the last map is one pixel, as a ResNet's is up to 32 pixels.
    if config.kind == "finetune" and config.size <= 32 and last == 1:
        raise UsageError(
            f"{images} images in batches of {size} leave a last batch of one image for batch norm, which has no "
            "statistics of it at this size: choose another batch_size."
        )
    if size <= images:
        return []
    fitting = max(images - images % processes, processes)
    # In proportion to the batch: Goyal et al. 2017, arXiv 1706.02677.
    fit = " ".join(f"{name}={rate * fitting / size:.3g}" for name, rate in config.rates.items())
    return [
        f"warning: batch_size {size} is more than the {images} labelled images: batch_size={fitting} {fit} would fit"
    ]


def _plan(config: Any, train: LabelledImages, labelled: LabelledImages, val: LabelledImages, *, processes: int) -> str:
    """What is measured, and on how many images, up to the validation images."""
    if isinstance(config, recipes.ClassifierRecipe):
        steps, batch = -(-len(labelled) // config.batch_size), min(config.batch_size, len(labelled))
        rates = ", ".join(f"{name} {rate:g}" for name, rate in config.rates.items())
        norm = f", batch norm over {batch / config.groups:g} images" if config.groups else ""
        return (
            f"\n  images a step {batch} ({batch / processes:g} a process), {rates}, {config.epochs} epochs of {steps} "
            f"step{'s' * (steps > 1)}{norm}\n  {len(labelled)} labelled images of {len(train)}; "
        )
    if config.kind == "knn":
        how = f"the {min(config.neighbours, len(train))} nearest of {len(train)} training images vote"
    elif config.by == "head":
        how = f"TWIST's own head of {config.head}"
    else:
        how = f"k-means ({config.algorithm}), {config.clusters or len(val.classes)} clusters on {config.fit_on} images"
    return f" → {how}\n  "


def recorded_recipe(config: Any, train: LabelledImages, val: LabelledImages) -> dict[str, Any]:
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


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(request: Request, weights: Weights, setup: Setup) -> Result:  # noqa: ARG001 (they are in `setup`)
    """Measure the weights as resolved, with `resume` from the last finished epoch of a training."""
    config, output, classes = setup.config, request.output, len(setup.train.classes)
    output.mkdir(parents=True, exist_ok=True)
    # With the machine's part, which the record leaves out: what to type again.
    whole = {"config": request.protocol.config, **config.model_dump(mode="json"), "images": setup.recipe["images"]}
    files.write_json(output / "recipe.json", whole)
    log(output, setup.plan)
    try:
        if isinstance(config, recipes.ClassifierRecipe) and request.eval_only:
            training.require_finished(output, config)  # before features are extracted
        finetunes = config.kind == "finetune"
        result = _classify(setup, training.train_finetune) if finetunes else _on_frozen_features(setup)
    except Exception as error:
        log(output, f"stopped: {error}")
        raise
    log(output, "result: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))
    notes = [*result.notes, *setup.notes]
    if classes <= 5 and any("top5" in name for name in result.metrics):
        notes.append(f"Top-5 of {classes} classes is 100 whatever the weights: it says nothing here.")
    return replace(result, notes=notes)


_Features = Callable[[str], FeatureFile]  # of the images of a split: "train", "val" or "held"


def _on_frozen_features(setup: Setup) -> Result:
    """Linear probe, k-NN and clusters: features of a backbone that is proven not to change, then what reads them."""
    shared = setup.request.controls.shared
    folder = (Path(shared) if shared else setup.request.output) / "features"
    with explained(memory=recipes.START):
        extractor = setup.extractor(setup.device)

        def features(split: str) -> FeatureFile:
            images = getattr(setup, {"train": "labelled"}.get(split, split))
            return extract(extractor, images, setup.config, folder=folder, title=f"{split} features")

        with frozen(extractor.network) as digest:
            measure = {"linear": _linear, "knn": _neighbours, "cluster": _clusters}[setup.config.kind]
            result = measure(setup, features)
    if not (setup.config.machine.keep_features or shared):
        shutil.rmtree(folder, ignore_errors=True)
    return replace(result, notes=[*result.notes, BIT_EQUAL.format(digest)], loaded=digest)


def _linear(setup: Setup, features: _Features) -> Result:
    train = None if setup.config.augment or setup.request.eval_only else features("train")
    held = features("held") if setup.held is not None else None
    return _classify(setup, training.train_linear, features("val"), held, train)


def _classify(setup: Setup, work: Callable[..., Any], *arguments: Any) -> Result:
    """A classifier trained by `work(rank, setup, *arguments)`: one process a GPU, the recipe's total batch kept."""
    config, request, output = setup.config, setup.request, setup.request.output
    processes, device = max(request.gpus, 1), setup.device.type
    done = training.run_ranks(work, setup, *arguments, processes=processes, device=device, output=output)
    given = {"file": str(request.checkpoint or RANDOM_FILE), "sha256": request.sha256, "reading": request.reading}
    kept = {"classes": list(setup.train.classes), "chosen": done["chosen"], "weights": given}
    framework.leave(output, header=setup.weights.header.model_dump(mode="json"), **kept)
    history = done["history"]
    best = max((row for row in history if "top1_percent" in row), key=lambda row: row["top1_percent"])
    images = f"{len(setup.labelled)} labelled images of {len(setup.train)}"
    notes = [
        f"{images}; total batch {config.batch_size} on any number of GPUs.",
        f"Top-1 is the last epoch's; the best was {best['top1_percent']:.2f} in epoch {best['epoch'] + 1} of "
        f"{config.epochs} (TWIST's evaluate.py prints the best so far).",
    ]
    if setup.held is not None:
        rates, of = [*config.rates.values()], ", ".join(f"{top1:.1f}" for top1 in done["held"])
        notes.append(
            f"Learning rate {rates[done['chosen']]:g} of {len(rates)} ({', '.join(f'{rate:g}' for rate in rates)}), "
            f"chosen on {len(setup.held)} held-out training images (top-1 of each: {of})."
        )
    if request.eval_only:
        end = f"at the end of the training top-1 was {history[-1]['top1_percent']:.2f}"
        notes.append(f"Evaluated from the stored weights, nothing was trained; {end}.")
    media = [
        prediction_sheet(output / "predictions.png", setup.val.spread(training.PICTURED), done["predicted"]),
        plot_losses(output / CURVES, output / "losses.png", title=request.protocol.name),
    ]
    return Result(done["metrics"], setup.recipe, media, curves=output / CURVES, notes=notes)


def _neighbours(setup: Setup, features: _Features) -> Result:
    config, bank, queries = setup.config, features("train"), features("val")
    with explained(memory=recipes.SEARCH):
        device = setup.device if setup.request.gpus else None
        similarity, index = (
            one.cpu() for one in search(queries, bank, config.neighbours, config.machine, device=device)
        )
    classes, labels = len(setup.train.classes), (bank.labels, queries.labels)
    ranks = vote_ranks(similarity, index, *labels, classes=classes, temperature=config.temperature)
    media = [neighbour_sheet(setup.request.output / "neighbours.png", setup.train, setup.val, index)]
    return Result({f"knn_top{k}_percent": top_percent(ranks, k) for k in (1, 5)}, setup.recipe, media)


def _clusters(setup: Setup, features: _Features) -> Result:
    # Here, because scikit-learn takes seconds to import and only this protocol needs it.
    from twist.measure.clusters import cluster_metrics, kmeans

    config = setup.config
    if config.head is not None:
        # Before the features: a wrong checkpoint should be said at once.
        head = read_head(Path(config.head), setup.weights.tensors, activation=config.head_activation)
        rows, size = features("val"), config.machine.feature_batch_size
        with explained(memory=FEATURES), torch.no_grad():
            blocks = (rows[start : start + size] for start in range(0, len(rows), size))
            assignment = torch.cat([head(block).argmax(dim=1) for block in blocks]).numpy()
        how = f"TWIST's own head with {head.output.out_features} outputs"
    else:
        rows, fit_on = features("val"), features(config.fit_on)
        clusters = config.clusters or len(setup.train.classes)
        settings = config.model_dump(include={"algorithm", "restarts", "max_passes", "step_size", "normalise"})
        with explained(memory="take algorithm=minibatch restarts=1 and a small step_size"):
            asked = {**settings, "clusters": clusters, "seed": setup.request.seed}
            assignment = kmeans(fit_on.mapped(), rows.mapped(), **asked)
        how = f"k-means with {clusters} clusters, found on the {config.fit_on} images"
    return Result(
        metrics=cluster_metrics(setup.val.labels, assignment),
        recipe=setup.recipe,
        media=[cluster_sheet(setup.request.output / "clusters.png", setup.val, assignment)],
        notes=[f"{how}; the {len(setup.val)} validation images fall into {len(np.unique(assignment))} of them."],
    )


@torch.no_grad()
def predict(run: Path, pictures: Iterable[Picture], output: Path) -> dict[str, Any]:  # noqa: ARG001 (nothing is drawn)
    """The best classes of each picture with their probabilities, by a finished linear or fine-tuning run."""
    told, recipe = framework.evaluation(run), files.read_json(run / "recipe.json")
    if recipe["kind"] not in ("linear", "finetune"):
        raise UserError(f"{recipe['config']} trains no classifier: use a linear or semi-supervised run.")
    if "classes" not in told:
        raise UserError(f"{run} is of an earlier version, which did not note its classes: measure it with --eval-only.")
    path = training.newest_state(run)
    if path is None:
        raise UserError(f"{run} holds no {training.CHECKPOINT}: put it back, or run the protocol again.")
    state = read_state(path, *training.STATE, remedy="run the protocol again")["model"]
    header, given = Backbone.model_validate(told["header"]), told["weights"]
    if recipe["kind"] == "finetune":  # the backbone, then the classifier
        prefix, tensors = "1.", {name[2:]: value for name, value in state.items() if name.startswith("0.")}
    else:  # a frozen backbone is not copied: it is read from the file that the run was given
        file = run / given["file"]  # relative only where it lies in the run folder
        if not file.is_file() or given["sha256"] not in (None, files.sha256_file(file)):
            raise UserError(f"{file}, whose features the classifier reads, is gone or another file: put it back.")
        prefix = f"{told['chosen']}." if recipe["rate_factors"] else ""
        tensors, _ = load_artefact(file, **given["reading"])
    weight, bias = (state[f"{prefix}{name}"] for name in ("weight", "bias"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network_of(header, tensors).to(device).eval()
    extractor = Extractor(network, header, device, recipe["precision"], recipe.get("last_blocks", 1))
    view = centre_crop(**{name: recipe[name] for name in ("size", "resize", "interpolation")})
    images = []
    for _, path, pixels in pictures:
        ((rows, _),) = extractor.batches([(view(pixels)[None], torch.zeros(1))])
        scores = F.linear(rows.cpu(), weight, bias)[0].softmax(0)
        best = zip(*(part.tolist() for part in scores.topk(min(_SHOWN, len(scores)))))
        classes = [{"name": told["classes"][place], "score": score} for score, place in best]
        images.append({"file_name": str(path), "classes": classes})
    return {"classes": told["classes"], "images": images}
