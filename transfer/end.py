"""What a run prints at its end: the measured metrics, what others published, and the files that were written.

Paths are as one would type them: relative where they lie below the working directory.
"""

import shlex
from pathlib import Path

from twist.contracts.metrics import METRICS
from twist.contracts.published import PublishedRow, find_neighbours, protocol_title
from twist.contracts.record import RunRecord
from twist.contracts.weights import Backbone
from twist.transfer.protocols import Protocol


def render_end(record: RunRecord, row: Protocol, backbone: Backbone) -> str:
    """Measured metrics, with what was published for the same method and network under this protocol."""
    network, full = backbone.display_name, record.scale == "full"
    published = _published_for(record, backbone) if full else []
    lines = [f"{row.name} · {record.method} · {record.weights.name} · seed {record.seed} · {record.wall_s:.0f} s"]
    classes = record.recipe.get("images", {}).get("classes", 1000)
    for name in row.metrics:
        if "top5" in name and classes <= 5:
            continue  # 100 whatever the weights
        if name in record.metrics:
            lines.append(f"  {METRICS[name].label:22} {record.metrics[name]:6.2f} {METRICS[name].unit}")
            lines += [_against(record.metrics[name], name, one, row) for one in published if name in one.metrics]
    if full and not published:
        lines.append(f"  nothing published for {record.method} on a {network} under this protocol is known here")
    if not full:
        lines.append(f"  {record.scale} scale: not comparable with published numbers")
    return "\n".join(lines)


def _published_for(record: RunRecord, backbone: Backbone) -> list[PublishedRow]:
    """The published rows of the method on this network: those of the same epochs, else those that do not state any."""
    wanted = (record.method, backbone.display_name)
    rows = [row for row in find_neighbours(record.protocol) if (row.method, row.architecture) == wanted]
    same = [row for row in rows if row.epochs == backbone.epochs]
    return same or [row for row in rows if row.epochs is None]


def _against(value: float, name: str, published: PublishedRow, row: Protocol) -> str:
    printed = published.metrics[name]
    difference, epochs = value - printed, f", {published.epochs} ep" if published.epochs else ""
    if published.protocol != row.name:
        title = protocol_title(published.protocol)
        text = f"published under another recipe ({title}) {printed:.1f}{epochs}: {difference:+.2f}"
    else:
        verdict = "within" if abs(difference) <= row.tolerance else "OUTSIDE"
        text = f"published {printed:.1f} ± {row.tolerance:g}{epochs}: {difference:+.2f}, {verdict}"
    return f"    {text} [{published.source}]"


def render_places(record: RunRecord, path: Path) -> str:
    """Where `record`, which lies at `path`, its pictures and its curves are, and the command that shows it."""
    lines = [f"  record    {typed(path)}"]
    for what, names in (("pictures", record.media), ("curves", (record.curves,) if record.curves else ())):
        for place in dict.fromkeys((path.parent / name).parent for name in names):
            inside = [Path(name).name for name in names if (path.parent / name).parent == place]
            listed = f"{typed(place)}/ ({', '.join(inside)})" if inside[1:] else f"{typed(place)}/{inside[0]}"
            lines.append(f"  {what:8}  {listed}")
    return "\n".join([*lines, f"  show it   twist compare {shlex.quote(typed(path.parent.parent))}"])


def typed(path: Path) -> str:
    """`path` as one types it in the working directory: relative where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
