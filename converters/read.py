"""Any checkpoint → the artefact in memory: find the backbone, take one branch, check every tensor.

Every tensor of the file is either used or dropped by name; a name that the layout does not know is an error, because
that is how half a network goes missing. Nothing here imports a framework, nor torch before the tensors are asked for.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from pydantic import ValidationError

from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.weights import METADATA_KEY, Backbone, read_header
from twist.converters import sources
from twist.converters.architecture import UNSEEN, Arrays, Network, assemble, joined_names
from twist.converters.evidence import (
    contradiction,
    described,
    header_of_run,
    hub_pixels,
    huggingface,
    method_of,
    trained_for,
)
from twist.converters.find import CONVERTED, Found, is_converted, locate, state_dicts
from twist.converters.open import Contents, as_torch, read_contents, widened
from twist.converters.sources import Reading
from twist.converters.zoo import located

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been read: the artefact in memory, and what became of every tensor of the file."""

    arrays: Arrays  # artefact names; float32, and batch norms' counters as int64
    backbone: Backbone
    sha256: str
    # artefact name → name in the file (`q + k + v` of three in one); what the layout lacks and we filled is not in it.
    names: dict[str, str]
    count: int  # tensors beside each other in the file, those of the backbone among them
    dropped: tuple[str, ...]
    filled: tuple[str, ...]
    unused_entries: dict[str, int]  # entry → tensors in it
    dtype: str
    notes: tuple[str, ...]
    branches: tuple[str, ...]  # all that are in the file

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The arrays as torch's tensors; those of float32 are mapped onto the file, and are not written to it."""
        return as_torch(self.arrays)

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
    # Copies: the file may be replaced while they are in use.
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
    architecture: str | None = None,
    method: str | None = None,
    allow_nan: bool = False,
) -> Source:
    """The same for a file whose contents have been read already."""
    if layout is not None and layout not in sources.BY_NAME:
        raise UsageError(f'There is no layout "{layout}".{did_you_mean(layout, sources.BY_NAME)}')
    if method is not None:
        from twist.contracts.record import check_label

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
    said = huggingface(contents)
    found = locate(contents, layout=layout, branch=branch, entry=entry, prefix=prefix, architecture=architecture)
    inside, dropped = found.parts
    network = assemble(inside, found.table, where)
    header = _header(contents, found, network, heads, said)
    arrays = {name: _plain(array, counter="num_batches" in name) for name, array in network.arrays.items()}
    if not allow_nan:
        check_values(arrays, where)
    names: dict[str, str] = {}
    for name, step in network.steps.items():
        for whole in joined_names(step.name):
            place = found.branch.prefix + name
            names[whole] = f"{names[whole]} + {place}" if whole in names else place
    return Source(
        arrays=arrays,
        backbone=header if method is None else header.model_copy(update={"method": method}),
        sha256=contents.sha256,
        names=names,
        count=len(found.state),
        dropped=dropped,
        filled=network.filled,
        unused_entries=_unused_entries(contents.value, found),
        dtype=network.dtypes,
        notes=_notes(found, network, arrays),
        branches=found.present,
    )


def _plain(array: np.ndarray[Any, Any], *, counter: bool) -> np.ndarray[Any, Any]:
    return widened(array).astype(np.int64 if counter else np.float32, copy=False)


def check_values(arrays: Mapping[str, np.ndarray[Any, Any]], where: str) -> None:
    """`UserError` when weights are NaN or infinite, or a variance is negative."""
    # Smallest and largest: NaN and infinity show in either, and no second array is made.
    ranges = {name: (array.min(), array.max()) for name, array in arrays.items() if array.dtype.kind == "f"}
    bad = [name for name, both in ranges.items() if not np.isfinite(both).all()]
    bad += [name for name, (least, _) in ranges.items() if name.endswith(".running_var") and least < 0]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} tensors hold NaN or infinite values, or negative variances (first: {bad[0]}): the "
            "training diverged or the file was damaged; take an earlier checkpoint, or pass --allow-nan to convert it "
            "as it is."
        )


def _header(contents: Contents, found: Found, network: Network, heads: int | None, said: Mapping[str, Any]) -> Backbone:
    """What the file is: as an earlier conversion or the run that trained it says, or by its layout and evidence.

    Raises:
        UserError: the file says that it is another network of the same names and shapes, or heads are told of one that
            has none or says its own.
    """
    layout, shape, where = found.layout, network.shape, str(contents.path)
    in_config = contents.beside.get("config.json", {}).get(METADATA_KEY)
    converted = layout.name == CONVERTED.name  # it may be a copy, with one of timm's networks as its table
    if not converted and in_config is None:
        reason = contradiction(contents, shape["architecture"], dense=found.asked)
        if reason is not None:
            raise UserError(
                f"{where}: {reason}: frameworks would compute something else with these weights; where the name is "
                "wrong, save the state dict alone."
            )
    if heads is not None and shape["vit"] is None:
        raise UserError(f"{where} is a {shape['architecture']}, which has no attention heads: leave --heads away.")
    text = None
    if converted:
        text = contents.metadata.get(METADATA_KEY) or contents.value[METADATA_KEY]
    elif in_config is not None and layout.of_hub:
        text = json.dumps(in_config)
    elif found.asked and trained_for(found.state) is not None:
        text = header_of_run(contents)
    place = {
        "source_layout": layout.name,
        "source_branch": found.branch.name,
        "source_sha256": contents.sha256,
    }
    if text is not None:
        header = _earlier_header(text, shape, where)
        if heads is not None and heads != header.transformer.heads:
            raise UserError(f"{where} says that it has {header.transformer.heads} heads: leave --heads away.")
        own = converted or in_config is not None
        return header if own else header.model_copy(update=place)
    vit = shape["vit"] and described(shape, heads, contents, layout, network.arrays.get("pos_embed"))
    pixels = (hub_pixels(contents) if layout.name == "timm" else None) or layout.pixels
    epoch = contents.value.get("epoch")
    fields: dict[str, Any] = {"stride_in": layout.stride_in, "method": method_of(contents, layout)}
    fields |= {**pixels.model_dump(exclude={"label"}), **said, **shape, **place, "vit": vit}
    if vit or shape["image_size"] or shape["architecture"] in ("resnet18", "resnet34"):
        fields["stride_in"] = "3x3"  # the place of the stride is a property of bottlenecks
    return Backbone(
        **fields,
        padding="symmetric" if shape["image_size"] else layout.padding,
        epochs=epoch if layout.epoch_is_count and type(epoch) is int and epoch >= 0 else None,
    )


def _earlier_header(text: str, shape: Mapping[str, Any], where: str) -> Backbone:
    """The header that an earlier conversion left in its output."""
    try:
        header = Backbone.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"{where}: the header that came with it is not valid ({error.errors()[0]['msg']}): convert the original "
            "again."
        ) from None
    unseen = {"vit"} | ({"image_size"} if shape["vit"] and shape["vit"].rope_base else set())  # no table, no size
    same = all(getattr(header, key) == value for key, value in shape.items() if key not in unseen)
    if same and shape["vit"]:
        same = header.transformer.model_dump(exclude=UNSEEN) == shape["vit"].model_dump(exclude=UNSEEN)
    if not same:
        raise UserError(
            f"{where}: the header says {header.display_name}, the tensors are {shape['architecture']}: one of them "
            "is not this file's; convert the original again."
        )
    return header


def _unused_entries(value: dict[str, Any], found: Found) -> dict[str, int]:
    """Entries with tensors other than the one that was used, and how many tensors each holds."""
    used = found.branch.entry
    counts: Counter[str] = Counter()
    for path, tensors in state_dicts(value):
        if path and path != used:
            counts[path[0]] += len(tensors)
    return dict(counts)


def _notes(found: Found, network: Network, arrays: Arrays) -> tuple[str, ...]:
    layout, notes, dtype = found.layout, [*found.notes], network.dtypes
    dense = trained_for(found.state) if found.asked else None
    if dense is not None:
        notes.append(f"it comes out of a trained {dense.title}, where it ran {dense.runs}; here it is a plain network")
    if layout.lookalikes:
        notes.append(f"files of {layout.lookalikes} have the same names: for one of them say --from")
    if network.filled:
        endings = sorted({name.rpartition(".")[2] for name in network.filled})
        notes.append(f"{len(network.filled)} tensors that this layout does not keep were filled: {', '.join(endings)}")
    double = [name for name, array in network.arrays.items() if array.dtype == np.float64]
    rounded = sum(not np.array_equal(network.arrays[name], arrays[name], equal_nan=True) for name in double)
    if rounded:
        notes.append(f"the file holds {dtype}: {rounded} tensors have values that float32 rounds")
    elif dtype != "float32":
        notes.append(f"the file holds {dtype}; every value is exact in the float32 that is written")
    if layout.padding == "same":
        notes.append("this network was trained with TensorFlow's asymmetric 'same' padding")
    return tuple(notes)


def assumed(backbone: Backbone) -> tuple[str, ...]:
    """What no tensor of a file says, and how it was read: a proof compares the target with this reading."""
    if backbone.timm_name:
        return (f"what timm's own code computes for {backbone.timm_name}",)
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
