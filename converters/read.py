"""Any checkpoint → the artefact in memory: find the layout by content, take one branch, account for the rest.

Every tensor of the file is either used or dropped by name; a name that the layout does not know is an error, because
that is how half a network goes missing. Nothing here imports a framework.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from twist.contracts import rename
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.rename import Table
from twist.contracts.weights import METADATA_KEY, Backbone, read_header
from twist.converters import hub, manifest, settings, sources
from twist.converters.containers import Contents, read_contents
from twist.converters.detect import CONVERTED, Found, find, matches, state_dicts
from twist.converters.sources import Branch, Layout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been read: the artefact in memory and the account of every tensor."""

    tensors: dict[str, Tensor]
    backbone: Backbone
    sha256: str
    # artefact name → name in the file; tensors that the layout lacks and we filled are not in it.
    names: dict[str, str]
    dropped: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    left_aside: dict[str, int] = field(default_factory=dict)  # entry → tensors in it
    dtype: str = "float32"
    notes: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()  # all that are in the file


def load_artefact(
    checkpoint: Path, *, layout: str | None = None, branch: str | None = None
) -> tuple[dict[str, Tensor], Backbone]:
    """Tensors (artefact names, float32) and header of any supported checkpoint; our own artefact passes through.

    Raises:
        UserError: the file is not readable, not supported, or does not hold the branch. One sentence.
        UsageError: there is no layout of that name.
    """
    source = load_source(checkpoint, layout=layout, branch=branch)
    # Copies: a reader's tensors are mapped onto the file, and would change with it.
    return {name: tensor.clone() for name, tensor in source.tensors.items()}, source.backbone


def load_source(
    checkpoint: Path, *, layout: str | None = None, branch: str | None = None, allow_nan: bool = False
) -> Source:
    """`load_artefact` with the account of every tensor of the file; the tensors may be mapped onto it."""
    return account(read_contents(Path(checkpoint)), layout=layout, branch=branch, allow_nan=allow_nan)


def account(
    contents: Contents, *, layout: str | None = None, branch: str | None = None, allow_nan: bool = False
) -> Source:
    """The same for a file whose contents have been read already."""
    if layout is not None and layout not in sources.BY_NAME:
        raise UsageError(f'There is no layout "{layout}".{did_you_mean(layout, sources.BY_NAME)}')
    if METADATA_KEY in contents.metadata:  # our own header says more than any layout
        return _from_artefact(contents, layout, branch, allow_nan)
    return _account(contents, find(contents, layout=layout, branch=branch), allow_nan)


def _account(contents: Contents, found: Found, allow_nan: bool) -> Source:
    layout, branch, where = found.layout, found.branch, str(contents.path)
    backbone, dropped, others = _divide(found)
    if others:
        foreign = manifest.explain_foreign(list(found.state))
        raise UserError(
            f"{where}: {len(others)} tensors are neither the backbone's nor among those that the layout {layout.name} "
            f"drops (first: {others[0]}); {foreign or 'another layout may fit: name it with --from'}."
        )
    try:
        steps = rename.inwards(found.table, backbone)
    except rename.RenameError as error:
        foreign = manifest.explain_foreign(list(backbone))
        raise UserError(f"{where} (layout {layout.name}): {str(error).rstrip('.')}; {foreign or _EXTRA}.") from None
    tensors = rename.apply(steps, backbone)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    geometry = manifest.guess(shapes, where=where)
    filled = _fill(tensors, geometry, found.table)
    manifest.recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()}, where=where)
    _check_network(contents, layout, geometry)
    tensors, dtype = _float32(tensors, where)
    check_values(tensors, where, allow_nan)
    ordered = {name: tensors[name] for name in manifest.shapes_of(geometry)}
    prefix = found.branch.prefix
    return Source(
        tensors=ordered,
        backbone=_header(contents, found, geometry),
        sha256=contents.sha256,
        names={step.name: prefix + name for name, step in steps.items()},
        dropped=tuple(dropped),
        filled=tuple(filled),
        left_aside=_left_aside(contents.value, layout, branch, where),
        dtype=dtype,
        notes=_notes(found, geometry, settings.heads_of_vit_small(contents.value), filled, dtype),
        branches=found.present,
    )


_EXTRA = "a backbone has no such tensor, take the file as its authors published it"


def _divide(found: Found) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """(backbone tensors without prefix, dropped names, names nobody knows) of the branch's state dict."""
    layout, prefix = found.layout, found.branch.prefix
    others = tuple(f"{branch.prefix}*" for branch in layout.branches if branch.prefix not in ("", prefix))
    backbone, dropped, unknown = {}, [], []
    for name, tensor in found.state.items():
        inside, tail = name.startswith(prefix), name[len(prefix) :]
        # A prefix wins over the drop list (`encoder_q.0.` over `encoder_q.*`); without one the list speaks for all.
        if (inside and matches(tail, layout.heads)) or (not (inside and prefix) and matches(name, layout.drop)):
            dropped.append(name)
        elif inside:
            backbone[tail] = tensor
        elif matches(name, others):
            dropped.append(name)
        else:
            unknown.append(name)
    return backbone, dropped, unknown


def _check_network(contents: Contents, layout: Layout, geometry: manifest.Geometry) -> None:
    """`UserError` when the file says that it is another network of the same names and shapes."""
    where, reason = str(contents.path), None
    for architecture, why in layout.refuse:
        reason = why if geometry.architecture == architecture else reason
    heads = settings.heads_of_vit_small(contents.value)
    if geometry.architecture == "vit_small_patch16" and heads not in (None, settings.VIT_SMALL_HEADS):
        reason = f"its settings give this ViT-S {heads} heads, as MoCo v3's has, and the usual ViT-S/16 has 6"
    reason = reason or hub.other_network(contents.path, geometry.architecture)
    if reason is not None:
        raise UserError(f"{where}: {reason}: frameworks would compute something else with these weights.")


def _header(contents: Contents, found: Found, geometry: manifest.Geometry) -> Backbone:
    value, layout = contents.value, found.layout
    if layout.name == CONVERTED:
        return _carried(value[METADATA_KEY], geometry, str(contents.path))
    if layout.name == "timm" and METADATA_KEY in hub.config_of(contents.path):
        return _carried(json.dumps(hub.config_of(contents.path)[METADATA_KEY]), geometry, str(contents.path))
    pixels = (hub.pixels_of(contents.path) if layout.name == "timm" else None) or layout.pixels
    epoch = value.get("epoch")
    return Backbone(
        architecture=geometry.architecture,  # type: ignore[arg-type]
        width=geometry.width,  # type: ignore[arg-type]
        stem="patch16" if geometry.image_size else "conv7x7",
        # The place of the stride and TensorFlow's padding are properties of bottlenecks and of convolutions.
        stride_in=layout.stride_in if geometry.architecture not in ("resnet18", "resnet34") else "3x3",
        padding="symmetric" if geometry.image_size else layout.padding,
        image_size=geometry.image_size,
        channel_order=pixels.channel_order,
        mean=pixels.mean,
        std=pixels.std,
        input_range=pixels.input_range,
        method=settings.text_at(value, layout.method_at) or layout.method,
        epochs=epoch if layout.epoch_is_count and type(epoch) is int and epoch >= 0 else None,
        source_layout=layout.name,
        source_branch=found.branch.name,
        source_sha256=contents.sha256,
    )


def _carried(text: str, geometry: manifest.Geometry, where: str) -> Backbone:
    """The header that an earlier conversion left in its output."""
    try:
        header = Backbone.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"{where}: the header that came with it is not valid ({error.errors()[0]['msg']}): convert the original "
            "again."
        ) from None
    _check_geometry(header, geometry, where)
    return header


def _check_geometry(header: Backbone, geometry: manifest.Geometry, where: str) -> None:
    said = manifest.Geometry(header.architecture, header.width, header.image_size)
    if said != geometry:
        raise UserError(
            f"{where}: the header says {header.display_name}, the tensors are {geometry.architecture}: one of them "
            "is not this file's; convert the original again."
        )


def _fill(tensors: dict[str, Tensor], geometry: manifest.Geometry, table: Table) -> list[str]:
    """Add what the layout does not keep at all (BN's counter, Caffe2's statistics); return the names added."""
    import torch

    absent = tuple(end for end in table.absent if not any(name.endswith(end) for name in tensors))
    filled = []
    for name, shape in manifest.shapes_of(geometry).items():
        if name not in tensors and absent and name.endswith(absent):
            if name.endswith(".num_batches_tracked"):
                tensors[name] = torch.zeros((), dtype=torch.int64)
            else:
                # As Detectron2 fills them when it loads these files (layers/batch_norm.py): mean 0, variance 1.
                tensors[name] = torch.ones(shape) if name.endswith("var") else torch.zeros(shape)
            filled.append(name)
    return filled


def _float32(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], str]:
    import torch

    hollow = next((name for name, t in tensors.items() if t.is_meta or t.layout is not torch.strided), None)
    if hollow is not None:
        raise UserError(
            f"{where}: {hollow} is a sparse tensor or one without values: save the network's plain tensors."
        )
    counters = {name for name in tensors if name.endswith(".num_batches_tracked")}
    kinds = sorted({str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if name not in counters})
    if len(kinds) != 1:
        raise UserError(
            f"{where} mixes number formats ({', '.join(kinds)}) within the backbone: nobody can say which tensors lost "
            "precision; take the float32 checkpoint."
        )
    if kinds[0] not in ("float32", "float16", "bfloat16"):
        raise UserError(f"{where} holds weights as {kinds[0]}: float32, float16 and bfloat16 are converted.")
    # float16 and bfloat16 are exact in float32.
    return {
        name: tensor.to(torch.int64 if name in counters else torch.float32) for name, tensor in tensors.items()
    }, kinds[0]


def check_values(tensors: Mapping[str, Tensor], where: str, allow_nan: bool) -> None:
    """`UserError` when weights are NaN or infinite, or a variance is negative, unless that is allowed."""
    if allow_nan:
        return
    # Smallest and largest in one pass: NaN and infinity show in either, and no second tensor is made.
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not all(v.isfinite() for v in t.aminmax())]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} tensors hold NaN or infinite values (first: {bad[0]}): the training diverged; take "
            "an earlier checkpoint, or pass --allow-nan to convert it as it is."
        )
    bad = [name for name, tensor in tensors.items() if name.endswith(".running_var") and bool(tensor.amin() < 0)]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} running variances hold negative values (first: {bad[0]}), which no batch norm "
            "computes: the file was damaged or edited; take it as its authors published it, or pass --allow-nan."
        )


def _notes(
    found: Found, geometry: manifest.Geometry, heads: int | None, filled: list[str], dtype: str
) -> tuple[str, ...]:
    layout, notes = found.layout, []
    if layout.name == "torchvision":
        notes.append(
            "plain names with a classifier are taken for torchvision's; conversions of BYOL and SimCLR look the same, "
            "and need --from byol-torch or --from simclr-torch"
        )
    if layout.lookalikes:
        notes.append(f"the names are those of {layout.lookalikes}, too: if it is one, say --from")
    if geometry.architecture == "vit_small_patch16" and heads is None and not layout.heads_known:
        notes.append("nothing in the file says how many heads this ViT-S has: 6 are taken, MoCo v3's has 12")
    if filled:
        endings = sorted({name.rpartition(".")[2] for name in filled})
        notes.append(f"{len(filled)} tensors that this layout does not keep were filled: {', '.join(endings)}")
    if dtype != "float32":
        notes.append(f"the file holds {dtype}; every value is exact in the float32 that is written")
    if layout.padding == "same":
        notes.append("this network was trained with TensorFlow's asymmetric 'same' padding")
    return tuple(notes)


def _left_aside(value: dict[str, Any], layout: Layout, branch: Branch, where: str) -> dict[str, int]:
    """Entries with tensors beside the one that was used; `UserError` for one that nobody declared."""
    aside: dict[str, int] = {}
    others = tuple(other.entry[0] for other in layout.branches if other.entry)
    for key, item in value.items():
        used = branch.entry[1:] if branch.entry[:1] == (key,) else None
        count = sum(len(tensors) for path, tensors in state_dicts(item) if path != used)
        # A tensor at the top of the file is a name of the state dict, not an entry.
        if count == 0 or not isinstance(item, (dict, list)):
            continue
        if not matches(str(key), (*layout.entries, *others, *sources.TRAINING_ENTRIES)):
            raise UserError(
                f"{where}: the entry {key} holds {count} tensors that the layout {layout.name} does not know: name "
                "another layout with --from, or save the network's state dict alone."
            )
        aside[str(key)] = count
    return aside


def _from_artefact(contents: Contents, layout: str | None, branch: str | None, allow_nan: bool) -> Source:
    header = read_header(contents.path)
    if layout not in (None, header.source_layout):
        raise UserError(
            f"{contents.path} is an artefact, made from the layout {header.source_layout}: leave --from away, or "
            f"convert the original file with --from {layout}."
        )
    if branch not in (None, header.source_branch):
        raise UserError(
            f"{contents.path} is an artefact of the branch {header.source_branch}; convert the original file."
        )
    where = str(contents.path)
    geometry = manifest.recognise({n: tuple(t.shape) for n, t in contents.value.items()}, where=where)
    _check_geometry(header, geometry, where)
    tensors, dtype = _float32(contents.value, where)
    check_values(tensors, where, allow_nan)
    ordered = {name: tensors[name] for name in manifest.shapes_of(geometry)}
    return Source(ordered, header, contents.sha256, names={name: name for name in ordered}, dtype=dtype)
