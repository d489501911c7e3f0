"""Hugging Face transformers: the folder that `AutoModel.from_pretrained` loads, for ResNets and the ViTs it has.

A ViT is the kind whose code computes what it does: ViT (class token), DeiT (one register with a position, which is its
distillation token), I-JEPA (no class token), DINOv2 (LayerScale), DINOv2 with registers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts import rename
from twist.contracts.shapes import tensors_of
from twist.contracts.weights import METADATA_KEY, RESNETS, Backbone, write_safetensors
from twist.converters import tables
from twist.converters.architecture import joined_names, split
from twist.converters.proof import ProofError
from twist.converters.targets import TIMM_ALONE, Stages, Target, quoted

if TYPE_CHECKING:
    from torch import Tensor

_CLASSES = {
    "resnet": "ResNetModel",
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "ijepa": "IJepaModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
_REGISTERS = "dinov2_with_registers"
_POOLED = ("vit", "deit", "ijepa")  # come with a pooling layer that no backbone fills, unless they are told


def _kind(backbone: Backbone) -> str | None:
    """`model_type` of the network, None where there is none."""
    if not backbone.is_vit:
        return "resnet"
    vit = backbone.transformer
    if vit.pre_norm or not vit.final_norm:
        return None
    if vit.rope_base:
        return "dinov3_vit" if vit.class_token and vit.registers and vit.layer_scale else None
    if vit.layer_scale:
        # Features of the MLP that transformers' DINOv2 makes of the ratio (models/dinov2/modeling_dinov2.py).
        features = vit.embed_dim * _ratio(backbone)
        features = (int(features * 2 / 3) + 7) // 8 * 8 if vit.mlp == "swiglu" else features
        fits = vit.class_token and features == vit.mlp_features and (vit.registers or vit.prefix_positions)
        return (_REGISTERS if vit.registers else "dinov2") if fits else None
    if vit.mlp == "swiglu" or not vit.prefix_positions:
        return None
    return {(True, 0): "vit", (True, 1): "deit", (False, 0): "ijepa"}.get((vit.class_token, vit.registers))


def _ratio(backbone: Backbone) -> int:
    """The whole number that DINOv2's config takes, of which SwiGLU keeps two thirds."""
    vit = backbone.transformer
    return round(vit.mlp_features / vit.embed_dim * (1.5 if vit.mlp == "swiglu" else 1))


def _refuse(backbone: Backbone) -> str | None:
    if backbone.timm_name:
        return TIMM_ALONE
    if backbone.channel_order == "BGR":
        return "its image processors give RGB"
    if backbone.padding == "same":
        return "its ResNets pad symmetrically"
    return None if _kind(backbone) else "it has no ViT with these tokens, norms and layers"


def _steps(backbone: Backbone, tensors: Mapping[str, Any]) -> dict[str, rename.Step]:
    """Name of the artefact (query, key and value apart) → name in the file."""
    table = tables.HUGGINGFACE_RESNET
    if backbone.is_vit:
        swiglu = backbone.transformer.mlp == "swiglu"
        if backbone.transformer.rope_base:
            table = tables.HUGGINGFACE_DINOV3_SWIGLU if swiglu else tables.HUGGINGFACE_DINOV3
            return rename.outwards(table, tensors)
        dinov2 = tables.HUGGINGFACE_DINOV2_SWIGLU if swiglu else tables.HUGGINGFACE_DINOV2
        table = dinov2 if backbone.transformer.layer_scale else tables.HUGGINGFACE_VIT
    return rename.outwards(table, tensors)


def _apart(backbone: Backbone, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors as transformers has them: query, key and value apart, and DINOv3's gate."""
    rotary = backbone.is_vit and backbone.transformer.rope_base is not None
    return split(tensors, gates=rotary and backbone.transformer.mlp == "swiglu")


def _names(backbone: Backbone) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, step in _steps(backbone, _apart(backbone, tensors_of(backbone))).items():
        (whole,) = joined_names(name)
        found[whole] = f"{found[whole]} + {step.name}" if whole in found else step.name
    return found


def _write(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    import torch

    whole = dict(tensors)
    if _kind(backbone) == _REGISTERS:
        # Its table has a row for the class token and none for the registers, which are added to these.
        rows, table = backbone.prefix_tokens if backbone.transformer.prefix_positions else 0, whole["pos_embed"]
        first = table[:, :1] if rows else torch.zeros_like(table[:, :1])
        whole["reg_token"] = whole["reg_token"] + (table[:, 1:rows] if rows else 0)
        whole["pos_embed"] = torch.cat([first, table[:, rows:]], dim=1)
    apart = _apart(backbone, whole)
    file = {step.name: apart[name] for name, step in _steps(backbone, apart).items()}
    if backbone.is_vit and backbone.transformer.layer_scale:  # DINOv2's networks have one, unused without masks
        dimension = backbone.transformer.embed_dim
        file["embeddings.mask_token"] = torch.zeros(1, 1, dimension)[
            0 if not backbone.transformer.rope_base else slice(1)
        ]
    write_safetensors(path, file, {"format": "pt"})


def _settings(backbone: Backbone) -> dict[str, str]:
    """`config.json`, with our header for the way back, and `preprocessor_config.json`."""
    kind = _kind(backbone)
    assert kind is not None
    if kind == _REGISTERS:  # as `_write` leaves them
        vit = backbone.transformer.model_copy(update={"prefix_positions": False})
        backbone = backbone.model_copy(update={"vit": vit})
    mean, std = backbone.pixels(1)
    side = backbone.image_size or 224
    images = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    config = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "dtype": "float32",
        **(_vit_config(backbone) if backbone.is_vit else _resnet_config(backbone)),
        METADATA_KEY: json.loads(backbone.model_dump_json()),
    }
    texts = {"config.json": config, "preprocessor_config.json": images}
    return {name: json.dumps(text, indent=2, sort_keys=True, allow_nan=False) + "\n" for name, text in texts.items()}


def _vit_config(backbone: Backbone) -> dict[str, Any]:
    vit = backbone.transformer
    dinov2 = {"mlp_ratio": _ratio(backbone), "use_swiglu_ffn": vit.mlp == "swiglu"}
    rope = {
        "rope_theta": vit.rope_base,
        "num_register_tokens": vit.registers,
        "query_bias": vit.qkv_bias,
        "value_bias": vit.qkv_bias,
        "use_gated_mlp": vit.mlp == "swiglu",
        "hidden_act": "silu" if vit.mlp == "swiglu" else "gelu",
    }
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": vit.mlp_features,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.norm_eps,
        "image_size": backbone.image_size,
        "patch_size": backbone.patch_size,
        **({} if vit.rope_base else {"qkv_bias": vit.qkv_bias}),
        **(dinov2 if vit.layer_scale and not vit.rope_base else {}),
        **({"num_register_tokens": vit.registers} if vit.layer_scale and vit.registers else {}),
        **(rope if vit.rope_base else {}),
    }


def _resnet_config(backbone: Backbone) -> dict[str, Any]:
    depths, bottleneck = RESNETS[backbone.architecture]
    return {
        "embedding_size": 64 * backbone.width,
        "hidden_sizes": [width * backbone.width * (4 if bottleneck else 1) for width in (64, 128, 256, 512)],
        "depths": depths,
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": backbone.stride_in == "1x1",
    }


def _usage(folder: Path, backbone: Backbone) -> str:
    options = ", add_pooling_layer=False" if _kind(backbone) in _POOLED else ""
    return f"""\
from transformers import AutoImageProcessor, AutoModel

network = AutoModel.from_pretrained({quoted(folder)}{options})
processor = AutoImageProcessor.from_pretrained({quoted(folder)})
"""


def _run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """Every stage of each image, by the image processor and the network that the folder gives."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    pooled = _kind(backbone) in _POOLED
    logging.disable_progress_bar()
    options = {"add_pooling_layer": False} if pooled else {}
    network, info = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise ProofError(f"transformers does not find its tensors in the file ({len(wrong)}, first: {wrong[0]})")
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    # DINOv2's always resize the position table; the others do when they are asked.
    asked = {"interpolate_pos_encoding": True} if pooled else {}
    name, first = ("block", 0) if backbone.is_vit else ("res", 2)
    result = []
    for file in files:
        images = processor(images=Image.open(file).convert("RGB"), do_resize=False, return_tensors="pt")
        states = network.eval()(**images, output_hidden_states=True, **asked).hidden_states[1:]
        result.append({f"{name}{first + index}": state for index, state in enumerate(states)})
    return result


TARGET = Target(
    name="huggingface",
    title="Hugging Face transformers",
    weights="model.safetensors",
    package="transformers",
    extra="huggingface",
    names=_names,
    write=_write,
    framework=lambda _: (_run, "transformers"),
    usage=_usage,
    refuse=_refuse,
    settings=_settings,
    # It resizes the position table with antialiasing only for DINOv2 with registers.
    changes=lambda backbone: {"resize": "antialias" if _kind(backbone) == _REGISTERS else "plain"},
    library="transformers",
)
