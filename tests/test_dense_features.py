"""Dense features: which places of a network they are, and the file that every dense protocol reads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet as tv

from twist.contracts.errors import UserError
from twist.contracts.networks import build_backbone, network_of, normalise
from twist.contracts.weights import Backbone
from twist.measure.dense import DenseExtractor, Layers

CPU = torch.device("cpu")
VIT = {"stem": "patch16", "image_size": 224}


def extractor(architecture: str, **layers: Any) -> DenseExtractor:
    torch.manual_seed(5)
    header = Backbone(architecture=architecture, method="random", **(VIT if architecture.startswith("vit") else {}))
    tensors = build_backbone(architecture).state_dict()
    chosen = Layers(**layers)
    network = network_of(header, tensors, output_stride=chosen.output_stride).eval().requires_grad_(False)
    return DenseExtractor(network, header, CPU, chosen)


def pixels(count: int = 2, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("layers", "dimension", "side"),
    [({}, 512, 2), ({"stages": (3,)}, 256, 4), ({"stages": (3, 4)}, 768, 4), ({"output_stride": 16}, 512, 4)],
)
def test_stages_of_a_resnet(layers: dict[str, Any], dimension: int, side: int) -> None:
    one = extractor("resnet18", **layers)
    assert one.maps(pixels()).shape == (2, dimension, side, side)
    assert one.stride == 64 // side


def test_a_dilated_last_stage_is_torchvisions() -> None:
    ours = extractor("resnet50", output_stride=16)
    reference = tv.ResNet(tv.Bottleneck, [3, 4, 6, 3], replace_stride_with_dilation=[False, False, True])
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(ours.network.state_dict())
    reference.eval()
    inputs = normalise(pixels(), ours.header)
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(inputs))))
    x = reference.layer4(reference.layer3(reference.layer2(reference.layer1(x))))
    torch.testing.assert_close(ours.maps(pixels()), x, rtol=1e-3, atol=1e-3)


def test_blocks_of_a_vit_at_another_size() -> None:
    one = extractor("vit_tiny_patch16", last_blocks=4)
    maps = one.maps(pixels(1, 96))
    assert maps.shape == (1, 4 * 192, 6, 6)
    assert one.stride == 16
    last = extractor("vit_tiny_patch16", last_blocks=1).maps(pixels(1, 96))
    torch.testing.assert_close(maps[:, -192:], last)
    raw = extractor("vit_tiny_patch16", last_norm=False).maps(pixels(1, 96))
    assert not torch.allclose(raw, last)
    with pytest.raises(UserError, match="multiple"):
        one.maps(pixels(1, 100))


def test_keys_are_those_of_the_last_attention() -> None:
    one = extractor("vit_tiny_patch16", tokens="keys")
    maps = one.maps(pixels(1, 64))
    network: Any = one.network
    tokens: list[Tensor] = []
    hook = network.blocks[-1].norm1.register_forward_hook(lambda *call: tokens.append(call[2]))
    network.forward_features(normalise(pixels(1, 64), one.header))
    hook.remove()
    weight, bias = network.blocks[-1].attn.qkv.weight[192:384], network.blocks[-1].attn.qkv.bias[192:384]
    keys = torch.nn.functional.linear(tokens[0][:, 1:], weight, bias)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), keys, rtol=1e-4, atol=1e-4)


# ── The file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def batches(images: Tensor, seen: list[int], fail_at: int | None = None) -> Callable[[int], Iterator[Tensor]]:
    def read(start: int) -> Iterator[Tensor]:
        for index in range(start, len(images)):
            if index == fail_at:
                raise RuntimeError("killed")
            seen.append(index)
            yield images[index : index + 1]

    return read


def to_file(one: DenseExtractor, folder: Path, read: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"key": {"images": "a"}, "max_disk_gb": 1, **changes}
    return one.to_file(read, images=4, size=32, folder=folder, title="test", **settings)


def test_rows_are_patches_and_are_read_once(tmp_path: Path) -> None:
    one, images, seen = extractor("resnet18", stages=(3,)), pixels(4, 32), []
    file = to_file(one, tmp_path, batches(images, seen))
    expected = torch.cat([one.maps(image[None]) for image in images]).permute(0, 2, 3, 1).reshape(-1, 256)
    assert (file.height, file.width, len(file)) == (2, 2, 16)
    torch.testing.assert_close(file[:], expected)
    torch.testing.assert_close(file.rows_of(2), expected[8:12])
    to_file(one, tmp_path, batches(images, seen))
    assert seen == [0, 1, 2, 3]  # the second protocol costs no forward pass


def test_a_killed_extraction_goes_on(tmp_path: Path) -> None:
    one, images, seen = extractor("resnet18", stages=(3,)), pixels(4, 32), []
    with pytest.raises(RuntimeError):
        to_file(one, tmp_path, batches(images, seen, fail_at=3))
    part = next(tmp_path.glob("*.part"))
    with part.open("ab") as stream:  # a kill in the middle of an image
        stream.write(b"half")
    resumed = to_file(one, tmp_path, batches(images, seen))
    assert seen == [0, 1, 2, 3]
    whole = to_file(one, tmp_path / "other", batches(images, []))
    assert torch.equal(resumed[:], whole[:])


def test_whatever_decides_features_names_another_file(tmp_path: Path) -> None:
    one, images = extractor("resnet18", stages=(3,)), pixels(4, 32)
    header = one.header.model_copy(update={"channel_order": "BGR"})
    read = batches(images, [])
    paths = [to_file(one, tmp_path, read).path, to_file(one, tmp_path, read, key={"images": "b"}).path]
    paths += [to_file(extractor("resnet18", stages=(4,)), tmp_path, read).path]
    paths += [to_file(DenseExtractor(one.network, header, CPU, one.layers), tmp_path, read).path]
    next(one.network.parameters()).data.mul_(1.5)
    paths += [to_file(DenseExtractor(one.network, one.header, CPU, one.layers), tmp_path, read).path]
    assert len({*paths}) == 5


def test_more_disk_than_allowed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_disk_gb"):
        to_file(extractor("resnet18"), tmp_path, batches(pixels(4, 32), []), max_disk_gb=1e-6)
