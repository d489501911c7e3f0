"""Source → artefact → target, proven: `twist convert`. A folder appears whole, or not at all."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.machine import software
from twist.contracts.run_folder import replaced_whole
from twist.contracts.weights import Backbone, weights_file
from twist.converters import output_folder
from twist.converters.listing import listing
from twist.converters.output_folder import REPORT, TENSORS
from twist.converters.proof import TOLERANCE, Kind, Proof, prove
from twist.converters.read import Source, load_source
from twist.converters.stages import ProofError
from twist.converters.targets.detectron2 import write_pickle
from twist.converters.targets.registry import TARGETS, Target
from twist.converters.usage import usage

__all__ = ["Conversion", "ProofError", "convert", "render"]
TargetName = Literal["detectron2", "mmseg", "torchvision", "timm"]


@dataclass(frozen=True)
class Conversion:
    """What was written and proven. `max_difference` is relative: max|Δ| / max|feature| of the worst stage."""

    target: str
    output: Path
    weights: Path
    overlay: Path | None
    report: Path | None
    backbone: Backbone
    source_sha256: str
    max_difference: float | None
    proof: Kind
    max_absolute_difference: float | None = None
    notes: tuple[str, ...] = ()


def convert(
    checkpoint: Path,
    *,
    target: TargetName,
    layout: str | None = None,
    branch: str | None = None,
    output: Path | None = None,
    verify: bool = True,
    pkl: bool = False,
    allow_nan: bool = False,
) -> Conversion:
    """Convert `checkpoint` into the folder `output` (default: `<its name>-<target>` in the working directory).

    The folder holds the weights, the overlay where the target has settings, `report.json` and `tensors.txt`. An earlier
    conversion of the same file there is replaced.

    Raises:
        UserError: the checkpoint cannot be read, the target has no such network, or the folder holds anything else;
            nothing is written.
        ProofError: the target does not compute the source's features; nothing is written.
        UsageError: unknown target or layout, or `pkl` for another target than Detectron2.
    """
    checkpoint = weights_file(checkpoint)
    if target not in TARGETS:
        raise UsageError(f'There is no target "{target}".{did_you_mean(target, TARGETS)}')
    if pkl and target != "detectron2":
        raise UsageError(f"--pkl writes Detectron2's pickle; it has no meaning with --to {target}.")
    output = Path(output) if output is not None else output_folder.default_folder(checkpoint, target)
    output_folder.check(output, checkpoint)
    writer = TARGETS[target]
    source = load_source(checkpoint, layout=layout, branch=branch, allow_nan=allow_nan)
    output_folder.check_same_source(
        output,
        checkpoint,
        sha256=source.sha256,
        layout=source.backbone.source_layout,
        branch=source.backbone.source_branch,
    )
    reason = writer.refuse(source.backbone)
    if reason:
        raise UserError(
            f"{checkpoint} is a {source.backbone.display_name}, which cannot become a {writer.title} backbone: "
            f"{reason}; --to torchvision keeps any of them."
        )
    with replaced_whole(output) as folder:
        proof = _build(folder, writer, source, checkpoint, verify=verify, pkl=pkl)
    overlay = writer.overlay_name(source.backbone) if writer.overlay_name else None
    return Conversion(
        target=target,
        output=output,
        weights=output / writer.weights,
        overlay=output / overlay if overlay else None,
        report=output / REPORT,
        backbone=source.backbone,
        source_sha256=source.sha256,
        max_difference=proof.max_difference,
        proof=proof.kind,
        max_absolute_difference=proof.max_absolute_difference,
        notes=(*source.notes, *proof.notes),
    )


def render(conversion: Conversion) -> str:
    """What `twist convert` prints: what came out, and what was proven."""
    backbone = conversion.backbone
    files = sorted(path.name for path in conversion.output.iterdir())
    difference = (
        f"every stage's features agree to {conversion.max_difference or 0:.2g} of their largest "
        f"({conversion.max_absolute_difference or 0:.2g} absolutely); {TOLERANCE:g} is allowed"
    )
    proven = {
        "framework": f"proven with the framework itself: {difference}",
        "manifest": f"proven against a recorded manifest and our reference network, no framework ran: {difference}",
        "none": "not proven (--no-verify)",
    }[conversion.proof]
    return (
        f"{backbone.method} {backbone.display_name} (layout {backbone.source_layout}, branch {backbone.source_branch}) "
        f"for {TARGETS[conversion.target].title}\n{proven}\n"
        + "".join(f"note: {note}\n" for note in conversion.notes)
        + f"{conversion.output}/ holds {', '.join(files)}. To load it:\n\n"
        + textwrap.indent(usage(conversion.target, conversion.output, backbone), "    ").rstrip()
    )


def _build(folder: Path, writer: Target, source: Source, checkpoint: Path, *, verify: bool, pkl: bool) -> Proof:
    backbone = source.backbone
    writer.write(folder / writer.weights, source.tensors, backbone)
    if pkl:
        write_pickle(folder / "weights.pkl", source.tensors, backbone)
    if writer.overlay_name and writer.overlay_text:
        files.write_text(folder / writer.overlay_name(backbone), writer.overlay_text(backbone))
    names = writer.names(backbone)
    files.write_text(folder / TENSORS, listing(source, names))
    proof = prove(writer.name, folder, backbone, source.tensors) if verify else Proof("none", "nothing: --no-verify")
    files.write_json(folder / REPORT, _report(writer, source, checkpoint, names, proof))
    return proof


def _report(writer: Target, source: Source, checkpoint: Path, names: dict[str, str], proof: Proof) -> dict[str, Any]:
    unplaced = [source.names.get(name, name) for name in source.tensors if name not in names]
    return {
        "source": {
            "file": checkpoint.name,
            "sha256": source.sha256,
            "layout": source.backbone.source_layout,
            "branch": source.backbone.source_branch,
            "dtype": source.dtype,
            "tensors": len(source.names) + len(source.dropped),
            "used": len(source.names) - sum(name in source.names for name in source.tensors if name not in names),
            "dropped": [*source.dropped, *unplaced],
            "entries_left_aside": source.left_aside,
        },
        "target": {
            "name": writer.name,
            "weights": writer.weights,
            "tensors": len(names),
            "filled_from_source": sum(name in source.names for name in names),
            "filled_by_rule": [names[name] for name in source.filled if name in names],
        },
        "backbone": source.backbone.model_dump(mode="json"),
        "proof": proof.to_json(),
        "notes": [*source.notes, *proof.notes],
        "software": software(),
    }
