"""Hugging Face transformers: the folder that `AutoModel.from_pretrained` loads, for ResNets and the ViTs it has.

A ViT is the kind whose code computes what it does: ViT (class token), DeiT (one register with a position, which is its
distillation token), I-JEPA (no class token), DINOv2 (LayerScale), DINOv2 with registers.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts import rename
from twist.contracts.weights import METADATA_KEY, RESNETS, Backbone, write_safetensors
from twist.converters import tables
from twist.converters.proof import ProofError
from twist.converters.targets import ProofRun, Stages, Target, own_names, quoted

if TYPE_CHECKING:
    from torch import Tensor

_CLASSES = {
    "resnet": "ResNetModel",
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "ijepa": "IJepaModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}


def refuse(backbone: Backbone) -> str | None:
    """Why transformers has no such network, or None."""
    if backbone.channel_order == "BGR":
        return "its image processors give RGB"
    if not backbone.is_vit:
        return "its ResNets pad symmetrically" if backbone.padding == "same" else None
    if _kind(backbone) is None or backbone.transformer.pre_norm or not backbone.transformer.final_norm:
        return "it has no ViT with these tokens, norms and layers"
    return None


def names(backbone: Backbone) -> dict[str, str]:
    """Artefact name → name in the file; one matrix becomes query, key and value."""
    from twist.converters.vit import joined_name, split

    if not backbone.is_vit:
        return {name: step.name for name, step in rename.outwards(_table(backbone), own_names(backbone)).items()}
    from twist.contracts.shapes import tensors_of

    found: dict[str, str] = {}
    for name, step in rename.outwards(_table(backbone), split(tensors_of(backbone))).items():
        whole = joined_name(name)
        found[whole] = f"{found[whole]} + {step.name}" if whole in found else step.name
    return found


def write(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """`model.safetensors`, as `save_pretrained` names its tensors."""
    import torch

    from twist.converters.vit import split

    whole = dict(tensors)
    if backbone.is_vit and _kind(backbone) == "dinov2_with_registers":
        # Its table has a row for the class token and none for the registers, which are added to these.
        rows, table = backbone.prefix_tokens if backbone.transformer.prefix_positions else 0, whole["pos_embed"]
        first = table[:, :1] if rows else torch.zeros_like(table[:, :1])
        whole["reg_token"] = whole["reg_token"] + (table[:, 1:rows] if rows else 0)
        whole["pos_embed"] = torch.cat([first, table[:, rows:]], dim=1)
    apart = split(whole) if backbone.is_vit else whole
    file = {step.name: apart[name] for name, step in rename.outwards(_table(backbone), apart).items()}
    if backbone.is_vit and backbone.transformer.layer_scale:  # DINOv2's networks have one, unused without masks
        file["embeddings.mask_token"] = torch.zeros(1, backbone.transformer.embed_dim)
    write_safetensors(path, file, {"format": "pt"})


def settings(backbone: Backbone) -> dict[str, str]:
    """`config.json`, with our header for the way back, and `preprocessor_config.json`."""
    kind = _kind(backbone)
    assert kind is not None
    if kind == "dinov2_with_registers":  # as `write` leaves them
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
        **(_vit_config(backbone, kind) if backbone.is_vit else _resnet_config(backbone)),
        METADATA_KEY: json.loads(backbone.model_dump_json()),
    }
    texts = {"config.json": config, "preprocessor_config.json": images}
    return {name: json.dumps(text, indent=2, sort_keys=True, allow_nan=False) + "\n" for name, text in texts.items()}


def usage(folder: Path, backbone: Backbone) -> str:
    """Lines that load network and image processor."""
    return f"""\
from transformers import AutoImageProcessor, AutoModel

network = AutoModel.from_pretrained({quoted(folder)}{_options(backbone, ", ")})
processor = AutoImageProcessor.from_pretrained({quoted(folder)})
"""


def framework(backbone: Backbone) -> tuple[ProofRun, str]:  # noqa: ARG001 (the same for every network)
    """The proof run by transformers."""
    return _run, f"transformers {importlib.metadata.version('transformers')}"


def _run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """Every stage of each image, by the image processor and the network that the folder gives."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    options = {"add_pooling_layer": False} if _options(backbone, "") else {}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    network, info = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    if shown:
        logging.enable_progress_bar()
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise ProofError(f"transformers does not find its tensors in the file ({len(wrong)}, first: {wrong[0]})")
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    # DINOv2's always resize the position table; the others do when they are asked.
    asked = {"interpolate_pos_encoding": True} if _options(backbone, "") else {}
    result = []
    for file in files:
        images = processor(images=Image.open(file).convert("RGB"), do_resize=False, return_tensors="pt")
        states = network.eval()(**images, output_hidden_states=True, **asked).hidden_states[1:]
        name, first = ("block", 0) if backbone.is_vit else ("res", 2)
        result.append({f"{name}{first + index}": state for index, state in enumerate(states)})
    return result


def _options(backbone: Backbone, comma: str) -> str:
    """The constructor's argument by which a ViT comes without a pooling layer that no backbone fills."""
    return f"{comma}add_pooling_layer=False" if _kind(backbone) in ("vit", "deit", "ijepa") else ""


def _kind(backbone: Backbone) -> str | None:
    """`model_type` of the network, None where there is none."""
    if not backbone.is_vit:
        return "resnet"
    vit = backbone.transformer
    if vit.layer_scale:
        fits = vit.class_token and _dinov2_features(backbone) == vit.mlp_features
        kind = "dinov2_with_registers" if vit.registers else "dinov2"
        return kind if fits and (vit.registers or vit.prefix_positions) else None
    if vit.mlp == "swiglu" or not vit.prefix_positions:
        return None
    return {(True, 0): "vit", (True, 1): "deit", (False, 0): "ijepa"}.get((vit.class_token, vit.registers))


def _table(backbone: Backbone) -> rename.Table:
    if not backbone.is_vit:
        return tables.HUGGINGFACE_RESNET
    swiglu = backbone.transformer.mlp == "swiglu"
    dinov2 = tables.HUGGINGFACE_DINOV2_SWIGLU if swiglu else tables.HUGGINGFACE_DINOV2
    return dinov2 if backbone.transformer.layer_scale else tables.HUGGINGFACE_VIT


def _dinov2_features(backbone: Backbone) -> int:
    """Features of the MLP that transformers' DINOv2 makes of `_ratio` (models/dinov2/modeling_dinov2.py)."""
    features = backbone.transformer.embed_dim * _ratio(backbone)
    return (int(features * 2 / 3) + 7) // 8 * 8 if backbone.transformer.mlp == "swiglu" else features


def _ratio(backbone: Backbone) -> int:
    """The whole number that it takes, of which SwiGLU keeps two thirds."""
    vit = backbone.transformer
    return round(vit.mlp_features / vit.embed_dim * (1.5 if vit.mlp == "swiglu" else 1))


def _vit_config(backbone: Backbone, kind: str) -> dict[str, Any]:
    vit = backbone.transformer
    dinov2 = {"mlp_ratio": _ratio(backbone), "use_swiglu_ffn": vit.mlp == "swiglu"}
    registers = {"num_register_tokens": vit.registers} if kind == "dinov2_with_registers" else {}
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": vit.mlp_features,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.norm_eps,
        "image_size": backbone.image_size,
        "patch_size": backbone.patch_size,
        "qkv_bias": vit.qkv_bias,
        **({**dinov2, **registers} if vit.layer_scale else {}),
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


def _changes(backbone: Backbone) -> dict[str, Any]:
    """It resizes the position table with antialiasing only for DINOv2 with registers."""
    return {"resize": "antialias" if _kind(backbone) == "dinov2_with_registers" else "plain"}


TARGET = Target(
    name="huggingface",
    title="Hugging Face transformers",
    weights="model.safetensors",
    package="transformers",
    extra="huggingface",
    names=names,
    write=write,
    framework=framework,
    usage=usage,
    refuse=refuse,
    settings=settings,
    changes=_changes,
    library="transformers",
)
