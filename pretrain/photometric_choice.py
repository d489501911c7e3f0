"""Which form of the photometric part a run on a GPU takes: Triton's kernels, where they are right there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.photometric import Photometric, apply

# Of a normalised value, between two ways of computing it: half a level.
LARGEST_DIFFERENCE = 0.01


def fastest(groups: Sequence[Tensor], parameters: Sequence[Photometric]) -> Callable[[Tensor, Photometric], Tensor]:
    """`photometric_gpu.apply` if it gives for these views what `apply` gives, else `apply`, and a sentence why.

    To be asked once, with the first batch on a GPU, a tensor a resolution: it waits for the device, and Triton compiles
    its kernels for each.
    """
    try:
        from pretrain import photometric_gpu

        # A level on the edge of the solarisation may be inverted in one way only; hardly any is.
        apart = max(
            ((photometric_gpu.apply(*group) - apply(*group)).abs() > LARGEST_DIFFERENCE).float().mean().item()
            for group in zip(groups, parameters)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, none for this GPU, or no C compiler for its launcher: as many types
        reason = (str(error).splitlines() or [""])[0]
        print(f"Views are coloured the slower way: Triton cannot ({type(error).__name__}: {reason}).", file=sys.stderr)
        return apply
    if not apart < 1e-3:
        print(
            f"Views are coloured the slower way: {apart:.1%} of the pixels came out otherwise with Triton's kernels. "
            "Please report this, with what `twist doctor` says.",
            file=sys.stderr,
        )
        return apply
    return photometric_gpu.apply
