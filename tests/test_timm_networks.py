"""Networks that timm builds by name: read from what timm writes, proven, and measured through the feature contract."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from tiny_sample import tiny_sample

from twist.contracts.errors import UserError
from twist.contracts.networks import network_of, normalise
from twist.contracts.timm_networks import TimmNetwork
from twist.contracts.weights import Backbone, Vit
from twist.converters.convert import convert
from twist.converters.read import load_backbone, load_source
from twist.measure.dense import DenseExtractor, Layers
from twist.transfer.run import transfer

CONVNEXT, EFFICIENTNET, RELPOS = "test_convnext", "test_efficientnet", "test_vit_relpos"


def of(name: str) -> Backbone:
    return Backbone(architecture=f"timm:{name}", stem="own", method="any")


def network(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def folder(name: str, path: Path, **config: Any) -> Path:
    """timm's own hub folder, with another config where told."""
    save_for_hf(network(name), str(path), safe_serialization=True)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


@pytest.mark.parametrize("name", [CONVNEXT, EFFICIENTNET, RELPOS, "densenet121"])
def test_maps_and_output_are_timms_own(name: str) -> None:
    """Of `features_only=True` and `forward_head(pre_logits=True)`; some of timm's classes have `features`, too."""
    plain, maps_of, empty = network(name), network(name, features_only=True), TimmNetwork(f"timm:{name}").state_dict()
    ours = network_of(of(name), {key: tensor for key, tensor in plain.state_dict().items() if key in empty})
    maps_of.load_state_dict(dict(zip(maps_of.state_dict(), plain.state_dict().values())))  # the same order
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(ours(images), plain.forward_head(plain.forward_features(images), pre_logits=True))
        theirs, found = maps_of(images), ours.features(images, list(ours.maps))
    assert ours(images).shape[1] == ours.num_features
    names = [f"res{stride.bit_length() - 1}" for stride in maps_of.feature_info.reduction()]
    assert list(found) == ([f"block{index}" for index in range(9)] if name == RELPOS else names)
    for one, other in zip(list(found.values())[-len(theirs) :], theirs, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="no feature res9"):
        ours.features(images, ["res9"])


@pytest.mark.parametrize("name", [CONVNEXT, EFFICIENTNET, RELPOS])
def test_timms_folder_there_and_back(name: str, tmp_path: Path) -> None:
    hub = folder(name, tmp_path / "hub")
    config = json.loads((hub / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.4, 0.5, 0.6], "tag": "dino"}
    (hub / "config.json").write_text(json.dumps(config))
    done = convert(hub, to="timm", output=tmp_path / "there")
    assert (done.backbone.mean, done.backbone.method) == ((0.4, 0.5, 0.6), "dino")
    assert (done.proof.kind, done.backbone.architecture) == ("framework", f"timm:{name}")
    assert done.proof.max_difference is not None
    assert done.proof.max_difference < 1e-5
    artefact = convert(done.output, to="torchvision", output=tmp_path / "artefact")
    assert artefact.backbone == done.backbone
    again, header = load_backbone(artefact.weights)
    assert header == done.backbone, "pixels and method, too"
    loaded = timm.create_model(f"local-dir:{done.output}", pretrained=True, num_classes=0).eval()
    pixels = torch.randint(0, 256, (1, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(again(normalise(pixels, header)), loaded(normalise(pixels, header)))
    for to in ("detectron2", "mmseg", "huggingface", "onnx"):
        with pytest.raises(UserError, match="only timm builds it; the frozen protocols"):
            convert(artefact.weights, to=to, output=tmp_path / "no")


def test_other_files_that_name_it(tmp_path: Path) -> None:
    """timm's train.py, whose average counts; a wrapper of somebody's own; and a bare file with the name told."""
    state = network(CONVNEXT).state_dict()
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    training = {"arch": CONVNEXT, "state_dict": state, "state_dict_ema": averaged, "version": 2, "args": {}}
    for file, value, more, method, first in (
        ("a.pth.tar", training, {}, "supervised", averaged),
        ("b.pth.tar", training, {"branch": "model"}, "supervised", state),
        (
            "c.pth",
            {"hyper_parameters": {"model_name": CONVNEXT}, "state_dict": under("net.", state)},
            {},
            "unknown",
            state,
        ),
        ("d.pth", state, {"architecture": f"timm:{CONVNEXT}"}, "unknown", state),
    ):
        torch.save(value, tmp_path / file)
        source = load_source(tmp_path / file, **more)
        assert (source.backbone.architecture, source.backbone.method) == (f"timm:{CONVNEXT}", method)
        assert torch.equal(source.tensors["stem.0.weight"], first["stem.0.weight"])
        assert [name.rpartition(".")[0][-7:] for name in source.dropped] == ["head.fc"] * 2
    with pytest.raises(UserError, match=r"it is a ConvNeXt.*--architecture timm:NAME"):
        torch.save(state, tmp_path / "e.pth")
        load_source(tmp_path / "e.pth")
    with pytest.raises(UserError, match=rf"no network test_convnxt.*{CONVNEXT}"):
        load_source(tmp_path / "d.pth", architecture="test_convnxt")


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architecture": "test_convnext2"}, "timm:test_convnext2"),
        ({"model_args": {"in_chans": 3, "act_layer": "relu"}}, "model_args.*act_layer"),
    ],
)
def test_a_folder_whose_tensors_are_another_networks(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_source(folder(CONVNEXT, tmp_path / "hub", **config))


@pytest.mark.parametrize(
    ("name", "layers", "shape"),
    [
        (EFFICIENTNET, Layers(stages=(3, 4), output_stride=16), (48 + 64, 8, 8)),
        (CONVNEXT, Layers(stages=(2, 4)), (32 + 64, 16, 16)),
        (RELPOS, Layers(last_blocks=2), (2 * 96, 10, 10)),
    ],
)
def test_dense_features(name: str, layers: Layers, shape: tuple[int, ...]) -> None:
    size = shape[-1] * (16 if name != CONVNEXT else 8)
    built = network_of(of(name), output_stride=layers.output_stride)
    extractor = DenseExtractor(built, of(name), torch.device("cpu"), layers)
    found = extractor.maps(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    assert (tuple(found.shape[1:]), size // extractor.stride) == (shape, shape[-1])


def test_what_a_network_cannot() -> None:
    with pytest.raises(UserError, match="size=160"):
        TimmNetwork(f"timm:{RELPOS}")(torch.zeros(1, 3, 96, 96))
    with pytest.raises(UserError, match=r"layers\.output_stride=32"):
        TimmNetwork("timm:densenet121", output_stride=16)
    keys = DenseExtractor(TimmNetwork(f"timm:{RELPOS}"), of(RELPOS), torch.device("cpu"), Layers(tokens="keys"))
    with pytest.raises(UserError, match=r"layers\.tokens=patches"):
        keys.maps(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "overrides"),
    [
        ("sample-knn", []), ("sample-linear", ["epochs=1"]), ("sample-fewshot", []), ("sample-voc-knn-seg", []),
        ("sample-voc-linear-seg", ["iterations=2"]), ("sample-voc-cluster-seg", ["clusters=8"]),
        ("sample-voc-corloc", ["layers.output_stride=32"]),
    ],
)  # fmt: skip
def test_frozen_protocols(protocol: str, overrides: list[str], tmp_path: Path) -> None:
    overrides = [f"architecture=timm:{CONVNEXT}", *overrides]
    where: Any = {"data": Path(tiny_sample().root), "output": tmp_path / "run", "results": tmp_path}
    record = transfer(protocol, overrides=overrides, weights="random", **where)
    assert record.recipe["architecture"] == f"timm:{CONVNEXT}"
    assert record.metrics


def test_keys_of_a_rotary_vit() -> None:
    """DINOv3's biases lie apart from timm's matrix of queries, keys and values, which is then no module that runs."""
    vit = Vit(embed_dim=192, depth=1, heads=3, mlp_features=192, rope_base=100, registers=4, prefix_positions=False)
    header = Backbone(architecture="vit_tiny_patch16", stem="patch16", image_size=32, vit=vit, method="any")
    built = network_of(header)
    extractor = DenseExtractor(built, header, torch.device("cpu"), Layers(tokens="keys"))
    with torch.no_grad():
        first = extractor.maps(images := torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8))
        built.blocks[0].attn.qkv.weight[192:384] *= 2  # type: ignore[index, union-attr, operator]
    assert first.shape == (1, 192, 2, 4)
    torch.testing.assert_close(extractor.maps(images), 2 * first)
