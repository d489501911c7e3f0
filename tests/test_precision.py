"""A device does what it does well: bf16 on a CPU only where the processor multiplies it."""

from __future__ import annotations

import pytest
import torch

from twist.contracts import machine
from twist.pretrain.precision import autocast, precision_on

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("asked", ["bf16", "fp16", "fp32"])
def test_cuda_does_what_is_asked(asked: str) -> None:
    assert precision_on(CUDA, asked) == asked  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)],
)
def test_bf16_is_a_matter_of_instructions(
    capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.cpu_has_bf16() is expected


@pytest.mark.parametrize("expected", ["bf16", "fp32"])
def test_a_cpu_does_bf16_only_with_the_instructions(expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: expected == "bf16")
    assert precision_on(CPU, "bf16") == expected
    assert precision_on(CPU, "fp16") == "fp32"
    assert precision_on(CPU, "fp32") == "fp32"
    with autocast(CPU, "bf16"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected == "bf16" else torch.float32)
