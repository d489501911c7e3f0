"""Any checkpoint → the artefact in memory: find the layout by content, take one branch, check every tensor.

Every tensor of the file is either used or dropped by name; a name that the layout does not know is an error, because
that is how half a network goes missing. Nothing here imports a framework.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

from pydantic import ValidationError

from twist.contracts import rename
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.record import check_label
from twist.contracts.weights import METADATA_KEY, Backbone, read_header
from twist.converters import sources, vit
from twist.converters.detect import (
    CONVERTED,
    Found,
    architecture_of,
    check_complete,
    fill,
    hub_pixels,
    is_converted,
    known_network,
    readable,
    state_dicts,
)
from twist.converters.evidence import contradiction, header_of_run, huggingface, method_of, trained_for
from twist.converters.open import Contents, read_contents
from twist.converters.search import locate
from twist.converters.sources import Reading, matches
from twist.converters.zoo import located

if TYPE_CHECKING:
    from torch import Tensor, nn

_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been read: the artefact in memory, and what became of every tensor of the file."""

    tensors: dict[str, Tensor]
    backbone: Backbone
    sha256: str
    # artefact name → name in the file (`q + k + v` of three in one); what the layout lacks and we filled is not in it.
    names: dict[str, str]
    count: int  # tensors beside each other in the file, those of the backbone among them
    dropped: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    unused_entries: dict[str, int] = field(default_factory=dict)  # entry → tensors in it
    dtype: str = "float32"
    notes: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()  # all that are in the file

    @property
    def used_modules(self) -> tuple[str, ...]:
        """First parts of the names that the backbone has in the file."""
        return tuple(sorted({name.partition(".")[0] for name in self.names.values()}))


def load_artefact(checkpoint: str | os.PathLike[str], **reading: Unpack[Reading]) -> tuple[dict[str, Tensor], Backbone]:
    """Tensors (artefact names, float32) and header of any supported checkpoint; our own artefact passes through.

    Raises:
        UserError: the file is not readable, not supported, or does not hold the branch. One sentence.
        UsageError: there is no layout of that name.
    """
    source = load_source(checkpoint, **reading)
    # Copies: a reader's tensors are mapped onto the file, and would change with it.
    return {name: tensor.clone() for name, tensor in source.tensors.items()}, source.backbone


def load_backbone(checkpoint: str | os.PathLike[str], **reading: Unpack[Reading]) -> tuple[nn.Module, Backbone]:
    """The network of any supported checkpoint with its weights, in eval mode, and its header.

    `network(images)` gives (B, D) for float images (B, 3, H, W) that are normalised as the header says
    (`twist.contracts.networks.normalise`); `network.features(images, ["res4", "res5"])`, of a ViT `["block5", …]`, maps
    (B, C, H/s, W/s) by name. Raises as `load_artefact` does.
    """
    from twist.contracts.networks import network_of

    tensors, header = load_artefact(checkpoint, **reading)
    return network_of(header, tensors), header


def load_source(checkpoint: str | os.PathLike[str], *, allow_nan: bool = False, **reading: Unpack[Reading]) -> Source:
    """`load_artefact` with what became of every tensor; the tensors may be mapped onto the file."""
    file, how = located(checkpoint, **reading)
    return read_source(read_contents(file), **how, allow_nan=allow_nan)


def read_source(
    contents: Contents,
    *,
    layout: str | None = None,
    branch: str | None = None,
    entry: str | None = None,
    prefix: str | None = None,
    heads: int | None = None,
    method: str | None = None,
    allow_nan: bool = False,
) -> Source:
    """The same for a file whose contents have been read already."""
    import torch

    if layout is not None and layout not in sources.BY_NAME:
        raise UsageError(f'There is no layout "{layout}".{did_you_mean(layout, sources.BY_NAME)}')
    if method is not None:
        check_label(method)
    where = str(contents.path)
    if (entry, prefix) != (None, None) and is_converted(contents):
        raise UserError(f"{where} is a converted backbone and nothing else: leave --entry and --prefix away.")
    if METADATA_KEY in contents.metadata:
        header = read_header(contents.path)
        for option, asked, is_ in (("from", layout, header.source_layout), ("branch", branch, header.source_branch)):
            if asked not in (None, is_):
                raise UserError(f"{where} was made from {is_}: leave --{option} away, or convert the original file.")
        layout = branch = None  # the header says more than any layout
    described = huggingface(contents)
    found = locate(contents, layout=layout, branch=branch, entry=entry, prefix=prefix)
    backbone, dropped = _split(found)
    try:
        steps = rename.inwards(found.table, backbone)
    except rename.RenameError as error:
        reason = known_network(backbone) or "its backbone is another network than a plain ResNet or ViT"
        raise UserError(f"{where} (layout {found.layout.name}): {str(error).rstrip('.')}; {reason}.") from None
    tensors = vit.joined(rename.apply(steps, readable(backbone, where)))
    try:
        shape = architecture_of(tensors, where)
        filled = fill(tensors, shape, found.table)
        ordered = check_complete(tensors, shape, where)
    except UserError:
        known = known_network(backbone)
        if known is None:
            raise
        raise UserError(f"{where} (layout {found.layout.name}) cannot be converted: {known}.") from None
    _check_network(contents, found, shape["architecture"])
    earlier, shape = _described(contents, found, shape, heads, tensors)
    kept = {name: tensors[name] for name in ordered}
    tensors, dtype = _float32(kept, where)
    rounded = sum(t.dtype is torch.float64 and not torch.equal(t, tensors[name].double()) for name, t in kept.items())
    if not allow_nan:
        check_values(tensors, where)
    header = earlier or _header(contents, found, shape, described)
    names: dict[str, str] = {}
    for name, step in steps.items():
        whole, name = vit.joined_name(step.name), found.branch.prefix + name
        names[whole] = f"{names[whole]} + {name}" if whole in names else name
    return Source(
        tensors=tensors,
        backbone=header if method is None else header.model_copy(update={"method": method}),
        sha256=contents.sha256,
        names=names,
        count=len(found.state),
        dropped=tuple(dropped),
        filled=tuple(filled),
        unused_entries=_unused_entries(contents.value, found),
        dtype=dtype,
        notes=_notes(found, filled, rounded, dtype),
        branches=found.present,
    )


def _split(found: Found) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the prefix, without it, and the names of all others.

    Only what the layout names as a head is left out under the prefix: the rename table has to know the rest.
    """
    layout, prefix = found.layout, found.branch.prefix
    backbone, dropped = {}, []
    for name, tensor in found.state.items():
        tail = name.removeprefix(prefix)
        # A prefix wins over the drop list (`encoder_q.0.` over `encoder_q.*`); without one the list decides alone.
        head = matches(tail, layout.heads) or (not prefix and matches(name, layout.drop))
        head = head or name == "n_averaged"  # torch.optim.swa_utils: how many were averaged
        if head or not name.startswith(prefix):
            dropped.append(name)
        else:
            backbone[tail] = tensor
    return backbone, dropped


def _check_network(contents: Contents, found: Found, architecture: str) -> None:
    """`UserError` when the file says that it is another network of the same names and shapes."""
    ours = found.layout is CONVERTED or METADATA_KEY in contents.beside.get("config.json", {})  # the header says it
    reason = None if ours else contradiction(contents, architecture, dense=found.asked)
    if reason is not None:
        raise UserError(
            f"{contents.path}: {reason}: frameworks would compute something else with these weights; where the name is "
            "wrong, save the state dict alone."
        )


def _described(
    contents: Contents, found: Found, shape: dict[str, Any], heads: int | None, tensors: Mapping[str, Tensor]
) -> tuple[Backbone | None, dict[str, Any]]:
    """The header that an earlier conversion left, or None; and `shape` with a ViT's whole description."""
    text, where = None, str(contents.path)
    if found.layout is CONVERTED:
        text = contents.metadata.get(METADATA_KEY) or contents.value[METADATA_KEY]
    elif METADATA_KEY in (config := contents.beside.get("config.json", {})) and found.layout.of_hub:
        text = json.dumps(config[METADATA_KEY])
    elif found.asked and trained_for(found.state) is not None:
        text = header_of_run(contents)
    if heads is not None and shape["vit"] is None:
        raise UserError(f"{where} is a {shape['architecture']}, which has no attention heads: leave --heads away.")
    if text is not None:
        header = _earlier_header(text, shape, where)
        if heads is not None and heads != header.transformer.heads:
            raise UserError(f"{where} says that it has {header.transformer.heads} heads: leave --heads away.")
        if found.layout is not CONVERTED and METADATA_KEY not in contents.beside.get("config.json", {}):
            place = {"source_layout": found.layout.name, "source_branch": found.branch.name}
            header = header.model_copy(update={**place, "source_sha256": contents.sha256})
        return header, {**shape, "vit": header.vit}
    return None, shape if shape["vit"] is None else vit.described(shape, heads, contents, found.layout, tensors)


def _header(contents: Contents, found: Found, shape: dict[str, Any], described: dict[str, Any]) -> Backbone:
    value, layout = contents.value, found.layout
    pixels = (hub_pixels(contents) if layout.name == "timm" else None) or layout.pixels
    epoch = value.get("epoch")
    fields: dict[str, Any] = {"stride_in": layout.stride_in, "method": method_of(contents, layout)}
    fields |= {**pixels.model_dump(exclude={"label"}), **described}
    if shape["architecture"] in ("resnet18", "resnet34") or shape["image_size"]:
        fields["stride_in"] = "3x3"  # the place of the stride is a property of bottlenecks
    return Backbone(
        **shape,
        **fields,
        padding="symmetric" if shape["image_size"] else layout.padding,
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
    seen = {key: value for key, value in shape.items() if key != "vit"}
    described = header.transformer.model_dump(exclude=vit.UNSEEN) if header.is_vit else None
    shaped = shape["vit"] and shape["vit"].model_dump(exclude=vit.UNSEEN)
    if described != shaped or any(getattr(header, key) != value for key, value in seen.items()):
        raise UserError(
            f"{where}: the header says {header.display_name}, the tensors are {shape['architecture']}: one of them "
            "is not this file's; convert the original again."
        )
    return header


def _float32(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], str]:
    """The tensors as float32 (batch norms' counters as int64), and the dtypes that they had."""
    import torch

    counters = {name for name in tensors if name.endswith(".num_batches_tracked")}
    kinds = sorted({str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if name not in counters})
    other = [kind for kind in kinds if kind not in _DTYPES]
    if other:
        raise UserError(
            f"{where} holds weights as {' and '.join(other)}: {', '.join(_DTYPES)} are converted; take the checkpoint "
            "that was trained, before it was quantised."
        )
    return {
        name: tensor.to(torch.int64 if name in counters else torch.float32) for name, tensor in tensors.items()
    }, " and ".join(kinds)


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


def _unused_entries(value: dict[str, Any], found: Found) -> dict[str, int]:
    """Entries with tensors other than the one that was used, and how many tensors each holds."""
    used = found.branch.entry
    counts = {
        str(key): sum(len(tensors) for path, tensors in state_dicts(item, (str(key),)) if path != used)
        for key, item in value.items()
    }
    return {key: count for key, count in counts.items() if count and (used or key not in found.state)}


def _notes(found: Found, filled: list[str], rounded: int, dtype: str) -> tuple[str, ...]:
    layout, notes = found.layout, [*found.notes]
    dense = trained_for(found.state) if found.asked else None
    if dense is not None:
        notes.append(f"it comes out of a trained {dense.title}, where it ran {dense.runs}; here it is a plain network")
    if layout.lookalikes:
        notes.append(f"files of {layout.lookalikes} have the same names: for one of them say --from")
    if filled:
        endings = sorted({name.rpartition(".")[2] for name in filled})
        notes.append(f"{len(filled)} tensors that this layout does not keep were filled: {', '.join(endings)}")
    if rounded:
        notes.append(f"the file holds {dtype}: {rounded} tensors have values that float32 rounds")
    elif dtype != "float32":
        notes.append(f"the file holds {dtype}; every value is exact in the float32 that is written")
    if layout.padding == "same":
        notes.append("this network was trained with TensorFlow's asymmetric 'same' padding")
    return tuple(notes)


def assumed(backbone: Backbone) -> tuple[str, ...]:
    """What no tensor of a file says, and how it was read: a proof compares the target with this reading."""
    if backbone.is_vit:
        vit = backbone.transformer
        return (
            f"{vit.mlp} in the feed-forward layers",
            f"{vit.heads} attention heads",
            f"layer norms with the epsilon {vit.norm_eps:g}",
            "softmax attention over all tokens",
        )
    return (
        "ReLU after each norm and each sum",
        f"the stride of a stage in its first {backbone.stride_in} convolution",
        "no dilation",
        f"{backbone.padding} padding",
        "a 3×3 max pool of stride 2 after the stem",
        "batch norms with the epsilon 1e-5",
    )


def counts_by_module(names: Iterable[str], *, used: tuple[str, ...]) -> dict[str, int]:
    """`{"encoder_k": 320, "encoder_q.fc": 4}` instead of 324 names; of a module in use, the part that is not."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts[".".join(parts[: 2 if parts[0] in used else 1]).split("/")[0]] += 1
    return dict(counts)
