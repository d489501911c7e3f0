"""`twist doctor`: what this environment can do, and for everything it cannot, the command that changes it."""

import importlib
import os
import platform
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from twist.contracts.errors import EXTRAS, install_command
from twist.contracts.machine import CLONE, c_compiler, cores
from twist.contracts.progress import Progress

# Name in the report → the module to import, and what there is not without it.
PACKAGES = {
    "torch": ("torch", "pretraining, conversion and transfer"),
    "torchvision": ("torchvision.ops", "ResNets"),
    "timm": ("timm", "ViT backbones"),
    "fvcore": ("fvcore", "schedules"),
    "safetensors": ("safetensors", "weights files"),
    "numba": ("numba", "views on a CPU"),
    "scipy": ("scipy", "comparison with a baseline"),
    "datasets": ("datasets", "Parquet, tar shards and hubs as image source"),
    "submitit": ("submitit", "--slurm"),
    "Detectron2": ("detectron2.modeling", "detection protocols"),
    "MMSegmentation": ("mmseg", "segmentation protocols"),
}


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
    with Progress("doctor", total=len(PACKAGES), unit="package", every_s=2.0) as bar:
        for name in PACKAGES:
            bar.advance(0, importing=name)
            checks.append(_package(name))
            bar.advance(1)
    others = (_accelerator, _processes, _compiler, _photos, _machine, _data)
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


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module and "", or None and the first line of why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    except Exception as error:  # a broken build of a foreign package can raise anything at import
        text = str(error).splitlines()[0] if str(error) else ""
        return None, f"{type(error).__name__}: {text}"


def _package(name: str) -> Check:
    """A package that does not import is broken in a clone, which has all; of a wheel, an extra may be absent."""
    module, lacking = PACKAGES[name]
    found, why = _import(module)
    if found is not None:
        version = str(getattr(importlib.import_module(module.partition(".")[0]), "__version__", "installed"))
        return LOOKS[name](found, version) if name in LOOKS else Check(name, version)
    package, absent = module.partition(".")[0], why.startswith("ModuleNotFoundError")
    needed = any(package in EXTRAS[extra] for extra in ("convert", "pretrain", "compare"))
    remedy = "make install" if CLONE and package != "detectron2" else install_command(package)
    return Check(name, f"{why} (no {lacking})", remedy, broken=needed and (CLONE is not None or not absent))


def _torch(_: ModuleType, version: str) -> Check:
    recent = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= (2, 10)
    remedy = "" if recent else "install torch ≥ 2.10: older ones can be attacked through checkpoints (CVE-2026-24747)"
    return Check("torch", version, remedy, broken=not recent)


def _torchvision(operators: ModuleType, version: str) -> Check:
    import torch

    try:
        operators.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except RuntimeError as error:
        remedy = "torch and torchvision are of different builds: install both from the package registry"
        return Check("torchvision", f"{version}, but {str(error).splitlines()[0]}", remedy, broken=True)
    return Check("torchvision", version)


def _detectron2(_: ModuleType, version: str) -> Check:
    kind = "without" if _import("detectron2._C")[0] is None else "with"
    return Check("Detectron2", f"{version}, {kind} compiled operators (R-CNN protocols need none)")


def _mmseg(module: ModuleType, version: str) -> Check:
    if (Path(str(module.__file__)).parent / ".mim" / "configs").is_dir():
        return Check("MMSegmentation", version)
    return Check("MMSegmentation", f"{version} without its configs", "reinstall it from its wheel", broken=True)


LOOKS = {"torch": _torch, "torchvision": _torchvision, "Detectron2": _detectron2, "MMSegmentation": _mmseg}


def _accelerator() -> Check:
    module, _ = _import("torch")
    if module is None:
        return Check("GPU", "unknown without torch")
    if module.cuda.is_available():
        return Check("GPU", f"{module.cuda.device_count()} × {module.cuda.get_device_name(0)}")
    return Check("GPU", "none: sample protocols and the demo run on the CPU, full recipes want 1 to 8 GPUs")


def _processes() -> Check:
    dist, why = _import("torch.distributed")
    if dist is None or not dist.is_available():
        return Check("several processes", f"torch.distributed is absent {why}", "install a torch that has it")
    backends = [n for n, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
    return Check("several processes", ", ".join(backends))


def _compiler() -> Check:
    compiler = c_compiler()
    if compiler is None:
        return Check("C compiler", "none; run.compile needs one on a GPU", "install gcc, or set CC")
    return Check("C compiler", compiler)


def _photos() -> Check:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if not missing:
        return Check("photos sample", "apt-get and dpkg-deb are there")
    remedy = "the photos come from Debian packages: use --source shapes"
    return Check("photos sample", f"{' and '.join(missing)} absent", remedy)


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
