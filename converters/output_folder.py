"""The folder of a conversion: what it is called, and that it replaces nothing but an older one of the same network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twist.contracts.errors import UserError

REPORT, TENSORS = "report.json", "tensors.txt"
# All that a conversion writes, whatever the target; a folder with anything else is not ours to replace.
FILES = {
    REPORT, TENSORS, "weights.pth", "weights.pkl", "overlay.yaml", "overlay.py", "backbone.safetensors",
    "model.safetensors", "config.json",
}  # fmt: skip
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
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output} is no folder of its own: choose another --output.")
    if output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{output} is the folder you are in, or one above it: choose another --output.")
    if output.resolve() in checkpoint.resolve().parents:
        raise UserError(f"{checkpoint} lies in {output}, which would be replaced: choose another --output.")
    others = sorted(path.name for path in output.iterdir() if path.name not in FILES) if output.exists() else []
    if others or (output.exists() and any(output.iterdir()) and _earlier(output) is None):
        what = f" (it holds {others[0]})" if others else ""
        raise UserError(f"{output} exists and is no earlier conversion{what}: choose another --output.")


def check_same_source(output: Path, checkpoint: Path, **source: str | None) -> None:
    """`UserError` when `output` is the conversion of another network: its sha256, layout and branch are compared."""
    earlier = _earlier(output)
    for what, ours in source.items() if earlier is not None else ():
        theirs = earlier.get(what)
        if theirs != ours:
            raise UserError(
                f"{output} holds the conversion of another network ({what} {theirs}, file {earlier.get('file')}; "
                f"{checkpoint.name} has {ours}): choose another --output, or remove that one."
            )


def _earlier(output: Path) -> dict[str, Any] | None:
    """What the report of an earlier conversion in `output` says of its source; None when there is no such report."""
    try:
        report = json.loads((output / REPORT).read_text())
        return report["source"] if {"sha256", "layout"} <= set(report["source"]) and "proof" in report else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
