"""Networks that timm builds by name (`timm:convnext_tiny` in a header), with the feature contract of the suite's own.

Their maps are those of timm's `features_only=True`: `res2` (stride 4) … `res5` (32), the last map of each stride, or
`block0`, … where all have one stride. `forward` gives (B, D), timm's `forward_head(pre_logits=True)`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from twist.contracts.errors import UserError, check_names, did_you_mean
from twist.contracts.weights import TIMM

# By which some families take images of other sizes than those of their tables: ViTs, Swin.
_FREE_SIZES: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmNetwork(nn.Module):
    """The network `timm:NAME` without a classifier, randomly initialised.

    With an `output_stride` below 32 its last stages are dilated; where all maps have one stride, it means nothing.
    `maps` are the places of its maps among timm's, by name. In a state dict its tensors have timm's names.

    Raises:
        UserError: timm has no network of that name, or does not dilate it.
    """

    def __init__(self, architecture: str, *, output_stride: int = 32) -> None:
        super().__init__()
        plain = self if output_stride == 32 else outline(architecture)
        dilated: dict[str, Any] = {} if plain is self or plain.patch_size else {"output_stride": output_stride}
        self.network: Any = _build(architecture.removeprefix(TIMM), dilated)
        self.num_features: int = self.network.head_hidden_size  # of `forward`: some have a layer after the pool
        strides = [row["reduction"] for row in self.network.feature_info]
        # The one stride that all maps have.
        self.patch_size: int | None = strides[0] if len(set(strides)) == 1 else None
        names = [f"res{round(math.log2(stride))}" for stride in strides]
        names = [f"block{index}" for index in range(len(strides))] if self.patch_size else names
        # Of a dilated network as they were.
        self.maps: dict[str, int] = dict(zip(names, range(len(names)))) if plain is self else plain.maps
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    @property
    def settings(self) -> dict[str, Any]:
        """timm's `pretrained_cfg`."""
        found: dict[str, Any] = self.network.pretrained_cfg
        return found

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self._run(self.network, images)
        return pooled

    def forward_intermediates(self, images: Tensor, **which: Any) -> Any:
        """As timm's."""
        return self._run(self.network.forward_intermediates, images, **which)

    def features(self, images: Tensor, names: Sequence[str] = ()) -> dict[str, Tensor]:
        """Maps (B, C, H/s, W/s) by name (default: the last); `UserError` for one that there is not."""
        names = names or list(self.maps)[-1:]
        check_names(names, list(self.maps))
        places = sorted({self.maps[name] for name in names})
        maps = self.forward_intermediates(images, indices=places, intermediates_only=True, output_fmt="NCHW")
        return {name: maps[places.index(self.maps[name])] for name in names}

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Every map by name, and `pooled`, what `forward` gives."""
        return {**self.features(images, list(self.maps)), "pooled": self(images)}

    def _run(self, call: Any, images: Tensor, **arguments: Any) -> Any:
        try:
            return call(images, **arguments)
        except AssertionError as error:  # it takes the size of its tables alone
            side = self.settings["input_size"][1]
            raise UserError(
                f"{str(error).rstrip('.')}: this network takes images of {side} × {side} pixels (size={side})."
            ) from None


@functools.cache
def outline(architecture: str) -> TimmNetwork:
    """The same without values."""
    with torch.device("meta"):
        return TimmNetwork(architecture)


def _build(name: str, dilated: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models(f"{name[:4]}*"))
        raise UserError(f"timm {timm.__version__} has no network {name}.{near}")
    for free in _FREE_SIZES:
        try:
            return timm.create_model(name, num_classes=0, **free, **dilated)
        except (TypeError, NotImplementedError, AssertionError):  # an argument that the family has not
            continue
    raise UserError(f"timm does not dilate {name}: say layers.output_stride=32.")


def _without_prefix(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}network.")]:
        state[prefix + name.removeprefix(f"{prefix}network.")] = state.pop(name)


def _with_prefix(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}network.{name.removeprefix(prefix)}"] = state.pop(name)
