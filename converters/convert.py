"""Source → artefact → target, proven: `twist convert`. A folder appears whole, or not at all."""

import json
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Unpack

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, did_you_mean, require
from twist.contracts.machine import software
from twist.contracts.run_folder import replaced_whole
from twist.contracts.weights import Backbone
from twist.converters.proof import TOLERANCE, Proof, prove
from twist.converters.read import Source, assumed, counts_by_module, load_source
from twist.converters.sources import Reading
from twist.converters.targets import TARGETS, Target, pixel_text
from twist.converters.zoo import located

REPORT, TENSORS, DROPPED, CARD = "report.json", "tensors.txt", "dropped.txt", "README.md"
# What a conversion writes next to the weights; a folder with anything else is not ours to replace.
FILES = {REPORT, TENSORS, DROPPED, CARD, "weights.pkl", "overlay.yaml", "overlay.py", "config.json"}
FILES |= {"preprocessor_config.json", "model.onnx.data"}
_ENDINGS = {".pth", ".pt", ".tar", ".pkl", ".ckpt", ".bin", ".npz", ".safetensors"}
# What training programs call every file they write: the folder it lies in says more.
_COMMON_NAMES = {"backbone", "checkpoint", "last", "latest", "model", "pytorch_model", "weights"}


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
    checkpoint: str | os.PathLike[str],
    *,
    to: str,
    output: str | os.PathLike[str] | None = None,
    verify: bool = True,
    pkl: bool = False,
    allow_nan: bool = False,
    **reading: Unpack[Reading],
) -> Conversion:
    """Convert `checkpoint` (a file, a run's folder, `zoo:NAME`) for the target `to` into the folder `output`.

    By default that is `<its name>-<target>` in the working directory.
    The folder holds the weights, the overlay where the target has settings, `report.json`, `tensors.txt` and, where
    tensors were left out, `dropped.txt`. An earlier conversion of the same file there is replaced.

    Raises:
        UserError: the checkpoint cannot be read, the target has no such network, or the folder holds anything else;
            nothing is written.
        ProofError: the target does not compute the source's features; nothing is written.
        UsageError: unknown target or layout, or `pkl` for a target that has no pickle.
    """
    checkpoint, how = located(checkpoint, **reading)
    if to not in TARGETS:
        raise UsageError(f'There is no target "{to}".{did_you_mean(to, TARGETS)}')
    into = TARGETS[to]
    if pkl and into.write_pickle is None:
        raise UsageError(f"--pkl has no meaning with --to {to}: Detectron2 reads such a file.")
    output = Path(output or f"{name_of(checkpoint)}-{to}")
    earlier = _earlier(output, checkpoint)
    source = load_source(checkpoint, allow_nan=allow_nan, **how)
    backbone, said = source.backbone, _origin(source, checkpoint)
    for what in ("sha256", "layout", "branch") if earlier else ():
        if earlier.get(what) != said[what]:
            raise UserError(
                f"{output} holds the conversion of another network ({what} {earlier.get(what)}, file "
                f"{earlier.get('file')}; {checkpoint.name} has {said[what]}): choose another --output, or remove that "
                "one."
            )
    reason = into.refuse(backbone)
    if reason:
        raise UserError(
            f"{checkpoint} is a {backbone.display_name}, which cannot become a {into.title} backbone: {reason}; "
            "--to torchvision keeps any of them."
        )
    if into.extra:
        require(into.extra)
    settings, names = into.settings(backbone), into.names(backbone)
    with replaced_whole(output) as folder:
        into.write(folder / into.weights, source.tensors, backbone)
        if pkl and into.write_pickle:
            into.write_pickle(folder / "weights.pkl", source.tensors, backbone)
        # Tensors beside the backbone, and those that the target has no place for.
        dropped = [*source.dropped, *(source.names.get(name, name) for name in source.arrays if name not in names)]
        texts = {**settings, TENSORS: _listing(source, names), DROPPED: "".join(f"{name}\n" for name in dropped)}
        for name, text in texts.items():
            if text:
                files.write_text(folder / name, text)
        proof = prove(into, folder, backbone, source.tensors) if verify else Proof("none", "nothing: --no-verify")
        notes = (*source.notes, *proof.notes)
        report = {
            "source": {
                **said,
                "dtype": source.dtype,
                "tensors": source.count,
                "used": source.count - len(dropped),
                # Tensors that were left out, by the module they are in; their names are in dropped.txt.
                "dropped": counts_by_module(dropped, used=source.used_modules),
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
            "assumed": list(assumed(backbone)),
            "backbone": backbone.model_dump(mode="json"),
            "proof": proof.to_json(),
            "notes": list(notes),
            "software": software(),
        }
        files.write_json(folder / REPORT, report)
        if into.library:
            files.write_text(folder / CARD, _model_card(into, source, checkpoint, proof))
    overlay = next((output / name for name in settings), None)
    return Conversion(into, output, output / into.weights, overlay, backbone, proof, notes)


def _origin(source: Source, checkpoint: Path) -> dict[str, str]:
    header = source.backbone
    place = {"layout": header.source_layout, "branch": header.source_branch}
    return {"file": checkpoint.name, "sha256": source.sha256, **place}


def conversion_text(conversion: Conversion) -> str:
    """What `twist convert` prints: what came out, what was proven, and the lines that load it."""
    backbone, proof, output = conversion.backbone, conversion.proof, conversion.output
    return (
        f"{backbone.method} {backbone.display_name} (layout {backbone.source_layout}, branch {backbone.source_branch}) "
        f"for {conversion.target.title}\n{_proven(proof)}\n"
        + "".join(f"note: {note}\n" for note in conversion.notes)
        + f"{output}/ holds {', '.join(sorted(path.name for path in output.iterdir()))}. To load it:\n\n"
        + textwrap.indent(conversion.target.usage(output, backbone), "    ").rstrip()
    )


def _proven(proof: Proof) -> str:
    if proof.kind == "none":
        return "not proven (--no-verify)"
    ours = "against a recorded manifest and our reference network, no framework ran"
    by = "with the framework itself" if proof.kind == "framework" else ours
    return (
        f"proven {by}: the target computes what this reading of the file computes; every stage's features agree to "
        f"{proof.max_difference or 0:.2g} of their largest ({proof.max_absolute_difference or 0:.2g} absolutely), "
        f"{TOLERANCE:g} is allowed"
    )


def _model_card(into: Target, source: Source, checkpoint: Path, proof: Proof) -> str:
    """`README.md` as the hubs read it. The licence is left to who publishes: no checkpoint says it."""
    backbone, usage = source.backbone, into.usage(Path("FOLDER"), source.backbone)
    rows = {
        "method": backbone.method + (f", {backbone.epochs} epochs" if backbone.epochs else ""),
        "architecture": backbone.display_name,
        "training data": "not stated in the file",
        "licence": "that of the source; it is not stated in the file",
        "source": f"`{checkpoint.name}`, SHA-256 `{source.sha256}`, layout {backbone.source_layout}, branch "
        f"{backbone.source_branch}",
        "pixels": pixel_text(backbone, 1),
        "converted": f"by twist-suite; {_proven(proof)} ({proof.by})",
        "assumed": "; ".join(assumed(backbone)),
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    tags = f"- {json.dumps(backbone.method)}\n- {backbone.display_name}"
    return (
        f"---\nlibrary_name: {into.library}\npipeline_tag: image-feature-extraction\ntags:\n{tags}\n---\n\n"
        f"# {backbone.method} {backbone.display_name}\n\nA backbone without a classifier.\n\n"
        f"| | |\n|---|---|\n{table}\n```python\n{usage}```\n"
    )


def _listing(source: Source, names: Mapping[str, str]) -> str:
    """`tensors.txt`: source name, target name and shape of every tensor; a blank line between blocks of the network."""

    def block(name: str) -> str:
        first, second, *_ = (*name.split("."), "")
        return f"{first}.{second}" if second.isdigit() else "around"

    rows = [
        (block(name), source.names.get(name, "(filled)"), names.get(name, "(dropped)"), str(tuple(array.shape)))
        for name, array in source.arrays.items()
    ]
    # The dropped are many (a second encoder, a queue): one group for each top-level module.
    rows += [(name.split(".")[0].split("/")[0], name, "(dropped)", "") for name in source.dropped]
    widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
    groups = [f"{'source':{widths[0]}}  {'target':{widths[1]}}  shape"]
    for _, group in groupby(rows, key=lambda row: row[0]):
        groups.append("\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for _, a, b, c in group))
    unused = "".join(f"\nleft aside: {entry} ({count} tensors)" for entry, count in source.unused_entries.items())
    return "\n\n".join(groups) + "\n" + unused + ("\n" if unused else "")


def name_of(checkpoint: Path) -> str:
    """What to call the weights of a file: its own name, or its folder's where every run calls its file so."""
    name = checkpoint.name
    while Path(name).suffix.lower() in _ENDINGS:
        name = Path(name).stem
    folder = checkpoint.resolve().parent.name
    if name == "teacher_backbone" and folder:  # of a run that has a student's too
        return f"{folder}-teacher"
    return folder or name if name in _COMMON_NAMES else name


def _earlier(output: Path, checkpoint: Path) -> dict[str, Any]:
    """What the report of an earlier conversion in `output` says of its source; {} where there is none.

    Raises:
        UserError: `output` is anything but free, empty, or an earlier conversion without `checkpoint` in it.
    """
    if not output.exists() and not output.is_symlink():
        return {}
    wrong, source = None, dict[str, Any]()
    if output.is_symlink() or not output.is_dir():
        wrong = "is no folder of its own"
    elif output.resolve() in (Path.cwd(), *Path.cwd().parents):
        wrong = "is the folder you are in, or one above it"
    elif output.resolve() in checkpoint.resolve().parents:
        wrong = f"would be replaced, and {checkpoint} lies in it"
    elif found := {path.name for path in output.iterdir()}:
        others = sorted(found - FILES - {target.weights for target in TARGETS.values()})
        report = files.read_json(output / REPORT) if REPORT in found else {}
        source = report.get("source", {}) if "proof" in report else {}
        if others or not {"sha256", "layout"} <= set(source):
            wrong = "exists and is no earlier conversion" + (f" (it holds {others[0]})" if others else "")
    if wrong is not None:
        raise UserError(f"{output} {wrong}: choose another --output.")
    return source
