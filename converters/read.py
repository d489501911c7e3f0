"""Any checkpoint → the artefact in memory: find the layout by content, take one branch, account for the rest.

Every tensor of the file is either used or dropped by name; a name that the layout does not know is an error, because
that is how half a network goes missing. Nothing here imports a framework.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from contracts.errors import UsageError, UserError, did_you_mean
from contracts.weights import METADATA_KEY, Backbone, read_header
from converters import manifest, rename, sources
from converters.containers import Contents, read_contents
from converters.rename import Table
from converters.sources import Branch, Layout
from converters.tables import DETECTRON2, MMSEG_VIT, TIMM_VIT, TORCHVISION

if TYPE_CHECKING:
    from torch import Tensor

ARTEFACT, CONVERTED = "artefact", "twist-converted"


@dataclass(frozen=True)
class Found:
    """Where the backbone lies in a file."""

    layout: Layout
    branch: Branch
    table: Table
    state: dict[str, Tensor]  # names without `module.` and `_orig_mod.`
    present: tuple[str, ...]  # names of all branches in the file


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
        return _from_artefact(contents, branch, allow_nan)
    return _account(contents, find(contents, layout=layout, branch=branch), allow_nan)


def find(contents: Contents, *, layout: str | None = None, branch: str | None = None) -> Found:
    """The layout of a file and the branch to take; raises as `load_artefact` does."""
    value, where = contents.value, str(contents.path)
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {_kind(value)}, not a dictionary of tensors: save the network's state dict.")
    value = _with_haiku(value)
    if layout is not None and layout not in sources.BY_NAME:
        raise UsageError(f'There is no layout "{layout}".{did_you_mean(layout, sources.BY_NAME)}')
    if layout is None and isinstance(value.get(METADATA_KEY), str):
        candidates: tuple[Layout, ...] = (_converted(),)
    elif layout is None and _hub_pixels(contents.path) is not None:
        candidates = (sources.BY_NAME["timm"],)
    elif layout is None:
        _ask_if_ambiguous(contents, value)
        candidates = tuple(row for row in sources.LAYOUTS if row.detect)
    else:
        candidates = (sources.BY_NAME[layout],)
    for row in candidates:
        places = list(_places(row, value, forced=layout is not None))
        if places:
            if layout is None and row.name in _PLAIN_NAMES:
                _ask_if_named(contents.path, row)
            return _choose(places, branch, where)
    raise UserError(_why_not(contents, value, layout))


def state_dicts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dictionary in a file that directly holds tensors, with the path of entries that leads to it."""
    if isinstance(value, dict):
        tensors = _tensors_of(value)
        if tensors:
            yield path, tensors
        for key, item in value.items():
            if isinstance(item, (dict, list)):
                yield from state_dicts(item, (*path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from state_dicts(item, (*path, str(index)))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name fits one of the globs (`a|b`: either)."""
    return any(fnmatchcase(name, part) for pattern in patterns for part in pattern.split("|"))


def _places(layout: Layout, value: dict[str, Any], *, forced: bool) -> Iterator[Found]:
    """Each branch of `layout` that is in the file, the preferred one first."""
    if not forced and not all(entry in value for entry in layout.top):
        return
    for branch in layout.branches:
        state = _state_at(value, branch.entry)
        if state is None:
            continue
        if not forced and not all(any(matches(name, (mark,)) for name in state) for mark in layout.evidence):
            continue
        for table in layout.tables:
            if any(branch.prefix + anchor in state for anchor in table.anchors):
                yield Found(layout, branch, table, state, ())
                break


def _choose(places: list[Found], branch: str | None, where: str) -> Found:
    present = tuple(dict.fromkeys(place.branch.name for place in places))
    chosen = next((place for place in places if branch in (None, place.branch.name)), None)
    if chosen is None:
        raise UserError(
            f"{where} (layout {places[0].layout.name}) holds no branch {branch}: it holds "
            f"{', '.join(present)}; choose one of "
            "them, or leave --branch away."
        )
    return Found(chosen.layout, chosen.branch, chosen.table, chosen.state, present)


def _account(contents: Contents, found: Found, allow_nan: bool) -> Source:
    layout, branch, where = found.layout, found.branch, str(contents.path)
    backbone, dropped, others = _divide(found)
    if others:
        foreign = manifest.explain_foreign(list(found.state))
        raise UserError(
            f"{where}: {len(others)} tensors are neither the backbone's nor among those that the "
            f"layout {layout.name} drops "
            f"(first: {others[0]}); {foreign or 'another layout may fit: name it with --from'}."
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
    for architecture, reason in layout.refuse:
        if geometry.architecture == architecture:
            raise UserError(f"{where}: {reason}: frameworks would compute something else with these weights.")
    tensors, dtype = _float32(tensors, where)
    check_finite(tensors, where, allow_nan)
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
        notes=_notes(layout, filled, dtype),
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


def _header(contents: Contents, found: Found, geometry: manifest.Geometry) -> Backbone:
    value, layout = contents.value, found.layout
    if layout.name == CONVERTED:
        return _carried(value[METADATA_KEY], geometry, str(contents.path))
    if layout.name == "timm" and METADATA_KEY in _hub_config(contents.path):
        return _carried(json.dumps(_hub_config(contents.path)[METADATA_KEY]), geometry, str(contents.path))
    pixels = (_hub_pixels(contents.path) if layout.name == "timm" else None) or layout.pixels
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
        method=layout.method,
        epochs=epoch if layout.epoch_is_count and type(epoch) is int else None,
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
            f"{where}: the header that came with it is not valid ({error.errors()[0]['msg']}): "
            "convert the original again."
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


def check_finite(tensors: Mapping[str, Tensor], where: str, allow_nan: bool) -> None:
    """`UserError` when weights are NaN or infinite, unless that is allowed."""
    if allow_nan:
        return
    # Smallest and largest in one pass: NaN and infinity show in either, and no second tensor is made.
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not all(v.isfinite() for v in t.aminmax())]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} tensors hold NaN or infinite values (first: {bad[0]}): the training "
            "diverged; take an "
            "earlier checkpoint, or pass --allow-nan to convert it as it is."
        )


def _notes(layout: Layout, filled: list[str], dtype: str) -> tuple[str, ...]:
    notes = []
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


def _from_artefact(contents: Contents, branch: str | None, allow_nan: bool) -> Source:
    header = read_header(contents.path)
    if branch not in (None, header.source_branch):
        raise UserError(
            f"{contents.path} is an artefact of the branch {header.source_branch}; convert the original file."
        )
    where = str(contents.path)
    geometry = manifest.recognise({n: tuple(t.shape) for n, t in contents.value.items()}, where=where)
    _check_geometry(header, geometry, where)
    tensors, dtype = _float32(contents.value, where)
    check_finite(tensors, where, allow_nan)
    ordered = {name: tensors[name] for name in manifest.shapes_of(geometry)}
    return Source(ordered, header, contents.sha256, names={name: name for name in ordered}, dtype=dtype)


def _converted() -> Layout:
    """Our own `weights.pth`: the header travels inside, so that the way back is exact."""
    return Layout(
        CONVERTED,
        "unknown",
        (
            Branch("backbone", ("model",), ""),
            Branch("backbone", ("state_dict",), "backbone."),
            Branch("backbone", ("state_dict",), ""),
        ),
        tables=(DETECTRON2, TORCHVISION, MMSEG_VIT, TIMM_VIT),
    )


def _hub_config(path: Path) -> dict[str, Any]:
    """The `config.json` that timm and the hubs put beside a weights file, {} when there is none."""
    if path.name not in ("model.safetensors", "pytorch_model.bin"):
        return {}
    try:
        config = json.loads((path.parent / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and "architecture" in config else {}


def _hub_pixels(path: Path) -> sources.Pixels | None:
    config = _hub_config(path)
    settings = config.get("pretrained_cfg", config)
    try:
        mean, std = (tuple(float(value) for value in settings[key]) for key in ("mean", "std"))
        return sources.Pixels(mean=mean, std=std) if len(mean) == len(std) == 3 else None  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None


def _ask_if_ambiguous(contents: Contents, value: dict[str, Any]) -> None:
    if _hub_pixels(contents.path) is not None:
        return
    for case in sources.AMBIGUOUS:
        state = _state_at(value, case.entry)
        if (
            state is None
            or not all(entry in value for entry in case.top)
            or any(entry in value for entry in case.absent)
        ):
            continue
        if all(any(matches(name, (mark,)) for name in state) for mark in case.evidence):
            raise UserError(
                f"{contents.path} does not say what it is ({case.why}): say "
                f"--from {', --from '.join(case.choices[:-1])} or --from {case.choices[-1]}."
            )


# Layouts that hold nothing but plain names; a file's own name may then say what its contents cannot.
_PLAIN_NAMES = ("torchvision", "torchvision-training", "backbone")


def _ask_if_named(path: Path, layout: Layout) -> None:
    for word, choice, difference in (("simclr", "simclr-torch", "pixels"), ("byol", "byol-torch", "padding")):
        if word in path.name.lower():
            raise UserError(
                f"{path} is called {word} but looks like {layout.name}, which has other {difference}: "
                f"say --from {choice}, or --from {layout.name} if the name misleads."
            )


def _why_not(contents: Contents, value: dict[str, Any], layout: str | None) -> str:
    where = str(contents.path)
    found = list(state_dicts(value))
    names = [name for _, tensors in found for name in tensors]
    if layout is not None:
        row = sources.BY_NAME[layout]
        wanted = " or ".join(
            f"{'/'.join(b.entry) or 'the file itself'}: {b.prefix}{row.tables[0].anchors[0]}" for b in row.branches[:2]
        )
        return (
            f"{where} does not have the layout {layout} (expected in {wanted}); `twist inspect "
            f"{where}` says what it holds."
        )
    if set(value) >= {"state", "param_groups"} or (found and all("optimizer" in path[:1] for path, _ in found)):
        return f"{where} holds only an optimiser's state, no network: take the checkpoint with the model's state dict."
    foreign = manifest.explain_foreign(names)
    if foreign:
        return f"{where} cannot be converted: {foreign}."
    if not names:
        return (
            f"{where} holds no tensors (entries: {', '.join(map(str, list(value)[:6])) or 'none'}): "
            "save the state dict."
        )
    if any(name.endswith(("conv1.weight", "patch_embed.proj.weight")) for name in names):
        return (
            f"{where}: none of the {len(sources.LAYOUTS)} layouts fits its {len(names)} tensors "
            f"(first: {names[0]}); if you know "
            "the layout, name it with --from."
        )
    return (
        f"{where} holds {len(names)} tensors (first: {names[0]}) of no ResNet or ViT that is known; "
        "see docs/conversions.md."
    )


def _with_haiku(value: dict[str, Any]) -> dict[str, Any]:
    """DeepMind's BYOL: parameters and statistics of each network joined under plain names."""
    experiment = value.get("experiment_state")
    if not isinstance(experiment, dict):
        return value
    joined = {}
    for network in ("online", "target"):
        parts = [experiment.get(f"{network}_{part}") for part in ("params", "state")]
        if all(isinstance(part, dict) for part in parts):
            joined[network] = {
                _haiku_name(module, leaf): tensor
                for part in parts
                for module, leaves in part.items()  # type: ignore[union-attr]
                for leaf, tensor in leaves.items()
                # `hidden` and `counter` belong to the running mean's own bookkeeping; `average` is the statistic.
                if leaf not in ("hidden", "counter")
            }
    return {**value, "experiment_state": joined}


def _haiku_name(module: str, leaf: str) -> str:
    """`res_net50/~/block_group_0/~/block_0/~/conv_0` + `w` → `block_group_0/block_0/conv_0/w`."""
    parts = [part for part in module.split("/") if part != "~"]
    starts = ("initial_", "block_group_", "projector", "predictor", "classifier")
    first = next((index for index, part in enumerate(parts) if part.startswith(starts)), 0)
    parts = [part.removesuffix("_1") if part.startswith("initial_") else part for part in parts[first:]]
    return "/".join((*parts, leaf))


def _state_at(value: dict[str, Any], entry: tuple[str, ...]) -> dict[str, Tensor] | None:
    for key in entry:
        value = value.get(key) if isinstance(value, dict) else None  # type: ignore[assignment]
    if not isinstance(value, dict):
        return None
    tensors = _tensors_of(value)
    cleaned = {_clean(name): tensor for name, tensor in tensors.items()}
    if len(cleaned) != len(tensors):
        raise UserError(
            "Two tensors have the same name once `module.` is taken away: save the network without its wrapper."
        )
    return cleaned or None


def _tensors_of(value: dict[Any, Any]) -> dict[str, Tensor]:
    import torch

    return {str(name): item for name, item in value.items() if isinstance(item, torch.Tensor)}


def _clean(name: str) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name.replace("_orig_mod.", "")


def _kind(value: Any) -> str:
    return {"list": "a list", "Tensor": "a single tensor"}.get(type(value).__name__, f"a {type(value).__name__}")
