"""Dense features of a frozen backbone: one row a patch, extracted once into a file that every dense protocol reads.

Rows lie image by image and line by line of the map, so the file is (N·h·w, D). `N` images, `B` of a batch, `H` `W` the
input's sides, `h` `w` those of the map, `D` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from twist.contracts.config import Config
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.contracts.networks import normalise
from twist.contracts.weights import Backbone
from twist.measure.features import RowFile, autocast, state_digest


class Layers(Config):
    """Which features of a network are meant: `stages` and `output_stride` where it has stages, the others of a ViT.

    Several stages lie side by side, the coarser ones enlarged (bilinear) to the map of the finest.
    """

    stages: tuple[Literal[1, 2, 3, 4], ...] = Field(default=(4,), min_length=1)
    # 16: the last stage keeps its resolution and is dilated instead (DeepLab; torchvision's
    # replace_stride_with_dilation).
    output_stride: Literal[16, 32] = 32
    # Patch tokens of so many last blocks, side by side, each after the network's last norm or as they are.
    last_blocks: int = Field(default=1, gt=0)
    last_norm: bool = True
    # "keys": those of the last block's attention, all heads side by side, which LOST reads.
    tokens: Literal["patches", "keys"] = "patches"


@dataclass(frozen=True)
class DenseExtractor:
    """A network in eval mode on `device` and which of its features are read; `header` says how it wants its pixels."""

    network: nn.Module
    header: Backbone
    device: torch.device
    layers: Layers
    precision: str = "fp32"

    @property
    def has_stages(self) -> bool:
        """As ResNets; a ViT's maps all have one stride."""
        return not self.header.is_vit and getattr(self.network, "patch_size", None) is None

    @property
    def stride(self) -> int:
        """Pixels of the input that one place of the map stands for."""
        if self.has_stages:
            return min(4 * 2 ** (min(self.layers.stages) - 1), self.layers.output_stride)
        return self.header.patch_size if self.header.is_vit else int(self.network.patch_size)  # type: ignore[arg-type]

    @property
    def multiple(self) -> int:
        """The sides of an input must be a multiple of this: a ViT has whole patches only, Swin and its like too."""
        if self.has_stages:
            return 32 if self.header.timm_name else 1
        return self.stride

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """(B, D, h, w) float32 on `device`, of decoded images (B, 3, H, W) uint8 whose sides are whole patches."""
        if images.shape[2] % self.multiple or images.shape[3] % self.multiple:
            raise UserError(
                f"{self.header.display_name} reads patches of {self.multiple} pixels, and {images.shape[2]} × "
                f"{images.shape[3]} is no multiple of that: choose another size."
            )
        inputs = normalise(images.to(self.device, non_blocking=True), self.header)
        with autocast(self.precision, self.device):
            parts = self._parts(inputs.contiguous(memory_format=torch.channels_last))
        finest = parts[0].shape[2:]
        # To its own size bilinear interpolation changes nothing.
        return torch.cat([F.interpolate(part.float(), finest, mode="bilinear") for part in parts], 1)

    def _parts(self, inputs: Tensor) -> list[Tensor]:
        network: Any = self.network
        if self.has_stages:
            names = [f"res{number + 1}" for number in sorted(self.layers.stages)]
            maps = network.features(inputs, names)
            return [maps[name] for name in names]
        if self.layers.tokens == "keys" and self.header.timm_name:
            raise UserError(f"The keys of {self.header.display_name} are not known: say layers.tokens=patches.")
        if self.layers.tokens == "keys":
            return [self._keys(inputs)]
        return list(
            network.forward_intermediates(
                inputs, indices=self.layers.last_blocks, norm=self.layers.last_norm, output_fmt="NCHW",
                intermediates_only=True,
            )
        )  # fmt: skip

    def _keys(self, inputs: Tensor) -> Tensor:
        network: Any = self.network
        attention, found = network.blocks[-1].attn, []
        hook = attention.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            network.forward_features(inputs)
        finally:
            hook.remove()
        # The middle third of timm's q, k, v; of a rotary network before its positions, and there without a bias.
        size = len(attention.qkv.weight) // 3
        bias = None if attention.qkv.bias is None else attention.qkv.bias[size : 2 * size]
        keys = F.linear(found[0], attention.qkv.weight[size : 2 * size], bias)  # (B, tokens, D)
        patches = keys[:, network.num_prefix_tokens :]
        height, width = (side // self.stride for side in inputs.shape[2:])
        return patches.transpose(1, 2).reshape(len(patches), -1, height, width)

    def to_file(
        self, batches: Callable[[int], Iterable[Tensor]], *, images: int, size: int, key: dict[str, Any], folder: Path,
        title: str, max_disk_gb: float,
    ) -> DenseFile:  # fmt: skip
        """Features of `images` images of `size` × `size` pixels in a file below `folder`, at most `max_disk_gb` large.

        Its name is a digest of weights, header, layers and `key` (the images, and what made inputs of them). A complete
        file is reused without a forward pass; of one that was begun, what is there is kept. `batches`: number of the
        first image → decoded images (B, 3, size, size) uint8 from there to the last.
        """
        one = self.maps(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        dimension, height, width = one.shape[1:]
        name = sha256_json(
            {
                **key,
                "weights": state_digest(self.network),
                "header": self.header.model_dump(mode="json"),
                "layers": self.layers.model_dump(mode="json"),
                "precision": self.precision if self.device.type == "cuda" else "fp32",
                "size": size,
            }
        )[:24]
        file = DenseFile(folder / f"{name}.f32", images, height, width, dimension)
        if file.complete:
            return file
        needed = len(file) * dimension * 4 / 1e9
        if needed > max_disk_gb:
            raise UserError(
                f"The features of {images} images need {needed:.1f} GB of disk in {folder}, and machine.max_disk_gb is "
                f"{max_disk_gb:g}: allow more, or take a smaller size."
            )

        def rows(start: int) -> Iterator[Tensor]:
            return (self.maps(one).permute(0, 2, 3, 1).flatten(0, 2) for one in batches(start))

        file.fill(rows, title, each=file.patches, resume=True)
        return file


@dataclass(frozen=True)
class DenseFile(RowFile):
    """(N·h·w, D) rows, one a patch, of `images` maps."""

    path: Path
    images: int
    height: int
    width: int
    dimension: int

    def __len__(self) -> int:
        return self.images * self.patches

    @property
    def patches(self) -> int:
        """Of one image."""
        return self.height * self.width

    def rows_of(self, image: int, count: int = 1) -> Tensor:
        """(count·h·w, D) of `count` images from `image` on."""
        return self[image * self.patches : (image + count) * self.patches]
