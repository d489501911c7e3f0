"""Every layout read back to what went in; the tables; the architecture that shapes give."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    absent,
    checkpoint_value,
    flat_tensors,
    renamed_back,
    same,
    saved,
    source_names,
    under,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from twist.contracts import rename
from twist.contracts.errors import UsageError, UserError
from twist.contracts.shapes import shapes_of
from twist.contracts.weights import RESNETS, write_backbone
from twist.converters.architecture import architecture_of, assemble, fill, split
from twist.converters.evidence import HeadsUnknownError
from twist.converters.find import locate
from twist.converters.inspect import inspect
from twist.converters.open import read_contents
from twist.converters.read import load_artefact, load_source
from twist.converters.sources import BY_NAME, LAYOUTS, Branch, Layout, matches
from twist.converters.tables import CAFFE2, DETECTRON2, TABLES, TORCHVISION, VIT_TABLES

RESNET18, RESNET50 = flat_tensors(), flat_tensors("resnet50")
SHAPES18, SHAPES50 = shapes_of("resnet18"), shapes_of("resnet50")
# Files of DINOv2 hold ViTs alone (tests/test_vit.py).
OF_RESNETS = [layout for layout in LAYOUTS if layout.tables[0] not in VIT_TABLES]
PLACES = [(layout, branch) for layout in OF_RESNETS for branch in layout.branches]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("architecture", RESNETS)
def test_shapes_tell_every_depth_and_width(architecture: str, width: int) -> None:
    tensors = shapes_of(architecture, width=width)
    found = architecture_of(tensors, "it")
    assert (found["architecture"], found["width"]) == (architecture, width)
    assert list(assemble(dict(tensors), TORCHVISION, "it").arrays) == list(tensors)


# Files of rotary and gated ViTs are read in tests/test_vit.py and tests/test_model_hubs.py.
PLAIN = {name: table for name, table in TABLES.items() if not re.search("rope|dinov3|swiglu", name)}


@pytest.mark.parametrize("table", PLAIN.values(), ids=PLAIN)
def test_tables_are_total_injective_and_invertible(table: rename.Table) -> None:
    vit = any(row[2] == "cls_token" for row in table.rows)
    lacking = table.absent if table.name in ("haiku", "caffe2") else ()
    for architecture in ("vit_small_patch16", "vit_large_patch14") if vit else RESNETS:
        tensors = shapes_of(architecture)
        tensors = split(tensors, gates=False) if table.name.startswith("huggingface-") and vit else tensors
        names = [name for name in tensors if not name.endswith(lacking)]
        steps = rename.outwards(table, names)
        assert len({step.name for step in steps.values()}) == len(names)
        back = rename.inwards(table, [step.name for step in steps.values()])
        assert [step.name for step in back.values()] == names


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_name_has_no_place(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RESNET50)))
    position = data.draw(st.integers(0, len(name)))
    letter = data.draw(st.sampled_from("abz0./_"))
    changed = name[:position] + letter + name[position:]
    # Another block index may be a legal name; the block it came from is then incomplete.
    with pytest.raises(UserError):
        assemble({changed if other == name else other: array for other, array in SHAPES50.items()}, TORCHVISION, "it")


@pytest.mark.parametrize(
    ("rows", "names", "says"),
    [
        ((("conv", "a", "conv1"), ("conv", "a", "conv1")), ["a.weight"], "no single place"),
        ((("conv", "a.{}", "b"), ("conv", "c", "d")), ["a.0.weight", "a.1.weight"], "the same name"),
        ((("conv", "a", "x"), ("conv", "b", "x")), ["a.weight", "b.weight"], "the same name"),
    ],
)
def test_a_table_that_is_not_one_to_one_is_refused(rows: tuple, names: list[str], says: str) -> None:
    with pytest.raises(rename.RenameError, match=says):
        rename.inwards(rename.Table("wrong", rows), names)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "branch"), PLACES, ids=lambda row: row.name)
def test_round_trip_is_the_identity(layout: Layout, branch: Branch, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "model.bin", layout, branch, RESNET18)
    source = load_source(file, layout=layout.name, branch=branch.name, allow_nan=True)
    assert source.backbone.source_layout == layout.name
    assert source.backbone.source_branch == branch.name
    assert (source.backbone.mean, source.backbone.std) == (layout.pixels.mean, layout.pixels.std)
    assert source.backbone.padding == layout.padding
    assert list(source.tensors) == list(RESNET18)
    kept = [name for name in RESNET18 if not (absent(layout) and name.endswith(layout.tables[0].absent))]
    assert all(same(source.tensors[name], RESNET18[name]) for name in kept)
    # And back: the names and values of the file, exactly.
    before = source_names(layout, branch, RESNET18)
    assert {source.names[name] for name in kept} == set(before)
    back = renamed_back(layout.tables[0], {name: source.tensors[name] for name in kept})
    assert all(same(back[name.removeprefix(branch.prefix)], value) for name, value in before.items())
    assert set(source.filled) == set(RESNET18) - set(kept)


@pytest.mark.parametrize("layout", [row for row in OF_RESNETS if row.detect], ids=lambda row: row.name)
def test_layouts_are_told_apart_by_content(layout: Layout, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "model.bin", layout, layout.branches[0], RESNET18)
    source = load_source(file, allow_nan=True)  # the check costs most of the time here, and has its own test
    assert (source.backbone.source_layout, source.backbone.method) == (layout.name, layout.method)
    # Epochs are taken where `epoch` is known to count them; a file without entries has none.
    assert source.backbone.epochs == (100 if layout.epoch_is_count and layout.branches[0].entry else None)
    assert torch.equal(source.tensors["conv1.weight"], RESNET18["conv1.weight"])
    for name in source.dropped:
        assert matches(name, (*layout.drop, *(f"{b.prefix}*" for b in layout.branches))), name


def test_deepmind_byol_without_jax(tmp_path: Path) -> None:
    layout = BY_NAME["byol-deepmind"]
    file = write_checkpoint(tmp_path / "pretrain.pkl", layout, layout.branches[0], RESNET18)
    source = load_source(file)
    assert source.backbone.padding == "same"
    assert set(source.dropped) == {"classifier/b"}
    assert {name.rpartition(".")[2] for name in source.filled} == {"num_batches_tracked"}
    target = locate(read_contents(file), branch="target")
    assert float(target.state["initial_conv/w"].flatten()[0]) >= 9000


@pytest.mark.parametrize("kept", [(), (".running_var",)])
def test_statistics_that_a_layout_does_not_keep_change_nothing(kept: tuple[str, ...]) -> None:
    lacking = [name for name in RESNET18 if "num_batches" in name or ("running" in name and not name.endswith(kept))]
    tensors = {name: array for name, array in SHAPES18.items() if name not in lacking}
    assert fill(tensors, SHAPES18, CAFFE2) == lacking
    for name in lacking:
        assert tensors[name].shape == SHAPES18[name].shape
        assert (tensors[name] == name.endswith(".running_var")).all(), name
    # Statistics that are half there are not made up.
    assert fill({name: a for name, a in SHAPES18.items() if name != "bn1.running_mean"}, SHAPES18, CAFFE2) == []


def test_haiku_axes_are_permuted() -> None:
    kernel = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    there = rename.apply({"x": rename.Step("y", "hwio")}, {"x": kernel})["y"]
    assert there.shape == (5, 4, 2, 3)
    assert there[4, 3, 1, 2] == kernel[1, 2, 3, 4]


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."])
def test_wrappers_are_taken_off(wrap: str, tmp_path: Path) -> None:
    assert list(load_artefact(saved(tmp_path / "x.pth", under(wrap, RESNET18)))[0]) == list(RESNET18)


@pytest.mark.parametrize(
    ("layout", "name", "choice"),
    [("moco", "PCL_v2.pth.tar", "pcl"), ("moco-v1", "pcl_v1.pth", "pcl"), ("deepcluster-v2", "selav2.pth", "sela-v2")],
)
def test_a_file_that_is_called_another_method_is_asked_for(layout: str, name: str, choice: str, tmp_path: Path) -> None:
    row = BY_NAME[layout]
    file = write_checkpoint(tmp_path / name, row, row.branches[0], RESNET18)
    with pytest.raises(UserError, match=f"looks like {layout}, which has another method: say --from {choice}"):
        load_artefact(file)
    assert load_artefact(file, layout=choice)[1].method == choice
    source = load_source(file.rename(tmp_path / "checkpoint.pth"))
    assert source.backbone.method == row.method
    assert any("SeLa v2" in note for note in source.notes) == (layout == "deepcluster-v2")


@pytest.mark.parametrize(
    ("architecture", "table", "layout"),
    [
        ("vit_small_patch16", "timm-vit", "dino"), ("vit_base_patch16", "timm-vit", "dino"),
        ("vit_small_patch16", "mmpretrain-vit", "mmselfsup"), ("vit_base_patch16", "mmseg-vit", "mmseg"),
    ],
)  # fmt: skip
def test_vits(architecture: str, table: str, layout: str, tmp_path: Path) -> None:
    tensors = flat_tensors(architecture, image_size=384)
    state = under("backbone.", renamed_back(TABLES[table], tensors))
    value: dict[str, Any] = {
        "dino": {"teacher": under("module.", state), "student": {"a": 1}},
        "mmselfsup": {"state_dict": state, "meta": {}},
        "mmseg": {"state_dict": {**state, "decode_head.w": torch.ones(1)}},
    }[layout]
    heads = None if layout == "dino" else 12  # DINO's file says that they are the usual ones
    # A segmentor's backbone has to be asked for.
    told = {"layout": "mmseg" if layout == "mmseg" else None, "heads": heads}
    found, header = load_artefact(saved(tmp_path / "x.pth", value), **told)
    assert (header.architecture, header.image_size, header.source_layout) == (architecture, 384, layout)
    assert header.transformer.heads == (heads or tensors["norm.bias"].numel() // 64)
    assert all(same(found[name], tensors[name]) for name in tensors)


PROBE = {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)}
IN_DETECTRON2 = {"model": under("backbone.bottom_up.", renamed_back(DETECTRON2, RESNET50))}


@pytest.mark.parametrize(
    ("value", "told", "says"),
    [
        ({"state_dict": under("module.encoder_q.", RESNET18)}, {"branch": "key"}, "no branch key: it holds query"),
        ({"state_dict": under("module.encoder_q.", RESNET18)}, {"layout": "mocco"}, 'Did you mean "moco"'),
        ({"state_dict": under("module.encoder_q.", RESNET18)}, {"layout": "dino"}, "does not have the layout dino"),
        # What content cannot tell is asked.
        ({"state_dict": RESNET18 | PROBE}, {}, "--from simclr-torch or --from byol-torch or --from torchvision-tra"),
        (RESNET18 | PROBE, {}, "is called simclr but looks like torchvision"),
        (IN_DETECTRON2, {}, "--from detectron2-model or --from detectron2-msra"),
    ],
)
def test_what_is_not_there_or_not_certain_has_to_be_said(value: Any, told: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises((UserError, UsageError), match=says):
        load_artefact(saved(tmp_path / ("simclr.pth" if "simclr but" in says else "x.pth"), value), **told)


def test_what_a_layout_says_of_its_pixels_is_in_the_header(tmp_path: Path) -> None:
    header = load_artefact(saved(tmp_path / "x.pth", {"state_dict": RESNET18 | PROBE}), layout="simclr-torch")[1]
    assert (header.mean, header.std, header.method) == ((0, 0, 0), (1, 1, 1), "simclr")
    header = load_artefact(saved(tmp_path / "d2.pth", IN_DETECTRON2), layout="detectron2-msra")[1]
    assert (header.channel_order, header.stride_in, header.input_range) == ("BGR", "1x1", 255)
    layout = BY_NAME["detectron2-caffe2"]
    file = write_checkpoint(tmp_path / "R.pkl", layout, layout.branches[1], RESNET18)  # under `blobs`
    header = load_source(file, allow_nan=True).backbone
    assert (header.source_layout, header.channel_order, header.std) == ("detectron2-caffe2", "BGR", (1, 1, 1))


def test_what_lies_outside_a_backbones_names_is_left_aside_and_what_lies_inside_is_not(tmp_path: Path) -> None:
    """Heads have any name: PixPro's instance branch, MAE's decoder, VICRegL's maps. Inside, every tensor counts."""
    for name, prefix in (("moco", "encoder_q."), ("barlow-twins", "backbone."), ("swav", "")):
        value = checkpoint_value(BY_NAME[name], BY_NAME[name].branches[0], RESNET18)
        state = value.get("state_dict") or value.get("model") or value
        state["module.surprise.weight"] = torch.ones(2, 2)
        if prefix:
            source = load_source(saved(tmp_path / "x.pth", value), allow_nan=True)
            assert "surprise.weight" in source.dropped
            state[f"module.{prefix}layer1.0.surprise.weight"] = torch.ones(2, 2)
        with pytest.raises(UserError, match=r"surprise\.weight"):
            load_source(saved(tmp_path / "x.pth", value), allow_nan=True)


def vit_small(**settings: object) -> dict[str, object]:
    """solo-learn's file of a ViT-S with these hyper-parameters."""
    probe = {"classifier.weight": torch.ones(2, 2), "classifier.bias": torch.ones(2)}
    state = under("backbone.", flat_tensors("vit_small_patch16", image_size=224))
    return {"state_dict": state | probe, "hyper_parameters": settings}


HEADS: dict[str, tuple[dict[str, object], int | None]] = {
    "the method": ({"method": "mocov3"}, 12),
    "keyword arguments": ({"backbone": {"name": "vit_small", "kwargs": {"num_heads": 12}}}, 12),
    "a config's text": ({"cfg": "backbone=dict(type='VisionTransformer', num_heads=12)"}, 12),
    "an architecture": ({"cfg": "backbone=dict(type='MoCoV3ViT', arch='mocov3-small')"}, 12),
    "args.json": ({"method": "mocov3"}, 12),
    "the usual": ({"backbone": {"num_heads": 6}}, 6),
    "timm's name": ({"model": "deit_small_patch16_224"}, 6),
    "a decoder's": ({"decoder_num_heads": 16}, None),
    "two numbers": ({"a": {"num_heads": 6}, "b": {"num_heads": 12}}, None),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_settings_say_how_many_heads_a_vit_has(case: str, tmp_path: Path) -> None:
    """Twelve heads have the names and shapes of six, and other features (8 % of them, measured on random weights)."""
    settings, heads = HEADS[case]
    if case == "args.json":
        (tmp_path / case).write_text(json.dumps(settings))
        settings = {}
    file = saved(tmp_path / "x.ckpt", vit_small(**settings))
    if heads is None:
        with pytest.raises(HeadsUnknownError, match=r"--heads 6 .* or --heads 12"):
            load_source(file)
        assert "--heads" in inspect(file).problems[0]
    else:
        header = load_source(file).backbone
        assert (header.transformer.heads, header.vit is None) == (heads, heads == 6)


def test_told_heads_are_taken_and_impossible_ones_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.ckpt", vit_small())
    source = load_source(file, heads=12)
    assert source.backbone.display_name == "vit_small_patch16_heads12"
    converted = write_backbone(tmp_path / "x.safetensors", source.tensors, source.backbone)
    assert load_source(converted, heads=12).backbone == source.backbone
    for path, heads, says in (
        (file, 5, "cannot be shared by 5 heads"),
        (converted, 6, "12 heads: leave --heads away"),
        (saved(tmp_path / "r.pth", RESNET18), 6, "no attention heads"),
    ):
        with pytest.raises(UserError, match=says):
            load_source(path, heads=heads)


@pytest.mark.parametrize(("source", "heads"), [("moco-v3", 12), ("mae", None), ("learned", None)])
def test_the_fixed_table_of_moco_v3_says_twelve_heads(source: str, heads: int | None, tmp_path: Path) -> None:
    """moco-v3 vits.py, written out for one dimension: sines and cosines down the image, then across; MAE's turned."""
    state = {name: tensor.clone() for name, tensor in flat_tensors("vit_small_patch16").items()}
    frequencies = [1 / 10000 ** (index / 96) for index in range(96)]
    places = [(row, column) if source == "moco-v3" else (column, row) for row in range(14) for column in range(14)]
    waves = [
        [wave(place * f) for place in pair for wave in (math.sin, math.cos) for f in frequencies] for pair in places
    ]
    if source != "learned":
        state["pos_embed"] = torch.tensor([[[0.0] * 384, *waves]])
    file = saved(tmp_path / "x.pth", {"model": state})
    if heads is None:
        with pytest.raises(HeadsUnknownError):
            load_source(file)
    else:
        vit = load_source(file).backbone.transformer
        assert (vit.heads, vit.positions) == (heads, "sincos")


def lightly(*parts: str, **more: torch.Tensor) -> dict[str, object]:
    """A module of lightly's: these backbones, its projection head, and other tensors (dots are written as `__`)."""
    state = {f"{part}.{name}": tensor for part in parts for name, tensor in RESNET18.items()}
    more = {"projection_head__layers__0__weight": torch.ones(2, 2), **more}
    return {"state_dict": state | {name.replace("__", "."): tensor for name, tensor in more.items()}}


@pytest.mark.parametrize(
    ("value", "method"),
    [
        (lightly("backbone", "backbone_momentum", criterion__memory_bank__bank=torch.ones(2, 2)), "moco-v2"),
        (lightly("backbone", "key_backbone"), "moco-v2"),
        (lightly("backbone", "backbone_momentum", projection_head__layers__2__weight=torch.ones(2, 2)), "moco-v2"),
        # TiCo: its second layer comes after a batch norm.
        (lightly("backbone", "backbone_momentum", projection_head__layers__3__weight=torch.ones(2, 2)), "unknown"),
        ({"backbone": RESNET18, "optimizer": {}}, "unknown"),
        ({"backbone": RESNET18, "model": {f"backbone.{n}": t for n, t in RESNET18.items()}, "args": None}, "twist"),
        ({"model": RESNET18 | {"fc.weight": torch.ones(2, 512)}, "optimizer": {}, "args": None}, "unknown"),
    ],
)
def test_a_method_is_named_only_where_the_file_is_its_own(value: dict, method: str, tmp_path: Path) -> None:
    assert load_source(saved(tmp_path / "x.pth", value), allow_nan=True).backbone.method == method


def test_mae_and_deit_lie_under_model(tmp_path: Path) -> None:
    vit = flat_tensors("vit_base_patch16", image_size=224)
    decoder = {"mask_token": torch.ones(1, 1, 512), "decoder_pos_embed": torch.ones(1, 197, 512)}
    mae = load_source(saved(tmp_path / "mae.pth", {"model": vit | decoder}), allow_nan=True)
    assert (mae.backbone.method, mae.backbone.transformer.heads, set(mae.dropped)) == ("mae", 12, {*decoder})
    file = saved(tmp_path / "deit.pth", {"model": vit | {"head.weight": torch.ones(2, 768)}})
    deit = load_source(file, heads=12, allow_nan=True)
    assert (deit.backbone.method, deit.backbone.vit, deit.dropped) == ("unknown", None, ("head.weight",))
    assert load_source(file, layout="mae", allow_nan=True).backbone.method == "mae"
