"""Frozen features: from decoded images to rows of a file, and the proof that the network did not change on the way.

Rows are float32, written as they are computed. `N` images, `B` of a batch, `S` the input's side, `D` features.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from twist.contracts import states
from twist.contracts.files import sha256_json
from twist.contracts.networks import normalise
from twist.contracts.progress import Progress
from twist.contracts.weights import Backbone, tensors_digest

# Images (B, 3, S, S) uint8 RGB or features (B, D), and labels (B,).
Batch = tuple[Tensor, Tensor]


class RowFile:
    """`len(self)` float32 rows of `dimension` values in the file `path`. `file[start:stop]` reads these rows alone."""

    path: Path
    dimension: int

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, rows: slice) -> Tensor:
        # Read, not mapped, so that no more memory is used than is asked for.
        start, stop, _ = rows.indices(len(self))
        count, offset = (stop - start) * self.dimension, start * self.dimension * 4
        data = np.fromfile(self.path, dtype=np.float32, count=count, offset=offset)
        return torch.from_numpy(data).view(-1, self.dimension)

    def mapped(self) -> np.ndarray:
        """The rows as a read-only memory map, for scikit-learn and for rows in any order."""
        return np.memmap(self.path, dtype=np.float32, mode="r", shape=(len(self), self.dimension))

    @property
    def complete(self) -> bool:
        """Whether the rows are as they were written; where not, they are to be computed anew."""
        try:
            fields, sealed = states.read_manifest(states.manifest_of(self.path))
            return sealed and states.damage(self.path, fields) is None
        except (OSError, ValueError):
            return False

    def fill(self, rows: Callable[[int], Iterable[Tensor]], title: str, *, each: int = 1, resume: bool = False) -> None:
        """Write the rows of all images, `each` of one, unless they are there: `rows(n)` gives blocks from image n on.

        A second process that wants the same waits for the first. `resume` keeps what one that was killed has written.
        """
        part, image_bytes = self.path.with_suffix(".part"), each * self.dimension * 4
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if self.complete:  # by the process that was waited for
                part.unlink(missing_ok=True)
                return
            done = os.fstat(stream.fileno()).st_size // image_bytes if resume else 0
            stream.truncate(done * image_bytes)
            with Progress(title, total=len(self) // each, start=done, unit="image") as progress:
                for block in rows(done):
                    stream.write(block.cpu().numpy().tobytes())
                    progress.advance(len(block) // each)
            stream.flush()
            os.fsync(stream.fileno())
            part.replace(self.path)
            # Size and digest of the rows, which are all there now.
            states.write_manifest(states.manifest_of(self.path), states.description(self.path))


@dataclass(frozen=True)
class FeatureFile(RowFile):
    """(N, D) rows, one an image, and their labels (N,) int64."""

    path: Path
    labels: Tensor
    dimension: int

    def __len__(self) -> int:
        return len(self.labels)


def state_digest(network: nn.Module) -> str:
    """SHA-256 of the state dict, buffers included: names, types, shapes and bytes."""
    return tensors_digest(network.state_dict())


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[str]:
    """Eval mode and no gradients inside; yields the state's digest, and `RuntimeError` if it is another at the end."""
    network.eval().requires_grad_(False)
    before = state_digest(network)
    yield before
    if state_digest(network) != before:
        raise RuntimeError("The frozen backbone changed: a parameter or a buffer is not bit-equal to what it was.")


def effective_rank(features: Tensor) -> float:
    """RankMe of (N, D) features, between 1 and D: how many directions they are spread over.

    The exponential of the entropy of the singular values' shares (Garrido et al. 2023, arXiv 2210.02885, equation 1).
    """
    rows = features.double()
    singular = torch.linalg.eigvalsh(rows.T @ rows).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(1e-12)
    return float((-torch.special.xlogy(shares, shares).sum()).exp())


def centre_crop(*, size: int, resize: int, interpolation: str = "bilinear") -> v2.Transform:
    """The test-time view of an image: its shorter side to `resize`, then the central `size` × `size` pixels."""
    return v2.Compose([v2.Resize(resize, InterpolationMode(interpolation), antialias=True), v2.CenterCrop(size)])


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 on CUDA where `precision` is "bf16"; nothing on CPU."""
    if device.type == "cuda" and precision == "bf16":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def network_inputs(decoded: Iterable[Batch], header: Backbone, device: torch.device) -> Iterator[Batch]:
    """Decoded images (B, 3, S, S) uint8 with labels → float32 inputs of the network `header` describes, on `device`."""
    for pixels, labels in decoded:
        images = normalise(pixels.to(device, non_blocking=True), header)
        yield images.contiguous(memory_format=torch.channels_last), labels.to(device, non_blocking=True)


@dataclass(frozen=True)
class Extractor:
    """A network in eval mode on `device`, and how its features are read; `header` says how it wants its pixels.

    `last_blocks` of a ViT: 1 is the network's own output, more are the normed class tokens of so many blocks (DINO).
    """

    network: nn.Module
    header: Backbone
    device: torch.device
    precision: str = "fp32"
    last_blocks: int = 1

    @property
    def dimension(self) -> int:
        return int(self.network.num_features) * self.last_blocks  # type: ignore[arg-type]

    def features(self, images: Tensor) -> Tensor:
        """(B, D) of normalised images (B, 3, S, S)."""
        if self.last_blocks == 1:
            return self.network(images)
        layers_of = self.network.get_intermediate_layers
        layers = layers_of(images, n=self.last_blocks, norm=True, return_prefix_tokens=True)  # type: ignore[operator]
        return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)

    @torch.no_grad()
    def batches(self, decoded: Iterable[Batch]) -> Iterator[Batch]:
        """Decoded images (B, 3, S, S) uint8 with labels → (B, D) float32 features with labels, both on `device`."""
        for inputs, labels in network_inputs(decoded, self.header, self.device):
            with autocast(self.precision, self.device):
                rows = self.features(inputs)
            yield rows.float(), labels

    def to_file(
        self, decoded: Iterable[Batch], labels: np.ndarray, *, key: dict[str, Any], folder: Path, title: str
    ) -> FeatureFile:
        """Features of all images in order, in a file below `folder` that appears whole or not at all.

        Its name is a digest of weights, header and `key`, what else decides the features: the images, and what made
        inputs of them. A complete file of that name is reused, and `decoded` is not read.
        """
        key = {
            **key,
            "weights": state_digest(self.network),
            "header": self.header.model_dump(mode="json"),
            "precision": self.precision if self.device.type == "cuda" else "fp32",
            "last_blocks": self.last_blocks,
        }
        target = FeatureFile(folder / f"{sha256_json(key)[:24]}.f32", torch.from_numpy(labels), self.dimension)
        if not target.complete:
            target.fill(lambda _: (rows for rows, _ in self.batches(decoded)), title)
        return target
