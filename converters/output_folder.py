"""The folder of a conversion: what it is called, and that it replaces nothing but an older one of the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.converters.targets import TARGETS

REPORT, TENSORS, DROPPED = "report.json", "tensors.txt", "dropped.txt"
# What a conversion writes next to the weights; a folder with anything else is not ours to replace.
FILES = {REPORT, TENSORS, DROPPED, "weights.pkl", "overlay.yaml", "overlay.py", "config.json"}
_ENDINGS = {".pth", ".pt", ".tar", ".pkl", ".ckpt", ".bin", ".npz", ".safetensors"}
# What training programs call every file they write: the folder it lies in says more.
_COMMON_NAMES = {"backbone", "checkpoint", "last", "latest", "model", "pytorch_model", "weights"}


def name_of(checkpoint: Path) -> str:
    """What to call the weights of a file: its own name, or its folder's where every run calls its file so."""
    name = checkpoint.name
    while Path(name).suffix.lower() in _ENDINGS:
        name = Path(name).stem
    folder = checkpoint.resolve().parent.name
    if name == "teacher_backbone" and folder:  # of a run that has a student's too
        return f"{folder}-teacher"
    return folder or name if name in _COMMON_NAMES else name


def default_folder(checkpoint: Path, target: str) -> Path:
    """`<name>-<target>` in the working directory."""
    return Path(f"{name_of(checkpoint)}-{target}")


def check(output: Path, checkpoint: Path) -> None:
    """`UserError` unless `output` is free, empty, or an earlier conversion that does not hold `checkpoint` itself."""
    if not output.exists() and not output.is_symlink():
        return
    ours = FILES | {target.weights for target in TARGETS.values()}
    wrong = None
    if output.is_symlink() or not output.is_dir():
        wrong = "is no folder of its own"
    elif output.resolve() in (Path.cwd(), *Path.cwd().parents):
        wrong = "is the folder you are in, or one above it"
    elif output.resolve() in checkpoint.resolve().parents:
        wrong = f"would be replaced, and {checkpoint} lies in it"
    elif others := sorted(path.name for path in output.iterdir() if path.name not in ours):
        wrong = f"exists and is no earlier conversion (it holds {others[0]})"
    elif any(output.iterdir()) and not _source(output):
        wrong = "exists and is no earlier conversion"
    if wrong is not None:
        raise UserError(f"{output} {wrong}: choose another --output.")


def check_same_source(output: Path, checkpoint: Path, **source: str | None) -> None:
    """`UserError` when `output` is the conversion of another network: its sha256, layout and branch are compared."""
    earlier = _source(output)
    for what, ours in source.items() if earlier else ():
        if earlier.get(what) != ours:
            raise UserError(
                f"{output} holds the conversion of another network ({what} {earlier.get(what)}, file "
                f"{earlier.get('file')}; {checkpoint.name} has {ours}): choose another --output, or remove that one."
            )


def _source(output: Path) -> dict[str, Any]:
    """What the report of an earlier conversion in `output` says of its source; empty when there is no such report."""
    try:
        report = files.read_json(output / REPORT)
        return report["source"] if {"sha256", "layout"} <= set(report["source"]) and "proof" in report else {}
    except (ValueError, KeyError, TypeError):
        return {}
