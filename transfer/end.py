"""What a run says at its end: what was measured, beside what others published, and where it was written.

Paths are as one would type them: relative where they lie below the working directory.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from twist.contracts.metrics import METRICS
from twist.contracts.record import RunRecord
from twist.contracts.weights import Backbone
from twist.transfer.protocols import Neighbour, Protocol, find_neighbours


def render_end(record: RunRecord, row: Protocol, backbone: Backbone) -> str:
    """Measured metrics, beside what was published for the same method and network under this protocol."""
    neighbours = (
        find_neighbours(row, record.method, backbone.epochs, backbone.display_name) if record.scale == "full" else []
    )
    lines = [f"{row.name} · {record.method} · {record.weights.name} · seed {record.seed} · {record.wall_s:.0f} s"]
    classes = record.recipe.get("images", {}).get("classes", 1000)
    for name in row.metrics:
        if "top5" in name and classes <= 5:
            continue  # 100 whatever the weights
        if name in record.metrics:
            lines.append(f"  {METRICS[name].label:22} {record.metrics[name]:6.2f} {METRICS[name].unit}")
            lines += [f"    {text}" for neighbour in neighbours for text in _against(name, record, neighbour)]
    if record.scale == "full" and not neighbours:
        lines.append(
            f"  nothing published for {record.method} on a {backbone.display_name} under this protocol is known here"
        )
    elif record.scale != "full":
        lines.append(f"  {record.scale} scale: not comparable with published numbers")
    return "\n".join(lines)


def _against(name: str, record: RunRecord, neighbour: Neighbour) -> list[str]:
    if name not in neighbour.values:
        return []
    difference = record.metrics[name] - neighbour.values[name]
    epochs = f", {neighbour.epochs} ep" if neighbour.epochs else ""
    if neighbour.differs:
        return [
            f"published under another recipe ({neighbour.differs}) {neighbour.values[name]:.1f}{epochs}: "
            f"{difference:+.2f} [{neighbour.source}]"
        ]
    verdict = "within" if abs(difference) <= neighbour.tolerance else "OUTSIDE"
    return [
        f"published {neighbour.values[name]:.1f} ± {neighbour.tolerance:g}{epochs}: {difference:+.2f}, {verdict} "
        f"[{neighbour.source}]"
    ]


def render_places(record: RunRecord, path: Path) -> str:
    """Where `record`, which lies at `path`, its pictures and its curves are, and the command that shows it."""
    lines = [f"  record    {_typed(path)}"]
    for what, names in (("pictures", record.media), ("curves", (record.curves,) if record.curves else ())):
        for place in dict.fromkeys((path.parent / name).parent for name in names):
            inside = [Path(name).name for name in names if (path.parent / name).parent == place]
            listed = f"{_typed(place)}/ ({', '.join(inside)})" if inside[1:] else f"{_typed(place)}/{inside[0]}"
            lines.append(f"  {what:8}  {listed}")
    return "\n".join([*lines, f"  show it   twist compare {shlex.quote(_typed(path.parent.parent))}"])


def _typed(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
