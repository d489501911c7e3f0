"""Source → artefact → target, proven: `twist convert`. A folder appears whole, or not at all."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.machine import software
from twist.contracts.run_folder import replaced_whole
from twist.contracts.weights import Backbone
from twist.converters import output_folder
from twist.converters.output_folder import DROPPED, REPORT, TENSORS
from twist.converters.proof import TOLERANCE, Proof, prove
from twist.converters.read import Source, assumed, counts_by_module, load_source
from twist.converters.targets import TARGETS, Target
from twist.converters.zoo import located


@dataclass(frozen=True)
class Conversion:
    """What was written into `output`, and what was proven."""

    target: Target
    output: Path
    weights: Path
    overlay: Path | None  # the file with the settings that the weights imply
    backbone: Backbone
    proof: Proof
    notes: tuple[str, ...]


def convert(
    checkpoint: Path,
    *,
    target: str,
    layout: str | None = None,
    branch: str | None = None,
    entry: str | None = None,
    prefix: str | None = None,
    heads: int | None = None,
    output: Path | None = None,
    verify: bool = True,
    pkl: bool = False,
    allow_nan: bool = False,
) -> Conversion:
    """Convert `checkpoint` (a file, a run's folder, `zoo:NAME`) into the folder `output`.

    By default that is `<its name>-<target>` in the working directory.
    The folder holds the weights, the overlay where the target has settings, `report.json`, `tensors.txt` and, where
    tensors were left out, `dropped.txt`. An earlier conversion of the same file there is replaced. `layout`, `branch`,
    `entry` and `prefix` say what to read, as `twist inspect` lists it.

    Raises:
        UserError: the checkpoint cannot be read, the target has no such network, or the folder holds anything else;
            nothing is written.
        ProofError: the target does not compute the source's features; nothing is written.
        UsageError: unknown target or layout, or `pkl` for a target that has no pickle.
    """
    checkpoint, how = located(checkpoint, layout=layout, branch=branch, heads=heads)
    if target not in TARGETS:
        raise UsageError(f'There is no target "{target}".{did_you_mean(target, TARGETS)}')
    into = TARGETS[target]
    if pkl and into.write_pickle is None:
        raise UsageError(f"--pkl has no meaning with --to {target}: Detectron2 reads such a file.")
    output = Path(output or output_folder.default_folder(checkpoint, target))
    output_folder.check(output, checkpoint)
    source = load_source(checkpoint, **how, entry=entry, prefix=prefix, allow_nan=allow_nan)
    backbone = source.backbone
    output_folder.check_same_source(
        output, checkpoint, sha256=source.sha256, layout=backbone.source_layout, branch=backbone.source_branch
    )
    reason = into.refuse(backbone)
    if reason:
        raise UserError(
            f"{checkpoint} is a {backbone.display_name}, which cannot become a {into.title} backbone: {reason}; "
            "--to torchvision keeps any of them."
        )
    settings = into.settings(backbone) if into.settings else None
    with replaced_whole(output) as folder:
        into.write(folder / into.weights, source.tensors, backbone)
        if pkl and into.write_pickle:
            into.write_pickle(folder / "weights.pkl", source.tensors, backbone)
        if settings:
            files.write_text(folder / settings[0], settings[1])
        names = into.names(backbone)
        files.write_text(folder / TENSORS, _listing(source, names))
        dropped = _dropped(source, names)
        if dropped:
            files.write_text(folder / DROPPED, "\n".join(dropped) + "\n")
        proof = prove(into, folder, backbone, source.tensors) if verify else Proof("none", "nothing: --no-verify")
        files.write_json(folder / REPORT, _report(into, source, checkpoint, names, proof))
    return Conversion(
        target=into,
        output=output,
        weights=output / into.weights,
        overlay=output / settings[0] if settings else None,
        backbone=backbone,
        proof=proof,
        notes=(*source.notes, *proof.notes),
    )


def conversion_text(conversion: Conversion) -> str:
    """What `twist convert` prints: what came out, what was proven, and the lines that load it."""
    backbone, proof, output = conversion.backbone, conversion.proof, conversion.output
    proven = "not proven (--no-verify)"
    if proof.kind != "none":
        ours = "against a recorded manifest and our reference network, no framework ran"
        by = "with the framework itself" if proof.kind == "framework" else ours
        proven = (
            f"proven {by}: the target computes what this reading of the file computes; every stage's features agree to "
            f"{proof.max_difference or 0:.2g} of their largest ({proof.max_absolute_difference or 0:.2g} absolutely), "
            f"{TOLERANCE:g} is allowed"
        )
    return (
        f"{backbone.method} {backbone.display_name} (layout {backbone.source_layout}, branch {backbone.source_branch}) "
        f"for {conversion.target.title}\n{proven}\n"
        + "".join(f"note: {note}\n" for note in conversion.notes)
        + f"{output}/ holds {', '.join(sorted(path.name for path in output.iterdir()))}. To load it:\n\n"
        + textwrap.indent(conversion.target.usage(output, backbone), "    ").rstrip()
    )


def _report(into: Target, source: Source, checkpoint: Path, names: Mapping[str, str], proof: Proof) -> dict[str, Any]:
    return {
        "source": {
            "file": checkpoint.name,
            "sha256": source.sha256,
            "layout": source.backbone.source_layout,
            "branch": source.backbone.source_branch,
            "dtype": source.dtype,
            "tensors": len(source.names) + len(source.dropped),
            "used": sum(name in names for name in source.names),
            # Tensors that were left out, by the module they are in; their names are in dropped.txt.
            "dropped": counts_by_module(_dropped(source, names), used=source.used_modules),
            "entries_left_aside": source.unused_entries,
        },
        "target": {
            "name": into.name,
            "weights": into.weights,
            "tensors": len(names),
            "filled_from_source": sum(name in source.names for name in names),
            "filled_by_rule": [names[name] for name in source.filled if name in names],
        },
        # What no tensor says: the proof compares the target with this reading of the file.
        "assumed": list(assumed(source.backbone)),
        "backbone": source.backbone.model_dump(mode="json"),
        "proof": proof.to_json(),
        "notes": [*source.notes, *proof.notes],
        "software": software(),
    }


def _dropped(source: Source, names: Mapping[str, str]) -> list[str]:
    """Names in the file of tensors beside the backbone, and of those that the target has no place for."""
    return [*source.dropped, *(source.names.get(name, name) for name in source.tensors if name not in names)]


def _listing(source: Source, names: Mapping[str, str]) -> str:
    """`tensors.txt`: source name, target name and shape of every tensor; a blank line between blocks of the network."""
    rows = [
        (_block(name), source.names.get(name, "(filled)"), names.get(name, "(dropped)"), str(tuple(tensor.shape)))
        for name, tensor in source.tensors.items()
    ]
    # The dropped are many (a second encoder, a queue): one group for each top-level module.
    rows += [(name.split(".")[0].split("/")[0], name, "(dropped)", "") for name in source.dropped]
    widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
    groups = [f"{'source':{widths[0]}}  {'target':{widths[1]}}  shape"]
    for _, group in groupby(rows, key=lambda row: row[0]):
        groups.append("\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for _, a, b, c in group))
    unused = "".join(f"\nleft aside: {entry} ({count} tensors)" for entry, count in source.unused_entries.items())
    return "\n\n".join(groups) + "\n" + unused + ("\n" if unused else "")


def _block(name: str) -> str:
    """The residual or transformer block that a tensor of the artefact is in; all others make one group."""
    first, second, *_ = (*name.split("."), "")
    return f"{first}.{second}" if second.isdigit() else "around"
