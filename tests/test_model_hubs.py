"""Folders of model hubs, in both directions: Hugging Face transformers and timm, their cards, and ONNX."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TINY, drawn, flat_tensors, renamed_back, saved, tiny_vit, under, write_drawn
from safetensors.torch import load_file, save_file

import twist
from twist.contracts.errors import UserError
from twist.contracts.networks import network_of
from twist.contracts.weights import Backbone
from twist.converters.architecture import split
from twist.converters.convert import convert
from twist.converters.inspect import inspect
from twist.converters.proof import ProofError
from twist.converters.read import load_source
from twist.converters.tables import HUGGINGFACE_RESNET, HUGGINGFACE_VIT
from twist.converters.targets import huggingface

RESNET, RESNET50 = flat_tensors(), flat_tensors("resnet50")
SMALL = Backbone(architecture="resnet18", method="dino")
PIXELS = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
VIT = {"model_type": "vit", "hidden_act": "gelu", "num_attention_heads": 3, "layer_norm_eps": 1e-12}


def folder(path: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """What transformers' `save_pretrained` writes, here of a ResNet unless the settings say another `model_type`."""
    path.mkdir()
    config = {"model_type": "resnet", "hidden_act": "relu", "downsample_in_first_stage": False, **settings}
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, path / "model.safetensors", metadata={"format": "pt"})
    return path


def vit_file(backbone: Backbone) -> dict[str, torch.Tensor]:
    return renamed_back(HUGGINGFACE_VIT, split(drawn(backbone)))


def test_a_resnets_folder_is_read_with_its_settings(tmp_path: Path) -> None:
    tensors = under("resnet.", renamed_back(HUGGINGFACE_RESNET, RESNET50))
    tensors["classifier.1.weight"] = torch.ones(2, 2048)
    source = load_source(folder(tmp_path / "hf", tensors, downsample_in_bottleneck=True), allow_nan=True)
    found = source.backbone
    assert (found.source_layout, found.method, found.stride_in) == ("huggingface-resnet", "supervised", "1x1")
    assert (found.mean, found.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert torch.equal(source.tensors["layer4.2.bn3.bias"], RESNET50["layer4.2.bn3.bias"])
    assert source.dropped == ("classifier.1.weight",)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hidden_act": "silu"}, "sets hidden_act to silu"),
        ({"model_type": "regnet"}, "is a regnet of Hugging Face transformers, a RegNet; of that library resnet, vit"),
        ({"model_type": "beit"}, "relative positions"),
        ({"model_type": "convnext"}, "ConvNeXt"),
        ({"model_type": "clip"}, "norm before its blocks"),
        ({"model_type": "somebodys"}, "not described here"),
    ],
)
def test_a_config_of_another_network_is_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_source(folder(tmp_path / "hf", renamed_back(HUGGINGFACE_RESNET, RESNET), **settings), allow_nan=True)


def test_a_vits_settings_are_heard(tmp_path: Path) -> None:
    file = vit_file(tiny_vit())
    with pytest.raises(UserError, match="cannot be shared by 5 heads"):
        load_source(folder(tmp_path / "five", file, **{**VIT, "num_attention_heads": 5}))
    supervised = folder(tmp_path / "x", file, **VIT, architectures=["ViTForImageClassification"])
    assert load_source(supervised).backbone.method == "supervised"
    assert inspect(supervised, method="dino").to_json()["method"] == "dino"


def test_folders_that_cannot_be_read_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match="dcp_to_torch"):
        load_source(tmp_path / "dcp")
    for text, says in (("{}", "is no index"), ('{"weight_map": {"a": "../x.safetensors"}}', "outside its own folder")):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=says):
            load_source(tmp_path)


# ---- transformers' own networks --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "widths", "depths"),
    [("basic", [64, 128, 256, 512], [2, 2, 2, 2]), ("bottleneck", [256, 512, 1024, 2048], [3, 4, 6, 3])],
)
def test_transformers_own_resnet_computes_what_is_read_of_it(
    kind: str, widths: Any, depths: Any, tmp_path: Path
) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(layer_type=kind, hidden_sizes=widths, depths=depths)
    network = transformers.ResNetModel(config).eval()
    network.save_pretrained(tmp_path / "hf")
    source = load_source(tmp_path / "hf")
    images = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        theirs = network(images, output_hidden_states=True).hidden_states[1:]
        ours = network_of(source.backbone, source.tensors).stages(images)  # type: ignore[operator]
    for mine, other in zip(ours.values(), theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


# ---- Targets ---------------------------------------------------------------------------------------------------------

ROPE = {"rope_base": 100.0, "registers": 4, "layer_scale": True, "prefix_positions": False, "norm_eps": 1e-5}
ROTARY = tiny_vit(**ROPE, side=14)
GIANT = tiny_vit(layer_scale=True, mlp="swiglu", mlp_features=512)
TO_HUB = {
    "ViT": (tiny_vit(resize="plain"), "vit"),
    "DeiT": (tiny_vit(registers=1), "deit"),
    "I-JEPA": (tiny_vit(class_token=False, pooling="avg", resize="plain"), "ijepa"),
    "DINOv2": (tiny_vit(layer_scale=True, resize="offset"), "dinov2"),
    "SwiGLU": (GIANT, "dinov2"),
    "registers": (tiny_vit(registers=4, layer_scale=True, prefix_positions=False), "dinov2_with_registers"),
    "DINOv3": (ROTARY, "dinov3_vit"),
    "DINOv3+": (tiny_vit(**{**ROPE, "mlp": "swiglu", "qkv_bias": False}, side=14), "dinov3_vit"),
    "ResNet": (SMALL, "resnet"),
}


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        (tiny_vit(pre_norm=True), "no ViT with these"), (tiny_vit(registers=4), "no ViT with these"),
        (SMALL.model_copy(update={"padding": "same"}), "pad symmetrically"),
        (SMALL.model_copy(update={"channel_order": "BGR"}), "give RGB"),
    ],
)  # fmt: skip
def test_what_transformers_has_not_is_refused(backbone: Backbone, says: str) -> None:
    assert says in (huggingface.TARGET.refuse(backbone) or "")


@pytest.mark.slow
@pytest.mark.parametrize("name", TO_HUB)
def test_transformers_computes_what_was_converted_and_its_folder_leads_back(name: str, tmp_path: Path) -> None:
    backbone, kind = TO_HUB[name]
    done = convert(write_drawn(tmp_path, backbone), to="huggingface", output=tmp_path / "hf")
    assert (done.proof.kind, len(done.proof.stages)) == ("framework", 2 if backbone.is_vit else 4)
    assert "transformers" in (tmp_path / "hf" / "README.md").read_text()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == kind
    names: dict[str, Any] = {}
    exec(done.target.usage(done.output, backbone), names)  # the printed lines
    assert type(names["network"]).__name__ == config["architectures"][0]
    assert tuple(names["processor"].image_std) == pytest.approx(backbone.std)
    source = load_source(tmp_path / "hf")
    assert source.backbone.model_copy(update={"vit": backbone.vit}) == backbone
    images = torch.randn(1, 3, 128, 64)
    with torch.inference_mode():
        ours, back = network_of(backbone, drawn(backbone))(images), network_of(source.backbone, source.tensors)(images)
    assert (ours - back).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.slow
def test_a_wrong_folder_for_transformers_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = TO_HUB["ViT"]
    write = huggingface.TARGET.write

    def without_one(path: Path, tensors: Any, backbone: Backbone) -> None:
        write(path, tensors, backbone)
        kept = load_file(path)
        del kept["encoder.layer.1.output.dense.bias"]
        save_file(kept, path, metadata={"format": "pt"})

    monkeypatch.setitem(huggingface.TARGET.__dict__, "write", without_one)
    with pytest.raises(ProofError, match="does not find its tensors in the file"):
        convert(write_drawn(tmp_path, backbone), to="huggingface", output=tmp_path / "hf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet", "registers"])
def test_onnx_computes_the_features_by_name(name: str, tmp_path: Path) -> None:
    import onnx

    backbone, _ = TO_HUB[name]
    done = convert(write_drawn(tmp_path, backbone), to="onnx", output=tmp_path / "out")
    names = [*(["block0", "block1"] if backbone.is_vit else ["res2", "res3", "res4", "res5"]), "features"]
    assert (done.proof.kind, [stage.stage for stage in done.proof.stages]) == ("framework", names)
    lines: dict[str, Any] = {}
    exec(done.target.usage(done.output, backbone), lines)  # the printed lines
    assert lines["names"] == names
    images = torch.randn(3, 3, 64, 64 if backbone.is_vit else 96)
    (found,) = lines["session"].run(["features"], {"images": images.numpy()})
    network, _ = twist.load_backbone(tmp_path / "backbone.safetensors")
    with torch.inference_mode():
        expected = network(images)
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert Backbone.model_validate_json(onnx.load(done.weights).metadata_props[0].value) == backbone
    assert b"site-packages" not in done.weights.read_bytes(), "no path of this machine"


def test_a_timm_folder_has_a_card(tmp_path: Path) -> None:
    done = convert(write_drawn(tmp_path, SMALL), to="timm", output=tmp_path / "out", method="my method")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    for text in ("my method", "resnet18", "mean 0.485", f"{done.proof.max_difference:.2g}", "timm.create_model("):
        assert text in card
    assert load_source(done.output).backbone.method == "my method"


# ---- In Python -------------------------------------------------------------------------------------------------------


def test_a_program_loads_a_network_and_its_features_by_name(tmp_path: Path) -> None:
    network, found = twist.load_backbone(str(write_drawn(tmp_path, SMALL)))
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        maps = network.features(images, ["res5", "res3"])  # type: ignore[operator]
        assert (list(maps), maps["res3"].shape) == (["res5", "res3"], (2, 128, 8, 12))
        assert torch.allclose(maps["res5"].mean((2, 3)), network(images), atol=1e-5)
    assert (found.method, network.training) == ("dino", False)
    with pytest.raises(UserError, match="no feature res6: choose from res2 to res5"):
        network.features(images, ["res6"])  # type: ignore[operator]
    vit = tiny_vit(registers=4)
    network, _ = twist.load_backbone(write_drawn(tmp_path, vit))
    with torch.inference_mode():
        maps = network.features(images, ["block1", "block0"])  # type: ignore[operator]
        tokens = network.forward_features(images)  # type: ignore[operator]
    assert [tuple(map_.shape) for map_ in maps.values()] == [(2, TINY["embed_dim"], 4, 6)] * 2
    torch.testing.assert_close(maps["block1"].flatten(2).transpose(1, 2), tokens[:, 5:])


def test_a_program_calls_what_the_command_line_does(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pth", {"state_dict": under("net.", RESNET)})
    assert twist.inspect(str(file)).to_json()["networks"][0]["prefix"] == "net."
    assert twist.load_artefact(file)[1].architecture == "resnet18"
    done = twist.convert(file, to="torchvision", output=tmp_path / "out", verify=False, allow_nan=True, method="mine")
    assert load_source(done.weights).backbone.method == "mine"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = twist.nothing
