"""In which precision the networks run: what the config asks for, as far as the device does it well."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch

Precision = Literal["bf16", "fp16", "fp32"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Instructions that multiply bfloat16 numbers. A processor without them converts each one, which is slower than float32.
_NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def precision_on(device: torch.device, asked: Precision) -> Precision:
    """CUDA does all three; a CPU bf16 where it has the instructions (`benchmarks/small_views.py`), else float32."""
    if device.type == "cuda":
        return asked
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if asked == "bf16" and any(capabilities.get(name) for name in _NATIVE_BF16) else "fp32"


def autocast(device: torch.device, asked: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context for the forward pass; the loss is float32 in any case (`loss.py`)."""
    precision = precision_on(device, asked)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_TYPES[precision])
