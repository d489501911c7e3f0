"""`tensors.txt`: where every tensor of the file went, three columns, a block of the network at a time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from twist.converters.read import Source

_FILLED, _DROPPED = "(filled)", "(dropped)"


def listing(source: Source, names: Mapping[str, str]) -> str:
    """Source name, target name, shape; a blank line between blocks; filled, dropped and left aside are named."""
    rows = []
    for name, tensor in source.tensors.items():
        row = (source.names.get(name, _FILLED), names.get(name, _DROPPED), str(tuple(tensor.shape)))
        rows.append((_block(name), *row))
    # The dropped are many (a second encoder, a queue): one group for each top-level module.
    rows += [(name.split(".")[0].split("/")[0], name, _DROPPED, "") for name in source.dropped]
    widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
    head = f"{'source':{widths[0]}}  {'target':{widths[1]}}  shape"
    groups = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        groups.append("\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for _, a, b, c in group))
    aside = "".join(f"\nleft aside: {entry} ({count} tensors)" for entry, count in source.left_aside.items())
    return head + "\n\n" + "\n\n".join(groups) + "\n" + aside + ("\n" if aside else "")


def _block(name: str) -> str:
    """Of an artefact's name, the residual or transformer block; stem, patches and last norm are one, too."""
    first, second, *_ = (*name.split("."), "")
    return f"{first}.{second}" if second.isdigit() else "around"
