"""Which network a set of arrays is: the artefact's names, the architecture by shapes, and every tensor in its place."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from twist.contracts import rename
from twist.contracts.errors import UserError
from twist.contracts.shapes import shapes_of
from twist.contracts.weights import RESNETS, TIMM, VIT_SIZES, Vit, difference, usual_vit
from twist.converters import sources

Arrays = dict[str, np.ndarray[Any, Any]]
DTYPES = ("float32", "float16", "bfloat16", "float64")
PATCHES = (8, 14, 16, 32)
# Fields of a ViT's description that no shape gives.
UNSEEN = {"heads", "positions", "norm_eps", "resize", "pooling", "rope_base"}


@dataclass(frozen=True)
class Network:
    """A whole network in the artefact's names and order."""

    arrays: Arrays
    shape: dict[str, Any]  # fields of a header: architecture, width, stem, image_size, vit
    steps: dict[str, rename.Step]  # of each name in the file
    filled: tuple[str, ...]  # what the layout does not keep

    @property
    def dtypes(self) -> str:
        """`float16 and float32`"""
        return " and ".join(sorted({kind_of(a) for name, a in self.arrays.items() if not _is_counter(name)}))


@functools.cache
def timm_table(architecture: str) -> rename.Table:
    """The names of a network `timm:NAME`, which are the artefact's. `UserError` where timm has no such network."""
    rows = tuple(("tensor", name, name) for name in shapes_of(architecture))
    return rename.Table(architecture, rows, absent=(".num_batches_tracked",))  # type: ignore[arg-type]


def timm_heads(table: rename.Table) -> tuple[str, ...]:
    """Patterns of what timm calls the network's classifiers."""
    from twist.contracts.timm_networks import outline

    named = outline(table.name).settings.get("classifier") or ()
    return tuple(f"{name}.*" for name in ((named,) if isinstance(named, str) else named))


def assemble(inside: Arrays, table: rename.Table, where: str) -> Network:
    """The network that `inside` is under the table's names.

    Raises:
        UserError: a tensor has no place, is missing or misshapen, or it is another network; one sentence.
    """
    try:
        steps = rename.inwards(table, inside)
        arrays = joined(rename.apply(steps, inside))
        kinds = sorted({kind_of(array) for name, array in arrays.items() if not _is_counter(name)})
        if not set(kinds) <= set(DTYPES):
            raise UserError(
                f"{where} holds weights as {' and '.join(kinds)}: {', '.join(DTYPES)} are converted; take the plain "
                "checkpoint that was trained."
            )
        named = table.name.startswith(TIMM)
        shape = _timm_shape(table.name) if named else architecture_of(arrays, where)
        expected = shapes_of(**{key: value for key, value in shape.items() if key != "stem"})
        filled = fill(arrays, expected, table)
        reason = difference(expected, arrays, values=False)
        if reason is not None:
            why = "" if named else ". ResNeXt (grouped convolutions) and wide_resnet have its names and other shapes"
            raise UserError(f"{where}: not a plain {shape['architecture']}: {reason}{why}.")
    except UserError as error:
        known = None if table.name.startswith(TIMM) else known_network(inside)
        text = f" cannot be converted: {known}" if known else f": {str(error).removeprefix(f'{where}: ').rstrip('.')}"
        raise UserError(f"{where}{text}.") from None
    return Network({name: arrays[name] for name in expected}, shape, steps, tuple(filled))


def kind_of(array: np.ndarray[Any, Any]) -> str:
    """`float32`; `bfloat16` and others that numpy has not are the name of their one field."""
    return array.dtype.names[0] if array.dtype.names else array.dtype.name


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


def known_network(names: Mapping[str, Any]) -> str | None:
    """Why a state dict with these names (cleaned) is of a well-known network that is not converted; else None."""
    text = "\n".join(names)  # one search a pattern, not one a name

    def found(pattern: str) -> bool:
        return re.search(pattern, text, re.MULTILINE) is not None

    rows = (row for row in sources.FOREIGN if all(map(found, row.has)) and not (row.lacks and found(row.lacks)))
    return next((f"{row.says}; {row.do}" for row in rows), None)


def fill(arrays: Arrays, expected: Arrays, table: rename.Table) -> list[str]:
    """Add what the layout does not keep at all (BN's counter, Caffe2's statistics); return the names added."""
    absent = tuple(end for end in table.absent if not any(name.endswith(end) for name in arrays))
    filled = [name for name in expected if name not in arrays and absent and name.endswith(absent)]
    for name in filled:
        # As Detectron2 fills them when it loads these files (layers/batch_norm.py): mean 0, variance 1, counter 0.
        arrays[name] = np.full_like(expected[name], name.endswith("running_var"), subok=False)
    return filled


def architecture_of(arrays: Arrays, where: str) -> dict[str, Any]:
    """The fields of a header that shapes give: architecture, width, stem, image size, and of a ViT the description.

    Raises:
        UserError: the stem and the number of blocks are those of no architecture.
    """
    if "patch_embed.proj.weight" in arrays:
        return _vit_of(arrays, where)
    if "conv1.weight" not in arrays:
        raise UserError(f"{where}: there is no conv1.weight of a ResNet and no patch_embed.proj.weight of a ViT in it.")
    stem = tuple(arrays["conv1.weight"].shape)
    if stem not in ((64, 3, 7, 7), (128, 3, 7, 7), (256, 3, 7, 7)):
        raise UserError(
            f"{where}: conv1.weight is {stem}, expected (64·w, 3, 7, 7) with the widths w = 1, 2, 4: only the 7×7 RGB "
            "stem of ImageNet's ResNets is converted, no 3×3 stem for small images and no other order of axes."
        )
    blocks = tuple(_blocks(arrays, f"layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in arrays
    for name, layout in RESNETS.items():
        if layout == (blocks, bottleneck):
            return {"architecture": name, "width": stem[0] // 64, "stem": "conv7x7", "image_size": None, "vit": None}
    kind = "bottleneck" if bottleneck else "basic"
    raise UserError(f"{where}: a ResNet with {blocks} {kind} blocks is none of {', '.join(RESNETS)}.")


def _timm_shape(architecture: str) -> dict[str, Any]:
    from twist.contracts.timm_networks import outline

    settings = outline(architecture).settings
    side = settings["input_size"][1] if settings.get("fixed_input_size") else None
    return {"architecture": architecture, "width": 1, "stem": "own", "image_size": side, "vit": None}


def _blocks(arrays: Arrays, prefix: str) -> int:
    return 1 + max((int(name.split(".")[1]) for name in arrays if name.startswith(prefix)), default=-1)


def _vit_of(arrays: Arrays, where: str) -> dict[str, Any]:
    """`architecture_of` of a ViT; `heads` and all that no shape says are the usual ones.

    The row of the class token's position is added to the token where the table has none for the registers beside it
    (DINOv2): the sum is what that network computes, and timm's table then covers the patches alone.
    """
    axes = arrays["patch_embed.proj.weight"].shape
    dimension, patch = (axes[0], axes[2]) if len(axes) == 4 else (0, 0)
    rope = "pos_embed" not in arrays and "blocks.0.gamma_1" in arrays  # DINOv3, as timm names it
    size = VIT_SIZES.get(dimension)
    if size is None or patch not in PATCHES:
        sizes = ", ".join(f"{name} ({features})" for features, name in VIT_SIZES.items())
        raise UserError(
            f"{where}: a ViT with dimension {dimension} and patches of {patch} pixels; known are {sizes}, with patches "
            f"of {', '.join(map(str, PATCHES))} pixels."
        )
    class_token = "cls_token" in arrays
    registers = arrays["reg_token"].shape[1] if "reg_token" in arrays else 0
    side, prefix_positions = (14, False) if rope else _table(arrays, class_token, registers, where)
    first, second = (arrays.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    features = second.shape[1] if second is not None and second.ndim == 2 else 4 * dimension
    usual = usual_vit(f"vit_{size}_patch{patch}")
    vit = Vit(
        embed_dim=dimension,
        depth=max(_blocks(arrays, "blocks."), 1),
        # 1408: Zhai et al. 2022; 64 features a head: dinov3/models/vision_transformer.py
        heads=dimension // 64 if rope else usual.heads if dimension == usual.embed_dim else 16,
        mlp_features=features,
        mlp="swiglu" if first is not None and first.shape[0] == 2 * features else "gelu",
        class_token=class_token,
        registers=registers,
        layer_scale="blocks.0.ls1.gamma" in arrays or rope,
        qkv_bias="blocks.0.attn.qkv.bias" in arrays or "blocks.0.attn.q_bias" in arrays,
        positions="learned" if rope or sincos(arrays["pos_embed"]) is None else "sincos",
        prefix_positions=prefix_positions,
        pre_norm="norm_pre.weight" in arrays,
        final_norm="norm.weight" in arrays,
        pooling="token" if class_token else "avg",
        **({"norm_eps": 1e-5, "rope_base": 100.0} if rope else {}),  # type: ignore[arg-type]
    )
    named = {"architecture": f"vit_{size}_patch{patch}", "width": 1, "stem": f"patch{patch}"}
    return {**named, "image_size": patch * side, "vit": vit}


def _table(arrays: Arrays, class_token: bool, registers: int, where: str) -> tuple[int, bool]:
    """Side of the position table's grid, and whether the table has rows for the prefix tokens."""
    table = arrays.get("pos_embed")
    rows = table.shape[1] if table is not None and table.ndim == 3 else 0
    for prefix in dict.fromkeys((class_token + registers, int(class_token), 0)):
        side = round(max(rows - prefix, 0) ** 0.5)
        if table is None or side < 1 or side * side != rows - prefix:
            continue
        if prefix == 1 and registers:  # DINOv2
            arrays["cls_token"] = arrays["cls_token"] + table[:, :1]
            arrays["pos_embed"] = table[:, 1:]
            return side, False
        return side, prefix > 0 or not class_token + registers
    raise UserError(
        f"{where}: the position table holds {rows} positions, not one for each prefix token ({class_token:d} class "
        f"token, {registers} registers) or none, and a square grid; others are not converted, since a resize could not "
        "be undone."
    )


def sincos(table: np.ndarray[Any, Any]) -> Literal["moco-v3", "mae"] | None:
    """Whose fixed table of sines and cosines (1, 1 + N², D) it is, with a class row of exactly zero; else None.

    MoCo v3 (vits.py) begins with the positions down the image, MAE (util/pos_embed.py) with those across.
    """
    side, dimension = round((table.shape[1] - 1) ** 0.5), table.shape[2]
    if side * side != table.shape[1] - 1 or side < 2 or dimension % 4 or table.dtype.names or table[:, 0].any():
        return None
    frequencies = 10000.0 ** -(np.arange(dimension // 4) / (dimension // 4))
    angles = np.arange(side)[:, None] * frequencies  # (N, D / 4)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (N, D / 2)
    shape = (side, side, dimension // 2)
    down, across = np.broadcast_to(waves[:, None], shape), np.broadcast_to(waves[None], shape)
    square = table[0, 1:].reshape(side, side, dimension)
    # bfloat16 rounds to 1/256.
    if np.abs(square - np.concatenate([down, across], axis=2)).max() < 5e-3:
        return "moco-v3"
    return "mae" if np.abs(square - np.concatenate([across, down], axis=2)).max() < 5e-3 else None


# ---- Matrices that are apart in some files and one in timm's ---------------------------------------------------------

# Ending of a part, ending of the whole, and all parts in their order.
_PARTS = {
    f".{place}{part}.": (f".{place}{whole}.", tuple(f".{place}{one}." for one in parts))
    for place, whole, parts in (("attn.", "qkv", "qkv"), ("mlp.", "fc1", ("fc1_g", "fc1_x")))
    for part in parts
}
# A bias of query, key and value at once, of which DINOv3's networks have no key's (it is masked).
_BIAS = ".attn.qkv_bias"


def joined_names(name: str) -> tuple[str, ...]:
    """`blocks.0.attn.qkv.weight` for that of the query, key or value alone; other names as they are."""
    if name.endswith(_BIAS):
        return tuple(name.replace(_BIAS, f".attn.{part}_bias") for part in "qv")
    whole = next((name.replace(part, whole) for part, (whole, _) in _PARTS.items() if part in name), name)
    return (whole,)


def joined(arrays: Mapping[str, Any]) -> Arrays:
    """The same with each block's parts in timm's one matrix; what lacks one of them stays apart."""
    whole: dict[str, Any] = {}
    for name, array in arrays.items():
        if name.endswith(_BIAS):
            third = len(array) // 3
            whole |= dict(zip(joined_names(name), (array[:third], array[2 * third :])))
            continue
        part = next((part for part in _PARTS if part in name), None)
        pieces = [arrays.get(name.replace(part, other)) for other in _PARTS[part][1]] if part else []
        if not part or any(piece is None for piece in pieces):
            whole[name] = array
        elif array is pieces[0]:
            whole[joined_names(name)[0]] = np.concatenate(pieces)  # type: ignore[arg-type]
    return whole


def split(arrays: Mapping[str, Any], *, gates: bool = False) -> dict[str, Any]:
    """The inverse of `joined` for query, key and value, and with `gates` for SwiGLU's; of arrays or tensors."""
    apart: dict[str, Any] = {}
    wholes = {whole: parts for whole, parts in _PARTS.values() if gates or "attn" in whole}
    for name, array in arrays.items():
        whole = next((whole for whole in wholes if whole in name), None)
        parts = wholes[whole] if whole else ("",)
        size = len(array) // len(parts) if whole else 0
        for index, part in enumerate(parts):
            piece = array[index * size : (index + 1) * size] if whole else array
            apart[name.replace(whole, part) if whole else name] = piece
    return apart
