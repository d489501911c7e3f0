"""The one training loop of the ImageNet protocols: SGD on cross-entropy, cosine by epoch, a checkpoint an epoch.

What is trained is a module from inputs to class scores: a linear layer over frozen features, or a backbone with a
linear layer. `B` images of one process, `K` classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twist.catalog.labelled import LabelledImages
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.failures import explained
from twist.contracts.progress import Progress
from twist.contracts.run_folder import refuse_other_run
from twist.contracts.weights import Backbone
from twist.transfer.engines.imagenet.accuracy import label_ranks
from twist.transfer.engines.imagenet.dataset import Batches
from twist.transfer.engines.imagenet.features import autocast
from twist.transfer.engines.imagenet.journal import Journal
from twist.transfer.engines.imagenet.processes import Rank
from twist.transfer.engines.imagenet.recipes import FEATURES, TRAINING, ClassifierRecipe, FinetuneRecipe, LinearRecipe

CHECKPOINT = "checkpoint.pth"
METRICS = ("top1_percent", "top5_percent")


# Validation images that are shown beside what was predicted for them.
PICTURED = 24


@dataclass(frozen=True)
class Job:
    """What every process of a run is given; `identity` is what makes this run this run.

    `train` are the images that have labels. With `eval_only` the stored model is measured and nothing is trained.
    """

    header: Backbone
    tensors: dict[str, Tensor]
    train: LabelledImages
    val: LabelledImages
    recipe: LinearRecipe | FinetuneRecipe
    seed: int
    output: Path
    identity: dict[str, Any]
    resume: bool = False
    eval_only: bool = False


@dataclass(frozen=True)
class Source:
    """Where batches of inputs and labels come from.

    Those of an epoch; all validation images of this process in order; and the `PICTURED` ones, which the first process
    takes alone.
    """

    epoch: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    validation: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    pictured: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    steps_per_epoch: int


def image_batches(rank: Rank, job: Job, recipe: ClassifierRecipe) -> tuple[Batches, Batches]:
    """This process's share of the images: random crops of those with labels, and the validation images in order."""
    share: dict[str, Any] = {"rank": rank.index, "world_size": rank.count, "pin_memory": rank.device.type == "cuda"}
    crops = Batches(job.train, recipe, batch_size=recipe.batch_size, augment=True, seed=job.seed, **share)
    return crops, Batches(job.val, recipe, batch_size=recipe.machine.feature_batch_size * rank.count, **share)


def new_classifier(dimension: int, classes: int, *, seed: int) -> nn.Linear:
    """Weights from N(0, 0.01), bias zero (TWIST's evaluate.py), drawn from `seed` alone."""
    classifier = nn.Linear(dimension, classes)
    with torch.no_grad():
        classifier.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        classifier.bias.zero_()
    return classifier


def train_classifier(
    model: nn.Module,
    rates: dict[str, tuple[float, Iterable[nn.Parameter]]],
    source: Source,
    recipe: ClassifierRecipe,
    *,
    rank: Rank,
    title: str,
    output: Path,
    identity: dict[str, Any],
    resume: bool,
    eval_only: bool = False,
) -> dict[str, Any]:
    """Train `model` to its last epoch, or with `eval_only` measure the finished one that is stored.

    Returns:
        `history`: one row an epoch with loss, rates and, where evaluated, accuracies; `metrics`: the accuracies at the
        end; `predicted`: class of each pictured image (none in processes other than the first).

    Args:
        rates: parameter groups, name → (learning rate, parameters).
        identity: what makes this run this run; a checkpoint with another one is refused.

    Raises:
        UserError: the checkpoint belongs to another run, there is one and `resume` was not given, there is none of a
            finished run to evaluate, the training diverged, or the GPU's memory is too small.
    """
    if eval_only:
        require_finished(output, recipe)
    model.to(rank.device)
    groups = [{"params": list(parameters), "lr": rate} for rate, parameters in rates.values()]
    optimizer = torch.optim.SGD(groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    history = _restore(output / CHECKPOINT, model, optimizer, identity=identity, resume=resume or eval_only)
    if eval_only:
        metrics = evaluate(model, source.validation(), recipe, rank)
    else:
        peaks = {name: rate for name, (rate, _) in rates.items()}
        for row in _epochs(
            model, optimizer, peaks, source, recipe, rank, done=len(history), title=title, output=output
        ):
            history.append(row)
            if rank.first:
                _save(output, model, optimizer, history, identity)
            rank.wait()
        metrics = {name: history[-1][name] for name in METRICS}
    predicted = predict(model, source.pictured(), recipe, rank) if rank.first else []
    return {"history": history, "metrics": metrics, "predicted": predicted}


def require_finished(output: Path, recipe: ClassifierRecipe) -> None:
    """Refuse to evaluate a run before its last epoch: what it has stored is a state that no protocol measures."""
    path = output / CHECKPOINT
    # Mapped: only the history is looked at.
    done = len(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["history"]) if path.exists() else 0
    if done < recipe.epochs:
        raise UserError(
            f"{output} stands at epoch {done} of {recipe.epochs}: --eval-only measures finished runs, so finish this "
            "one with --resume."
        )


def _epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    peaks: dict[str, float],
    source: Source,
    recipe: ClassifierRecipe,
    rank: Rank,
    *,
    done: int,
    title: str,
    output: Path,
) -> Iterator[dict[str, Any]]:
    """Train from epoch `done` to the last, a row an epoch; `peaks` are the groups' rates before the cosine."""
    cosine = CosineParamScheduler(1.0, 0.0)
    parallel: nn.Module = model
    if rank.count > 1:
        parallel = DistributedDataParallel(model, device_ids=[rank.index] if rank.device.type == "cuda" else None)
    steps = source.steps_per_epoch
    with (
        Progress(title, total=recipe.epochs * steps, start=done * steps, quiet=not rank.first, unit="step") as progress,
        Journal(output, done=done * steps, quiet=not rank.first) as journal,
    ):
        for epoch in range(done, recipe.epochs):
            shares = {name: rate * cosine(epoch / recipe.epochs) for name, rate in peaks.items()}
            for group, rate in zip(optimizer.param_groups, shares.values(), strict=True):
                group["lr"] = rate
            row = _train_epoch(parallel, optimizer, source.epoch(epoch), recipe, rank, progress)
            row = {"epoch": epoch, "step": (epoch + 1) * steps, **row, **{f"lr_{n}": r for n, r in shares.items()}}
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"The loss is {row['loss']} in epoch {epoch}: the training diverged; lower "
                    f"{' or '.join(f'lr_{name}' for name in peaks)}."
                )
            last = epoch + 1 == recipe.epochs
            if last or (epoch + 1) % recipe.machine.evaluate_every_epochs == 0:
                row |= evaluate(model, source.validation(), recipe, rank)
            # Before the checkpoint, so that a kill between them loses no line: the epoch is then done and said again.
            journal.epoch(row)
            yield row


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recipe: ClassifierRecipe, rank: Rank
) -> dict[str, float]:
    """Top-1 and top-5 over every validation image once, whatever the number of processes."""
    if rank.count > 1:
        # Batch norm's running statistics are each process's own after the last step; the first one's count.
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    model.eval()
    hits = torch.zeros(3, dtype=torch.float64, device=rank.device)
    with torch.no_grad(), explained(memory=FEATURES):
        for inputs, labels in batches:
            with autocast(recipe, rank.device):
                scores = model(inputs)
            ranks = label_ranks(scores.float(), labels)
            hits += torch.stack([(ranks < 1).sum(), (ranks < 5).sum(), torch.tensor(len(ranks), device=rank.device)])
    top1, top5, count = rank.sum(hits).tolist()
    return dict(zip(METRICS, (100.0 * top1 / count, 100.0 * top5 / count), strict=True))


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recipe: ClassifierRecipe, rank: Rank
) -> list[int]:
    """The class with the highest score of every input, in order."""
    model.eval()
    classes: list[int] = []
    with explained(memory=FEATURES):
        for inputs, _ in batches:
            with autocast(recipe, rank.device):
                scores = model(inputs)
            classes += scores.float().argmax(dim=1).tolist()
    return classes


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    recipe: ClassifierRecipe,
    rank: Rank,
    progress: Progress,
) -> dict[str, float]:
    model.train()
    began = time.monotonic()
    # Summed on the device: reading the loss at every step would make the GPU wait for the host.
    total = torch.zeros(2, dtype=torch.float64, device=rank.device)
    with explained(memory=TRAINING):
        for step, (inputs, labels) in enumerate(batches):
            with autocast(recipe, rank.device):
                scores = model(inputs)
            loss = F.cross_entropy(scores.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += torch.stack([loss.detach().double() * len(labels), loss.new_tensor(len(labels)).double()])
            progress.advance(1, **({"loss": loss.item()} if step % 20 == 0 else {}))
    loss_sum, count = rank.sum(total).tolist()
    return {"loss": loss_sum / count, "images_per_s": count / (time.monotonic() - began)}


def _save(
    output: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    identity: dict[str, Any],
) -> None:
    state = {
        "identity": identity,
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with files.atomic_path(output / CHECKPOINT) as temporary:
        torch.save(state, temporary)


def _restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, identity: dict[str, Any], resume: bool
) -> list[dict[str, Any]]:
    """The history in the checkpoint, loaded into model and optimizer; empty without one."""
    if not path.exists():
        return []
    if not resume:
        raise UserError(f"{path.parent} holds a run: go on with --resume, or choose another --output.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    refuse_other_run(path.parent, state["identity"], identity)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["history"])
