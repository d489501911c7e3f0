"""The end of a run: its record with all that belongs to it, and what is printed."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from twist.contracts import files
from twist.contracts.metrics import METRICS
from twist.contracts.published import find_neighbours, protocol_title
from twist.contracts.record import RunRecord, name_in, write_record
from twist.contracts.weights import Backbone
from twist.transfer.protocols import Protocol


def publish(record: RunRecord, results: Path, *, media: Iterable[Path], curves: Path | None) -> tuple[RunRecord, Path]:
    """Write the record with its pictures and curves, so that a folder of records can be moved and committed."""
    folder = results / record.protocol / name_in(record, results)

    def copied(path: Path) -> str:
        with files.atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)
        return os.path.relpath(folder / path.name, folder.parent)

    places = {"media": tuple(map(copied, media)), "curves": copied(curves) if curves else None}
    record = record.model_copy(update=places)
    return record, write_record(record, results)


def print_end(record: RunRecord, row: Protocol, backbone: Backbone, path: Path) -> None:
    """Print the numbers, where the record, its pictures and its curves are, and the command that shows it."""
    lines = [render_end(record, row, backbone), f"  record    {typed(path)}"]
    for what, names in (("pictures", record.media), ("curves", (record.curves,) if record.curves else ())):
        lines += [f"  {what:8}  {', '.join(typed(path.parent / name) for name in names)}"] if names else []
    lines += [f"  show it   twist compare {shlex.quote(typed(path.parent.parent))}"]
    print(*lines, sep="\n", file=sys.stderr)


def render_end(record: RunRecord, row: Protocol, backbone: Backbone) -> str:
    """Measured metrics, with what was published for the same method and network under this protocol.

    Published rows are those of the same epochs, else those that do not state any.
    """
    title = f"{row.name} · {record.method} · {record.weights.name} · seed {record.seed} · {record.wall_s:.0f} s"
    lines, found = [title], []
    if record.scale == "full":
        wanted = (record.method, backbone.display_name)
        rows = [one for one in find_neighbours(record.protocol) if (one.method, one.architecture) == wanted]
        same = [one for one in rows if one.epochs == backbone.epochs]
        found = same or [one for one in rows if one.epochs is None]
    for name in (name for name in row.metrics if name in record.metrics):
        if "top5" in name and record.recipe.get("images", {}).get("classes", 1000) <= 5:
            continue  # 100 whatever the weights
        value = record.metrics[name]
        lines.append(f"  {METRICS[name].label:22} {value:6.2f} {METRICS[name].unit}")
        for one in (one for one in found if name in one.metrics):
            difference, epochs = value - one.metrics[name], f", {one.epochs} ep" if one.epochs else ""
            verdict = "within" if abs(difference) <= row.tolerance else "OUTSIDE"
            text = f"published {one.metrics[name]:.1f} ± {row.tolerance:g}{epochs}: {difference:+.2f}, {verdict}"
            if one.protocol != row.name:
                other = f"published under another recipe ({protocol_title(one.protocol)}) {one.metrics[name]:.1f}"
                text = f"{other}{epochs}: {difference:+.2f}"
            lines.append(f"    {text} [{one.source}]")
    if record.scale != "full":
        lines.append(f"  {record.scale} scale: not comparable with published numbers")
    elif not found:
        network = backbone.display_name
        lines.append(f"  nothing published for {record.method} on a {network} under this protocol is known here")
    return "\n".join(lines)


def typed(path: Path) -> str:
    """`path` as one types it in the working directory: relative where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
