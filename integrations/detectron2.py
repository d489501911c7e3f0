"""Detectron2: ViTs of a weights artefact with class token, registers and all, for lazy configs and the registry.

Lazy configs build `VisionTransformer` (what `twist convert --to detectron2` writes). Of the older configs,
`add_vit_config(cfg)` adds the keys, and `MODEL.BACKBONE.NAME` is `build_twist_vit_backbone`, or
`build_twist_vit_pyramid_backbone` for ViTDet's simple feature pyramid on its last block.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import Tensor

from twist.contracts.vit import build_vit


class VisionTransformer(Backbone):  # type: ignore[misc]
    """`forward(images (B, 3, H, W))` gives maps (B, D, H/p, W/p) of `out_blocks` as `block0`, `block1`, …; the last
    block's after the last norm unless `final_norm` is false. The parameters lie in `network` under timm's names."""

    def __init__(
        self,
        architecture: str,
        image_size: int = 224,
        vit: Mapping[str, Any] | None = None,
        out_blocks: Sequence[int] = (-1,),
        final_norm: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = build_vit(architecture, image_size=image_size, vit=vit, drop_path=drop_path_rate)
        self.blocks = self.network.chosen(out_blocks)
        self.final_norm = final_norm
        self.patch = self.network.patch_embed.patch_size[0]
        self._out_features = [f"block{block}" for block in self.blocks]
        self._out_feature_channels = dict.fromkeys(self._out_features, self.network.embed_dim)
        self._out_feature_strides = dict.fromkeys(self._out_features, self.patch)

    @property
    def size_divisibility(self) -> int:
        return int(self.patch)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.network.features(images, self._out_features, final_norm=self.final_norm)
        return found


def add_vit_config(cfg: CfgNode) -> None:
    """Add `MODEL.TWIST_VIT` to a config: the fields of the artefact's header, the blocks, the pyramid's channels."""
    cfg.MODEL.TWIST_VIT = CfgNode(
        {
            "ARCHITECTURE": "vit_base_patch16",
            "IMAGE_SIZE": 224,
            "VIT": "",  # the header's `vit` as JSON; empty for the usual network of the name
            "OUT_BLOCKS": [-1],
            "FINAL_NORM": True,
            "DROP_PATH": 0.0,
            "PYRAMID_CHANNELS": 256,
        }
    )


@BACKBONE_REGISTRY.register()
def build_twist_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> VisionTransformer:  # noqa: ARG001
    """The ViT of `MODEL.TWIST_VIT` (Detectron2's registry passes an input shape; three channels are the artefact's)."""
    keys = cfg.MODEL.TWIST_VIT
    return VisionTransformer(
        keys.ARCHITECTURE,
        image_size=keys.IMAGE_SIZE,
        vit=json.loads(keys.VIT) if keys.VIT else None,
        out_blocks=keys.OUT_BLOCKS,
        final_norm=keys.FINAL_NORM,
        drop_path_rate=keys.DROP_PATH,
    )


@BACKBONE_REGISTRY.register()
def build_twist_vit_pyramid_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> SimpleFeaturePyramid:
    """ViTDet's simple feature pyramid (Li et al. 2022, p2 … p6 for patches of 16) on the last of `OUT_BLOCKS`."""
    return pyramid(build_twist_vit_backbone(cfg, input_shape), cfg)


class _Pyramid(SimpleFeaturePyramid):  # type: ignore[misc]
    """Detectron2's with the divisor of an image's sides, which it has under a key that nothing reads (@02b5c4e2)."""

    @property
    def size_divisibility(self) -> int:
        return int(self._size_divisibility)


def pyramid(net: Backbone, cfg: CfgNode, *, square_pad: int = 0) -> SimpleFeaturePyramid:
    """ViTDet's simple feature pyramid on the last map of `net`; `square_pad` pads images to squares of that side."""
    return _Pyramid(
        net,
        in_feature=net._out_features[-1],
        out_channels=cfg.MODEL.TWIST_VIT.PYRAMID_CHANNELS,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        norm="LN",
        square_pad=square_pad,
    )
