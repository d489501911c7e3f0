"""The architectures that an artefact can hold, as plain numbers: names, blocks, widths. No framework is imported."""

from __future__ import annotations

from typing import Final, Literal

Architecture = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet200",
    "vit_small_patch16",
    "vit_base_patch16",
]
# Blocks a stage, and whether a block is a bottleneck (He et al. 2015, table 1; 200: He et al. 2016, with the same
# bottleneck and not the identity mappings).
RESNETS: Final[dict[str, tuple[tuple[int, int, int, int], bool]]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
    "resnet200": ((3, 24, 36, 3), True),
}
# Name → embedding dimension; both have 12 blocks, heads of 64, an MLP of 4 × the dimension, patches of 16 pixels.
VITS: Final[dict[str, int]] = {"vit_small_patch16": 384, "vit_base_patch16": 768}
VIT_BLOCKS: Final = 12
ARCHITECTURES: Final = (*RESNETS, *VITS)


def depth_of(architecture: str) -> int:
    """50 of `resnet50`."""
    return int(architecture.removeprefix("resnet"))
