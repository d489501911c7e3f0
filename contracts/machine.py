"""What this machine can do and what is installed: the one place that asks, so that a test can replace the answer."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from twist.contracts.files import sha256_file

# The folder that holds the rooms: the top of a clone, or `twist` in site-packages.
_TOP = Path(__file__).resolve().parent.parent
CLONE = _TOP if (_TOP / "pyproject.toml").is_file() else None
SHARED_MEMORY = Path("/dev/shm")
# Instructions that multiply bfloat16 numbers, as `torch.cpu.get_capabilities` calls them.
_NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")

# What a SLURM job of ours may be told, by its name in --slurm and in a suite's [slurm] → submitit's name for it.
SLURM_KEYS = {
    **{name: f"slurm_{name}" for name in ("partition", "account", "qos", "constraint", "comment", "exclude")},
    **{name: name for name in ("nodes", "mem_gb", "timeout_min", "name")},
    "gpus": "gpus_per_node",
    "cpus": "cpus_per_task",
}


def cores() -> int:
    """Cores that this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def divided_cores(parts: int) -> list[list[int]]:
    """The numbers of the cores that this process may use, in `parts` shares; empty where a system does not say."""
    numbers = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [numbers[part::parts] or numbers for part in range(parts)] if numbers else []


def memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16; without that each number is converted, slower than float32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in _NATIVE_BF16)


def free_shared_memory() -> int | None:
    """Bytes left for the batches that data workers hand over; None where the system has no such folder."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def c_compiler() -> str | None:
    """The compiler that `torch.compile` uses: $CC, or the first that is on the path."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


def hardware() -> dict[str, str | int | None]:
    """Processor, cores this process may use, and the GPUs that an already imported torch sees."""
    torch = sys.modules.get("torch")
    gpus = 0 if torch is None or not torch.cuda.is_available() else torch.cuda.device_count()
    return {
        "processor": _processor(),
        "cores": cores(),
        "gpus": gpus,
        "gpu": torch.cuda.get_device_name(0) if torch is not None and gpus else None,
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", known.read_text()) if known.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


# Distributions whose versions a record keeps.
FRAMEWORKS = ("detectron2", "onedl-mmsegmentation", "onedl-mmengine", "mmsegmentation")
PACKAGES = ("torch", "torchvision", "timm", *FRAMEWORKS, "numpy", "numba")


def git_commit() -> str | None:
    """The commit of this clone, with `+changes` when the tree differs from it; None where it is installed."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=CLONE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = "+changes" if CLONE and git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changes if CLONE else None
    except (OSError, subprocess.CalledProcessError):
        return None


def code_sha256(*rooms: str) -> str:
    """SHA-256 over names and bytes of the Python files in our `rooms` (folders): equal ones run the same code."""
    digest = hashlib.sha256()
    for path in sorted(path for room in rooms for path in (_TOP / room).rglob("*.py")):
        digest.update(f"{path.relative_to(_TOP)} {sha256_file(path)};".encode())
    return digest.hexdigest()


def software() -> dict[str, str]:
    """Versions of Python and of those of our packages that are installed."""
    found = {name: [*importlib.metadata.distributions(name=name)] for name in PACKAGES}
    return {"python": platform.python_version()} | {name: d[0].version for name, d in found.items() if d}
