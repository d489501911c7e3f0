"""Frozen features: bit-equal backbone, deterministic files, the right tokens of a ViT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from imagenet_tree import write_tree
from torch import nn

from twist.catalog.class_folders import read_split
from twist.contracts.networks import build_backbone, normalise
from twist.contracts.weights import Backbone
from twist.transfer.engines.imagenet.dataset import Batches
from twist.transfer.engines.imagenet.features import (
    FrozenBackboneChanged,
    extract,
    feature_dimension,
    features_of,
    frozen,
    state_digest,
)
from twist.transfer.engines.imagenet.recipes import load_recipe

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """A convolution and a batch norm: small, and with buffers that training mode would change."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(images)).mean((2, 3))


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


HEADER = Backbone(architecture="resnet18", method="random")


def test_frozen_backbone_passes_and_a_single_changed_buffer_does_not(tiny: nn.Module) -> None:
    images = torch.randn(4, 3, 16, 16)
    with frozen(tiny) as digest:
        tiny(images)
    assert digest == state_digest(tiny)
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    with pytest.raises(FrozenBackboneChanged), frozen(tiny):
        tiny.train()  # the mistake that this proof is for: running statistics move, no parameter does
        tiny(images)
    with pytest.raises(FrozenBackboneChanged), frozen(tiny), torch.no_grad():
        next(tiny.parameters()).view(-1)[0] += 1e-7


def test_digest_tells_names_shapes_types_and_the_sign_of_zero_apart() -> None:
    def digest(**buffers: torch.Tensor) -> str:
        module = nn.Module()
        for name, value in buffers.items():
            module.register_buffer(name, value)
        return state_digest(module)

    zeros = torch.zeros(4)
    variants = [
        digest(a=zeros),
        digest(b=zeros),
        digest(a=-zeros),
        digest(a=zeros.view(2, 2)),
        digest(a=torch.zeros(4, dtype=torch.int32)),
    ]
    assert len(set(variants)) == len(variants)


def test_features_are_in_the_images_order_and_equal_a_plain_forward_pass(tiny: nn.Module, tmp_path: Path) -> None:
    images = read_split(write_tree(tmp_path / "tree") / "val")
    recipe = load_recipe("sample-knn", architecture="resnet18", overrides=("size=32", "resize=36"))
    tiny.eval()
    small_batches = recipe.model_copy(update={"machine": recipe.machine.model_copy(update={"feature_batch_size": 2})})
    with frozen(tiny):
        file = extract(tiny, HEADER, images, small_batches, folder=tmp_path / "f", title="t", device=CPU)
    pixels, labels = next(Batches(images, recipe, batch_size=len(images)).ordered())
    with torch.no_grad():
        expected = tiny(normalise(pixels, HEADER))
    assert torch.allclose(file.all(), expected, atol=1e-6)
    assert torch.equal(file.labels, labels)
    assert torch.equal(file.rows(2, 100), file.all()[2:])
    assert torch.equal(torch.from_numpy(file.mapped().copy()), file.all())


def test_file_is_reused_for_the_same_and_only_the_same(tiny: nn.Module, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    folder = tmp_path / "features"
    recipe = load_recipe("sample-knn", architecture="resnet18", overrides=("size=32", "resize=36"))
    tiny.eval().requires_grad_(False)

    def path(**changes: object) -> Path:
        changed = recipe.model_copy(update=changes)
        return extract(tiny, HEADER, read_split(root / "val"), changed, folder=folder, title="t", device=CPU).path

    first = path()
    written = first.stat().st_mtime_ns
    assert path() == first
    assert first.stat().st_mtime_ns == written
    assert path(resize=40) != first
    assert path(interpolation="bilinear") != first
    image = root / "val" / "class_0" / "val_0_000.png"
    image.write_bytes((root / "val" / "class_1" / "val_1_000.png").read_bytes())
    second = path()
    assert second != first
    with torch.no_grad():
        tiny.convolution.weight[0] += 1
    assert path() not in (first, second)


def test_torn_file_is_not_believed(tiny: nn.Module, tmp_path: Path) -> None:
    images = read_split(write_tree(tmp_path / "tree") / "val")
    recipe = load_recipe("sample-knn", architecture="resnet18", overrides=("size=32", "resize=36"))
    tiny.eval().requires_grad_(False)
    file = extract(tiny, HEADER, images, recipe, folder=tmp_path / "f", title="t", device=CPU)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-4])
    extract(tiny, HEADER, images, recipe, folder=tmp_path / "f", title="t", device=CPU)
    assert file.path.read_bytes() == whole


@pytest.mark.slow
def test_vit_features_are_class_tokens_after_the_norm() -> None:
    torch.manual_seed(0)
    network = build_backbone("vit_small_patch16", image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one = features_of(network, images)
        four = features_of(network, images, last_blocks=4)
    assert feature_dimension(network, last_blocks=4) == 4 * 384 == four.shape[1]
    # The last of the four is the network's own output; the others are earlier blocks, so they differ from it.
    assert torch.allclose(four[:, -384:], one, atol=1e-6)
    assert all(not torch.allclose(four[:, 384 * i : 384 * (i + 1)], one, atol=1e-3) for i in range(3))
