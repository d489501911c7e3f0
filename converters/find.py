"""Where the backbone lies in a file: where a layout has it whose evidence is there, else wherever a whole network is.

What content cannot tell is asked, never guessed; a file that nothing fits is explained in one sentence.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twist.contracts.errors import UserError
from twist.contracts.rename import Table
from twist.contracts.weights import METADATA_KEY, TIMM
from twist.converters import sources
from twist.converters.architecture import Arrays, Network, assemble, known_network, timm_heads, timm_table
from twist.converters.evidence import hub_pixels, timm_architecture, trained_for
from twist.converters.open import Contents
from twist.converters.sources import ANYWHERE, Branch, Layout, matches
from twist.converters.tables import DETECTRON2, MMSEG_VIT, TABLES, TIMM_ROPE, TIMM_VIT, TORCHVISION, VIT_TABLES

Entry = tuple[str, ...]
# This suite's own files: the header travels inside, so that the way back is exact.
CONVERTED = Layout(
    name="twist-converted",
    method="unknown",
    heads_known=True,
    branches=tuple(
        Branch("backbone", entry, prefix)
        for entry, prefix in (
            ((), ""), (("model",), ""), (("state_dict",), "backbone.network."), (("state_dict",), "backbone."),
            (("state_dict",), ""),
        )
    ),
    tables=(DETECTRON2, TORCHVISION, MMSEG_VIT, TIMM_ROPE, TIMM_VIT),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Where the backbone lies in a file."""

    layout: Layout
    branch: Branch
    table: Table
    state: Arrays  # names without `module.` and `_orig_mod.`
    present: tuple[str, ...] = ()  # names of all branches in the file
    asked: bool = False  # the user said where it is
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def parts(self) -> tuple[Arrays, tuple[str, ...]]:
        """The tensors under the prefix, without it, and the names of all others.

        Only what the layout names as a head is left out under the prefix: the rename table has to know the rest.
        """
        layout, prefix = self.layout, self.branch.prefix
        inside, dropped = {}, []
        for name, tensor in self.state.items():
            tail = name.removeprefix(prefix)
            # A prefix wins over the drop list (`encoder_q.0.` over `encoder_q.*`); without one the list decides alone.
            head = matches(tail, layout.heads) or (not prefix and matches(name, layout.drop))
            head = head or name == "n_averaged"  # torch.optim.swa_utils: how many were averaged
            if head or not name.startswith(prefix):
                dropped.append(name)
            else:
                inside[tail] = tensor
        return inside, tuple(dropped)


def locate(
    contents: Contents,
    *,
    layout: str | None = None,
    branch: str | None = None,
    entry: str | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
) -> Found:
    """The backbone to read: where a layout has it, or wherever in the file it is; `UserError` where that is not sure.

    `entry` (`a/b`: path of entries) and `prefix` say where it is; a layout then says its method and pixels only.
    `architecture`: the `timm:NAME` that it is.
    """
    value, where = contents.value, str(contents.path)
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a {type(value).__name__}, not a dictionary of tensors: save the state dict.")
    asked = entry is not None or prefix is not None
    table = own_table(contents, architecture)
    if not asked and layout != ANYWHERE.name:
        found = _by_layout(contents, layout, branch, table)
        if found is not None:
            return found
    place = None if prefix is None else f"{prefix.strip('.')}.".lstrip(".").removeprefix("module.")
    seen = list(networks(value, table))
    there = [net for net in seen if place in (None, net.prefix) and entry in (None, "/".join(net.entry))]
    chosen = [net for net in there if not net.reason]
    if not chosen:
        broken = next((net.reason for net in there if net.reason), None)
        if asked and any(not net.reason for net in seen):
            raise UserError(f"{where} holds no network there; it holds {_list(seen)}.")
        raise UserError(f"{where}, {broken}" if broken else _why_not(where, value))
    net, name, present = _one_of(chosen, seen if not asked else chosen, where, branch)
    row = sources.BY_NAME[layout] if layout is not None else _row_of(net)
    if not asked:
        _check_not_dense(net.state, ANYWHERE if layout is None else row, where, net.prefix)
    heads = timm_heads(table) if table else (*row.heads, *ANYWHERE.heads)
    row = row.model_copy(update={"heads": (*heads, *net.others), "drop": ()})
    note = f"{net.text} was found by its names" + ("" if layout else "; nothing names the method (--from LAYOUT does)")
    return Found(row, Branch(name, net.entry, net.prefix), net.table, net.state, present, asked=asked, notes=(note,))


def own_table(contents: Contents, architecture: str | None = None) -> Table | None:
    """The names of the one network that the file can hold, where it or `architecture` names one of timm's."""
    named = TIMM + architecture.removeprefix(TIMM) if architecture else timm_architecture(contents)
    return timm_table(named) if named else None


def is_converted(contents: Contents) -> bool:
    """Whether an earlier conversion's header is in the file."""
    value = contents.value
    return METADATA_KEY in contents.metadata or (isinstance(value, dict) and isinstance(value.get(METADATA_KEY), str))


# ---- State dicts -----------------------------------------------------------------------------------------------------


def state_dicts(value: Any, path: Entry = ()) -> Iterator[tuple[Entry, Arrays]]:
    """Every dictionary in a file that directly holds tensors, with the path of entries that leads to it."""
    if isinstance(value, dict) and (tensors := _tensors_of(value)):
        yield path, tensors
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from state_dicts(item, (*path, str(key)))


def _tensors_of(value: dict[Any, Any]) -> Arrays:
    return {str(name): item for name, item in value.items() if isinstance(item, np.ndarray)}


def _entry_at(value: Any, entry: Entry) -> Any:
    for key in entry:
        items = value.items() if isinstance(value, dict) else ()
        value = next((item for own, item in items if str(own) == key), None)
    return value


def state_at(value: Any, entry: Entry) -> Arrays:
    """The tensors at a path of entries, names without `module.` and `_orig_mod.`; {} when there are none."""
    value = _entry_at(value, entry)
    tensors = _tensors_of(value) if isinstance(value, dict) else {}
    cleaned = {clean: tensors[name] for name, clean in _clean_names(tensors).items()}
    if len(cleaned) != len(tensors):
        raise UserError(
            "Two tensors have the same name once `module.` is taken away: save the network without its wrapper."
        )
    return cleaned


def _clean_names(names: Iterable[str]) -> dict[str, str]:
    """Name in the file → name without what wrappers put before it."""
    # `_orig_mod.` first: a compiled wrapper may be around a distributed one, or inside.
    plain = {name: re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")) for name in names}
    # DINOv2's chunks for FSDP (BlockChunk) number blocks through; an EfficientNet's stages each begin at 0.
    joined = {name: re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", clean) for name, clean in plain.items()}
    return joined if len(set(joined.values())) == len(set(plain.values())) else plain


def _holds(state: Mapping[str, Any], evidence: tuple[str, ...]) -> bool:
    """Whether each pattern matches one of the names."""
    return all(any(matches(name, (pattern,)) for name in state) for pattern in evidence)


# ---- By layout -------------------------------------------------------------------------------------------------------


def _by_layout(contents: Contents, layout: str | None, branch: str | None, table: Table | None) -> Found | None:
    """The first layout whose evidence is in the file, and the branch to take; None where none fits.

    `table` has the names of the network that it is known to be.
    """
    value, where = _join_haiku(contents.value), str(contents.path)
    at = functools.cache(functools.partial(state_at, value))
    if layout is not None:
        candidates: Iterable[Layout] = (sources.BY_NAME[layout],)
    elif is_converted(contents):
        candidates = (CONVERTED,)
    elif hub_pixels(contents) is not None:
        candidates = (sources.BY_NAME["timm"],)
    elif table is not None:
        candidates = (sources.BY_NAME["timm-training"],)
    else:
        for case in sources.AMBIGUOUS:
            state = at(case.entry)
            fits = state and _holds(state, case.evidence) and not any(entry in value for entry in case.absent)
            if fits and known_network(state) is None:
                choices = " or ".join(f"--from {choice}" for choice in case.choices)
                raise UserError(f"{where} does not say what it is ({case.why}): say {choices}.")
        candidates = (row for row in sources.LAYOUTS if row.detect)
    if table is not None:
        known: dict[str, Any] = {"tables": (table,), "heads": timm_heads(table), "drop": (), "evidence": ()}
        candidates = [row.model_copy(update=known) for row in candidates]
    for row in candidates:
        places = list(_places(row, value, at, forced=layout is not None))
        if not places:
            continue
        if layout is None:
            for named in sources.NAMED:
                if named.word in contents.path.name.lower() and row.name in named.layouts:
                    raise UserError(
                        f"{where} is called {named.word} but looks like {row.name}, which has {named.difference}: say "
                        f"--from {named.meant}, or --from {row.name} if the name misleads."
                    )
            _check_not_dense(places[0].state, row, where, places[0].branch.prefix)
        present = tuple(dict.fromkeys(place.branch.name for place in places))
        chosen = next((place for place in places if branch in (None, place.branch.name)), None)
        if chosen is None:
            raise UserError(
                f"{where} (layout {row.name}) holds no branch {branch}: it holds {', '.join(present)}; choose one "
                "of them, or leave --branch away."
            )
        return replace(chosen, present=present, asked=layout is not None)
    if layout is not None:
        row = sources.BY_NAME[layout]
        raise UserError(
            f"{where} does not have the layout {layout} (expected in {'/'.join(row.branches[0].entry) or 'the file'}: "
            f"{row.branches[0].prefix}{row.tables[0].anchors[0]}); `twist inspect {where}` shows what it holds."
        )
    return None


def _places(layout: Layout, value: dict[str, Any], at: Callable[[Entry], Arrays], *, forced: bool) -> Iterator[Found]:
    """Each branch of `layout` that is in the file, the preferred one first."""
    if not forced and any(_entry_at(value, tuple(entry.split("/"))) is None for entry in layout.top):
        return
    named = {branch.name for branch in layout.branches}
    copies = [
        Branch(name, (*branch.entry[:-1], copy), branch.prefix)
        for branch in layout.branches
        for name, copy in sources.copies_of(branch.entry)
        if name not in named
    ]
    for branch in (*layout.branches, *copies):
        state = at(branch.entry)
        if not forced and not _fits(layout, state):
            continue
        for table in layout.tables:
            if any(branch.prefix + anchor in state for anchor in table.anchors):
                yield Found(layout, branch, table, state)
                break


def _fits(layout: Layout, state: Arrays) -> bool:
    """Whether a state dict has the layout's evidence, lacks what it must lack, and its linear layers are that."""
    for module in layout.linear:
        parts = {name.removeprefix(f"{module}."): t.ndim for name, t in state.items() if name.startswith(f"{module}.")}
        if parts != {"weight": 2, "bias": 1}:
            return False
    return _holds(state, layout.evidence) and not any(matches(name, layout.lacks) for name in state)


def _check_not_dense(state: Arrays, layout: Layout, where: str, prefix: str) -> None:
    """`UserError` for the state dict of a trained detector or segmentor, whose backbone has to be asked for."""
    # A pretraining with detection heads of its own names them in its row; `*head.*` names no such thing.
    named = tuple(pattern for pattern in layout.drop if pattern[0] != "*")
    dense = trained_for(state, named) if layout.name != CONVERTED.name else None
    if dense is not None:
        ask = f"--prefix {prefix}" if prefix else f"--from {layout.name}"
        raise UserError(
            f"{where} is a trained {dense.title}, whose backbone ran {dense.runs}; to take that backbone all the same, "
            f"as a plain network, say {ask}."
        )


def _join_haiku(value: dict[str, Any]) -> dict[str, Any]:
    """DeepMind's BYOL: `experiment_state` as {network: state dict} of haiku's parameters and statistics, joined."""
    experiment = value.get("experiment_state")
    if not isinstance(experiment, dict):
        return value
    networks: dict[str, Any] = {"online": {}, "target": {}}
    for network, state in networks.items():
        for part in ("params", "state"):
            modules = experiment.get(f"{network}_{part}")
            for module, leaves in modules.items() if isinstance(modules, dict) else ():
                # `hidden` and `counter` belong to the running mean's own bookkeeping; `average` is the statistic.
                kept = leaves.items() if isinstance(leaves, dict) else ()
                state |= {
                    _haiku_name(str(module), str(leaf)): tensor
                    for leaf, tensor in kept
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


# ---- Anywhere --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A backbone somewhere in a file, or what begins as one and is none for the reason given."""

    entry: Entry
    prefix: str
    table: Table
    state: Arrays  # the whole state dict; names without `module.` and `_orig_mod.`
    others: tuple[str, ...]  # patterns of further modules beside it, which are left aside
    network: Network | None = None
    reason: str | None = None

    @property
    def place(self) -> str:
        return " › ".join((*self.entry, self.prefix) if self.prefix else self.entry) or "the file's own level"

    @property
    def arrays(self) -> Arrays:
        return self.network.arrays if self.network else {}

    def to_json(self) -> dict[str, Any]:
        assert self.network is not None
        entry, name = "/".join(self.entry), self.network.shape["architecture"]
        return {"architecture": name, "entry": entry, "prefix": self.prefix, "tensors": len(self.arrays)}

    @property
    def text(self) -> str:
        """`resnet18 under state_dict › model.backbone. (120 tensors)`"""
        name = self.network.shape["architecture"] if self.network else "something"
        return f"{name} under {self.place}" + (f" ({len(self.arrays)} tensors)" if self.network else "")


def networks(value: Any, only: Table | None = None) -> Iterator[Candidate]:
    """Each place in a file where a network (with the names of `only`) begins, under its longest prefix first."""
    for path, _ in state_dicts(value):
        if path and matches(path[0], sources.TRAINING_ENTRIES):
            continue
        state = state_at(value, path)
        found: list[str] = []
        for prefix, table in sorted(_beginnings(state, only), key=lambda place: -len(place[0])):
            candidate = _candidate(path, prefix, table, state, found)
            if candidate.reason is None or prefix not in found:
                yield candidate
            found.append(prefix)


def _beginnings(state: Arrays, only: Table | None) -> Iterator[tuple[str, Table]]:
    """Prefix and table wherever the first and the third row of a table have a tensor."""
    for table in TABLES.values() if only is None else (only,):
        third, anchor = table.leaves_of(2), table.anchors[0]
        for name in state:
            prefix = name.removesuffix(anchor)
            begins = name.endswith(anchor) and (prefix == "" or prefix[-1] == ".")
            if begins and any(prefix + leaf in state for leaf in third):
                yield prefix, table


def _candidate(entry: Entry, prefix: str, table: Table, state: Arrays, deeper: list[str]) -> Candidate:
    """The network that begins at `prefix`; networks under longer prefixes are no part of it."""
    own = {path.partition(".")[0] for _, path, _ in table.rows}
    heads = ANYWHERE.heads if table.name in TABLES else timm_heads(table)
    inside, others = {}, set()
    for name, tensor in state.items():
        tail = name.removeprefix(prefix)
        if not name.startswith(prefix) or matches(tail, heads):
            continue
        module, dot, _ = tail.partition(".")
        elsewhere = any(name.startswith(other) for other in deeper if other != prefix)
        # What is beside a ResNet's modules and holds no convolution comes after it: a head, a queue, a counter.
        if module not in own and (elsewhere or (table not in VIT_TABLES and tensor.ndim <= 2)):
            others.add(module + (".*" if dot else ""))
        else:
            inside[tail] = tensor
    empty = Candidate(entry, prefix, table, state, tuple(sorted(others)))
    try:
        return replace(empty, network=assemble(inside, table, empty.place))
    except UserError as error:
        return replace(empty, reason=str(error))


def _row_of(net: Candidate) -> Layout:
    """The row of a network that is known by its names wherever it lies (the method is then not said), the row that has
    had a name for this place since before files were searched, or `anywhere`."""
    for row in sources.LAYOUTS:
        if row.own_network and net.table in row.tables and _holds(net.state, row.evidence):
            return row.model_copy(update={"method": "unknown"})
    places = ((row, branch) for row in sources.LAYOUTS if row.generic for branch in row.branches)
    return next((row for row, branch in places if (branch.entry, branch.prefix) == (net.entry, net.prefix)), ANYWHERE)


def _one_of(
    chosen: list[Candidate], seen: list[Candidate], where: str, branch: str | None
) -> tuple[Candidate, str, tuple[str, ...]]:
    """The network meant, the name of its branch, and all such names; `UserError` where several could be meant."""
    copies = {(*net.entry[:-1], copy): name for net in chosen for name, copy in sources.copies_of(net.entry)}
    first = next((net for net in chosen if net.entry not in copies), chosen[0])
    branches = {"backbone": first}
    doubtful = [net for net in seen if net.reason and net.prefix != first.prefix and net.entry == first.entry]
    for net in chosen:
        if net is first or _equal(net.arrays, first.arrays):  # one network under two names
            continue
        if net.entry in copies and net.prefix == first.prefix:
            branches.setdefault(copies[net.entry], net)
        else:
            doubtful.append(net)
    if doubtful:
        raise UserError(
            f"{where} holds several networks: {_list([first, *doubtful])}; choose one with --prefix or --entry."
        )
    name = branch or "backbone"
    if name not in branches:
        raise UserError(f"{where} holds no branch {branch}: it holds {', '.join(branches)}; choose one of them.")
    return branches[name], name, tuple(branches)


def _equal(one: Arrays, other: Arrays) -> bool:
    same = one.keys() == other.keys()
    return same and all(array.tobytes() == other[name].tobytes() for name, array in one.items())


def _list(nets: list[Candidate]) -> str:
    return ", ".join(net.text for net in nets)


def _why_not(where: str, value: dict[str, Any]) -> str:
    """Why nothing in a file can be converted, in one sentence."""
    found = list(state_dicts(value))
    names = {clean: None for _, tensors in found for clean in _clean_names(tensors).values()}
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
