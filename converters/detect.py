"""What a checkpoint is: the first layout whose evidence is in the file, the branch to take, the architecture.

What content cannot tell is asked, never guessed; a file that nothing fits is explained in one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts.errors import UserError
from twist.contracts.rename import Table
from twist.contracts.weights import METADATA_KEY, RESNETS, difference
from twist.converters import sources, vit
from twist.converters.evidence import trained_for
from twist.converters.open import Contents
from twist.converters.sources import Branch, Layout, Pixels, matches
from twist.converters.tables import DETECTRON2, MMSEG_VIT, TIMM_VIT, TORCHVISION

if TYPE_CHECKING:
    from torch import Tensor

# This suite's own files: the header travels inside, so that the way back is exact.
CONVERTED = Layout(
    name="twist-converted",
    method="unknown",
    heads_known=True,
    branches=(
        Branch("backbone", (), ""),
        Branch("backbone", ("model",), ""),
        Branch("backbone", ("state_dict",), "backbone.network."),
        Branch("backbone", ("state_dict",), "backbone."),
        Branch("backbone", ("state_dict",), ""),
    ),
    tables=(DETECTRON2, TORCHVISION, MMSEG_VIT, TIMM_VIT),
)


@dataclass(frozen=True)
class Found:
    """Where the backbone lies in a file."""

    layout: Layout
    branch: Branch
    table: Table
    state: dict[str, Tensor]  # names without `module.` and `_orig_mod.`
    present: tuple[str, ...] = ()  # names of all branches in the file
    asked: bool = False  # the user said where it is
    notes: tuple[str, ...] = ()


def find(contents: Contents, *, layout: str | None = None, branch: str | None = None) -> Found | None:
    """The layout of a file and the branch to take, None where no layout fits; raises as `load_artefact` does."""
    value, where = contents.value, str(contents.path)
    if not isinstance(value, dict):
        kind = "list" if isinstance(value, list) else type(value).__name__
        raise UserError(f"{where} holds a {kind}, not a dictionary of tensors: save the network's state dict.")
    value = join_haiku(value)
    if layout is not None:
        candidates: tuple[Layout, ...] = (sources.BY_NAME[layout],)
    elif is_converted(contents):
        candidates = (CONVERTED,)
    elif hub_pixels(contents) is not None:
        candidates = (sources.BY_NAME["timm"],)
    else:
        _ask_if_ambiguous(where, value)
        candidates = tuple(row for row in sources.LAYOUTS if row.detect)
    for row in candidates:
        places = list(_places(row, value, forced=layout is not None))
        if places:
            if layout is None:
                _ask_if_named(contents.path, row)
                check_not_dense(places[0].state, row, where, places[0].branch.prefix)
            present = tuple(dict.fromkeys(place.branch.name for place in places))
            chosen = [place for place in places if branch in (None, place.branch.name)]
            if not chosen:
                raise UserError(
                    f"{where} (layout {row.name}) holds no branch {branch}: it holds {', '.join(present)}; choose one "
                    "of them, or leave --branch away."
                )
            return replace(chosen[0], present=present, asked=layout is not None)
    if layout is not None:
        raise UserError(_not_that(where, layout))
    return None


def is_converted(contents: Contents) -> bool:
    """Whether an earlier conversion's header is in the file."""
    value = contents.value
    return METADATA_KEY in contents.metadata or (isinstance(value, dict) and isinstance(value.get(METADATA_KEY), str))


def state_dicts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dictionary in a file that directly holds tensors, with the path of entries that leads to it."""
    if isinstance(value, dict):
        tensors = _tensors_of(value)
        if tensors:
            yield path, tensors
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from state_dicts(item, (*path, str(key)))


def hub_pixels(contents: Contents) -> Pixels | None:
    """Mean and std that the hub's config.json names; None when it does not."""
    settings = contents.hub.get("pretrained_cfg", contents.hub)
    try:
        return Pixels(mean=settings["mean"], std=settings["std"])
    except (KeyError, TypeError, ValueError):
        return None


def architecture_of(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """The fields of a header that shapes give: architecture, width, stem, image size, and of a ViT the description.

    Raises:
        UserError: the stem and the number of blocks are those of no architecture.
    """
    if "patch_embed.proj.weight" in tensors:
        return vit.shape_of(tensors, where)
    if "conv1.weight" not in tensors:
        raise UserError(f"{where}: there is no conv1.weight of a ResNet and no patch_embed.proj.weight of a ViT in it.")
    stem = tuple(tensors["conv1.weight"].shape)
    if stem not in ((64, 3, 7, 7), (128, 3, 7, 7), (256, 3, 7, 7)):
        raise UserError(
            f"{where}: conv1.weight is {stem}, expected (64·w, 3, 7, 7) with the widths w = 1, 2, 4: only the 7×7 RGB "
            "stem of ImageNet's ResNets is converted, no 3×3 stem for small images and no other order of axes."
        )
    blocks = tuple(
        1 + max((int(name.split(".")[1]) for name in tensors if name.startswith(f"layer{stage}.")), default=-1)
        for stage in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.conv3.weight" in tensors
    for architecture, layout in RESNETS.items():
        if layout == (blocks, bottleneck):
            return {
                "architecture": architecture,
                "width": stem[0] // 64,
                "stem": "conv7x7",
                "image_size": None,
                "vit": None,
            }
    raise UserError(
        f"{where}: a ResNet with {blocks} {'bottleneck' if bottleneck else 'basic'} blocks is none of "
        f"{', '.join(RESNETS)}."
    )


def check_complete(tensors: Mapping[str, Tensor], shape: Mapping[str, Any], where: str) -> list[str]:
    """The names of an architecture's tensors in order; `UserError` unless `tensors` are exactly these.

    `shape` is what `architecture_of` gave.
    """
    expected = expected_of(shape)
    reason = difference(expected, tensors, values=False)
    if reason is not None:
        raise UserError(
            f"{where}: not a plain {shape['architecture']}: {reason}. ResNeXt (grouped convolutions) and wide_resnet "
            "have its names and other shapes; only plain ResNets and ViTs are converted."
        )
    return list(expected)


def expected_of(shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of the network that `shape` describes."""
    from twist.contracts.shapes import meta_tensors

    return meta_tensors(**{key: value for key, value in shape.items() if key != "stem"})


def readable(tensors: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    """The same tensors; `UserError` when one is sparse or has no values."""
    import torch

    bad = next((name for name, t in tensors.items() if t.is_meta or t.layout is not torch.strided), None)
    if bad is not None:
        raise UserError(f"{where}: {bad} is a sparse tensor or one without values: save the network's plain tensors.")
    return tensors


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


def known_network(names: Iterable[str]) -> str | None:
    """Why a state dict with these names (cleaned) is of a well-known network that is not converted; else None."""
    text = "\n".join(names)  # one search a pattern, not one a name

    def found(pattern: str) -> bool:
        return re.search(pattern, text, re.MULTILINE) is not None

    rows = (row for row in sources.FOREIGN if all(map(found, row.has)) and not (row.lacks and found(row.lacks)))
    return next((f"{row.says}; {row.do}" for row in rows), None)


def join_haiku(value: dict[str, Any]) -> dict[str, Any]:
    """DeepMind's BYOL: `experiment_state` as {network: state dict} of haiku's parameters and statistics, joined."""
    experiment = value.get("experiment_state")
    if not isinstance(experiment, dict):
        return value
    networks = {}
    for network in ("online", "target"):
        parts = [experiment.get(f"{network}_{part}") for part in ("params", "state")]
        networks[network] = {
            _haiku_name(module, leaf): tensor
            for part in parts
            if isinstance(part, dict)
            for module, leaves in part.items()
            if isinstance(module, str) and isinstance(leaves, dict)
            for leaf, tensor in leaves.items()
            # `hidden` and `counter` belong to the running mean's own bookkeeping; `average` is the statistic.
            if leaf not in ("hidden", "counter")
        }
    return {**value, "experiment_state": networks}


def _haiku_name(module: str, leaf: str) -> str:
    """`res_net50/~/block_group_0/~/block_0/~/conv_0` + `w` → `block_group_0/block_0/conv_0/w`."""
    parts = [part for part in module.split("/") if part != "~"]
    starts = ("initial_", "block_group_", "projector", "predictor", "classifier")
    first = next((index for index, part in enumerate(parts) if part.startswith(starts)), 0)
    parts = [part.removesuffix("_1") if part.startswith("initial_") else part for part in parts[first:]]
    return "/".join((*parts, leaf))


def _places(layout: Layout, value: dict[str, Any], *, forced: bool) -> Iterator[Found]:
    """Each branch of `layout` that is in the file, the preferred one first."""
    if not forced and not all(_entry_at(value, tuple(entry.split("/"))) is not None for entry in layout.top):
        return
    named = {branch.name for branch in layout.branches}
    copies = [
        Branch(name, (*branch.entry[:-1], copy), branch.prefix)
        for branch in layout.branches
        for name, copy in sources.copies_of(branch.entry)
        if name not in named
    ]
    for branch in (*layout.branches, *copies):
        state = state_at(value, branch.entry)
        if not forced and not _fits(layout, state):
            continue
        for table in layout.tables:
            if any(branch.prefix + anchor in state for anchor in table.anchors):
                yield Found(layout, branch, table, state)
                break


def _fits(layout: Layout, state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the layout's evidence, lacks what it must lack, and its linear layers are that."""
    for module in layout.linear:
        parts = {name.removeprefix(f"{module}."): t.ndim for name, t in state.items() if name.startswith(f"{module}.")}
        if parts != {"weight": 2, "bias": 1}:
            return False
    return holds(state, layout.evidence) and not any(matches(name, layout.lacks) for name in state)


def check_not_dense(state: Mapping[str, Tensor], layout: Layout, where: str, prefix: str) -> None:
    """`UserError` for the state dict of a trained detector or segmentor, whose backbone has to be asked for."""
    # A pretraining with detection heads of its own names them in its row; `*head.*` names no such thing.
    named = tuple(pattern for pattern in layout.drop if pattern[0] != "*")
    dense = trained_for(state, named) if layout is not CONVERTED else None
    if dense is not None:
        ask = f"--prefix {prefix}" if prefix else f"--from {layout.name}"
        raise UserError(
            f"{where} is a trained {dense.title}, whose backbone ran {dense.runs}; to take that backbone all the same, "
            f"as a plain network, say {ask}."
        )


def _ask_if_ambiguous(where: str, value: dict[str, Any]) -> None:
    for case in sources.AMBIGUOUS:
        state = state_at(value, case.entry)
        fits = state and holds(state, case.evidence) and not any(entry in value for entry in case.absent)
        if fits and known_network(state) is None:
            choices = " or ".join(f"--from {choice}" for choice in case.choices)
            raise UserError(f"{where} does not say what it is ({case.why}): say {choices}.")


def _ask_if_named(path: Path, layout: Layout) -> None:
    for row in sources.NAMED:
        if row.word in path.name.lower() and layout.name in row.layouts:
            raise UserError(
                f"{path} is called {row.word} but looks like {layout.name}, which has {row.difference}: say --from "
                f"{row.meant}, or --from {layout.name} if the name misleads."
            )


def _not_that(where: str, layout: str) -> str:
    row = sources.BY_NAME[layout]
    entry = "/".join(row.branches[0].entry) or "the file itself"
    first = row.branches[0].prefix + row.tables[0].anchors[0]
    return (
        f"{where} does not have the layout {layout} (expected in {entry}: {first}); `twist inspect {where}` shows "
        "what it holds."
    )


def why_not(where: str, value: dict[str, Any]) -> str:
    """Why nothing in a file can be converted, in one sentence."""
    found = list(state_dicts(value))
    names = {clean: tensors[name] for _, tensors in found for name, clean in _clean_names(tensors).items()}
    if not names:
        entries = ", ".join(map(str, list(value)[:6])) or "none"
        return f"{where} holds no tensors (entries: {entries}): save the state dict."
    if set(value) >= {"state", "param_groups"} or all("optimizer" in path[:1] for path, _ in found):
        return f"{where} holds only an optimiser's state, no network: take the checkpoint with the model's state dict."
    known = known_network(names)
    if known:
        return f"{where} cannot be converted: {known}."
    return (
        f"{where} holds no ResNet and no ViT whose names are known (its {len(names)} tensors begin with "
        f"{next(iter(names))}): save the backbone alone under torchvision's or timm's names."
    )


def holds(state: Mapping[str, Tensor], evidence: tuple[str, ...]) -> bool:
    """Whether each pattern matches one of the names."""
    return all(any(matches(name, (pattern,)) for name in state) for pattern in evidence)


def _entry_at(value: Any, entry: tuple[str, ...]) -> Any:
    for key in entry:
        value = (
            next((item for own, item in value.items() if str(own) == key), None) if isinstance(value, dict) else None
        )
    return value


def state_at(value: Any, entry: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors at a path of entries, names without `module.` and `_orig_mod.`; {} when there are none."""
    value = _entry_at(value, entry)
    tensors = _tensors_of(value) if isinstance(value, dict) else {}
    cleaned = {clean: tensors[name] for name, clean in _clean_names(tensors).items()}
    if len(cleaned) != len(tensors):
        raise UserError(
            "Two tensors have the same name once `module.` is taken away: save the network without its wrapper."
        )
    return cleaned


def _tensors_of(value: dict[Any, Any]) -> dict[str, Tensor]:
    import torch

    return {str(name): item for name, item in value.items() if isinstance(item, torch.Tensor)}


def _clean_names(names: Iterable[str]) -> dict[str, str]:
    """Name in the file → name without what wrappers put before it."""
    plain = {name: _clean(name) for name in names}
    # DINOv2's chunks for FSDP (BlockChunk) number blocks through; an EfficientNet's stages each begin at 0.
    joined = {name: re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", clean) for name, clean in plain.items()}
    return joined if len(set(joined.values())) == len(set(plain.values())) else plain


def _clean(name: str) -> str:
    name = name.replace("_orig_mod.", "")  # first: a compiled wrapper may be around a distributed one, or inside
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
