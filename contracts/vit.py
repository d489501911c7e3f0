"""The ViTs that an artefact's header describes: timm's VisionTransformer, and the resizing of its position table.

`B` images, `D` features; a grid has `H` × `W` patches, its table `N` × `N` positions behind the prefix tokens' rows.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp, SwiGLUPacked
from timm.models import vision_transformer as timm
from torch import Tensor, nn

from twist.contracts.errors import check_names
from twist.contracts.weights import Resize, Vit, stem_of, usual_vit

# The tenth of a patch that DINO adds to the grid, so that the scale gives the size (facebookresearch/dino, issue 8).
OFFSET: Final = 0.1


class VisionTransformer(timm.VisionTransformer):
    """timm's network without a classifier; `forward(images (B, 3, H, W))` gives (B, D), for images of any size."""

    def __init__(self, vit: Vit, *, patch_size: int, image_size: int, drop_path: float = 0.0) -> None:
        halves = 2 if vit.mlp == "swiglu" else 1
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            global_pool=vit.pooling,
            fc_norm=False,
            embed_dim=vit.embed_dim,
            depth=vit.depth,
            num_heads=vit.heads,
            # timm takes the integer part of ratio × dimension: the half keeps rounding away from it.
            mlp_ratio=(halves * vit.mlp_features + 0.5) / vit.embed_dim,
            mlp_layer=SwiGLUPacked if vit.mlp == "swiglu" else Mlp,  # type: ignore[arg-type]
            act_layer=nn.SiLU if vit.mlp == "swiglu" else nn.GELU,
            qkv_bias=vit.qkv_bias,
            init_values=1e-5 if vit.layer_scale else None,  # DINOv2's (dinov2/configs/ssl_default_config.yaml)
            class_token=vit.class_token,
            reg_tokens=vit.registers,
            no_embed_class=not vit.prefix_positions,
            pre_norm=vit.pre_norm,
            final_norm=vit.final_norm,
            norm_layer=partial(LayerNorm, eps=vit.norm_eps),
            dynamic_img_size=True,
            drop_path_rate=drop_path,
        )
        self.resize: Resize = vit.resize

    @classmethod
    def described(
        cls, architecture: str, *, image_size: int = 224, vit: Mapping[str, Any] | None = None, drop_path: float = 0.0
    ) -> "VisionTransformer":
        """The network that a header's fields of these names describe; `ValueError` where `vit` is no description."""
        whole = usual_vit(architecture) if vit is None else Vit.model_validate(dict(vit))
        patch = int(stem_of(architecture).removeprefix("patch"))
        return cls(whole, patch_size=patch, image_size=image_size, drop_path=drop_path)

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
        maps: Any = self.forward_intermediates(
            images, indices=indices, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        found: dict[str, Tensor] = {known[index]: map_ for index, map_ in zip(indices, maps, strict=True)}
        if final_norm and known[-1] in found:
            found[known[-1]] = self.norm(found[known[-1]].permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return {name: found[name] for name in names}

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
