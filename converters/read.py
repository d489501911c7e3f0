"""Any checkpoint → the artefact in memory: find the layout by content, take one branch, check every tensor.

Every tensor of the file is either used or dropped by name; a name that the layout does not know is an error, because
that is how half a network goes missing. Nothing here imports a framework.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from twist.contracts import rename
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.rename import Table
from twist.contracts.weights import METADATA_KEY, Backbone, read_header
from twist.converters import sources, vit
from twist.converters.detect import (
    CONVERTED,
    Found,
    architecture_of,
    check_complete,
    expected_of,
    find,
    hub_pixels,
    known_network,
    matches,
    state_dicts,
)
from twist.converters.open import Contents, Opaque, read_contents

if TYPE_CHECKING:
    from torch import Tensor

# timm's names of the networks that an artefact describes; others (resnetaa50, resnet50_gn) may have the same tensors.
_TIMM_NAMES = re.compile(
    r"(tv_|gluon_|ssl_|swsl_)?resnet\d+(_v1b)?|(vit|deit)_(tiny|small|base|large|huge|giant)_patch\d+(_\d+|_dinov2|_reg4_dinov2)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been read: the artefact in memory, and what became of every tensor of the file."""

    tensors: dict[str, Tensor]
    backbone: Backbone
    sha256: str
    # artefact name → name in the file; tensors that the layout lacks and we filled are not in it.
    names: dict[str, str]
    dropped: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    unused_entries: dict[str, int] = field(default_factory=dict)  # entry → tensors in it
    dtype: str = "float32"
    notes: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()  # all that are in the file


def load_artefact(
    checkpoint: Path, *, layout: str | None = None, branch: str | None = None, heads: int | None = None
) -> tuple[dict[str, Tensor], Backbone]:
    """Tensors (artefact names, float32) and header of any supported checkpoint; our own artefact passes through.

    `heads` is the number of a ViT's attention heads, for a file that does not say it.

    Raises:
        UserError: the file is not readable, not supported, or does not hold the branch. One sentence.
        UsageError: there is no layout of that name.
    """
    source = load_source(checkpoint, layout=layout, branch=branch, heads=heads)
    # Copies: a reader's tensors are mapped onto the file, and would change with it.
    return {name: tensor.clone() for name, tensor in source.tensors.items()}, source.backbone


def load_source(
    checkpoint: Path,
    *,
    layout: str | None = None,
    branch: str | None = None,
    heads: int | None = None,
    allow_nan: bool = False,
) -> Source:
    """`load_artefact` with what became of every tensor; the tensors may be mapped onto the file."""
    contents = read_contents(Path(checkpoint))
    return read_source(contents, layout=layout, branch=branch, heads=heads, allow_nan=allow_nan)


def read_source(
    contents: Contents,
    *,
    layout: str | None = None,
    branch: str | None = None,
    heads: int | None = None,
    allow_nan: bool = False,
) -> Source:
    """The same for a file whose contents have been read already."""
    if layout is not None and layout not in sources.BY_NAME:
        raise UsageError(f'There is no layout "{layout}".{did_you_mean(layout, sources.BY_NAME)}')
    where = str(contents.path)
    if METADATA_KEY in contents.metadata:
        header = read_header(contents.path)
        for option, asked, is_ in (("from", layout, header.source_layout), ("branch", branch, header.source_branch)):
            if asked not in (None, is_):
                raise UserError(f"{where} was made from {is_}: leave --{option} away, or convert the original file.")
        layout = branch = None  # the header says more than any layout
    found = find(contents, layout=layout, branch=branch)
    backbone, dropped = _split(found, where)
    try:
        steps = rename.inwards(found.table, backbone)
    except rename.RenameError as error:
        reason = known_network(backbone) or "a backbone has no such tensor, take the file as its authors published it"
        raise UserError(f"{where} (layout {found.layout.name}): {str(error).rstrip('.')}; {reason}.") from None
    tensors = rename.apply(steps, backbone)
    shape = architecture_of(tensors, where)
    filled = fill(tensors, shape, found.table)
    ordered = check_complete(tensors, shape, where)
    _check_network(contents, shape["architecture"])
    earlier, shape = _described(contents, found, shape, heads, tensors)
    tensors, dtype = _float32({name: tensors[name] for name in ordered}, where)
    if not allow_nan:
        check_values(tensors, where)
    return Source(
        tensors=tensors,
        backbone=earlier or _header(contents, found, shape),
        sha256=contents.sha256,
        names={step.name: found.branch.prefix + name for name, step in steps.items()},
        dropped=tuple(dropped),
        filled=tuple(filled),
        unused_entries=_unused_entries(contents.value, found, where),
        dtype=dtype,
        notes=_notes(found, filled, dtype),
        branches=found.present,
    )


def _split(found: Found, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's tensors without prefix, and the names that the layout drops; `UserError` for any other name."""
    layout, prefix = found.layout, found.branch.prefix
    others = tuple(f"{branch.prefix}*" for branch in layout.branches if branch.prefix not in ("", prefix))
    backbone, dropped, unknown = {}, [], []
    for name, tensor in found.state.items():
        inside, tail = name.startswith(prefix), name[len(prefix) :]
        # A prefix wins over the drop list (`encoder_q.0.` over `encoder_q.*`); without one the list decides alone.
        if (inside and matches(tail, layout.heads)) or (not (inside and prefix) and matches(name, layout.drop)):
            dropped.append(name)
        elif inside:
            backbone[tail] = tensor
        elif matches(name, others):
            dropped.append(name)
        else:
            unknown.append(name)
    if unknown:
        reason = known_network(found.state) or "another layout may fit: name it with --from"
        raise UserError(
            f"{where}: {len(unknown)} tensors are neither the backbone's nor among those that the layout {layout.name} "
            f"drops (first: {unknown[0]}); {reason}."
        )
    return backbone, dropped


def fill(tensors: dict[str, Tensor], shape: Mapping[str, Any], table: Table) -> list[str]:
    """Add what the layout does not keep at all (BN's counter, Caffe2's statistics); return the names added."""
    import torch

    absent = tuple(end for end in table.absent if not any(name.endswith(end) for name in tensors))
    expected = expected_of(shape)
    filled = [name for name in expected if name not in tensors and absent and name.endswith(absent)]
    for name in filled:
        # As Detectron2 fills them when it loads these files (layers/batch_norm.py): mean 0, variance 1, counter 0.
        empty = torch.ones_like if name.endswith("running_var") else torch.zeros_like
        tensors[name] = empty(expected[name], device="cpu")
    return filled


def _check_network(contents: Contents, architecture: str) -> None:
    """`UserError` when the file says that it is another network of the same names and shapes."""
    reason = None
    named = None if METADATA_KEY in contents.hub else contents.hub.get("architecture")
    if isinstance(named, str) and not _TIMM_NAMES.fullmatch(named.partition(".")[0]):
        reason = f"its config.json calls it {named}, which is not the {architecture} it looks like"
    if reason is not None:
        raise UserError(f"{contents.path}: {reason}: frameworks would compute something else with these weights.")


def _described(
    contents: Contents, found: Found, shape: dict[str, Any], heads: int | None, tensors: Mapping[str, Tensor]
) -> tuple[Backbone | None, dict[str, Any]]:
    """The header that an earlier conversion left, or None; and `shape` with a ViT's whole description."""
    text, where = None, str(contents.path)
    if found.layout is CONVERTED:
        text = contents.metadata.get(METADATA_KEY) or contents.value[METADATA_KEY]
    elif found.layout.name == "timm" and METADATA_KEY in contents.hub:
        text = json.dumps(contents.hub[METADATA_KEY])
    if heads is not None and shape["vit"] is None:
        raise UserError(f"{where} is a {shape['architecture']}, which has no attention heads: leave --heads away.")
    if text is not None:
        header = _earlier_header(text, shape, where)
        if heads is not None and heads != header.transformer.heads:
            raise UserError(f"{where} says that it has {header.transformer.heads} heads: leave --heads away.")
        return header, {**shape, "vit": header.vit}
    return None, shape if shape["vit"] is None else vit.with_heads(shape, heads, contents, found.layout, tensors)


def _header(contents: Contents, found: Found, shape: dict[str, Any]) -> Backbone:
    value, layout = contents.value, found.layout
    pixels = (hub_pixels(contents) if layout.name == "timm" else None) or layout.pixels
    epoch = value.get("epoch")
    method = value
    for key in layout.method_at:
        method = _items(method).get(key)
    return Backbone(
        **shape,
        # The place of the stride and TensorFlow's padding are properties of bottlenecks and of convolutions.
        stride_in=layout.stride_in if shape["architecture"] not in ("resnet18", "resnet34") else "3x3",
        padding="symmetric" if shape["image_size"] else layout.padding,
        **pixels.model_dump(exclude={"label"}),
        method=method if layout.method_at and isinstance(method, str) else layout.method,
        epochs=epoch if layout.epoch_is_count and type(epoch) is int and epoch >= 0 else None,
        source_layout=layout.name,
        source_branch=found.branch.name,
        source_sha256=contents.sha256,
    )


def _earlier_header(text: str, shape: dict[str, Any], where: str) -> Backbone:
    """The header that an earlier conversion left in its output."""
    try:
        header = Backbone.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"{where}: the header that came with it is not valid ({error.errors()[0]['msg']}): convert the original "
            "again."
        ) from None
    # What no shape gives is the header's alone.
    unseen = dict.fromkeys(("heads", "positions", "norm_eps", "resize", "pooling")) if header.is_vit else {}
    seen = {key: value for key, value in shape.items() if key != "vit"}
    described = header.transformer.model_dump(exclude=set(unseen)) if header.is_vit else None
    shaped = shape["vit"] and shape["vit"].model_dump(exclude=set(unseen))
    if described != shaped or any(getattr(header, key) != value for key, value in seen.items()):
        raise UserError(
            f"{where}: the header says {header.display_name}, the tensors are {shape['architecture']}: one of them "
            "is not this file's; convert the original again."
        )
    return header


def _float32(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], str]:
    """The tensors as float32 (batch norms' counters as int64), and the dtype that they had."""
    import torch

    bad = next((name for name, t in tensors.items() if t.is_meta or t.layout is not torch.strided), None)
    if bad is not None:
        raise UserError(f"{where}: {bad} is a sparse tensor or one without values: save the network's plain tensors.")
    counters = {name for name in tensors if name.endswith(".num_batches_tracked")}
    kinds = sorted({str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if name not in counters})
    if len(kinds) != 1 or kinds[0] not in ("float32", "float16", "bfloat16"):
        raise UserError(
            f"{where} holds weights as {' and '.join(kinds)}: one of float32, float16 and bfloat16 is converted; take "
            "the float32 checkpoint."
        )
    # float16 and bfloat16 are exact in float32.
    return {
        name: tensor.to(torch.int64 if name in counters else torch.float32) for name, tensor in tensors.items()
    }, kinds[0]


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """`UserError` when weights are NaN or infinite, or a variance is negative."""
    # Smallest and largest in one pass: NaN and infinity show in either, and no second tensor is made.
    ranges = {name: t.aminmax() for name, t in tensors.items() if t.is_floating_point()}
    bad = [name for name, (least, most) in ranges.items() if not (least.isfinite() and most.isfinite())]
    bad += [name for name, (least, _) in ranges.items() if name.endswith(".running_var") and least < 0]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} tensors hold NaN or infinite values, or negative variances (first: {bad[0]}): the "
            "training diverged or the file was damaged; take an earlier checkpoint, or pass --allow-nan to convert it "
            "as it is."
        )


def _unused_entries(value: dict[str, Any], found: Found, where: str) -> dict[str, int]:
    """Entries with tensors other than the one that was used; `UserError` for one that nobody declared."""
    unused: dict[str, int] = {}
    layout, entry = found.layout, found.branch.entry
    known = (
        *layout.entries,
        *(branch.entry[0] for branch in layout.branches if branch.entry),
        *sources.TRAINING_ENTRIES,
    )
    for key, item in value.items():
        used = entry[1:] if entry[:1] == (key,) else None
        count = sum(len(tensors) for path, tensors in state_dicts(item) if path != used)
        if count == 0:
            continue
        if not matches(str(key), known):
            raise UserError(
                f"{where}: the entry {key} holds {count} tensors that the layout {layout.name} does not know: name "
                "another layout with --from, or save the network's state dict alone."
            )
        unused[str(key)] = count
    return unused


def _notes(found: Found, filled: list[str], dtype: str) -> tuple[str, ...]:
    layout, notes = found.layout, []
    if layout.lookalikes:
        notes.append(f"files of {layout.lookalikes} have the same names: for one of them say --from")
    if filled:
        endings = sorted({name.rpartition(".")[2] for name in filled})
        notes.append(f"{len(filled)} tensors that this layout does not keep were filled: {', '.join(endings)}")
    if dtype != "float32":
        notes.append(f"the file holds {dtype}; every value is exact in the float32 that is written")
    if layout.padding == "same":
        notes.append("this network was trained with TensorFlow's asymmetric 'same' padding")
    return tuple(notes)


def _items(value: Any) -> dict[Any, Any]:
    """Entries of a dictionary, or attributes of a settings object."""
    state = value.state if isinstance(value, Opaque) else value
    return state if isinstance(state, dict) else {}
