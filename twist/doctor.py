"""`twist doctor`: what this environment can do, and for everything it cannot, the command that mends it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from twist.contracts.machine import c_compiler, cores


@dataclass(frozen=True)
class Check:
    """One line: `broken` things fail the command, `absent` ones only close a door; both say how to mend."""

    name: str
    found: str
    remedy: str = ""
    broken: bool = False


def examine() -> list[Check]:
    """Run every check; none of them raises."""
    checks: list[Callable[[], Check]] = [
        _python,
        _torch,
        _torchvision,
        _accelerator,
        _ranks,
        lambda: _package("timm", "ViT backbones"),
        lambda: _package("fvcore", "schedules"),
        lambda: _package("safetensors", "the weights artefact"),
        lambda: _package("numba", "views on a CPU"),
        _compiler,
        _detectron2,
        _mmseg,
        lambda: _optional("datasets", "Parquet, tar shards and hubs as image source", "hub"),
        lambda: _optional("submitit", "--slurm", "pretrain"),
        _photos,
        _machine,
        _data,
    ]
    return [check() for check in checks]


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
    lines.append("")
    lines.append("Everything needed works." if not broken else f"{broken} of {len(checks)} need mending.")
    return "\n".join(lines)


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module and "", or None and the first line of why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    except Exception as error:  # a broken build of a foreign package can raise anything at import
        text = str(error).splitlines()[0] if str(error) else ""
        return None, f"{type(error).__name__}: {text}"


def _version(module: ModuleType) -> str:
    return str(getattr(module, "__version__", "installed"))


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Check(
        "Python", found, "" if fits else "use Python 3.11, 3.12 or 3.13: make install PYTHON=python3.11", not fits
    )


def _torch() -> Check:
    module, why = _import("torch")
    if module is None:
        return Check("torch", why, "make install", broken=True)
    version = _version(module)
    recent = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= (2, 10)
    remedy = "" if recent else "install torch ≥ 2.10: older ones can be attacked through checkpoints (CVE-2026-24747)"
    return Check("torch", version, remedy, broken=not recent)


def _torchvision() -> Check:
    module, why = _import("torchvision.ops")
    if module is None:
        return Check(
            "torchvision", why, "install the torchvision that belongs to your torch (make install)", broken=True
        )
    import torch
    import torchvision

    try:
        module.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except RuntimeError as error:
        remedy = "torch and torchvision are of different builds: take both from the registry (make install)"
        return Check("torchvision", f"{torchvision.__version__}, but {str(error).splitlines()[0]}", remedy, broken=True)
    return Check("torchvision", torchvision.__version__)


def _accelerator() -> Check:
    module, _ = _import("torch")
    if module is None:
        return Check("GPU", "unknown without torch")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("GPU", f"{len(names)} × {names[0]}")
    return Check("GPU", "none: sample protocols and the demo run on the CPU, full recipes want 1 to 8 GPUs")


def _ranks() -> Check:
    module, _ = _import("torch.distributed")
    if module is None or not module.is_available():
        return Check(
            "several processes", "torch.distributed is absent", "install a torch build that has it", broken=True
        )
    import torch.distributed as dist

    backends = [n for n, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
    return Check("several processes", ", ".join(backends))


def _package(name: str, purpose: str) -> Check:
    module, why = _import(name)
    if module is None:
        return Check(name, f"{why} (needed for {purpose})", "make install", broken=True)
    return Check(name, _version(module))


def _compiler() -> Check:
    compiler = c_compiler()
    if compiler is None:
        return Check("C compiler", "none; run.compile needs one on a GPU", "install gcc, or set CC")
    return Check("C compiler", compiler)


def _optional(name: str, purpose: str, extra: str) -> Check:
    module, _ = _import(name)
    if module is None:
        return Check(name, f"absent: no {purpose}", f"pip install twist-suite[{extra}]")
    return Check(name, _version(module))


def _detectron2() -> Check:
    module, why = _import("detectron2.modeling")
    if module is None:
        remedy = "make install (or pip install ./third_party/detectron2); an official git build works too"
        return Check("Detectron2", f"{why}; no detection protocols", remedy)
    import detectron2

    compiled = _import("detectron2._C")[0] is not None
    kind = "with" if compiled else "without"
    return Check("Detectron2", f"{detectron2.__version__}, {kind} compiled operators (R-CNN protocols need none)")


def _mmseg() -> Check:
    module, why = _import("mmseg")
    if module is None:
        return Check("MMSegmentation", f"{why}; no segmentation protocols", "pip install twist-suite[transfer]")
    folder = Path(str(module.__file__)).parent / ".mim" / "configs"
    if not folder.is_dir():
        return Check(
            "MMSegmentation", f"{_version(module)} without its configs", "reinstall it from its wheel", broken=True
        )
    return Check("MMSegmentation", _version(module))


def _photos() -> Check:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        return Check(
            "photos sample",
            f"{' and '.join(missing)} absent",
            "the photos come from Debian packages: use --source shapes",
        )
    return Check("photos sample", "apt-get and dpkg-deb are there")


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
