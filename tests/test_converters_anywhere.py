"""Backbones in no layout's place, files that name their network, detectors and segmentors, averaged copies, numbers."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from checkpoint_files import flat_state, flat_tensors, renamed_back
from omegaconf import OmegaConf
from safetensors.torch import save_file

from twist.contracts.errors import UserError
from twist.converters.evidence import agrees
from twist.converters.inspect import inspect, inspection_text
from twist.converters.read import load_source
from twist.converters.tables import DETECTRON2

RESNET = flat_tensors()
RESNET50 = flat_tensors("resnet50")
OTHER = flat_tensors(seed=5)
BARE = {"fc.weight": torch.ones(2, 512), "fc.bias": torch.ones(2)}


def under(prefix: str, tensors: dict[str, torch.Tensor] = RESNET) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(a.flatten()[0] == b.flatten()[0])


# ---- The file names its network -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "architecture", "agree"),
    [
        ("resnet50", "resnet50", True), ("resnet50.a1_in1k", "resnet50", True), ("timm/resnet50", "resnet50", True),
        ("torchvision.models.resnet50", "resnet50", True), ("ResNet", "resnet50", True),
        ("tv_resnet50", "resnet50", True),
        ("resnet50w2", "resnet50", True), ("resnet50_1x", "resnet50", True), ("moco_v2_resnet50", "resnet50", True),
        ("dino_resnet50", "resnet50", True), ("gluon_resnet50_v1b", "resnet50", True), ("ResNet-50", "resnet50", True),
        ("resnet101", "resnet50", False), ("resnetaa50", "resnet50", False), ("resnetblur50", "resnet50", False),
        ("resnet50_gn", "resnet50", False), ("resnet50d", "resnet50", False), ("ResNetV1c", "resnet50", False),
        ("resnetv2_50", "resnet50", False), ("fcn_resnet50", "resnet50", False), ("resnext50_32x4d", "resnet50", False),
        ("resnet50_clip", "resnet50", False), ("wide_resnet50_2", "resnet50", False), ("vit_small", "resnet50", False),
        ("vit_small_patch16_224", "vit_small_patch16", True), ("deit_small", "vit_small_patch16", True),
        ("mae_vit_base_patch16", "vit_base_patch16", True), ("vit_small", "vit_small_patch16", True),
        ("dino_vits16", "vit_small_patch16", True), ("VisionTransformer", "vit_small_patch16", True),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch14", True),
        ("dinov2_vits14_reg", "vit_small_patch14", True),
        ("vit_relpos_small_patch16_224", "vit_small_patch16", False), ("vit_small_r26_s32", "vit_small_patch16", False),
        ("vit_base_patch16_siglip_224", "vit_base_patch16", False), ("swin_tiny", "vit_small_patch16", False),
        ("vit_base_patch16_clip_quickgelu_224", "vit_base_patch16", False), ("convnext_tiny", "resnet50", False),
    ],
)  # fmt: skip
def test_a_name_is_that_of_the_network_or_it_speaks_against_it(name: str, architecture: str, agree: bool) -> None:
    assert agrees(name, architecture) is agree


def timm_file(name: str, **more: Any) -> dict[str, Any]:
    """What timm's train.py saves (utils/checkpoint_saver.py) of this network."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=2)
    return {
        "epoch": 3,
        "arch": name,
        "state_dict": flat_state(network),
        "version": 2,
        "args": argparse.Namespace(),
        **more,
    }


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur50", "resnetaa50d"])
def test_timms_own_files_of_other_resnets_are_refused(name: str, tmp_path: Path) -> None:
    """They have a ResNet-50's tensors; read as one their features are 0.17 and 0.48 of their size away."""
    with pytest.raises(
        UserError, match="deep stem" if name.endswith("d") else f"arch calls it {name}, which is not the"
    ):
        load_source(saved(tmp_path / "x.pth.tar", timm_file(name)), allow_nan=True)
    source = load_source(saved(tmp_path / "y.pth.tar", timm_file("resnet50")), allow_nan=True)
    assert (source.backbone.architecture, source.backbone.method) == ("resnet50", "supervised")


@pytest.mark.parametrize(
    "settings",
    [
        {"args": argparse.Namespace(model="resnetblur18")},
        {"args": {"model": "resnetblur18"}},
        {"hyper_parameters": {"model_name": "resnetblur18"}},
        {"hyper_parameters": {"backbone": {"name": "resnetblur18"}}},
        {"config": OmegaConf.create({"model": {"name": "resnetblur18"}})},
        {"hyper_parameters": {"cfg": OmegaConf.create({"network": "resnetblur18"})}},
        {
            "meta": {
                "cfg": "model = dict(\n  backbone=dict(\n  norm_cfg=dict(type='BN'),\n  depth=18, type='ResNetV1d'))"
            }
        },
        {"model_name": "resnet34"},
    ],
)
def test_a_network_is_named_wherever_settings_stand(settings: dict[str, Any], tmp_path: Path) -> None:
    place = {"state_dict": under("net.")}
    with pytest.raises(UserError, match=r"which is not the resnet18 that its tensors look like"):
        load_source(saved(tmp_path / "x.pth", place | settings), allow_nan=True)
    said = json.loads(json.dumps({"args": {"model": "resnet18", "data": "vit", "arch": "moco"}}))
    assert load_source(saved(tmp_path / "y.pth", place | said), allow_nan=True).backbone.architecture == "resnet18"


def test_settings_beside_a_file_are_read(tmp_path: Path) -> None:
    """solo-learn writes its method and its network into args.json beside the checkpoint."""
    probe = {"classifier.weight": torch.ones(2, 512), "classifier.bias": torch.ones(2)}
    file = saved(tmp_path / "x.ckpt", {"state_dict": under("backbone.") | probe})
    assert load_source(file, allow_nan=True).backbone.method == "unknown"
    (tmp_path / "args.json").write_text(json.dumps({"method": "vicreg", "backbone": {"name": "resnet18"}}))
    source = load_source(file, allow_nan=True)
    assert (source.backbone.source_layout, source.backbone.method) == ("solo-learn", "vicreg")
    (tmp_path / "args.json").write_text(json.dumps({"method": "vicreg", "backbone": {"name": "wide_resnet18"}}))
    with pytest.raises(UserError, match=r"args\.json\.backbone\.name calls it wide_resnet18"):
        load_source(file, allow_nan=True)


# ---- Detectors and segmentors ---------------------------------------------------------------------------------------


def dense(name: str) -> dict[str, torch.Tensor]:
    kinds = (
        torchvision.models.segmentation if "_resnet50" in name and "rcnn" not in name else torchvision.models.detection
    )
    with torch.device("meta"):
        network = getattr(kinds, name)(weights=None, weights_backbone=None)
    return flat_state(network)


def mmseg() -> dict[str, torch.Tensor]:
    return under("backbone.", RESNET50) | {"decode_head.conv_seg.weight": torch.ones(2, 8, 1, 1)}


def smp() -> dict[str, torch.Tensor]:
    heads = {
        "decoder.blocks.0.conv1.0.weight": torch.ones(2, 2, 3, 3),
        "segmentation_head.0.weight": torch.ones(1, 2, 3, 3),
    }
    return under("encoder.", RESNET50) | heads


DENSE = {
    "fcn_resnet50": (lambda: dense("fcn_resnet50"), "torchvision segmentation model", "backbone."),
    "deeplabv3_resnet50": (lambda: dense("deeplabv3_resnet50"), "torchvision segmentation model", "backbone."),
    "fasterrcnn_resnet50_fpn": (lambda: dense("fasterrcnn_resnet50_fpn"), "torchvision detector", "backbone.body."),
    "mmseg": (mmseg, "MMSegmentation segmentor", "backbone."),
    "smp": (smp, "model of segmentation_models_pytorch", "encoder."),
}


@pytest.mark.parametrize("entry", ["", "state_dict", "model"])
@pytest.mark.parametrize("name", DENSE)
def test_a_dense_models_backbone_has_to_be_asked_for(name: str, entry: str, tmp_path: Path) -> None:
    """A segmentation model dilates: read as a plain ResNet-50 its features are others."""
    make, title, prefix = DENSE[name]
    file = saved(tmp_path / "x.pth", {entry: make(), "args": {"model": name}} if entry else make())
    with pytest.raises(UserError, match=rf"is a trained {title}, .* say --prefix {prefix}"):
        load_source(file, allow_nan=True)
    source = load_source(file, prefix=prefix, allow_nan=True)
    assert (source.backbone.architecture, source.backbone.method) == ("resnet50", "unknown")
    assert any(f"trained {title}" in note for note in source.notes)
    assert source.dropped


# ---- A backbone anywhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"state_dict": under("backbone.")}, "state_dict › backbone."),
        ({"state_dict": under("model.net.") | {"loss.weight": torch.ones(3)}}, "state_dict › model.net."),
        ({"state_dict": under("encoder.") | under("projector.0.", BARE), "hyper_parameters": {}}, "encoder."),
        ({"model_state_dict": RESNET | BARE}, "model_state_dict"),
        ({"module": under("net."), "ds_version": "0.16"}, "module › net."),  # DeepSpeed's mp_rank_00_model_states.pt
        ({"net": under("module.encoder."), "epoch": 3}, "net › encoder."),
        (under("online_encoder.net.") | {"online_predictor.net.0.weight": torch.ones(2, 2)}, "online_encoder.net."),
        ({"n_averaged": torch.tensor(3), **under("module.")}, "the file's own level"),  # torch.optim.swa_utils
        ({"state_dict": RESNET, "critic": {"w": torch.ones(3)}}, "state_dict"),
        ({"ckpt": {"weights": renamed_back(DETECTRON2, RESNET50)}}, "ckpt › weights"),
        ({"state_dict": RESNET | {"ema_conv1_weight": RESNET["conv1.weight"]}}, "state_dict"),  # mmcv 1's EMAHook
        ({"state_dict": under("model.") | under("backbone.")}, "state_dict › "),  # one network, two names
    ],
)  # fmt: skip
def test_one_network_is_found_wherever_it_lies(value: dict[str, Any], place: str, tmp_path: Path) -> None:
    source = load_source(saved(tmp_path / "x.pth", value), allow_nan=True)
    assert source.backbone.method == "unknown"
    assert same(source.tensors["conv1.weight"], RESNET["conv1.weight"])
    assert any(place in note and "tensors) was found" in note for note in source.notes)


def test_of_several_networks_one_is_chosen_by_entry_and_prefix(tmp_path: Path) -> None:
    value = {"state_dict": under("online.") | under("target.", OTHER), "best": under("target.", OTHER)}
    file = saved(tmp_path / "x.pth", value)
    with pytest.raises(UserError, match=r"several networks: .*state_dict › online\..*choose one with --prefix"):
        load_source(file, allow_nan=True)
    for prefix in ("target.", "target", "module.target."):
        source = load_source(file, prefix=prefix, entry="state_dict", allow_nan=True)
        assert same(source.tensors["conv1.weight"], OTHER["conv1.weight"])
        assert source.unused_entries == {"best": 120}
    assert load_source(file, prefix="online", layout="byol-torch", allow_nan=True).backbone.method == "byol"
    with pytest.raises(UserError, match="holds no network there; it holds resnet18 under state_dict › online"):
        load_source(file, prefix="teacher", allow_nan=True)
    text = inspection_text(inspect(file))
    assert "resnet18 under state_dict › target. (120 tensors)" in text


def test_half_a_network_is_none(tmp_path: Path) -> None:
    half = {name: tensor for name, tensor in under("net.").items() if "layer4.1.bn2" not in name}
    with pytest.raises(UserError, match="tensors missing"):
        load_source(saved(tmp_path / "x.pth", {"state_dict": half}))
    extra = under("net.") | {"net.layer1.0.attn.weight": torch.ones(3)}
    with pytest.raises(UserError, match="no single place"):
        load_source(saved(tmp_path / "y.pth", {"state_dict": extra}))
    # A convolution beside the stem may be part of the network.
    stem = under("net.") | {"net.conv0.weight": torch.ones(3, 3, 1, 1)}
    with pytest.raises(UserError, match="no single place"):
        load_source(saved(tmp_path / "z.pth", {"state_dict": stem}))


AVERAGE = {"n_averaged": torch.tensor(1), **under("module.", OTHER | BARE)}


@pytest.mark.parametrize(
    ("value", "default", "branches"),
    [
        (timm_file("resnet18") | {"state_dict_ema": "ema"}, "ema", ("ema", "model")),
        ({"model": RESNET | BARE, "model_ema": AVERAGE}, "ema", ("ema", "model")),  # torchvision's references
        ({"model": RESNET | BARE, "model_ema": OTHER | BARE}, "backbone", ("backbone", "ema")),  # DeiT
        ({"state_dict": under("a."), "ema_state_dict": under("module.a.", OTHER)}, "backbone", ("backbone", "raw")),
        ({"state_dict": under("net."), "current_model_state": under("net.", OTHER)}, "backbone", ("backbone", "raw")),
    ],
)  # fmt: skip
def test_an_averaged_copy_is_a_branch(
    value: dict[str, Any], default: str, branches: tuple[str, ...], tmp_path: Path
) -> None:
    if value.get("state_dict_ema") == "ema":
        value = {**value, "state_dict_ema": {name: tensor + 1 for name, tensor in value["state_dict"].items()}}
    file = saved(tmp_path / "x.pth", value)
    first = load_source(file, allow_nan=True)
    assert (first.backbone.source_branch, first.branches) == (default, branches)
    other = next(name for name in branches if name != default)
    second = load_source(file, branch=other, allow_nan=True)
    assert second.backbone.source_branch == other
    assert not same(first.tensors["conv1.weight"], second.tensors["conv1.weight"])


# ---- Numbers --------------------------------------------------------------------------------------------------------


def test_every_float_is_read_and_what_is_rounded_is_said(tmp_path: Path) -> None:
    mixed = {name: t.half() if ".conv" in name else t for name, t in flat_tensors(seed=0).items()}
    source = load_source(saved(tmp_path / "o2.pth", mixed), allow_nan=True)
    assert source.dtype == "float16 and float32"
    assert any("every value is exact" in note for note in source.notes)
    brain = {name: t.bfloat16() if t.is_floating_point() else t for name, t in flat_tensors(seed=0).items()}
    source = load_source(saved(tmp_path / "brain.pth", brain))
    assert source.dtype == "bfloat16"
    assert all(torch.equal(source.tensors[name].flatten()[:1], t.float().flatten()[:1]) for name, t in brain.items())
    double = {name: t.double() if t.is_floating_point() else t for name, t in RESNET.items()}
    source = load_source(saved(tmp_path / "double.pth", double), allow_nan=True)
    assert source.tensors["conv1.weight"].dtype is torch.float32
    assert any("float64; every value is exact" in note for note in source.notes)
    double["bn1.weight"] = torch.full((64,), 0.1, dtype=torch.float64)
    notes = load_source(saved(tmp_path / "rounded.pth", double), allow_nan=True).notes
    assert any("float64: 1 tensors have values that float32 rounds" in note for note in notes)


# ---- Names of methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "tag", "method"),
    [
        ("resnet18", "a1_in1k", "supervised"), ("resnet18", "tv_in1k", "supervised"), ("resnet18", "", "supervised"),
        ("resnet18", "dino", "dino"), ("resnet18", "mae", "mae"),
        ("resnet18", "fb_swsl_ig1b_ft_in1k", "semi-supervised"),
        ("resnet18", "somebodys_own", "unknown"),
    ],
)  # fmt: skip
def test_a_timm_folders_tag_names_the_method(architecture: str, tag: str, method: str, tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in RESNET.items()}, tmp_path / "model.safetensors")
    pretrained = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "tag": tag}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": pretrained}))
    header = load_source(tmp_path / "model.safetensors", allow_nan=True).backbone
    assert (header.method, header.std) == (method, (0.5, 0.5, 0.5))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetaa18", "pretrained_cfg": pretrained}))
    with pytest.raises(UserError, match="calls it resnetaa18, which is not the resnet18"):
        load_source(tmp_path / "model.safetensors", allow_nan=True)


# ---- No false word --------------------------------------------------------------------------------------------------

# timm's or torchvision's name of a network that is not ours → a word of what is said about it.
FOREIGN = {
    "convnext_tiny": "ConvNeXt", "convnextv2_atto": "ConvNeXt", "tv:convnext_tiny": "ConvNeXt",
    "swin_tiny_patch4_window7_224": "Swin", "swinv2_tiny_window8_256": "Swin", "tv:swin_t": "Swin",
    "regnety_002": "RegNet", "efficientnet_b0": "EfficientNet", "tv:mobilenet_v2": "MobileNet",
    "resnet50_gn": "group norm", "resnetv2_50": "pre-activation", "resnetv2_50x1_bit": "pre-activation",
    "resnet50d": "deep stem", "seresnet50": "squeeze-and-excitation", "skresnet50": "selective kernels",
    "resnet50_clip.openai": "CLIP's ResNet", "res2net50_26w_4s": "Res2Net", "resnest14d": "ResNeSt",
    "hrnet_w18_small": "HRNet", "densenet121": "DenseNet", "inception_v3": "Inception",
    "nf_resnet50": "normaliser-free", "mixer_s32_224": "MLP-Mixer", "xcit_nano_12_p16_224": "XCiT",
    "beit_base_patch16_224": "relative positions", "vit_relpos_small_patch16_224": "relative positions",
    "vit_small_r26_s32_224": "hybrid ViT", "pvt_v2_b0": "pyramid vision transformer",
    "resnext50_32x4d": "ResNeXt", "wide_resnet50_2": "wide_resnet",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module.model."])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_refusal_says_what_the_file_is(name: str, prefix: str, tmp_path: Path) -> None:
    kind, _, own = name.rpartition(":")
    with torch.device("meta"):
        network = getattr(torchvision.models, own)() if kind else timm.create_model(own)
    value = under(prefix, flat_state(network))
    with pytest.raises(UserError) as caught:
        load_source(saved(tmp_path / "x.pth", {"state_dict": value} if prefix else value), allow_nan=True)
    message = str(caught.value)
    assert FOREIGN[name] in message
    assert message.endswith(".")
    assert "\n" not in message
    assert "published" not in message


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["base_model.model.blocks.0.attn.qkv.lora_A.default.weight"], "LoRA adapters"),
        (["conv1.weight_scale", "layer1.0.conv1.weight_scale"], "quantised"),
        (["vit.encoder.layer.0.attention.attention.query.weight"], "query, key and value apart"),
        (["root.conv.weight", "block1.unit01.conv1.weight"], "BiT"),
        (["vision_model.pre_layrnorm.weight"], "norm before its first block"),
        (["encoder.rel_pos_bias.relative_position_bias_table"], "relative positions"),  # SimMIM's ViT
        (["blocks.0.attn.q_bias", "blocks.0.attn.relative_position_bias_table"], "relative positions"),  # BEiT
        (["encoder.blocks.0.residual1.fn.rope.freqs", "encoder.blocks.0.residual1.norm.weight"], "rotary"),  # CAPI
        (["encoder.layers.0.blocks.0.attn.relative_position_bias_table"], "Swin"),
    ],
)
def test_a_file_is_named_by_signatures_too(names: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_source(saved(tmp_path / "x.pth", {"state_dict": dict.fromkeys(names, torch.ones(2))}))
