"""A backbone anywhere: every state dict of a file is searched for whole networks that are known, under any prefix.

A file that no layout fits is taken when it holds one such network and nothing else that could be meant; `--entry` and
`--prefix` choose among several. Which method made it is then not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from twist.contracts import rename
from twist.contracts.errors import UserError
from twist.contracts.rename import Table
from twist.converters import sources
from twist.converters.detect import (
    Found,
    architecture_of,
    check_complete,
    check_not_dense,
    fill,
    find,
    holds,
    known_network,
    matches,
    readable,
    state_at,
    state_dicts,
    why_not,
)
from twist.converters.open import Contents
from twist.converters.sources import ANYWHERE, Branch, Layout
from twist.converters.tables import TABLES, VIT_TABLES
from twist.converters.vit import joined

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Network:
    """A backbone in a file, or what begins as one and is none for the reason given."""

    entry: tuple[str, ...]
    prefix: str
    table: Table
    state: dict[str, Tensor]  # the whole state dict; names without `module.` and `_orig_mod.`
    tensors: dict[str, Tensor]  # the network's, artefact names
    others: tuple[str, ...] = ()  # patterns of further modules beside it, which are left aside
    architecture: str = ""
    reason: str | None = None

    @property
    def place(self) -> str:
        """`state_dict › model.backbone.`"""
        return " › ".join((*self.entry, self.prefix) if self.prefix else self.entry) or "the file's own level"

    @property
    def text(self) -> str:
        """`resnet18 under state_dict › model.backbone. (120 tensors)`"""
        return f"{self.architecture} under {self.place} ({len(self.tensors)} tensors)"


def locate(
    contents: Contents,
    *,
    layout: str | None = None,
    branch: str | None = None,
    entry: str | None = None,
    prefix: str | None = None,
) -> Found:
    """The backbone to read: where a layout has it, or wherever in the file it is; `UserError` where that is not sure.

    `entry` (`a/b`: path of entries) and `prefix` say where it is; a layout then says its method and pixels only.
    """
    if entry is None and prefix is None and layout != ANYWHERE.name:
        found = find(contents, layout=layout, branch=branch)
        if found is not None:
            return found
    value, where = contents.value, str(contents.path)
    asked = entry is not None or prefix is not None
    place = None if prefix is None else f"{prefix.strip('.')}.".lstrip(".").removeprefix("module.")
    seen = list(networks(value))
    chosen = [
        net for net in seen if place in (None, net.prefix) and entry in (None, "/".join(net.entry)) and not net.reason
    ]
    if not chosen:
        broken = next((net.reason for net in seen if net.reason and place in (None, net.prefix)), None)
        if asked and any(not net.reason for net in seen):
            raise UserError(f"{where} holds no network there; it holds {_list(seen)}.")
        raise UserError(f"{where}, {broken}" if broken else why_not(where, value))
    net, name, present = _one_of(chosen, seen if not asked else chosen, where, branch)
    row = sources.BY_NAME[layout] if layout is not None else _row_of(net)
    if not asked:
        check_not_dense(net.state, ANYWHERE if layout is None else row, where, net.prefix)
    row = row.model_copy(update={"heads": (*row.heads, *ANYWHERE.heads, *net.others)})
    note = f"{net.text} was found by its names" + ("" if layout else "; nothing names the method (--from LAYOUT does)")
    return Found(row, Branch(name, net.entry, net.prefix), net.table, net.state, present, asked=asked, notes=(note,))


def networks(value: Any) -> Iterator[Network]:
    """Each place in a file where a network begins, under its longest prefix first."""
    for path, _ in state_dicts(value):
        if path and matches(path[0], sources.TRAINING_ENTRIES):
            continue
        state = state_at(value, path)
        found: list[str] = []
        for prefix, table in sorted(_beginnings(state), key=lambda place: -len(place[0])):
            network = _network(path, prefix, table, state, tuple(found))
            if network.reason is None or prefix not in found:
                yield network
            found.append(prefix)


def _beginnings(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Table]]:
    """Prefix and table wherever the first and the third row of a table have a tensor."""
    for table in TABLES.values():
        third = table.leaves_of(2)
        for anchor in table.anchors[:1]:
            for name in state:
                prefix = name.removesuffix(anchor)
                begins = name.endswith(anchor) and (prefix == "" or prefix[-1] == ".")
                if begins and any(prefix + leaf in state for leaf in third):
                    yield prefix, table


def _network(
    entry: tuple[str, ...], prefix: str, table: Table, state: dict[str, Tensor], deeper: tuple[str, ...]
) -> Network:
    """The network that begins at `prefix`; networks under longer prefixes are no part of it."""
    own = {path.partition(".")[0] for _, here, _ in table.rows for path in (here,)}
    inside, others = {}, set()
    for name, tensor in state.items():
        tail = name.removeprefix(prefix)
        if not name.startswith(prefix) or matches(tail, ANYWHERE.heads):
            continue
        module, dot, _ = tail.partition(".")
        elsewhere = any(name.startswith(other) for other in deeper if other != prefix)
        # What is beside a ResNet's modules and holds no convolution comes after it: a head, a queue, a counter.
        if module not in own and (elsewhere or (table not in VIT_TABLES and tensor.ndim <= 2)):
            others.add(module + (".*" if dot else ""))
        else:
            inside[tail] = tensor
    net = Network(entry, prefix, table, state, inside, tuple(sorted(others)))
    try:
        steps = rename.inwards(table, inside)
        tensors = joined(rename.apply(steps, readable(inside, net.place)))
        shape = architecture_of(tensors, net.place)
        fill(tensors, shape, table)
        check_complete(tensors, shape, net.place)
    except UserError as error:
        why = known_network(inside)
        return replace(net, reason=f"{net.place}: {why}." if why else str(error))
    return replace(net, tensors=tensors, architecture=shape["architecture"])


def _row_of(net: Network) -> Layout:
    """The row of a network that is known by its names wherever it lies (the method is then not said), the row that has
    had a name for this place since before files were searched, or `anywhere`."""
    for row in sources.LAYOUTS:
        if row.own_network and net.table in row.tables and holds(net.state, row.evidence):
            return row.model_copy(update={"method": "unknown"})
    places = ((row, branch) for row in sources.LAYOUTS if row.generic for branch in row.branches)
    return next((row for row, branch in places if (branch.entry, branch.prefix) == (net.entry, net.prefix)), ANYWHERE)


def _one_of(
    chosen: list[Network], seen: list[Network], where: str, branch: str | None
) -> tuple[Network, str, tuple[str, ...]]:
    """The network meant, the name of its branch, and all such names; `UserError` where several could be meant."""
    copies = {(*net.entry[:-1], copy): name for net in chosen for name, copy in sources.copies_of(net.entry)}
    first = next((net for net in chosen if net.entry not in copies), chosen[0])
    branches = {"backbone": first}
    doubtful = [net for net in seen if net.reason and net.prefix != first.prefix and net.entry == first.entry]
    for net in chosen:
        if net is first or _equal(net, first):  # one network under two names
            continue
        name = copies.get(net.entry)
        if name and net.prefix == first.prefix:
            branches.setdefault(name, net)
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


def _equal(net: Network, other: Network) -> bool:
    import torch

    same = net.tensors.keys() == other.tensors.keys()
    return same and all(
        torch.equal(tensor.nan_to_num(), other.tensors[name].nan_to_num()) for name, tensor in net.tensors.items()
    )


def _list(nets: list[Network]) -> str:
    return ", ".join(net.text if not net.reason else f"something under {net.place}" for net in nets)
