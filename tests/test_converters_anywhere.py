"""Backbones in no layout's place, files that name their network, detectors and segmentors, averaged copies, numbers."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from checkpoint_files import flat_tensors, numbered, renamed_back, same, saved, under
from omegaconf import OmegaConf
from safetensors.torch import save_file

from twist.contracts.errors import UserError
from twist.converters.evidence import agrees
from twist.converters.inspect import inspect, inspection_text
from twist.converters.read import load_source
from twist.converters.tables import DETECTRON2

RESNET, RESNET50, OTHER = flat_tensors(), flat_tensors("resnet50"), flat_tensors(seed=5)
BARE = {"fc.weight": torch.ones(2, 512), "fc.bias": torch.ones(2)}


# ---- The file names its network -------------------------------------------------------------------------------------


NAMES = {
    "resnet50": (
        "resnet50 resnet50.a1_in1k timm/resnet50 torchvision.models.resnet50 ResNet tv_resnet50 resnet50w2 resnet50_1x"
        " moco_v2_resnet50 gluon_resnet50_v1b ResNet-50",
        "resnet101 resnetaa50 resnetblur50 resnet50_gn resnet50d ResNetV1c resnetv2_50 fcn_resnet50 resnext50_32x4d"
        " resnet50_clip wide_resnet50_2 vit_small convnext_tiny",
    ),
    "vit_small_patch16": (
        "vit_small_patch16_224 deit_small vit_small dino_vits16 VisionTransformer",
        "vit_relpos_small_patch16_224 vit_small_r26_s32 swin_tiny",
    ),
    "vit_base_patch16": ("mae_vit_base_patch16", "vit_base_patch16_siglip_224 vit_base_patch16_clip_quickgelu_224"),
    "vit_small_patch14": ("vit_small_patch14_reg4_dinov2.lvd142m dinov2_vits14_reg", ""),
}


@pytest.mark.parametrize("architecture", NAMES)
def test_a_name_is_that_of_the_network_or_it_speaks_against_it(architecture: str) -> None:
    for names, agree in zip(NAMES[architecture], (True, False), strict=True):
        for name in names.split():
            assert agrees(name, architecture) is agree, name


def timm_file(name: str) -> dict[str, Any]:
    """What timm's train.py saves (utils/checkpoint_saver.py) of this network."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=2)
    state = numbered(network.state_dict())
    return {"epoch": 3, "arch": name, "state_dict": state, "version": 2, "args": argparse.Namespace()}


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur50", "resnetaa50d", "resnet50"])
def test_timms_own_files_of_other_resnets_are_those(name: str, tmp_path: Path) -> None:
    """They have a ResNet-50's tensors; read as one their features are 0.17 and 0.48 of their size away."""
    header = load_source(saved(tmp_path / "x.pth.tar", timm_file(name)), allow_nan=True).backbone
    assert (header.architecture.removeprefix("timm:"), header.method) == (name, "supervised")
    assert (header.timm_name is None) is (name == "resnet50")


@pytest.mark.parametrize(
    "settings",
    [
        {"args": argparse.Namespace(model="resnetblur34")},
        {"args": {"model": "resnetblur34"}},
        {"hyper_parameters": {"model_name": "resnetblur34"}},
        {"hyper_parameters": {"backbone": {"name": "resnetblur34"}}},
        {"config": OmegaConf.create({"model": {"name": "resnetblur34"}})},
        {"hyper_parameters": {"cfg": OmegaConf.create({"network": "resnetblur34"})}},
        {"meta": {"cfg": "model = dict(\n backbone=dict(\n norm_cfg=dict(type='BN'),\n depth=18, type='ResNetV1d'))"}},
        {"model_name": "resnet34"},
    ],
)
def test_a_network_is_named_wherever_settings_stand(settings: dict[str, Any], tmp_path: Path) -> None:
    place = {"state_dict": under("net.", RESNET)}
    with pytest.raises(UserError, match=r"which is not the resnet18 that its tensors look like"):
        load_source(saved(tmp_path / "x.pth", place | settings), allow_nan=True)
    said = json.loads(json.dumps({"args": {"model": "resnet18", "data": "vit", "arch": "moco"}}))
    assert load_source(saved(tmp_path / "y.pth", place | said), allow_nan=True).backbone.architecture == "resnet18"


# ---- Detectors and segmentors ---------------------------------------------------------------------------------------


def dense(kind: Any, name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        network = getattr(kind, name)(weights=None, weights_backbone=None)
    return numbered(network.state_dict())


FCN, RCNN = torchvision.models.segmentation, torchvision.models.detection
SMP = {"decoder.blocks.0.conv1.0.weight": torch.ones(2, 2, 3, 3), "segmentation_head.0.weight": torch.ones(1, 2, 3, 3)}
HEAD = {"decode_head.conv_seg.weight": torch.ones(2, 8, 1, 1)}


@pytest.mark.parametrize(
    ("make", "name", "entry", "title", "prefix"),
    [
        (lambda: dense(FCN, "fcn_resnet50"), "fcn_resnet50", "", "torchvision segmentation model", "backbone."),
        (lambda: dense(RCNN, "fasterrcnn_resnet50_fpn"), "x", "state_dict", "torchvision detector", "backbone.body."),
        (lambda: under("backbone.", RESNET50) | HEAD, "x", "model", "MMSegmentation segmentor", "backbone."),
        (lambda: under("encoder.", RESNET50) | SMP, "x", "", "model of segmentation_models_pytorch", "encoder."),
    ],
)
def test_a_dense_models_backbone_has_to_be_asked_for(
    make: Callable[[], Any], name: str, entry: str, title: str, prefix: str, tmp_path: Path
) -> None:
    """A segmentation model dilates: read as a plain ResNet-50 its features are others."""
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
        ({"state_dict": under("model.net.", RESNET) | {"loss.weight": torch.ones(3)}}, "state_dict › model.net."),
        ({"state_dict": under("encoder.", RESNET) | under("projector.0.", BARE), "hyper_parameters": {}}, "encoder."),
        ({"model_state_dict": RESNET | BARE}, "model_state_dict"),
        ({"module": under("net.", RESNET), "ds_version": "0.16"}, "module › net."),  # DeepSpeed
        ({"net": under("module.encoder.", RESNET), "epoch": 3}, "net › encoder."),
        (under("online_encoder.net.", RESNET) | {"online_predictor.net.0.weight": torch.ones(2, 2)}, "online_encoder"),
        ({"n_averaged": torch.tensor(3), **under("module.", RESNET)}, "the file's own level"),  # torch.optim.swa_utils
        ({"state_dict": RESNET, "critic": {"w": torch.ones(3)}}, "state_dict"),
        ({"ckpt": {"weights": renamed_back(DETECTRON2, RESNET50)}}, "ckpt › weights"),
        ({"state_dict": RESNET | {"ema_conv1_weight": RESNET["conv1.weight"]}}, "state_dict"),  # mmcv 1's EMAHook
        ({"state_dict": under("model.", RESNET) | under("backbone.", RESNET)}, "state_dict › "),  # under two names
    ],
)  # fmt: skip
def test_one_network_is_found_wherever_it_lies(value: dict[str, Any], place: str, tmp_path: Path) -> None:
    source = load_source(saved(tmp_path / "x.pth", value), allow_nan=True)
    assert source.backbone.method == "unknown"
    assert same(source.tensors["conv1.weight"], RESNET["conv1.weight"])
    assert any(place in note and "tensors) was found" in note for note in source.notes)


def test_of_several_networks_one_is_chosen_by_entry_and_prefix(tmp_path: Path) -> None:
    value = {"state_dict": under("online.", RESNET) | under("target.", OTHER), "best": under("target.", OTHER)}
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


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({name: tensor for name, tensor in under("net.", RESNET).items() if "4.1.bn2" not in name}, "tensors missing"),
        (under("net.", RESNET) | {"net.layer1.0.attn.weight": torch.ones(3)}, "no single place"),
        # A convolution beside the stem may be part of the network.
        (under("net.", RESNET) | {"net.conv0.weight": torch.ones(3, 3, 1, 1)}, "no single place"),
    ],
)
def test_half_a_network_is_none(state: dict[str, torch.Tensor], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_source(saved(tmp_path / "x.pth", {"state_dict": state}))


@pytest.mark.parametrize(
    ("value", "default", "branches"),
    [
        ({"model": RESNET | BARE, "model_ema": OTHER | BARE}, "backbone", ("backbone", "ema")),  # DeiT
        ({"state_dict": RESNET, "ema_state_dict": under("module.", OTHER)}, "backbone", ("backbone", "raw")),
    ],
)
def test_an_averaged_copy_is_a_branch(
    value: dict[str, Any], default: str, branches: tuple[str, ...], tmp_path: Path
) -> None:
    file = saved(tmp_path / "x.pth", value)
    first = load_source(file, allow_nan=True)
    assert (first.backbone.source_branch, first.branches) == (default, branches)
    (other,) = set(branches) - {default}
    second = load_source(file, branch=other, allow_nan=True)
    assert second.backbone.source_branch == other
    assert not same(first.tensors["conv1.weight"], second.tensors["conv1.weight"])


# ---- Numbers --------------------------------------------------------------------------------------------------------


FLOATS = {name: tensor for name, tensor in flat_tensors(seed=0).items() if tensor.is_floating_point()}


@pytest.mark.parametrize(
    ("changed", "dtype", "note"),
    [
        ({n: t.half() for n, t in FLOATS.items() if ".conv" in n}, "float16 and float32", "every value is exact"),
        ({name: tensor.bfloat16() for name, tensor in FLOATS.items()}, "bfloat16", "every value is exact"),
        ({name: tensor.double() for name, tensor in FLOATS.items()}, "float64", "float64; every value is exact"),
        (
            {name: tensor.double() + 0.1 * (name == "bn1.weight") for name, tensor in FLOATS.items()}, "float64",
            "float64: 1 tensors have values that float32 rounds",
        ),
    ],
)  # fmt: skip
def test_every_float_is_read_and_what_is_rounded_is_said(
    changed: dict[str, torch.Tensor], dtype: str, note: str, tmp_path: Path
) -> None:
    source = load_source(saved(tmp_path / "x.pth", flat_tensors(seed=0) | changed), allow_nan=True)
    assert source.dtype == dtype
    assert any(note in said for said in source.notes) or dtype == "bfloat16"
    assert all(same(source.tensors[name], tensor.float()) for name, tensor in changed.items())


# ---- Names of methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "method"),
    [
        ("a1_in1k", "supervised"), ("", "supervised"), ("dino", "dino"), ("fb_swsl_ig1b_ft_in1k", "semi-supervised"),
        ("somebodys_own", "unknown"),
    ],
)  # fmt: skip
def test_a_timm_folders_tag_names_the_method(tag: str, method: str, tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in RESNET.items()}, tmp_path / "model.safetensors")
    pretrained = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "tag": tag}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": pretrained}))
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
@pytest.mark.parametrize("name", FOREIGN)
def test_a_refusal_says_what_the_file_is(name: str, tmp_path: Path) -> None:
    kind, _, own = name.rpartition(":")
    with torch.device("meta"):
        network = getattr(torchvision.models, own)() if kind else timm.create_model(own)
    prefix = "module.model." if "resnet" in name else ""
    with pytest.raises(UserError) as caught:
        load_source(saved(tmp_path / "x.pth", under(prefix, numbered(network.state_dict()))), allow_nan=True)
    message = str(caught.value)
    assert FOREIGN[name] in message
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
        (["encoder.blocks.0.residual1.fn.rope.freqs", "encoder.blocks.0.residual1.norm.weight"], "rotary"),  # CAPI
        (["encoder.layers.0.blocks.0.attn.relative_position_bias_table"], "Swin"),
    ],
)
def test_a_file_is_named_by_signatures_too(names: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_source(saved(tmp_path / "x.pth", {"state_dict": dict.fromkeys(names, torch.ones(2))}))
