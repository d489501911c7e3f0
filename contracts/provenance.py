"""Where a result comes from: git commit and software versions (hardware: `machine.py`)."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "detectron2",
    "onedl-mmsegmentation",
    "onedl-mmengine",
    "mmsegmentation",
    "numpy",
    "numba",
)


def git_commit() -> str | None:
    """The commit of this checkout, with `+changes` when the tree differs from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def software() -> dict[str, str]:
    """Versions of Python and of those of our packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
