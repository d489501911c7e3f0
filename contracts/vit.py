"""The ViTs that an artefact's header describes: timm's VisionTransformer, and the resizing of its position table.

`B` images, `D` features; a grid has `H` × `W` patches, its table `N` × `N` positions behind the prefix tokens' rows.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp, SwiGLUPacked
from timm.models import eva
from timm.models import vision_transformer as timm
from torch import Tensor, nn

from twist.contracts.errors import check_names
from twist.contracts.weights import Resize, Vit, stem_of, usual_vit

# The tenth of a patch that DINO adds to the grid, so that the scale gives the size (facebookresearch/dino, issue 8).
OFFSET: Final = 0.1


class PatchFeatures:
    """What the networks of this suite have beside timm's: patch features by the names of blocks."""

    blocks: nn.Sequential
    norm: nn.Module

    def chosen(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """Blocks in order, counted from 0; negative ones from the end. `ValueError` for one that is not there."""
        depth = len(self.blocks)
        if not blocks or any(not -depth <= block < depth for block in blocks):
            raise ValueError(f"blocks {list(blocks)} of a ViT with {depth}: choose from 0 to {depth - 1}.")
        return tuple(sorted({block % depth for block in blocks}))

    def features(self, images: Tensor, names: Sequence[str] = (), *, final_norm: bool = True) -> dict[str, Tensor]:
        """Maps (B, D, H/p, W/p) of the patches after `block0`, … by name (default: the last block); of the last block
        after the network's last norm. `UserError` for a block that there is not."""
        known = [f"block{index}" for index in range(len(self.blocks))]
        names = names or known[-1:]
        check_names(names, known)
        indices = sorted({known.index(name) for name in names})
        maps: Any = self.forward_intermediates(  # type: ignore[attr-defined]
            images, indices=indices, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        found: dict[str, Tensor] = {known[index]: map_ for index, map_ in zip(indices, maps, strict=True)}
        if final_norm and known[-1] in found:
            found[known[-1]] = self.norm(found[known[-1]].permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return {name: found[name] for name in names}


def build_vit(
    architecture: str, *, image_size: int = 224, vit: Mapping[str, Any] | None = None, drop_path: float = 0.0
) -> Any:
    """The network that a header's fields of these names describe, without a classifier, randomly initialised.

    `forward(images (B, 3, H, W))` gives (B, D), for images of any size; `ValueError` where `vit` is no description.
    """
    whole = usual_vit(architecture) if vit is None else Vit.model_validate(dict(vit))
    arguments: dict[str, Any] = {
        **whole.timm_arguments(),
        "img_size": image_size,
        "patch_size": int(stem_of(architecture).removeprefix("patch")),
        "num_classes": 0,
        "norm_layer": partial(LayerNorm, eps=whole.norm_eps),
        "dynamic_img_size": True,
        "drop_path_rate": drop_path,
    }
    if whole.rope_base is not None:
        return RotaryVisionTransformer(**arguments)
    gated = whole.mlp == "swiglu"
    arguments |= {"mlp_layer": SwiGLUPacked if gated else Mlp, "act_layer": nn.SiLU if gated else nn.GELU}
    network = VisionTransformer(**arguments)
    network.resize = whole.resize
    return network


class RotaryVisionTransformer(PatchFeatures, eva.Eva):  # type: ignore[misc]
    """timm's network of DINOv3."""


class VisionTransformer(PatchFeatures, timm.VisionTransformer):  # type: ignore[misc]
    """timm's network whose position table is resized as the header says."""

    resize: Resize = "antialias"

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches (B, H, W, D) → tokens with their positions (B, prefix + H·W, D)."""
        if self.resize == "antialias":
            return super()._pos_embed(x)
        rows = 0 if self.no_embed_class else self.num_prefix_tokens
        assert self.pos_embed is not None
        table = resized(self.pos_embed, (x.shape[1], x.shape[2]), prefix_rows=rows, rule=self.resize)
        patches = x.flatten(1, 2)
        if self.no_embed_class:
            patches = patches + table
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = torch.cat([*prefix, patches], dim=1)
        return self.pos_drop(tokens if self.no_embed_class else tokens + table)


def resized(table: Tensor, grid: tuple[int, int], *, prefix_rows: int, rule: Resize) -> Tensor:
    """A position table (1, prefix + N², D) for a `grid` of (H, W) patches: (1, prefix + H·W, D).

    The first `prefix_rows` rows stay. What each rule computes is said at `Vit.resize`.
    """
    prefix, patches = table[:, :prefix_rows], table[:, prefix_rows:]
    side = round(patches.shape[1] ** 0.5)
    if grid == (side, side):
        return table
    square = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, N, N)
    if rule == "offset":
        scale = ((grid[0] + OFFSET) / side, (grid[1] + OFFSET) / side)
        square = F.interpolate(square, scale_factor=scale, mode="bicubic")
    else:
        square = F.interpolate(square, size=grid, mode="bicubic", antialias=rule == "antialias")
    assert square.shape[2:] == grid
    return torch.cat([prefix, square.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
