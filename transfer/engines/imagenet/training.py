"""Linear and fine-tuning protocols: one training loop, SGD on cross-entropy, cosine by epoch.

linear: on a frozen backbone, as TWIST's evaluate.py (ResNets) and DINO's probe (ViTs). finetune: at two rates, as
evaluate.py `--weights finetune`, with batch norm over groups of the size that its eight GPUs had.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twist.contracts import states
from twist.contracts.curves import CURVES, Curves
from twist.contracts.errors import UserError
from twist.contracts.failures import explained, raise_reported
from twist.contracts.files import sha256_json
from twist.contracts.pickles import read_state
from twist.contracts.progress import Progress
from twist.contracts.run_folder import refuse_other_run, refuse_second_start
from twist.contracts.weights import tensors_digest
from twist.measure.features import Batch, FeatureFile, autocast, frozen, network_inputs
from twist.measure.knn import label_ranks
from twist.transfer.engines.imagenet.recipes import START, TRAINING, ClassifierRecipe
from twist.transfer.engines.plain import FEATURES, Rank, decoded, epoch_batches, ordered_batches

if TYPE_CHECKING:
    from twist.transfer.engines.imagenet.engine import Setup

CHECKPOINT, LOG = "checkpoint.pth", "log.txt"
STATE = ("identity", "history", "model", "optimizer")
AGAIN = "start again in another folder (--output)"
METRICS = ("top1_percent", "top5_percent")
# Epochs on few features take milliseconds: at most so many seconds of them are trained again after a kill.
SAVE_EVERY_S = 10.0
# Validation images that are shown beside what was predicted for them.
PICTURED = 24


def log(output: Path, text: str) -> None:
    """Append `text` to the run's log, the time before each line."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    # Opened for each event: they are minutes apart, and a kill then loses none of them.
    with (output / LOG).open("a") as file:
        file.writelines(f"{now} {line}\n" for line in text.splitlines())


def run_ranks(work: Callable[..., Any], *arguments: Any, processes: int, device: str, output: Path) -> Any:
    """`work(rank, *arguments)` in `processes` processes on `device` ("cuda" or "cpu"); the first one's value (JSON)."""
    if processes == 1:
        with explained(memory=START):
            return work(Rank(device=torch.device(device)), *arguments)
    with tempfile.TemporaryDirectory(prefix="twist-ranks-") as folder:
        with raise_reported(output):
            mp.spawn(_process, args=(processes, device, folder, output, work, arguments), nprocs=processes)
        return json.loads((Path(folder) / "value.json").read_text())


def _process(
    index: int, count: int, device: str, folder: str, output: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    with explained(report=output, memory=START):
        if device == "cuda":
            torch.cuda.set_device(index)
        backend = "nccl" if device == "cuda" else "gloo"
        # A file as the meeting place: no port that another job on the machine may hold.
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=index, world_size=count)
        value = work(Rank(index, count, torch.device(f"cuda:{index}" if device == "cuda" else device)), *arguments)
        if index == 0:
            (Path(folder) / "value.json").write_text(json.dumps(value))
        dist.destroy_process_group()


# Index batches → a model's inputs with labels: of training images in an epoch, and of validation images.
TrainInputs = Callable[[Sequence[np.ndarray], int], Iterable[Batch]]
ValInputs = Callable[[Sequence[np.ndarray]], Iterable[Batch]]


def train_linear(
    rank: Rank, setup: Setup, val: FeatureFile, held: FeatureFile | None, train: FeatureFile | None
) -> dict[str, Any]:
    """What `Trainer.run` returns; without `train` the features of random crops are computed as they come."""

    def rows(file: FeatureFile, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        matrix = file.mapped()
        for chosen in batches:
            yield torch.from_numpy(matrix[chosen]).to(rank.device), file.labels[chosen].to(rank.device)

    def fit(train_inputs: TrainInputs) -> dict[str, Any]:
        new = partial(new_classifier, val.dimension, len(setup.train.classes), seed=setup.request.seed)
        parts = [new() for _ in setup.config.rates]
        model: nn.Module = parts[0] if held is None else Classifiers(parts)
        chosen_on = None if held is None else partial(rows, held)
        return Trainer(model, parts, train_inputs, partial(rows, val), chosen_on, rank=rank, setup=setup).run()

    if train is not None:
        return fit(lambda batches, _: rows(train, batches))
    extractor = setup.extractor(rank.device)
    with frozen(extractor.network):
        return fit(lambda batches, epoch: extractor.batches(setup.crops(batches, epoch, rank.device)))


def train_finetune(rank: Rank, setup: Setup) -> dict[str, Any]:
    """What `Trainer.run` returns."""
    device, header = rank.device, setup.weights.header
    backbone = setup.extractor(device)
    classifier = new_classifier(backbone.dimension, len(setup.train.classes), seed=setup.request.seed)
    normalise_in_groups(backbone.network, (setup.config.groups or rank.count) // rank.count)
    return Trainer(
        nn.Sequential(backbone.network, classifier),
        [classifier, backbone.network],
        lambda batches, epoch: network_inputs(setup.crops(batches, epoch, device), header, device),
        lambda batches: network_inputs(decoded(setup.val, setup.config, batches, device=device), header, device),
        rank=rank,
        setup=setup,
    ).run()


def new_classifier(dimension: int, classes: int, *, seed: int) -> nn.Linear:
    """Weights from N(0, 0.01), bias zero (TWIST's evaluate.py), drawn from `seed` alone."""
    classifier = nn.Linear(dimension, classes)
    with torch.no_grad():
        classifier.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        classifier.bias.zero_()
    return classifier


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """torch's, but in training each of `groups` equal parts of the batch has statistics of its own.

    The running ones follow the first part, as the published code's follow its first GPU, whose buffers torch's
    data-parallel wrapper sends to the others.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, *others = x.chunk(self.groups)
        batch_norm = partial(F.batch_norm, weight=self.weight, bias=self.bias, training=True, eps=self.eps)
        normalised = [batch_norm(part, running_mean=None, running_var=None) for part in others]
        return torch.cat([super().forward(first), *normalised])


def normalise_in_groups(network: nn.Module, groups: int) -> None:
    """Split the batch of every batch norm of `network`; parameters and names in the state dict stay."""
    for module in network.modules() if groups > 1 else ():
        if type(module) is nn.BatchNorm2d:
            module.__class__, module.groups = GroupedBatchNorm2d, groups  # type: ignore[assignment]


class Classifiers(nn.ModuleList):
    """Linear classifiers of the same features: (B, D) → (B, G, K), one matrix product for all."""

    def forward(self, rows: Tensor) -> Tensor:
        weight, bias = (torch.cat([getattr(one, name) for one in self]) for name in ("weight", "bias"))
        return F.linear(rows, weight, bias).view(len(rows), len(self), -1)


class Trainer:
    """Trains `model`, from inputs to class scores (B, K), or (B, G, K) of G classifiers that learn apart.

    Its `parts` have the recipe's `rates`, in their order. `held` are the inputs of images that none of them trains on:
    the classifier that is best there is the one whose accuracy counts.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[nn.Module], train: TrainInputs, val: ValInputs,
        held: ValInputs | None = None, *, rank: Rank, setup: Setup,
    ) -> None:  # fmt: skip
        self.model, self.train, self.val, self.held, self.rank = model.to(rank.device), train, val, held, rank
        self.setup, self.recipe, self.path = setup, setup.config, setup.request.output / CHECKPOINT
        self.optimizer = torch.optim.SGD(
            [{"params": [*part.parameters()]} for part in parts],
            lr=self.recipe.lr_classifier,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )
        # What a checkpoint must agree with to be continued.
        weights = tensors_digest(setup.weights.tensors)
        self.identity = {"recipe": sha256_json(setup.recipe), "seed": setup.request.seed, "weights": weights}
        self.saved = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Train to the last epoch, from the checkpoint where there is one; `eval_only` measures the stored model."""
        history = self._restore()
        if not self.setup.request.eval_only:
            self._train(history)
        measured = self._evaluate() if self.setup.request.eval_only else history[-1]
        metrics, count = {name: measured[name] for name in METRICS}, len(self.setup.val)
        shown = np.linspace(0, count - 1, num=min(PICTURED, count), dtype=int)  # as `LabelledImages.spread`
        ((scores, _),) = self._scores(self.val([shown]))
        chosen, held = self._choose()
        predicted = scores[:, chosen].argmax(dim=1).tolist()
        return {"history": history, "metrics": metrics, "predicted": predicted, "held": held, "chosen": chosen}

    def _train(self, history: list[dict[str, Any]]) -> None:
        """Train the epochs that `history` lacks, and add a row for each."""
        recipe, rank = self.recipe, self.rank
        steps = -(-len(self.setup.labelled) // recipe.batch_size)
        cosine = CosineParamScheduler(1.0, 0.0)
        model: nn.Module = self.model
        if rank.count > 1:
            model = DistributedDataParallel(model, device_ids=[rank.index] if rank.device.type == "cuda" else None)
        request = self.setup.request
        total, start, quiet = recipe.epochs * steps, len(history) * steps, rank.index > 0
        curves = None
        if not quiet:
            board, logger = request.output / "tensorboard", request.controls.logger
            curves = Curves(request.output / CURVES, start=start + 1, board=board, logger=logger)
        with (
            Progress(recipe.kind, total=total, start=start, quiet=quiet, unit="step") as progress,
            contextlib.closing(curves) if curves else contextlib.nullcontext(),
        ):
            for epoch in range(len(history), recipe.epochs):
                rates = {name: peak * cosine(epoch / recipe.epochs) for name, peak in recipe.rates.items()}
                for group, rate in zip(self.optimizer.param_groups, rates.values(), strict=True):
                    group["lr"] = rate
                values = {**self._train_epoch(model, epoch, progress), **rates}
                if not math.isfinite(values["loss"]):
                    raise UserError(f"The training diverged in epoch {epoch}: lower {' or '.join(rates)}.")
                if epoch + 1 == recipe.epochs or (epoch + 1) % recipe.machine.evaluate_every_epochs == 0:
                    values |= self._evaluate()
                step = (epoch + 1) * steps
                history.append({"epoch": epoch, "step": step, **values})
                if curves is not None:
                    # Before the checkpoint, so that a kill between them loses no line: the epoch is then trained again.
                    numbers = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
                    log(request.output, f"epoch {epoch + 1}: {numbers}")
                    curves.add(step, {"epoch": epoch, **values})
                    curves.plot(step, values)
                    if epoch + 1 == recipe.epochs or time.monotonic() - self.saved >= SAVE_EVERY_S:
                        self._save(history)
                        self.saved = time.monotonic()

    def _train_epoch(self, model: nn.Module, epoch: int, progress: Progress) -> dict[str, float]:
        model.train()
        order = {"batch_size": self.recipe.batch_size, "seed": self.setup.request.seed, "epoch": epoch}
        batches = epoch_batches(len(self.setup.labelled), **order, rank=self.rank, groups=self.recipe.groups)
        began = time.monotonic()
        # Summed on the device: reading the loss at every step would make the GPU wait for the host.
        total = torch.zeros(2, dtype=torch.float64, device=self.rank.device)
        with explained(memory=TRAINING):
            for step, (inputs, labels) in enumerate(self.train(batches, epoch)):
                with autocast(self.recipe.precision, self.rank.device):
                    scores = model(inputs)
                losses = mean_losses(scores, labels)
                # Of a grid the best: the others may diverge.
                loss = losses.detach().nan_to_num(nan=math.inf, posinf=math.inf).min()
                self.optimizer.zero_grad(set_to_none=True)
                losses.sum().backward()
                self.optimizer.step()
                total += torch.stack([loss.double() * len(labels), loss.new_tensor(len(labels)).double()])
                progress.advance(1, **({"loss": loss.item()} if step % 20 == 0 else {}))
        if self.rank.count > 1:
            dist.all_reduce(total)
        loss_sum, count = total.tolist()
        return {"loss": loss_sum / count, "images_per_s": count / (time.monotonic() - began)}

    def _evaluate(self) -> dict[str, float]:
        """Top-1 and top-5 over every validation image once, whatever the number of processes."""
        if self.rank.count > 1:
            # Batch norm's running statistics are each process's own after the last step; the first one's count.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        chosen, _ = self._choose()
        return dict(zip(METRICS, self._accuracies(self.val, len(self.setup.val))[chosen], strict=True))

    def _choose(self) -> tuple[int, list[float]]:
        """The classifier that is best on the held-out images, and the top-1 of each there."""
        if self.held is None:
            return 0, []
        assert self.setup.held is not None
        top1 = [top1 for top1, _ in self._accuracies(self.held, len(self.setup.held))]
        return top1.index(max(top1)), top1

    def _accuracies(self, inputs: ValInputs, images: int) -> list[list[float]]:
        """Top-1 and top-5 of every classifier, over all processes."""
        batches = ordered_batches(images, batch_size=self.recipe.machine.feature_batch_size, rank=self.rank)
        hits = torch.zeros(1, 2, dtype=torch.float64, device=self.rank.device)
        for scores, labels in self._scores(inputs(batches)):
            count = scores.shape[1]
            diverged = ~scores.isfinite().all(dim=2, keepdim=True) & (count > 1)  # of a grid: hits nothing
            flat = scores.masked_fill(diverged, 0.0).flatten(0, 1)
            ranks = label_ranks(flat, labels.repeat_interleave(count)).view(-1, count)  # (B, G)
            ranks = ranks.masked_fill(diverged[..., 0], scores.shape[2])
            hits = hits + torch.stack([(ranks < 1).sum(0), (ranks < 5).sum(0)], dim=1)  # (G, 2)
        if self.rank.count > 1:
            dist.all_reduce(hits)
        accuracies: list[list[float]] = (100.0 * hits / images).tolist()
        return accuracies

    @torch.no_grad()
    def _scores(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """(scores (B, G, K) float32, labels (B,)) of each batch, in eval mode."""
        self.model.eval()
        with explained(memory=FEATURES):
            for inputs, labels in batches:
                with autocast(self.recipe.precision, self.rank.device):
                    scores = self.model(inputs)
                yield (scores if scores.ndim == 3 else scores[:, None]).float(), labels

    def _save(self, history: list[dict[str, Any]]) -> None:
        state = {"identity": self.identity, "history": history}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        states.save(self.path, lambda path: torch.save(state, path))

    def _restore(self) -> list[dict[str, Any]]:
        """The history in the checkpoint, loaded into model and optimizer; empty without one."""
        path = newest_state(self.path.parent, quiet=self.rank.index > 0)
        if path is None:
            return []
        if not (self.setup.request.resume or self.setup.request.eval_only):
            refuse_second_start(self.path.parent, {})
        state = read_state(path, *STATE, remedy=AGAIN)
        refuse_other_run(self.path.parent, state["identity"], self.identity)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return list(state["history"])


def mean_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """(G,) mean cross-entropy of each classifier of (B, G, K) scores, or of the one of (B, K)."""
    if scores.ndim == 2:
        return F.cross_entropy(scores.float(), labels)[None]
    flat = F.cross_entropy(scores.flatten(0, 1).float(), labels.repeat_interleave(scores.shape[1]), reduction="none")
    return flat.view(len(labels), -1).mean(dim=0)


def newest_state(output: Path, *, quiet: bool = False) -> Path | None:
    """The state to go on from, verified: see `states.newest`; `quiet` says nothing of damage."""
    return states.newest(output / CHECKPOINT, say=lambda text: None if quiet else print(text, file=sys.stderr))


def require_finished(output: Path, recipe: ClassifierRecipe) -> None:
    """Refuse to evaluate a run before its last epoch: what it has stored is a state that no protocol measures."""
    path = newest_state(output, quiet=True)  # mapped: only the history is looked at
    done = len(read_state(path, *STATE, remedy=AGAIN, mapped=True)["history"]) if path else 0
    if done < recipe.epochs:
        remedy = "--eval-only measures finished runs, so finish this one with --resume"
        raise UserError(f"{output} stands at epoch {done} of {recipe.epochs}: {remedy}.")
