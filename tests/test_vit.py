"""ViTs beyond DeiT's: what a header says of them, their position table at other sizes, DINOv2's files, every target."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import drawn, saved, tiny_vit, under, write_drawn
from pydantic import ValidationError
from torch import Tensor

from twist.contracts.config import SHIPPED, identity_of, load_config
from twist.contracts.errors import UsageError
from twist.contracts.networks import network_of, stage_features
from twist.contracts.weights import Backbone, Resize, Vit, usual_vit
from twist.converters.convert import convert
from twist.converters.read import load_source
from twist.converters.targets import TARGETS, mmseg
from twist.pretrain.config import ModelConfig, PretrainConfig
from twist.transfer.protocols import find_protocol
from twist.transfer.request import Controls, Request
from twist.transfer.run import default_output, describe_run, find_weights
from twist.transfer.suite.config import SuiteConfig, WeightsEntry, jobs_of


def test_the_usual_networks_have_the_headers_of_before() -> None:
    old = Backbone(architecture="vit_small_patch16", stem="patch16", image_size=224, method="x")
    assert "vit" not in json.loads(old.model_dump_json())
    assert old.transformer == Vit(embed_dim=384, depth=12, heads=6, mlp_features=1536)
    assert (old.patch_size, old.prefix_tokens) == (16, 1)
    new = tiny_vit(registers=4, prefix_positions=False, heads=2)
    assert Backbone.model_validate_json(new.model_dump_json()) == new
    assert (new.display_name, new.prefix_tokens) == ("vit_tiny_patch16_heads2_reg4", 5)


@pytest.mark.parametrize(
    ("vit", "says"),
    [
        ({"heads": 5}, "cannot be shared by 5 heads"),
        ({"class_token": False}, "pooling is avg"),
        ({"embed_dim": 384, "heads": 6}, "not those of vit_tiny_patch16"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(vit: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        tiny_vit(**vit)


@pytest.mark.parametrize("rule", ["antialias", "plain", "offset"])
@pytest.mark.parametrize("prefix_positions", [True, False])
def test_a_network_resizes_its_table_by_its_rule(rule: Resize, prefix_positions: bool) -> None:
    """Registers included, and not square: the table resized by hand and put into a network of that grid."""
    backbone = tiny_vit(registers=4, prefix_positions=prefix_positions, resize=rule)
    state = drawn(backbone)
    images = torch.randn(1, 3, 20 * 16, 12 * 16)
    rows = 5 if prefix_positions else 0
    table = state["pos_embed"]
    prefix, square = table[:, :rows], table[:, rows:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    scale = {"scale_factor": (20.1 / 4, 12.1 / 4)} if rule == "offset" else {"size": (20, 12)}
    grid = F.interpolate(square, mode="bicubic", antialias=rule == "antialias", **scale)  # type: ignore[arg-type]
    from timm.models.vision_transformer import VisionTransformer

    fixed = VisionTransformer(
        img_size=(320, 192), embed_dim=192, depth=2, num_heads=3, mlp_ratio=1, num_classes=0, reg_tokens=4,
        no_embed_class=not prefix_positions,
    ).eval()  # fmt: skip
    fixed.load_state_dict({**state, "pos_embed": torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)})
    with torch.inference_mode():
        expected, found = fixed(images), network_of(backbone, state)(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_dinov2_with_registers(mlp: str, tmp_path: Path) -> None:
    """DINOv2's names, in chunks of blocks where gated: a position for the class token and none for the registers."""
    backbone = tiny_vit(patch=14, registers=4, prefix_positions=False, layer_scale=True, mlp=mlp)
    state, position = drawn(backbone), torch.randn(1, 1, 192)
    file = {"mask_token": torch.zeros(1, 192), "register_tokens": state.pop("reg_token")}
    file["cls_token"] = state.pop("cls_token") - position
    file["pos_embed"] = torch.cat([position, state.pop("pos_embed")[:, -16:]], dim=1)
    for name, tensor in state.items():
        gated = name.replace("blocks.", "blocks.0.").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        file[gated if mlp == "swiglu" else name] = tensor
    source = load_source(saved(tmp_path / "x.pth", file))
    assert (source.backbone.vit, source.backbone.method) == (backbone.vit, "dinov2")
    assert (source.backbone.source_layout, source.dropped) == ("dinov2-registers", ("mask_token",))
    images = torch.randn(1, 3, 280, 168)
    with torch.inference_mode():
        found, expected = (network_of(backbone, state)(images) for state in (source.tensors, drawn(backbone)))
    # The class token's position is added in another order.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_dinov2_without_registers_resizes_by_its_offset(tmp_path: Path) -> None:
    file = {**drawn(tiny_vit(patch=14, layer_scale=True)), "mask_token": torch.zeros(1, 192)}
    teacher = under("backbone.", file) | {"dino_head.w": torch.ones(2)}
    source = load_source(saved(tmp_path / "x.pth", {"teacher": teacher}))
    assert (source.backbone.source_layout, source.backbone.source_branch) == ("dinov2", "teacher")
    assert source.backbone.transformer.resize == "offset"
    assert torch.equal(source.tensors["pos_embed"], file["pos_embed"])


def test_the_published_recipes_resize_as_published() -> None:
    for name in ("deit_s_300ep", "vit_b_300ep"):
        config = load_config(SHIPPED / "pretrain" / f"{name}.toml", PretrainConfig)
        assert config.model.vit == usual_vit(config.model.backbone).model_copy(update={"resize": "offset"})
    assert "resize" not in identity_of(ModelConfig(backbone="vit_small_patch16")), "older recipes keep their hash"


ROPE: dict[str, Any] = {
    "rope_base": 100.0, "registers": 4, "layer_scale": True, "prefix_positions": False, "norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_dinov3s_own_files(mlp: str, tmp_path: Path) -> None:
    """dinov3 models/vision_transformer.py: the bias of the keys is masked, and constants lie in the file."""
    backbone = tiny_vit(**ROPE, mlp=mlp, side=14)
    state = drawn(backbone)
    file: dict[str, Tensor] = {"mask_token": torch.zeros(1, 192), "rope_embed.periods": torch.ones(16)}
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if mlp == "swiglu" and "mlp.fc1" in name:
            file |= dict(zip((name.replace("fc1", "w1"), name.replace("fc1", "w2")), tensor.chunk(2)))
        elif name.endswith("q_bias"):
            value = state[name.replace("q_bias", "v_bias")]
            file[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.full((192,), float("nan")), value])
            file[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(576)
        elif not name.endswith("v_bias"):
            file[name.replace("fc2", "w3") if mlp == "swiglu" else name] = tensor
    source = load_source(saved(tmp_path / "x.pth", file))
    assert (source.backbone.vit, source.backbone.method) == (backbone.vit, "dinov3")
    assert all(torch.equal(tensor, state[name]) for name, tensor in source.tensors.items())
    assert source.names["blocks.0.attn.v_bias"] == "blocks.0.attn.qkv.bias"


def test_timms_dinov3(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    sizes = {"embed_dim": 192, "depth": 2, "num_heads": 3, "img_size": 64}
    for name in ("vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"):
        network = timm.create_model(name, num_classes=0, global_pool="token", **sizes).eval()
        save_for_hf(network, str(tmp_path / name), safe_serialization=True)
        source = load_source(tmp_path / name)
        assert (source.backbone.method, source.backbone.transformer.heads) == ("dinov3", 3)
        for size in ((64, 64), (320, 192)):
            images = torch.randn(1, 3, *size)
            with torch.inference_mode():
                ours, theirs = network_of(source.backbone, source.tensors)(images), network(images)
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


NETWORKS = {
    "twelve heads": tiny_vit(heads=12),
    "registers": tiny_vit(patch=14, registers=4, prefix_positions=False, layer_scale=True),
    "swiglu, offset": tiny_vit(patch=14, mlp="swiglu", layer_scale=True, resize="offset"),
    "no class token": tiny_vit(patch=8, class_token=False, prefix_positions=True, pooling="avg"),
    "Hugging Face": tiny_vit(norm_eps=1e-12, resize="plain"),
    "CLIP": tiny_vit(pre_norm=True, norm_eps=1e-5, qkv_bias=False),
    "rotary": tiny_vit(**ROPE),
    "rotary, gated": tiny_vit(**{**ROPE, "mlp": "swiglu", "qkv_bias": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name, network in NETWORKS.items()
        for target, row in TARGETS.items()
        if target not in ("onnx", "huggingface") and not row.refuse(network)  # those: tests/test_model_hubs.py
    ],
)
def test_every_target_computes_the_features_at_two_sizes(name: str, target: str, tmp_path: Path) -> None:
    backbone = NETWORKS[name]
    done = convert(write_drawn(tmp_path, backbone), to=target, output=tmp_path / "out")
    vit = backbone.transformer
    same = vit == vit.model_copy(update=TARGETS[target].changes(backbone))
    assert len(done.proof.stages) == 2
    if target != "torchvision":  # whose networks are ours where timm's resize otherwise
        assert done.proof.kind == "framework"
        assert bool(done.proof.drift) != same
    if target == "mmseg":
        assert mmseg.is_mmsegs(backbone) == (name == "Hugging Face")
    assert load_source(done.weights).backbone == backbone


@pytest.mark.slow
def test_the_frameworks_registries_build_patch_features() -> None:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone as build_detectron2
    from mmseg.registry import MODELS

    from twist.integrations import detectron2, mmseg  # noqa: F401 (importing registers)

    backbone = NETWORKS["registers"]
    state = drawn(backbone)
    images = torch.randn(2, 3, 5 * 14, 3 * 14)
    described = {"architecture": backbone.architecture, "image_size": 56, "vit": backbone.transformer.model_dump()}
    first = MODELS.build({"type": "mmseg.TwistVisionTransformer", **described, "out_indices": (0, -1)}).eval()
    cfg = get_cfg()
    detectron2.add_vit_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_twist_vit_backbone"
    keys = cfg.MODEL.TWIST_VIT
    keys.ARCHITECTURE, keys.IMAGE_SIZE, keys.VIT = backbone.architecture, 56, backbone.transformer.model_dump_json()
    keys.OUT_BLOCKS, keys.FINAL_NORM = [0, 1], False
    second = build_detectron2(cfg).eval()
    for network in (first, second):
        network.network.load_state_dict(state)
    reference = network_of(backbone, state)
    with torch.no_grad():
        tokens = stage_features(reference, images)["block1"]
        maps, named = first(images), second(images)
    assert [tuple(map_.shape) for map_ in maps] == [(2, 192, 5, 3)] * 2
    patches = tokens[:, 5:].transpose(1, 2).unflatten(2, (5, 3))
    torch.testing.assert_close(named["block1"], patches)
    torch.testing.assert_close(maps[0], named["block0"])
    with torch.no_grad():
        normed = reference.norm(tokens)[:, 5:].transpose(1, 2).unflatten(2, (5, 3))  # type: ignore[operator]
    torch.testing.assert_close(maps[1], normed)
    assert (second.output_shape()["block1"].stride, second.size_divisibility) == (14, 14)
    with pytest.raises(ValueError, match="choose from 0 to 1"):
        MODELS.build({"type": "mmseg.TwistVisionTransformer", **described, "out_indices": (2,)})
    cfg.MODEL.BACKBONE.NAME = "build_twist_vit_pyramid_backbone"
    keys.ARCHITECTURE, keys.IMAGE_SIZE, keys.VIT = "vit_tiny_patch16", 64, tiny_vit().transformer.model_dump_json()
    keys.OUT_BLOCKS = [-1]
    pyramid = build_detectron2(cfg)
    shapes = {name: tuple(map_.shape[1:]) for name, map_ in pyramid(torch.randn(1, 3, 64, 32)).items()}
    sides = {f"p{level}": (256, 2 ** (6 - level), 2 ** (5 - level)) for level in (2, 3, 4, 5)}
    assert shapes == {**sides, "p6": (256, 1, 1)}


def test_a_transfer_run_and_a_suite_pass_the_heads_on(tmp_path: Path) -> None:
    """Another number of heads is another run: other key, other folder, other `run.json`."""
    file = str(saved(tmp_path / "x.pth", drawn(tiny_vit())))
    row = find_protocol("sample-knn")
    given = {heads: find_weights(file, row, Controls(), heads=heads, method="m", seed=0) for heads in (None, 2)}
    assert given[2]["reading"]["heads"] == 2
    assert "heads2" in default_output(row, given[2], 0).name
    requests = [Request(row, tmp_path, tmp_path, **fields) for fields in given.values()]
    assert [describe_run(request)["weights"].get("heads") for request in requests] == [None, 2]
    with pytest.raises(UsageError, match="--heads"):
        find_weights("random", row, Controls(), heads=2)
    entries = [WeightsEntry(name="w", file=file, heads=heads) for heads in (None, 2)]
    suites = [SuiteConfig(weights=(entry,), protocols=("sample-knn",), seeds=(0,)) for entry in entries]
    keys = [next(jobs_of(suite, "sample-knn", entry)).key for suite, entry in zip(suites, entries, strict=True)]
    assert keys[0] != keys[1]
