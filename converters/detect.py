"""Where the backbone lies in a checkpoint: the first layout whose evidence is in the file, and the branch to take.

What content cannot tell is asked, never guessed; a file that nothing fits is explained in one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.rename import Table
from twist.contracts.weights import METADATA_KEY
from twist.converters import haiku, hub, manifest, sources
from twist.converters.containers import Contents
from twist.converters.sources import Branch, Layout
from twist.converters.tables import DETECTRON2, MMSEG_VIT, TIMM_VIT, TORCHVISION

if TYPE_CHECKING:
    from torch import Tensor

CONVERTED = "twist-converted"


@dataclass(frozen=True)
class Found:
    """Where the backbone lies in a file."""

    layout: Layout
    branch: Branch
    table: Table
    state: dict[str, Tensor]  # names without `module.` and `_orig_mod.`
    present: tuple[str, ...]  # names of all branches in the file


def find(contents: Contents, *, layout: str | None = None, branch: str | None = None) -> Found:
    """The layout of a file and the branch to take; raises as `load_artefact` does."""
    value, where = contents.value, str(contents.path)
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {_kind(value)}, not a dictionary of tensors: save the network's state dict.")
    value = haiku.joined(value)
    if layout is not None and layout not in sources.BY_NAME:
        raise UsageError(f'There is no layout "{layout}".{did_you_mean(layout, sources.BY_NAME)}')
    if layout is None and isinstance(value.get(METADATA_KEY), str):
        candidates: tuple[Layout, ...] = (_converted(),)
    elif layout is None and hub.pixels_of(contents.path) is not None:
        candidates = (sources.BY_NAME["timm"],)
    elif layout is None:
        _ask_if_ambiguous(contents, value)
        candidates = tuple(row for row in sources.LAYOUTS if row.detect)
    else:
        candidates = (sources.BY_NAME[layout],)
    for row in candidates:
        places = list(_places(row, value, forced=layout is not None))
        if places:
            if layout is None:
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
            f"{where} (layout {places[0].layout.name}) holds no branch {branch}: it holds {', '.join(present)}; "
            "choose one of them, or leave --branch away."
        )
    return Found(chosen.layout, chosen.branch, chosen.table, chosen.state, present)


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


def _ask_if_ambiguous(contents: Contents, value: dict[str, Any]) -> None:
    if hub.pixels_of(contents.path) is not None:
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
                f"{contents.path} does not say what it is ({case.why}): say --from "
                f"{', --from '.join(case.choices[:-1])} or --from {case.choices[-1]}."
            )


# A file's own name may say what its contents cannot: word in it, layouts that hold the same names, the layout that is
# meant, and what would be wrong.
_PLAIN_NAMES = ("torchvision", "torchvision-training", "backbone")
_NAMED = (
    ("simclr", _PLAIN_NAMES, "simclr-torch", "other pixels"),
    ("byol", _PLAIN_NAMES, "byol-torch", "other padding"),
    ("pcl", ("moco", "moco-v1"), "pcl", "another method"),
    ("sela", ("deepcluster-v2", "swav"), "sela-v2", "another method"),
)


def _ask_if_named(path: Path, layout: Layout) -> None:
    for word, layouts, choice, difference in _NAMED:
        if word in path.name.lower() and layout.name in layouts:
            raise UserError(
                f"{path} is called {word} but looks like {layout.name}, which has {difference}: say --from {choice}, "
                f"or --from {layout.name} if the name misleads."
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
            f"{where} does not have the layout {layout} (expected in {wanted}); `twist inspect {where}` says what it "
            "holds."
        )
    if set(value) >= {"state", "param_groups"} or (found and all("optimizer" in path[:1] for path, _ in found)):
        return f"{where} holds only an optimiser's state, no network: take the checkpoint with the model's state dict."
    foreign = manifest.explain_foreign(names)
    if foreign:
        return f"{where} cannot be converted: {foreign}."
    if not names:
        return (
            f"{where} holds no tensors (entries: {', '.join(map(str, list(value)[:6])) or 'none'}): save the state "
            "dict."
        )
    if any(name.endswith(("conv1.weight", "patch_embed.proj.weight")) for name in names):
        return (
            f"{where}: none of the {len(sources.LAYOUTS)} layouts fits its {len(names)} tensors (first: {names[0]}); "
            "if you know the layout, name it with --from."
        )
    return (
        f"{where} holds {len(names)} tensors (first: {names[0]}) of no ResNet or ViT that is known; see "
        "docs/conversions.md."
    )


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
    name = name.replace("_orig_mod.", "")  # first: a compiled wrapper may be around a distributed one, or inside
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _kind(value: Any) -> str:
    return {"list": "a list", "Tensor": "a single tensor"}.get(type(value).__name__, f"a {type(value).__name__}")
