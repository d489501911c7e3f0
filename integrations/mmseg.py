"""MMSegmentation: `TwistVisionTransformer`, registered as a backbone for ViTs that its own VisionTransformer is not.

    custom_imports = dict(imports=["twist.integrations.mmseg"])
    backbone = dict(type="TwistVisionTransformer", architecture="vit_small_patch14", image_size=518,
                    vit=dict(registers=4, ...), out_indices=(2, 5, 8, 11),
                    init_cfg=dict(type="Pretrained", checkpoint=..., prefix="backbone."))

`twist convert --to mmseg` writes these lines. The parameters lie in `network` under timm's names.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from twist.contracts.vit import build_vit


@MODELS.register_module(name="TwistVisionTransformer")
class VisionTransformer(BaseModule):  # type: ignore[misc]
    """A ViT of a weights artefact; `forward(images (B, 3, H, W))` gives a map (B, D, H/p, W/p) for each of
    `out_indices`, in order, the last block's after the last norm unless `final_norm` is false."""

    def __init__(
        self,
        architecture: str,
        image_size: int = 224,
        vit: dict[str, Any] | None = None,
        out_indices: Sequence[int] = (-1,),
        final_norm: bool = True,
        drop_path_rate: float = 0.0,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.network = build_vit(architecture, image_size=image_size, vit=vit, drop_path=drop_path_rate)
        self.out_indices = self.network.chosen(out_indices)
        self.final_norm = final_norm

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        patch = self.network.patch_embed.patch_size[0]
        down, right = ((-side) % patch for side in images.shape[2:])
        if down or right:  # whole images are of any size: zeros fill the last patches, as in MMSegmentation's own ViT
            images = F.pad(images, (0, right, 0, down))
        names = [f"block{index}" for index in self.out_indices]
        return tuple(self.network.features(images, names, final_norm=self.final_norm).values())
