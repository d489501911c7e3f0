"""What a checkpoint says of its ViT: shapes give almost all of it, and the number of attention heads is evidence.

Twelve heads have the names and shapes of six. So heads are told (`--heads`), or said by the layout, by the settings in
the file or beside it, or by MoCo v3's fixed position table; otherwise the user is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from twist.contracts.errors import UserError
from twist.contracts.weights import VIT_SIZES, VITS, Vit, usual_vit
from twist.converters.evidence import vit_of_config
from twist.converters.open import Contents, Opaque
from twist.converters.sources import Layout

if TYPE_CHECKING:
    from torch import Tensor

PATCHES = (8, 14, 16, 32)
# Fields of a description that no shape gives.
UNSEEN = {"heads", "positions", "norm_eps", "resize", "pooling"}
# moco-v3 vits.py: 12 heads in both sizes.
MOCO_V3_HEADS, _MOCO_V3_SIZES = 12, (384, 768)
_NUM_HEADS = re.compile(r"(?<![A-Za-z_])num_(?:attention_)?heads[^\w\[]{1,4}(\d+)")
_MOCO_V3 = re.compile(r"moco[-_]?v3", re.IGNORECASE)
# Names of networks with the usual heads: timm's, DeiT's and MAE's.
_USUAL = re.compile(r"\b(?:mae_)?(?:vit|deit3?)_(tiny|small|base|large|huge)_patch\d+")


class HeadsUnknownError(UserError):
    """Nothing says how many heads a ViT has, or what says so disagrees; `usual` is the most frequent number."""

    def __init__(self, message: str, usual: int) -> None:
        super().__init__(message)
        self.usual = usual


def shape_of(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """The fields of a header that the shapes give; `heads` and all that no shape says are the usual ones.

    The row of the class token's position is added to the token where the table has none for the registers beside it
    (DINOv2): the sum is what that network computes, and timm's table then covers the patches alone.

    Raises:
        UserError: no header describes such a ViT.
    """
    dimension, _, patch, *_ = (*tensors["patch_embed.proj.weight"].shape, 0, 0, 0)
    size = VIT_SIZES.get(dimension)
    if size is None or patch not in PATCHES:
        sizes = ", ".join(f"{name} ({features})" for features, name in VIT_SIZES.items())
        raise UserError(
            f"{where}: a ViT with dimension {dimension} and patches of {patch} pixels; known are {sizes}, with patches "
            f"of {', '.join(map(str, PATCHES))} pixels."
        )
    class_token = "cls_token" in tensors
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    side, prefix_positions = _table(tensors, class_token, registers, where)
    first, second = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    features = second.shape[1] if second is not None and second.ndim == 2 else 4 * dimension
    usual = usual_vit(f"vit_{size}_patch{patch}")
    fields = {
        "embed_dim": dimension,
        "depth": 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=0),
        "heads": usual.heads if dimension == usual.embed_dim else 16,  # 1408: Zhai et al. 2022
        "mlp_features": features,
        "mlp": "swiglu" if first is not None and first.shape[0] == 2 * features else "gelu",
        "class_token": class_token,
        "registers": registers,
        "layer_scale": "blocks.0.ls1.gamma" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "positions": "learned" if sincos(tensors["pos_embed"]) is None else "sincos",
        "prefix_positions": prefix_positions,
        "pre_norm": "norm_pre.weight" in tensors,
        "final_norm": "norm.weight" in tensors,
        "pooling": "token" if class_token else "avg",
    }
    vit = Vit.model_validate(fields)
    return {
        "architecture": f"vit_{size}_patch{patch}",
        "width": 1,
        "stem": f"patch{patch}",
        "image_size": patch * side,
        "vit": vit,
    }


_PARTS = re.compile(r"\.attn\.[qkv]\.")


def joined_name(name: str) -> str:
    """`blocks.0.attn.qkv.weight` for that of the query, key or value alone; other names as they are."""
    return _PARTS.sub(".attn.qkv.", name)


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with query, key and value of each block in timm's one matrix; what lacks one of them stays apart."""
    import torch

    whole = {}
    for name, tensor in tensors.items():
        parts = [tensors.get(_PARTS.sub(f".attn.{part}.", name)) for part in "qkv"]
        if joined_name(name) == name or any(part is None for part in parts):
            whole[name] = tensor
        elif tensor is parts[0]:
            whole[joined_name(name)] = torch.cat(parts)  # type: ignore[arg-type]
    return whole


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `joined`."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = zip("qkv", tensor.chunk(3)) if ".attn.qkv." in name else (("qkv", tensor),)
        apart |= {name.replace(".attn.qkv.", f".attn.{part}."): piece for part, piece in parts}
    return apart


def described(
    shape: dict[str, Any],
    heads: int | None,
    contents: Contents,
    layout: Layout,
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """`shape` with the heads that are told or that evidence gives, and what Hugging Face's settings or the layout say;
    `vit` is None for the usual network of the name.

    Raises:
        HeadsUnknownError: there is no evidence, or it disagrees.
        UserError: the dimension is no multiple of the heads, or the activation is not known.
    """
    usual = usual_vit(shape["architecture"])
    vit: Vit = shape["vit"]
    if vit.pre_norm:
        raise UserError(
            f"{contents.path} is a ViT with a norm before its blocks (CLIP), and no tensor says whether its MLPs have "
            "GELU or quick GELU, so it is not converted; take a plain ViT's weights."
        )
    described = vit_of_config(contents)
    if described is not None and described.model_dump(exclude=UNSEEN) == vit.model_dump(exclude=UNSEEN):
        return {**shape, "vit": described}
    if heads is None:
        said = _evidence(contents, layout, vit, tensors)
        if len(said) != 1:
            raise HeadsUnknownError(_question(str(contents.path), vit, said), vit.heads)
        heads = next(iter(said))
    epsilon = contents.beside.get("config.json", {}).get("layer_norm_eps", layout.norm_eps)
    try:
        vit = Vit.model_validate({**vit.model_dump(), "heads": heads, "resize": layout.resize, "norm_eps": epsilon})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{contents.path}: {reason}: say another number of --heads, or mend config.json.") from None
    return {**shape, "vit": None if vit == usual else vit}


def sincos(table: Tensor) -> Literal["moco-v3", "mae"] | None:
    """Whose fixed table of sines and cosines (1, 1 + N², D) it is, with a class row of exactly zero; else None.

    MoCo v3 (vits.py) begins with the positions down the image, MAE (util/pos_embed.py) with those across.
    """
    import torch

    side, dimension = round((table.shape[1] - 1) ** 0.5), table.shape[2]
    if side * side != table.shape[1] - 1 or side < 2 or dimension % 4 or table[:, 0].any():
        return None
    frequencies = 10000.0 ** -(torch.arange(dimension // 4, dtype=torch.float64) / (dimension // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (N, D / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (N, D / 2)
    down, across = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    square = table[0, 1:].reshape(side, side, dimension).double()
    # bfloat16 rounds to 1/256.
    if (square - torch.cat([down, across], dim=2)).abs().max() < 5e-3:
        return "moco-v3"
    return "mae" if (square - torch.cat([across, down], dim=2)).abs().max() < 5e-3 else None


def _table(tensors: dict[str, Tensor], class_token: bool, registers: int, where: str) -> tuple[int, bool]:
    """Side of the position table's grid, and whether the table has rows for the prefix tokens."""
    table = tensors.get("pos_embed")
    rows = table.shape[1] if table is not None and table.ndim == 3 else 0
    for prefix in dict.fromkeys((class_token + registers, int(class_token), 0)):
        side = round(max(rows - prefix, 0) ** 0.5)
        if table is None or side < 1 or side * side != rows - prefix:
            continue
        if prefix == 1 and registers:  # DINOv2
            tensors["cls_token"] = tensors["cls_token"] + table[:, :1]
            tensors["pos_embed"] = table[:, 1:]
            return side, False
        return side, prefix > 0 or not class_token + registers
    raise UserError(
        f"{where}: the position table holds {rows} positions, not one for each prefix token ({class_token:d} class "
        f"token, {registers} registers) or none, and a square grid; others are not converted, since a resize could not "
        "be undone."
    )


def _evidence(contents: Contents, layout: Layout, vit: Vit, tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """Number of heads → what says so: the strongest kind of evidence that there is, which may disagree with itself."""
    inside = {"its settings": contents.value, "config.json": contents.hub}
    kinds = [
        {heads: place for place, settings in inside.items() for heads in _numbers(settings)},
        {layout.vit_heads or vit.heads: f"the layout {layout.name}"} if layout.heads_known or layout.vit_heads else {},
        {heads: place for place, settings in inside.items() for heads in _named(settings, vit)},
        {heads: place for place, settings in contents.beside.items() for heads in _numbers(settings)},
        {heads: place for place, settings in contents.beside.items() for heads in _named(settings, vit)},
    ]
    if vit.embed_dim in _MOCO_V3_SIZES and sincos(tensors["pos_embed"]) == "moco-v3":
        kinds.append({MOCO_V3_HEADS: "the position table"})
    return next((said for said in kinds if said), {})


def _numbers(settings: Any) -> set[int]:
    """Numbers of heads in nested settings."""
    return {int(number) for number in _NUM_HEADS.findall(_text(settings))}


def _named(settings: Any, vit: Vit) -> set[int]:
    """Heads of the known networks that nested settings name: MoCo v3's, or the usual ones of that size."""
    text = _text(settings)
    if _MOCO_V3.search(text) and vit.embed_dim in _MOCO_V3_SIZES:
        return {MOCO_V3_HEADS}
    named = {VITS[size] for size in _USUAL.findall(text)}
    return {heads for dimension, _, heads, _ in named if dimension == vit.embed_dim}


def _text(settings: Any) -> str:
    return json.dumps(settings, default=lambda item: item.state if isinstance(item, Opaque) else None, skipkeys=True)


def _question(where: str, vit: Vit, said: Mapping[int, str]) -> str:
    choice = f"--heads {vit.heads} for the usual number"
    if vit.embed_dim == VITS["small"][0]:
        choice = f"--heads {vit.heads} (DeiT's, DINO's and timm's ViT-S) or --heads {MOCO_V3_HEADS} (MoCo v3's)"
    if said:
        places = ", ".join(f"{heads} heads by {place}" for heads, place in said.items())
        return f"{where}: what says how many heads this ViT has disagrees ({places}): say {choice}."
    return (
        f"{where}: nothing in the file or beside it says how many heads this ViT of {vit.embed_dim} features has, and "
        f"the shapes are the same for any number: say {choice}, or name the source with --from."
    )
