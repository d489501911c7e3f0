"""Frozen features: what the probes read, how they are extracted, and the proof that nothing was trained.

Features go row by row into one file, so 1.28 million × 2048 need no memory; readers take blocks of rows. They are
float32 whatever the forward pass computed in. `N` images, `D` features.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from twist.catalog.labelled import LabelledImages
from twist.contracts import files
from twist.contracts.failures import explained
from twist.contracts.files import sha256_json
from twist.contracts.networks import ResNet, normalise
from twist.contracts.progress import Progress
from twist.contracts.weights import Backbone
from twist.transfer.engines.imagenet.dataset import Batches
from twist.transfer.engines.imagenet.recipes import FEATURES, Recipe


class FrozenBackboneChanged(RuntimeError):
    """A backbone that was to stay frozen is not bit-equal to what it was: the number would not be a linear probe's."""


@dataclass(frozen=True)
class FeatureFile:
    """(N, D) float32 rows of a file and their labels (N,) int64."""

    path: Path
    labels: Tensor
    dimension: int

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), (stop - start, D): read, not mapped, so that no more memory is used than is asked for."""
        count = (min(stop, len(self)) - start) * self.dimension
        data = np.fromfile(self.path, dtype=np.float32, count=count, offset=start * self.dimension * 4)
        return torch.from_numpy(data).view(-1, self.dimension)

    def all(self) -> Tensor:
        return self.rows(0, len(self))

    def mapped(self) -> np.ndarray:
        """The rows as a read-only memory map, for scikit-learn."""
        return np.memmap(self.path, dtype=np.float32, mode="r", shape=(len(self), self.dimension))


def state_digest(network: nn.Module) -> str:
    """SHA-256 of the state dict, buffers included: names, types, shapes and bytes."""
    state = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        state.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        state.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[str]:
    """Eval mode and no gradients inside; proves at the end that the state is bit-equal, and yields its digest.

    Raises:
        FrozenBackboneChanged: a parameter or a buffer changed.
    """
    network.eval().requires_grad_(False)
    before = state_digest(network)
    yield before
    after = state_digest(network)
    if after != before:
        raise FrozenBackboneChanged(f"The frozen backbone changed: {before[:12]} before, {after[:12]} after.")


def features_of(network: nn.Module, images: Tensor, *, last_blocks: int = 1) -> Tensor:
    """(B, D) of normalised images: a ResNet's pooled output; a ViT's class tokens of the last blocks, side by side.

    One block is the ViT's own output. Several follow DINO's probe: each token after the last norm.
    """
    if isinstance(network, ResNet) or last_blocks == 1:
        return network(images)
    layers = network.get_intermediate_layers(  # type: ignore[operator]
        images, n=last_blocks, norm=True, return_prefix_tokens=True
    )
    return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)


def feature_dimension(network: nn.Module, *, last_blocks: int = 1) -> int:
    width = int(network.num_features)  # type: ignore[arg-type]
    return width if isinstance(network, ResNet) else width * last_blocks


def autocast(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 on CUDA where the recipe says so; nothing on CPU."""
    if device.type == "cuda" and recipe.precision == "bf16":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def feature_batches(
    network: nn.Module,
    header: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    device: torch.device,
    last_blocks: int = 1,
    remedy: str = FEATURES,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decoded batches (B, 3, S, S) uint8 with labels → (B, D) float32 features with labels (B,), both on `device`.

    `remedy` is what to do where memory runs out: it says which setting gave these batches their size.
    """
    for pixels, labels in batches:
        with explained(memory=remedy):
            inputs = normalise(pixels.to(device, non_blocking=True), header)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            with autocast(recipe, device):
                rows = features_of(network, inputs, last_blocks=last_blocks)
        yield rows.float(), labels.to(device, non_blocking=True)


def extract(
    network: nn.Module,
    header: Backbone,
    images: LabelledImages,
    recipe: Recipe,
    *,
    folder: Path,
    title: str,
    device: torch.device,
    last_blocks: int = 1,
) -> FeatureFile:
    """Features of `images` in their order, in a file below `folder`; an earlier complete file of the same is reused.

    The file's name is a digest of the weights, the header, the images (sizes and times of their files too) and the
    transform. It appears whole or not at all.

    Raises:
        UnreadableImage: names the file. UserError: memory ran out.
    """
    key = sha256_json(
        {
            "weights": state_digest(network),
            "header": header.model_dump(mode="json"),
            "images": images.stamp(),
            "transform": recipe.model_dump(mode="json", include={"size", "resize", "interpolation"}),
            "precision": recipe.precision if device.type == "cuda" else "fp32",
            "last_blocks": last_blocks,
        }
    )
    dimension = feature_dimension(network, last_blocks=last_blocks)
    target = FeatureFile(folder / f"{key[:24]}.f32", torch.from_numpy(images.labels), dimension)
    if target.path.exists() and target.path.stat().st_size == len(images) * dimension * 4:
        return target
    batch_size = recipe.machine.feature_batch_size
    decoded = Batches(images, recipe, batch_size=batch_size, pin_memory=device.type == "cuda").ordered()
    rows = feature_batches(network, header, decoded, recipe, device=device, last_blocks=last_blocks)
    with (
        files.atomic_path(target.path) as temporary,
        temporary.open("wb") as file,
        Progress(title, total=len(images), unit="image") as progress,
    ):
        for block, _ in rows:
            file.write(block.cpu().numpy().tobytes())
            progress.advance(len(block))
    return target
