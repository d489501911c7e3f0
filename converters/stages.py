"""What a proof compares, and what counts as the same: features stage by stage, and tensors bit for bit.

The measure of a stage is max|Δ| / max|feature|, because a trained network's features reach into the hundreds, where
1e-5 absolute is below float32's own step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twist.contracts.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# One image: res2 … res5 of a ResNet, or the tokens after every block of a ViT.
Stages = dict[str, "Tensor"]


class ProofError(UserError):
    """The target does not compute the source's features, or not all of its tensors were filled."""


@dataclass(frozen=True)
class Difference:
    """One stage: the largest |Δ|, the largest |feature|, and their ratio (the measure)."""

    stage: str
    absolute: float
    feature: float

    @property
    def relative(self) -> float:
        return self.absolute / self.feature if self.feature else self.absolute


def compare(ours: list[Stages], theirs: list[Stages]) -> tuple[Difference, ...]:
    """The difference of each stage over all images; equal NaNs agree, any other NaN is an infinite difference."""
    import torch

    result = []
    for stage in ours[0]:
        absolute = feature = 0.0
        for mine, other in zip(ours, theirs, strict=True):
            a = mine[stage]
            if stage not in other or other[stage].shape != a.shape:
                shape = tuple(other[stage].shape) if stage in other else "missing"
                raise ProofError(
                    f"The proof does not hold: {stage} is {shape}, expected {tuple(a.shape)}; nothing was written."
                )
            b = other[stage]
            both = a.isnan() & b.isnan()
            delta = torch.where(both, torch.zeros_like(a), a - b).abs().nan_to_num(nan=float("inf"))
            absolute = max(absolute, float(delta.max()))
            feature = max(feature, float(a.nan_to_num(nan=0.0).abs().max()))
        result.append(Difference(stage, absolute, feature))
    return tuple(result)


def check_filled(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """`ProofError` unless names and shapes are the same: every tensor of the target filled, none too many."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [name for name in expected if name in found and found[name] != expected[name]]
    if missing or extra or misshapen:
        first = (missing or misshapen or extra)[0]
        raise ProofError(
            f"The proof does not hold: of the target's {len(expected)} tensors {len(missing)} are not filled and "
            f"{len(misshapen)} have another shape, and {len(extra)} have no place in it (first: {first}); nothing was "
            "written."
        )


def check_loaded(expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """`ProofError` unless every tensor of the network that was loaded is the written one, bit for bit."""
    from twist.converters.torch_file import same_bytes

    check_filled(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: tuple(tensor.shape) for name, tensor in loaded.items()},
    )
    other = [name for name in expected if not same_bytes(expected[name].contiguous(), loaded[name].contiguous())]
    if other:
        raise ProofError(
            f"The proof does not hold: {len(other)} tensors of the loaded network are not the written ones (first: "
            f"{other[0]}); nothing was written."
        )
