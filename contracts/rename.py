"""The rename engine: a table of anchored rows, proven total, injective and invertible on every use.

A row pairs a module's path in some layout with its path in the artefact; `{}` stands for one block index. What hangs
below a module depends on its kind (a convolution has a weight, a norm has five tensors), so 34 rows cover the 318
tensors of a ResNet-50. Chains of `str.replace` are how the field loses weights silently: a row here matches a whole
name or not at all, and a name that no row or more than one row matches is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from twist.contracts.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["conv", "norm", "linear", "scale", "tensor"]
Change = Literal["same", "hwio", "flat"]
# kind → (ending in this layout, ending in the artefact, change of the value on the way in)
Rows = dict[str, list[tuple[str, Change]]]
Leaves = Mapping[Kind, tuple[tuple[str, str, Change], ...]]

TORCH_LEAVES: Leaves = {
    "conv": ((".weight", ".weight", "same"),),
    "norm": tuple(
        (leaf, leaf, "same") for leaf in (".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked")
    ),
    "linear": ((".weight", ".weight", "same"), (".bias", ".bias", "same")),
    "scale": ((".weight", ".weight", "same"), (".bias", ".bias", "same")),
    "tensor": (("", "", "same"),),
}


class RenameError(UserError):
    """Names that a table does not cover one to one."""


@dataclass(frozen=True)
class Table:
    """Rows (kind, path in this layout, path in the artefact) and what hangs below each kind."""

    name: str
    rows: tuple[tuple[Kind, str, str], ...]
    leaves: Leaves
    # The artefact's names for tensors that this layout lacks and a reader may fill: BN's counter, Caffe2's statistics.
    absent: tuple[str, ...] = ()

    @cached_property
    def _endings(self) -> tuple[tuple[str, str, Change], ...]:
        return tuple(
            (here + ending_here, there + ending_there, change)
            for kind, here, there in self.rows
            for ending_here, ending_there, change in self.leaves[kind]
        )

    @cached_property
    def _inwards(self) -> Rows:
        return _indexed((here, there, change) for here, there, change in self._endings)

    @cached_property
    def _outwards(self) -> Rows:
        return _indexed((there, here, change) for here, there, change in self._endings)

    @cached_property
    def anchors(self) -> tuple[str, ...]:
        """Names (without index) that show that a state dict follows this table: the stem's."""
        kind, here, _ = self.rows[0]
        return tuple(here + ending for ending, _, _ in self.leaves[kind])


@dataclass(frozen=True)
class Step:
    """One tensor's way: its name on the other side, and what happens to its value."""

    name: str
    change: Change


def inwards(table: Table, names: Iterable[str]) -> dict[str, Step]:
    """Layout names → artefact names. `RenameError` unless the table covers all, each once, and back again."""
    return _proven(table.name, names, table._inwards, table._outwards)


def outwards(table: Table, names: Iterable[str]) -> dict[str, Step]:
    """Artefact names → layout names, under the same proof."""
    return _proven(table.name, names, table._outwards, table._inwards)


def apply(steps: Mapping[str, Step], tensors: Mapping[str, Tensor], *, back: bool = False) -> dict[str, Tensor]:
    """`tensors` under their new names; `back` undoes the change of axes (for a table's outward direction)."""
    changes = _CHANGES_BACK if back else _CHANGES
    return {step.name: changes[step.change](tensors[name]) for name, step in steps.items()}


def _proven(
    name: str,
    names: Iterable[str],
    there: Rows,
    back: Rows,
) -> dict[str, Step]:
    names = list(names)
    steps: dict[str, Step] = {}
    unmatched = []
    for old in names:
        matches = _matches(there, old)
        if len(matches) == 1:
            steps[old] = matches[0]
        else:
            unmatched.append(old)
    if unmatched:
        raise RenameError(
            f"{len(unmatched)} of {len(names)} tensors have no single place in the table {name} (first: "
            f"{unmatched[0]})."
        )
    if len({step.name for step in steps.values()}) != len(steps):
        raise RenameError(f"The table {name} gives two tensors the same name.")
    for old, step in steps.items():
        if [found.name for found in _matches(back, step.name)] != [old]:
            raise RenameError(f"The table {name} does not lead back from {step.name} to {old}.")
    return steps


def _indexed(rows: Iterable[tuple[str, str, Change]]) -> Rows:
    index: Rows = {}
    for old, new, change in rows:
        index.setdefault(old, []).append((new, change))
    return index


def _matches(rows: Rows, name: str) -> list[Step]:
    """Every place of `name`: rows that are the name itself, and rows that are it with one number left open."""
    if "{" in name:
        return []
    found = [Step(new, change) for new, change in rows.get(name, ())]
    for number in _NUMBER.finditer(name):
        template = f"{name[: number.start()]}{{}}{name[number.end() :]}"
        found += [Step(new.replace("{}", number[0]), change) for new, change in rows.get(template, ())]
    return found


# No leading zeros: `layer1.01` is not `layer1.1`, and a lenient index would break injectivity.
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]*)(?![0-9])")


def _same(value: Tensor) -> Tensor:
    return value


# TensorFlow and haiku keep kernels as (height, width, in, out) and norms as (1, 1, 1, C).
_CHANGES: dict[Change, Callable[[Tensor], Tensor]] = {
    "same": _same,
    "hwio": lambda value: value.permute(3, 2, 0, 1),
    "flat": lambda value: value.reshape(-1),
}
_CHANGES_BACK: dict[Change, Callable[[Tensor], Tensor]] = {
    "same": _same,
    "hwio": lambda value: value.permute(2, 3, 1, 0),
    "flat": lambda value: value.reshape(1, 1, 1, -1),
}
