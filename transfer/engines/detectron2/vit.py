"""ViTs as backbones of Detectron2's R-CNNs: ViTDet (Li et al. 2022, arXiv 2203.16527), and ViTs that stay as they are.

ViTDet has Detectron2's own ViT (window attention but in four blocks, relative positions, no class token) and its simple
feature pyramid, AdamW with a rate that decays by layer, and crops of jittered scale, as
facebookresearch/detectron2 projects/ViTDet/configs @02b5c4e2. A frozen ViT is the converted network itself, all tokens
and blocks attending to the whole picture. Keys of both are added to the configs of recipes that have them alone, so
that the hashes of the others stay.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.modeling import BACKBONE_REGISTRY, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from twist.contracts.errors import UserError
from twist.contracts.weights import Backbone, Vit, usual_vit
from twist.converters.targets.detectron2 import detectron2_overlay
from twist.integrations.detectron2 import add_vit_config, build_twist_vit_pyramid_backbone, pyramid

VITDET, FROZEN = "build_vitdet_backbone", "build_frozen_vit_backbone"
# Tensors of an artefact that Detectron2's ViT has no place for, and those of its own.
_WITHOUT = ("cls_token", "norm.weight", "norm.bias")
_OWN = ("rel_pos_h", "rel_pos_w")


def add_keys(config: CfgNode, tree: Any) -> None:
    """Add the keys of ViTs to `config` where `tree`, which will be merged into it, has them."""
    if "TWIST_VIT" not in tree.get("MODEL", {}):
        return
    add_vit_config(config)
    # Side of a window in patches; the rate of a block is that of the next one times the decay.
    config.MODEL.VITDET = CfgNode({"WINDOW": 14, "LAYER_DECAY": 1.0})
    config.INPUT.LSJ_SIZE = 0  # side of the crops of jittered scale; 0 resizes as Detectron2's R-CNNs do


def set_weights(config: CfgNode, header: Backbone) -> list[str]:
    """Set the keys that a ViT's weights decide; what the backbone leaves out of them, for the plan and the record.

    `UserError` for a ViT that these backbones do not compute.
    """
    name, vit = header.display_name, header.transformer
    if header.patch_size != 16:
        raise UserError(f"{name} has patches of {header.patch_size} pixels; the feature pyramid is made for 16.")
    if config.MODEL.BACKBONE.NAME != VITDET:
        config.MODEL.BACKBONE.NAME = FROZEN
    elif (
        vit.registers
        or vit.layer_scale
        or vit.mlp != "gelu"
        or vit.pre_norm
        or (vit.class_token > vit.prefix_positions)
    ):
        raise UserError(
            f"{name} has registers, LayerScale or SwiGLU, which Detectron2's ViT has not: take "
            "coco-mrcnn-fpn-frozen-12ep, or a protocol of segmentation."
        )
    keys, pixels = config.MODEL.TWIST_VIT, detectron2_overlay(header)["model"]
    keys.ARCHITECTURE, keys.IMAGE_SIZE, keys.VIT = header.architecture, header.image_size, vit.model_dump_json()
    config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD = pixels["pixel_mean"], pixels["pixel_std"]
    config.INPUT.FORMAT = pixels["input_format"]
    if config.MODEL.BACKBONE.NAME == FROZEN:
        return []
    return ["Detectron2's ViT takes neither the class token nor the last norm of the weights, and attends in windows"]


def build_vitdet_backbone(cfg: CfgNode, _input_shape: Any = None) -> SimpleFeaturePyramid:
    """Detectron2's ViT under its pyramid; of every quarter of the blocks the last attends to the whole picture."""
    keys = cfg.MODEL.TWIST_VIT
    vit = Vit.model_validate(json.loads(keys.VIT)) if keys.VIT else usual_vit(keys.ARCHITECTURE)
    net = ViT(
        img_size=cfg.INPUT.LSJ_SIZE,
        patch_size=16,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.heads,
        mlp_ratio=vit.mlp_features / vit.embed_dim,
        qkv_bias=vit.qkv_bias,
        drop_path_rate=keys.DROP_PATH,
        norm_layer=partial(nn.LayerNorm, eps=vit.norm_eps),
        window_size=cfg.MODEL.VITDET.WINDOW,
        window_block_indexes=[block for block in range(vit.depth) if (block + 1) % (vit.depth // 4)],
        use_rel_pos=True,
        pretrain_img_size=keys.IMAGE_SIZE,
        pretrain_use_cls_token=vit.class_token,
    )
    return pyramid(net, cfg, square_pad=cfg.INPUT.LSJ_SIZE)


def build_frozen_vit_backbone(cfg: CfgNode, _input_shape: Any = None) -> SimpleFeaturePyramid:
    """The weights' own network under ViTDet's pyramid, of which the pyramid alone learns."""
    backbone = build_twist_vit_pyramid_backbone(cfg)
    backbone.net.requires_grad_(cfg.MODEL.BACKBONE.FREEZE_AT < 1)
    return backbone


for _build in (build_vitdet_backbone, build_frozen_vit_backbone):
    if _build.__name__ not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(_build)


def network_of(model: nn.Module) -> nn.Module | None:
    """The ViT of a model, whose names are the artefact's; None where the backbone is a ResNet."""
    if not isinstance(model.backbone, SimpleFeaturePyramid):
        return None
    return getattr(model.backbone.net, "network", model.backbone.net)


def tensors_for(network: nn.Module, weights: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors of a converted file that `network` has a place for, and the names that they have to fill."""
    tensors = torch.load(weights, map_location="cpu", weights_only=True)["model"]
    if isinstance(network, ViT):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _WITHOUT}
    return tensors, {name for name in network.state_dict() if not name.endswith(_OWN)}


def build_optimizer(config: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without decay of norms and positions, rates by layer (mask_rcnn_vitdet_b_100ep.py, common/optim.py)."""
    depth = len(network_of(model).blocks)  # type: ignore[union-attr, arg-type]
    solver = config.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=0.0,
        lr_factor_func=partial(get_vit_lr_decay_rate, lr_decay_rate=config.MODEL.VITDET.LAYER_DECAY, num_layers=depth),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    return torch.optim.AdamW(groups, lr=solver.BASE_LR, betas=(0.9, 0.999), weight_decay=solver.WEIGHT_DECAY)


def lsj_mapper(config: CfgNode) -> DatasetMapper:
    """Flip, then a square crop of the picture at 0.1 to 2 times its size (common/coco_loader_lsj.py)."""
    side = config.INPUT.LSJ_SIZE
    crops = [
        T.RandomFlip(horizontal=True),
        T.ResizeScale(min_scale=0.1, max_scale=2.0, target_height=side, target_width=side),
        T.FixedSizeCrop(crop_size=(side, side), pad=False),
    ]
    return DatasetMapper(config, is_train=True, augmentations=crops, recompute_boxes=True)
