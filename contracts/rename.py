"""The rename engine: a table of anchored rows, checked to be total, injective and invertible on every use.

A row pairs a module's path in some layout with its path in the artefact; `{}` stands for one block index. A row matches
a whole name or not at all, and a name without exactly one row is an error: chains of `str.replace` lose weights.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from twist.contracts.errors import UserError

Kind = Literal["conv", "norm", "linear", "scale", "tensor"]
Change = Literal["same", "hwio", "flat"]
# kind → (ending in the layout, ending in the artefact, change of the value from the layout to the artefact)
Leaves = Mapping[Kind, tuple[tuple[str, str, Change], ...]]


def _unchanged(*leaves: str) -> tuple[tuple[str, str, Change], ...]:
    return tuple((leaf, leaf, "same") for leaf in leaves)


TORCH_LEAVES: Leaves = {
    "conv": _unchanged(".weight"),
    "norm": _unchanged(".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked"),
    "linear": _unchanged(".weight", ".bias"),
    "scale": _unchanged(".weight", ".bias"),
    "tensor": _unchanged(""),
}


class RenameError(UserError):
    """Names that a table does not cover one to one."""


class Step(NamedTuple):
    """The new name of a tensor, and the change of its value."""

    name: str
    change: Change


# name, with `{}` for a block index → its places on the other side
Index = dict[str, list[Step]]


@dataclass(frozen=True)
class Table:
    """Rows (kind, path in the layout, path in the artefact) and the tensors of each kind of module."""

    name: str
    rows: tuple[tuple[Kind, str, str], ...]
    leaves: Leaves = field(default_factory=lambda: TORCH_LEAVES)
    # Endings in the artefact of tensors that the layout lacks and a reader may fill, such as a batch norm's counter.
    absent: tuple[str, ...] = ()

    @cached_property
    def indices(self) -> tuple[Index, Index]:
        """Layout → artefact, and back."""
        there: Index = {}
        back: Index = {}
        for kind, old, new in self.rows:
            for ending, ending_there, change in self.leaves[kind]:
                there.setdefault(old + ending, []).append(Step(new + ending_there, change))
                back.setdefault(new + ending_there, []).append(Step(old + ending, change))
        return there, back

    @cached_property
    def anchors(self) -> tuple[str, ...]:
        """Names that show that a state dict follows this table: those of the first row."""
        return self.leaves_of(0)

    def leaves_of(self, index: int) -> tuple[str, ...]:
        """The names in the layout that one row covers, in block 0."""
        kind, path, _ = self.rows[index]
        return tuple(path.replace("{}", "0") + ending for ending, _, _ in self.leaves[kind])


def inwards(table: Table, names: Iterable[str]) -> dict[str, Step]:
    """Layout names → artefact names. `RenameError` unless the table covers all, each once, and back again."""
    return _checked(table.name, list(names), *table.indices)


def outwards(table: Table, names: Iterable[str]) -> dict[str, Step]:
    """Artefact names → layout names, with the same checks."""
    return _checked(table.name, list(names), *reversed(table.indices))


def apply(steps: Mapping[str, Step], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` with the names and values that `inwards` gave; what is changed must be numpy's arrays."""
    return {step.name: _CHANGES[step.change](tensors[name]) for name, step in steps.items()}


def _checked(table: str, names: list[str], there: Index, back: Index) -> dict[str, Step]:
    found = {name: _matches(there, name) for name in names}
    unmatched = [name for name in names if len(found[name]) != 1]
    if unmatched:
        raise RenameError(
            f"{len(unmatched)} of {len(names)} tensors have no single place in the table {table} (first: "
            f"{unmatched[0]})."
        )
    steps = {name: matches[0] for name, matches in found.items()}
    if len({step.name for step in steps.values()}) != len(steps):
        raise RenameError(f"The table {table} gives two tensors the same name.")
    for old, step in steps.items():
        if [match.name for match in _matches(back, step.name)] != [old]:
            raise RenameError(f"The table {table} does not lead back from {step.name} to {old}.")
    return steps


# No leading zeros: if `layer1.01` were read as `layer1.1`, two names would become one.
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]*)(?![0-9])")


def _matches(index: Index, name: str) -> list[Step]:
    """Every place of `name`: rows that are the name itself, and rows that are the name with one number left open."""
    if "{" in name:
        return []
    found = list(index.get(name, ()))
    for number in _NUMBER.finditer(name):
        template = f"{name[: number.start()]}{{}}{name[number.end() :]}"
        found += [Step(new.replace("{}", number[0]), change) for new, change in index.get(template, ())]
    return found


# TensorFlow and haiku keep kernels as (height, width, in, out) and norms as (1, 1, 1, C).
_CHANGES: dict[Change, Callable[[Any], Any]] = {
    "same": lambda value: value,
    "hwio": lambda value: value.transpose(3, 2, 0, 1),
    "flat": lambda value: value.reshape(-1),
}
