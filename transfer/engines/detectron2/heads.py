"""MoCo's C4 head: Detectron2's `Res5ROIHeads` with one more batch norm after res5 (MoCo, arXiv 1911.05722, App. A.2).

The stock head builds res5 of bottlenecks only, so a ResNet-18 or -34 (the samples) could not bring its own layer4; here
the block follows the depth.
"""

from __future__ import annotations

from typing import Any

from detectron2.layers import get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn

# Blocks of the last stage of the ResNets that are made of basic blocks.
_BASIC_BLOCKS = {18: 2, 34: 3}


class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """`Res5ROIHeads` whose res5 ends with a norm of the backbone's kind."""

    @classmethod
    def _build_res5_block(cls, cfg: Any) -> tuple[nn.Sequential, int]:
        depth, norm = cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM
        if depth in _BASIC_BLOCKS:
            out_channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8  # res5 is 8 times res2
            blocks = _BASIC_BLOCKS[depth]
            res5 = nn.Sequential(
                *ResNet.make_stage(
                    BasicBlock,
                    blocks,
                    stride_per_block=[2] + [1] * (blocks - 1),
                    in_channels=out_channels // 2,
                    out_channels=out_channels,
                    norm=norm,
                )
            )
        else:
            res5, out_channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(norm, out_channels))
        return res5, out_channels


# A user's own MoCo code may have registered the name in this process already: ours then stays out of its way.
if "Res5ROIHeadsExtraNorm" not in ROI_HEADS_REGISTRY:
    ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)
