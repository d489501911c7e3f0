"""Any ViT of a weights artefact as patch features: what the backbones of both frameworks share.

The contract: of chosen blocks, maps of (B, D, H/p, W/p) for images (B, 3, H, W) and patches of p pixels. Class and
register tokens take part in the network and are no part of the maps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from twist.contracts.networks import build_backbone
from twist.contracts.weights import Vit


def build_vit(
    architecture: str, *, image_size: int = 224, vit: Mapping[str, Any] | None = None, drop_path: float = 0.0
) -> Any:
    """The network that a header's fields of these names describe, randomly initialised; its names are timm's.

    Raises:
        ValueError: `vit` is no description of a ViT, or there is no architecture of the name.
    """
    described = None if vit is None else Vit.model_validate(dict(vit))
    return build_backbone(architecture, image_size=image_size, drop_path=drop_path, vit=described)


def chosen(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Blocks in order, counted from 0; negative ones from the end. `ValueError` for one that is not there."""
    missing = [block for block in blocks if not -depth <= block < depth]
    if missing or not blocks:
        raise ValueError(f"blocks {list(blocks)} of a ViT with {depth}: choose from 0 to {depth - 1}.")
    return tuple(sorted({block % depth for block in blocks}))
