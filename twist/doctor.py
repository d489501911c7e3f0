"""`twist doctor`: what this environment can do, by extra, and for everything it cannot the command that changes it."""

import importlib
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from twist.contracts.errors import EXTRAS, install_command
from twist.contracts.machine import CLONE, c_compiler, cores
from twist.contracts.progress import Progress

# What is not there without the packages of an extra or a framework. Those of these rows are imported, for a build that
# does not fit the others shows there alone; of the rest it is only looked whether they are installed.
COMMANDS = {
    "convert": "twist convert, inspect",
    "pretrain": "twist pretrain",
    "compare": "twist compare",
    "transfer": "twist transfer",
    "Detectron2": "detection protocols",
    "MMSegmentation": "segmentation protocols",
}
ROWS = {**EXTRAS, "Detectron2": ("detectron2",), "MMSegmentation": ("mmseg", "mmcv", "mmengine")}
# Modules that bring a package's compiled operators along.
DEEP = {"torchvision": "torchvision.ops", "detectron2": "detectron2.modeling"}


@dataclass(frozen=True)
class Check:
    """One line. A `broken` thing fails the command; `remedy` says how to change what was found."""

    name: str
    found: str
    remedy: str = ""
    broken: bool = False


def examine() -> list[Check]:
    """Run every check; none of them raises."""
    checks = [Check("Python", platform.python_version())]
    distributions = packages_distributions()
    with Progress("doctor", total=len(ROWS), unit="extra", every_s=2.0) as bar:
        for name in ROWS:
            bar.advance(0, looking_at=name)
            checks.append(_packages(name, distributions))
            bar.advance(1)
    others: tuple[Callable[[], Check], ...] = (_accelerator, _compiler, _machine, _data)
    return [*checks, *(check() for check in others)]


def render(checks: list[Check]) -> str:
    """One line a check: mark, name, what was found, and the remedy below where there is one."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "✗" if check.broken else "–" if check.remedy else "✓"
        lines.append(f"{mark} {check.name:<{width}}  {check.found}")
        if check.remedy:
            lines.append(f"  {'':<{width}}  → {check.remedy}")
    broken = sum(check.broken for check in checks)
    summary = f"{broken} of {len(checks)} do not work." if broken else "Everything that is installed works."
    return "\n".join([*lines, "", summary])


def _packages(name: str, distributions: Mapping[str, list[str]]) -> Check:
    """An extra or a framework. In a clone, which has them all, a command's package that is absent is broken; of a
    wheel an extra may be absent."""
    there, absent, faults = [], [], []
    for package in ROWS[name]:
        if find_spec(package) is None:
            absent.append(package)
        elif fault := _fault(DEEP.get(package, package)) if name in COMMANDS else "":
            faults.append(f"{package}: {fault}")
        else:
            there.append(f"{package} {version(distributions[package][0])}")
    if not absent and not faults:
        return Check(name, ", ".join(there))
    lacking = f" (no {COMMANDS[name]})" if name in COMMANDS else ""
    found = "; ".join([*faults, *([f"{', '.join(absent)} not installed"] if absent else [])]) + lacking
    in_clone = CLONE is not None and name != "trackio"  # which is not in the lock
    remedy = "make install" if in_clone else install_command(absent[0] if absent else ROWS[name][0])
    return Check(name, found, remedy, broken=bool(faults) or (in_clone and name in EXTRAS and name in COMMANDS))


def _fault(module: str) -> str:
    """Why `module` does not import; empty where it does."""
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module)
    except Exception as error:  # a broken build of a foreign package can raise anything at import
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def _accelerator() -> Check:
    if find_spec("torch") is None or _fault("torch"):
        return Check("GPU", "unknown without torch")
    import torch

    if torch.cuda.is_available():
        return Check("GPU", f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}")
    return Check("GPU", "none: sample protocols and the demo run on the CPU, full recipes want 1 to 8 GPUs")


def _compiler() -> Check:
    if compiler := c_compiler():
        return Check("C compiler", compiler)
    return Check("C compiler", "none; run.compile needs one on a GPU", "install gcc, or set CC")


def _machine() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "" if free >= 2 else "free at least 2 GB: the demo writes about half of that"
    return Check("machine", f"{cores()} cores, {free:.0f} GB free here", remedy, broken=free < 0.5)


def _data() -> Check:
    root = os.environ.get("DETECTRON2_DATASETS")
    if root is None:
        return Check("data sets", "DETECTRON2_DATASETS is not set: pass --data ROOT to twist transfer")
    there = [name for name in ("coco", "VOC2007", "VOC2012", "cityscapes", "imagenet") if (Path(root) / name).is_dir()]
    remedy = "" if there else f"put coco/, VOC2007/, … below {root}, or set DETECTRON2_DATASETS elsewhere"
    return Check("data sets", f"{root}: {', '.join(there) or 'nothing known'}", remedy)
