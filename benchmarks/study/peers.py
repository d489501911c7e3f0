"""MoCo v2, BYOL and SimSiam on the budget of a TWIST config: lightly's modules, losses and transforms, one small loop.

    python -m benchmarks.study.peers moco-v2|byol|simsiam CONFIG.toml [section.key=value …] --output FOLDER
        [--optimizer adamw|sgd] [--lr LR]

CONFIG is a `twist pretrain` config. Its images are read as that reads them, and from it comes also what a comparison
must hold equal: images, epochs, batch, network, sizes and scales of the crops, blur, greyscale, precision, warm-up,
seed. From lightly come views, heads, losses and the momentum update, put together as its benchmark for small data sets
does (lightly @0068ac35,
`docs/source/getting_started/benchmarks/imagenette_benchmark.py`); what differs from there is said where it stands.

FOLDER/checkpoint.pth holds a `state_dict` with the names of that benchmark, which `twist convert` reads. At the end the
same reader makes FOLDER/backbone.safetensors of it, whose header says the recipe, the seed and the images, as a TWIST
run's does: so that seeds of one recipe are known as repeats. A run that was stopped goes on from its last checkpoint
(an epoch's end, a minute before or two) when the same command is given again. `B` images, two views each.
"""

import argparse
import hashlib
import io
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
)
from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    MoCoV2Transform,
    SimSiamTransform,
)
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from twist.contracts import files
from twist.contracts.config import load_config
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.contracts.networks import build_backbone
from twist.contracts.progress import Progress
from twist.contracts.run_folder import locked
from twist.contracts.weights import write_backbone
from twist.converters.read import load_artefact
from twist.pretrain.checkpoint import recipe_hash
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data.source import open_images
from twist.pretrain.plan import autocast, warmup_epochs, warmup_then_cosine

# Of the moving average; a smaller one than for ImageNet, because runs are short (lightly's benchmark).
MOMENTUM = 0.99
# Keys that MoCo compares with. The benchmark's 4096 would hold every image of a few thousand several times, as its own
# negative; these are the last eight batches of 64.
QUEUE = 1024
TEMPERATURE = 0.2  # MoCo v2, arXiv 2003.04297
# MoCo's batch norms see a GPU's share of a shuffled batch, so that a key cannot be told by its batch's statistics
# (arXiv 1911.05722, section 3.3). One device plays this many GPUs.
SHUFFLED_GROUPS = 2
# lr is before scaling with batch / 256. SGD's are lightly's benchmark's.
OPTIMIZERS = {"sgd": {"lr": 0.06, "weight_decay": 5e-4}, "adamw": {"lr": 0.004, "weight_decay": 1e-4}}


# A checkpoint is a quarter of a gigabyte: on a GPU writing one after each epoch would take longer than the epoch.
SAVE_EVERY_S = 60.0

# What the loss compares: (of the trained network, of its moving average), once for each view.
Pairs = list[tuple[Tensor, Tensor]]


class MoCoV2(nn.Module):
    """Query and key encoders with lightly's head and loss. Both views are queries, as in MoCo's own small demo."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.backbone = build_backbone(architecture)
        features: int = self.backbone.num_features  # type: ignore[assignment]
        self.projection_head = MoCoProjectionHead(features, features, 128)
        self.backbone_momentum = build_backbone(architecture)
        self.projection_head_momentum = MoCoProjectionHead(features, features, 128)
        _start_as_copy(self.backbone_momentum, self.backbone)
        _start_as_copy(self.projection_head_momentum, self.projection_head)
        self.criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(QUEUE, 128))

    def forward(self, first: Tensor, second: Tensor) -> Pairs:
        update_momentum(self.backbone, self.backbone_momentum, MOMENTUM)
        update_momentum(self.projection_head, self.projection_head_momentum, MOMENTUM)
        return [(self._queries(q), self._keys(k)) for q, k in ((first, second), (second, first))]

    def _queries(self, views: Tensor) -> Tensor:
        return self.projection_head(_in_groups(self.backbone, views))  # (B, 128)

    @torch.no_grad()
    def _keys(self, views: Tensor) -> Tensor:
        shuffled, order = batch_shuffle(views)
        keys = self.projection_head_momentum(_in_groups(self.backbone_momentum, shuffled))
        return batch_unshuffle(keys, order)  # (B, 128)


class BYOL(nn.Module):
    """Online and target networks with lightly's heads and loss, symmetric in the views."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.backbone = build_backbone(architecture)
        features: int = self.backbone.num_features  # type: ignore[assignment]
        self.projection_head = BYOLProjectionHead(features, 4096, 256)
        self.prediction_head = BYOLPredictionHead(256, 4096, 256)
        self.backbone_momentum = build_backbone(architecture)
        self.projection_head_momentum = BYOLProjectionHead(features, 4096, 256)
        _start_as_copy(self.backbone_momentum, self.backbone)
        _start_as_copy(self.projection_head_momentum, self.projection_head)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, first: Tensor, second: Tensor) -> Pairs:
        update_momentum(self.backbone, self.backbone_momentum, MOMENTUM)
        update_momentum(self.projection_head, self.projection_head_momentum, MOMENTUM)
        online = [self.prediction_head(self.projection_head(self.backbone(view))) for view in (first, second)]
        with torch.no_grad():
            target = [self.projection_head_momentum(self.backbone_momentum(view)) for view in (first, second)]
        return [(online[0], target[1]), (online[1], target[0])]  # each (B, 256)


class SimSiam(nn.Module):
    """One network with lightly's heads and loss; the other view's projection is taken without its gradient."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.backbone = build_backbone(architecture)
        features: int = self.backbone.num_features  # type: ignore[assignment]
        self.projection_head = SimSiamProjectionHead(features, 2048, 2048)
        self.prediction_head = SimSiamPredictionHead(2048, 512, 2048)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, first: Tensor, second: Tensor) -> Pairs:
        projected = [self.projection_head(self.backbone(view)) for view in (first, second)]
        online = [self.prediction_head(one) for one in projected]
        return [(online[0], projected[1].detach()), (online[1], projected[0].detach())]  # each (B, 2048)


METHODS: dict[str, type[MoCoV2 | BYOL | SimSiam]] = {"moco-v2": MoCoV2, "byol": BYOL, "simsiam": SimSiam}


def _start_as_copy(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
    deactivate_requires_grad(target)


def _in_groups(network: nn.Module, views: Tensor) -> Tensor:
    return torch.cat([network(group) for group in views.chunk(SHUFFLED_GROUPS)])


def transform_of(method: str, config: PretrainConfig) -> Callable[[Image.Image], list[Tensor]]:
    """lightly's views of the method, with the crops, blur and greyscale of `config` where that states them."""
    views = config.views
    if views.local_count or views.global_scale[1] != 1:
        raise UserError("The peers take two views with crops up to the whole image: set views.local_count = 0.")
    shared: dict[str, Any] = {"input_size": views.global_size, "min_scale": views.global_scale[0]}
    if views.blur_sigma is not None:
        shared["sigmas"] = views.blur_sigma
    if views.grey_probability is not None:
        shared["random_gray_scale"] = views.grey_probability
    transform: Callable[[Image.Image], list[Tensor]] = {
        "moco-v2": lambda: MoCoV2Transform(**shared),
        "byol": lambda: BYOLTransform(BYOLView1Transform(**shared), BYOLView2Transform(**shared)),
        "simsiam": lambda: SimSiamTransform(**shared),
    }[method]()
    return transform


def train(
    method: str, config: PretrainConfig, output: Path, *, optimizer: str = "sgd", lr: float | None = None
) -> Path:
    """Train, one epoch after the other, and return backbone.safetensors; goes on from what is there.

    Raises:
        UserError: there are too few images, or the folder holds another run.
    """
    run = {
        "method": method,
        "recipe": recipe_hash(config),
        "seed": config.run.seed,
        "optimizer": optimizer,
        "lr": lr,
    }
    settings = OPTIMIZERS[optimizer]
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    _seed(config.run.seed)
    model = METHODS[method](config.model.backbone).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    learner = _optimizer(optimizer, [p for p in model.parameters() if p.requires_grad], settings["weight_decay"])
    images = _Views(config, transform_of(method, config))
    batch = config.run.batch_size
    steps_per_epoch = len(images) // batch
    if not steps_per_epoch:
        raise UserError(f"{config.data.root} has {len(images)} images, fewer than a batch of {batch}.")
    base = (settings["lr"] if lr is None else lr) * batch / 256
    schedule = {"warmup_steps": warmup_epochs(config) * steps_per_epoch, "steps": config.run.epochs * steps_per_epoch}

    path = output / "checkpoint.pth"
    start, seconds = _restore(path, run, model, learner)
    batches, saved = iter(_loader(images, config, first_epoch=start)), time.perf_counter()
    with Progress(method, total=schedule["steps"], unit="step", start=start * steps_per_epoch) as progress:
        for epoch in range(start, config.run.epochs):
            began = time.perf_counter()
            for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
                first, second = next(batches)
                torch.manual_seed(_seed_of(config, step))  # MoCo shuffles, with any number of workers in the same way
                rate = warmup_then_cosine(step, base=base, end=1e-3 * base, **schedule)
                for group in learner.param_groups:
                    group["lr"] = rate
                with autocast(device, config.run.precision):
                    pairs = model(_to(first, device), _to(second, device))
                loss = torch.stack([model.criterion(a.float(), b.float()) for a, b in pairs]).mean()
                learner.zero_grad()
                loss.backward()
                learner.step()
                progress.advance(loss=loss.item(), lr=rate)
            seconds += time.perf_counter() - began
            if epoch + 1 == config.run.epochs or time.perf_counter() - saved > SAVE_EVERY_S:
                _save(path, run, model, learner, epoch=epoch + 1, seconds=seconds)
                saved = time.perf_counter()
    return _write_backbone(path, run, config)


class _Views(Dataset[list[Tensor]]):
    """The views of (epoch, image), drawn from these two and the seed alone: the same with any number of workers, and
    in a run that goes on."""

    def __init__(self, config: PretrainConfig, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images, self.transform, self.seed = open_images(config.data), transform, config.run.seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> list[Tensor]:
        _seed(int.from_bytes(hashlib.sha256(repr((self.seed, *key)).encode()).digest()[:8]))
        with Image.open(io.BytesIO(self.images.encoded(key[1]))) as image:
            return self.transform(image.convert("RGB"))


def _loader(images: _Views, config: PretrainConfig, *, first_epoch: int) -> DataLoader[list[Tensor]]:
    """Batches of all epochs that are left, one after the other, so that no epoch waits for workers to start."""
    workers, batch = config.data.workers, config.run.batch_size

    def orders() -> Iterator[list[tuple[int, int]]]:
        for epoch in range(first_epoch, config.run.epochs):
            order = np.random.default_rng(_seed_of(config, epoch)).permutation(len(images)).tolist()
            for first in range(0, len(order) - batch + 1, batch):
                yield [(epoch, index) for index in order[first : first + batch]]

    return DataLoader(images, batch_sampler=orders(), num_workers=workers, worker_init_fn=_one_thread)  # type: ignore[arg-type]


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _seed_of(config: PretrainConfig, number: int) -> int:
    return config.run.seed * 1_000_003 + number


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _write_backbone(path: Path, run: dict[str, Any], config: PretrainConfig) -> Path:
    tensors, header = load_artefact(path)
    said = {
        "method": run["method"],
        "epochs": config.run.epochs,
        "config_hash": sha256_json([run["method"], run["optimizer"], run["lr"], run["recipe"]]),
        "seed": config.run.seed,
        "images_sha256": open_images(config.data).fingerprint(),
    }
    return write_backbone(path.with_name("backbone.safetensors"), tensors, header.model_copy(update=said))


def _to(views: Tensor, device: torch.device) -> Tensor:
    return views.to(device, memory_format=torch.channels_last)  # (B, 3, size, size)


def _optimizer(name: str, parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay, fused=True)


def _save(
    path: Path, run: dict[str, Any], model: nn.Module, learner: torch.optim.Optimizer, *, epoch: int, seconds: float
) -> None:
    with files.atomic_path(path) as temporary:
        torch.save(
            {
                "epoch": epoch,
                "state_dict": model.state_dict(),
                "optimizer": {"learner": learner.state_dict(), "queue": _queue(model)},
                "run": run,
                "seconds": seconds,
            },
            temporary,
        )


def _queue(model: nn.Module) -> dict[str, Tensor]:
    """MoCo's keys and their position, which lightly leaves out of the state dict."""
    named = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in named}


def _restore(path: Path, run: dict[str, Any], model: nn.Module, learner: torch.optim.Optimizer) -> tuple[int, float]:
    """(epochs done, seconds they took)."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["run"] != run:
        other = ", ".join(key for key in run if state["run"].get(key) != run[key])
        raise UserError(f"{path} is of another run (other: {other}): give another --output, or remove it.")
    model.load_state_dict(state["state_dict"])
    for name, buffer in _queue(model).items():
        buffer.copy_(state["optimizer"]["queue"][name])
    learner.load_state_dict(state["optimizer"]["learner"])
    return state["epoch"], state["seconds"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="sgd")
    parser.add_argument("--lr", type=float, help="before scaling with batch / 256")
    given = parser.parse_intermixed_args()
    try:
        config = load_config(given.config, PretrainConfig, given.overrides)
        with locked(given.output):
            path = train(given.method, config, given.output, optimizer=given.optimizer, lr=given.lr)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
