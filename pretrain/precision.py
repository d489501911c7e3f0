"""In which precision the networks run: what the config asks for, as far as the device does it well."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch

from twist.contracts import machine

Precision = Literal["bf16", "fp16", "fp32"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_on(device: torch.device, asked: Precision) -> Precision:
    """CUDA does all three; a CPU bf16 where it has the instructions (`benchmarks/small_views.py`), else float32."""
    if device.type == "cuda":
        return asked
    return "bf16" if asked == "bf16" and machine.cpu_has_bf16() else "fp32"


def autocast(device: torch.device, asked: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context for the forward pass; the loss is float32 in any case (`loss.py`)."""
    precision = precision_on(device, asked)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_TYPES[precision])
