"""The convolution of one-pixel outputs: the numbers of torch's, forwards and backwards, used where it should be."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twist.contracts.networks import Conv3x3, build_backbone
from twist.contracts.shapes import shapes_of
from twist.contracts.weights import RESNETS, usual_vit


@pytest.mark.parametrize(("height", "width", "stride"), [(1, 1, 1), (1, 1, 2), (2, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_a_small_map_gives_the_numbers_of_a_convolution(height: int, width: int, stride: int) -> None:
    torch.manual_seed(0)
    ours = Conv3x3(5, 7, 3, stride=stride, padding=1).double()
    theirs = nn.Conv2d(5, 7, 3, stride=stride, padding=1).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 5, height, width, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [ours(inputs[0]), theirs(inputs[1])]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-12, atol=1e-12)


def test_views_of_32_pixels_need_no_convolution_in_the_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    maps: list[tuple[int, ...]] = []
    original = F.conv2d

    def counted(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        maps.append((weight.shape[0], *weight.shape[2:]))
        return original(x, weight, *rest)

    monkeypatch.setattr(F, "conv2d", counted)
    network = build_backbone("resnet18").eval()
    network(torch.zeros(2, 3, 32, 32))
    assert (512, 3, 3) not in maps
    assert (256, 3, 3) in maps
    maps.clear()
    network(torch.zeros(2, 3, 64, 64))
    assert maps.count((512, 3, 3)) == 4, "two by two pixels are a convolution's work"


def test_the_weights_are_torchvisions() -> None:
    """Same names, same initialisation from the same seed: the class changes how a convolution is computed only."""
    from torchvision.models import resnet18

    torch.manual_seed(1)
    ours = build_backbone("resnet18").state_dict()
    torch.manual_seed(1)
    theirs = resnet18().state_dict()
    assert list(ours) == [name for name in theirs if not name.startswith("fc.")]
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


VITS = {
    "usual": {},
    "no class token": {"class_token": False, "pooling": "avg"},
    "registers": {"registers": 4, "prefix_positions": False, "layer_scale": True},
    "registers with positions": {"registers": 2},
    "pre-norm": {"pre_norm": True, "qkv_bias": False, "final_norm": False},
    "swiglu": {"mlp": "swiglu", "mlp_features": 100},
}


@pytest.mark.parametrize("architecture", RESNETS)
def test_names_and_shapes_of_a_resnet_are_the_networks(architecture: str) -> None:
    for width in (1, 2):
        with torch.device("meta"):
            built = build_backbone(architecture, width=width).state_dict()
        assert _described(shapes_of(architecture, width=width)) == _described(built)


@pytest.mark.parametrize("kind", VITS)
def test_names_and_shapes_of_a_vit_are_the_networks(kind: str) -> None:
    vit = usual_vit("vit_small_patch8").model_copy(update={"depth": 2, **VITS[kind]})
    with torch.device("meta"):
        built = build_backbone("vit_small_patch8", image_size=112, vit=vit).state_dict()
    assert _described(shapes_of("vit_small_patch8", image_size=112, vit=vit)) == _described(built)


def _described(state: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(array.shape), str(array.dtype).removeprefix("torch.")) for name, array in state.items()]
