"""The folder of a conversion: whole or absent, and never at the cost of anything but an older one of the same file."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
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
    if name == "teacher_backbone" and folder:  # beside a student's, in the folder of one run
        return f"{folder}-teacher"
    return folder or name if name in _COMMON_NAMES else name


def default_folder(checkpoint: Path, target: str) -> Path:
    """`<name>-<target>` in the working directory."""
    return Path(f"{name_of(checkpoint)}-{target}")


def check(output: Path, checkpoint: Path) -> None:
    """`UserError` unless `output` is free, empty, or an earlier conversion that does not hold `checkpoint` itself."""
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"{output} is no folder of its own: choose another name with --output.")
    if output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{output} is the folder you are in, or one above it: choose a new one with --output.")
    if output.resolve() in checkpoint.resolve().parents:
        raise UserError(f"{checkpoint} lies in {output}, which would be replaced: choose another folder with --output.")
    others = sorted(path.name for path in output.iterdir() if path.name not in FILES)
    if others or (any(output.iterdir()) and _earlier(output) is None):
        what = f" (it holds {others[0]})" if others else ""
        raise UserError(f"{output} exists and is no earlier conversion{what}: choose another folder with --output.")


def check_same_source(output: Path, checkpoint: Path, *, sha256: str, layout: str | None, branch: str | None) -> None:
    """`UserError` when `output` is the conversion of another network: one's weights must not replace another's."""
    source = _earlier(output)
    if source is None:
        return
    if source.get("sha256") != sha256:
        raise UserError(
            f"{output} holds the conversion of another file ({source.get('file')}, sha256 "
            f"{str(source.get('sha256'))[:8]}…; {checkpoint.name} is {sha256[:8]}…): choose another folder with "
            "--output, or remove that one."
        )
    for what, theirs, ours in (("layout", source.get("layout"), layout), ("branch", source.get("branch"), branch)):
        if theirs != ours:
            raise UserError(
                f"{output} holds the conversion of this file's {what} {theirs}, and this is {ours}: choose another "
                "folder with --output, or remove that one."
            )


@contextlib.contextmanager
def building(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output`, which takes its place if nothing fails; an earlier one goes only then."""
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.parent / f".{output.name}.{secrets.token_hex(4)}"
    new.mkdir()
    try:
        yield new
        if output.exists():
            old = output.parent / f"{new.name}.old"
            output.rename(old)
            new.rename(output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            new.rename(output)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _earlier(output: Path) -> dict[str, Any] | None:
    """What the report of an earlier conversion in `output` says of its source; None when there is no such report."""
    try:
        report = json.loads((output / REPORT).read_text())
        return report["source"] if {"sha256", "layout"} <= set(report["source"]) and "proof" in report else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
