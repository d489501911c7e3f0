"""The ground floor: configs, atomic writes, the artefact, networks, images, the progress bar."""

import contextlib
import os
import pty
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from twist.contracts import files
from twist.contracts.config import Config, load_config, parse_override
from twist.contracts.errors import UsageError, UserError
from twist.contracts.images import UnreadableImage, image_names, read_image
from twist.contracts.networks import Conv3x3, SameConv2d, build_backbone, network_of, normalise, stage_features
from twist.contracts.shapes import shapes_of
from twist.contracts.weights import (
    ARCHITECTURES,
    RESNETS,
    Backbone,
    read_backbone,
    read_header,
    usual_vit,
    write_backbone,
)


class Inner(Config):
    learning_rate: float = 0.1
    scales: tuple[float, float] = (0.4, 1.0)


class Outer(Config):
    name: str
    inner: Inner = Inner()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Configs


def test_overrides_are_toml_and_reach_into_sections(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", 'name = "a"\n[inner]\nlearning_rate = 1e-3\n')
    config = load_config(path, Outer, ["inner.scales=[0.1, 0.5]", "name=plain words"])
    assert config == Outer(name="plain words", inner=Inner(learning_rate=1e-3, scales=(0.1, 0.5)))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ('name = "a"\n[inner]\nlearnin_rate = 1\n', [], 'inner.learnin_rate. Did you mean "learning_rate"?'),
        ('name = "a"\n', ["learning_rate=1"], 'unknown key learning_rate. Did you mean "inner.learning_rate"?'),
        ("[inner]\n", [], "name is missing"),
        ('name = "a"\n[inner]\nlearning_rate = "fast"\n', [], "inner.learning_rate = 'fast' does not fit"),
        ("name = ", [], "not valid TOML"),
        ('name = "a"\n', ["inner.learning_rate=inf"], "inner.learning_rate = inf does not fit"),
        ('name = "a"\n', ["inner.learning_rate"], "not an override"),
        ('name = "a"\n', ["name.x=1"], "name is a value, not a section"),
    ],
)
def test_config_mistakes_are_one_sentence(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config(write(tmp_path / "c.toml", text), Outer, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "says"), [("absent.toml", "cannot be read"), ("c.yaml", "TOML"), ("", "is a folder")])
def test_missing_config_and_wrong_ending(name: str, says: str, tmp_path: Path) -> None:
    write(tmp_path / "c.yaml", "")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match=says):
        load_config(tmp_path / (name or "folder.toml"), Outer)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**53), 2**53))
def test_numbers_survive_an_override(real: float, whole: int) -> None:
    assert parse_override(f"a.b={real!r}") == (["a", "b"], real)
    assert parse_override(f"a={whole}") == (["a"], whole)


# Atomic writes


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = write(tmp_path / "x.json", "old")
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(target, {"a": float("nan")})
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_is_beside_its_target_on_the_disk_before_it_counts_and_as_readable_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    before = os.umask(0o027)
    try:
        with files.atomic_path(tmp_path / "new" / "x.json") as temporary:
            temporary.write_text("whole")
            assert (temporary.parent, temporary.suffix, synced) == (tmp_path / "new", ".json", [])
        assert (tmp_path / "new" / "x.json").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert synced == [str(temporary), str(tmp_path / "new")]
    files.write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": "é",\n  "b": 1\n}\n', "equal values are equal bytes"


# The artefact


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("resnet18")


HEADER = Backbone(architecture="resnet18", method="twist", epochs=3, seed=1)


def test_artefact_round_trip_is_exact_and_reproducible(tmp_path: Path, resnet18: nn.Module) -> None:
    tensors = resnet18.state_dict()
    first = write_backbone(tmp_path / "a.safetensors", tensors, HEADER)
    second = write_backbone(tmp_path / "b.safetensors", dict(reversed(tensors.items())), HEADER)
    assert first.read_bytes() == second.read_bytes()
    reread, header = read_backbone(first)
    assert header == read_header(first) == HEADER
    assert all(torch.equal(reread[name], tensors[name]) for name in tensors)
    written = HEADER.model_dump(mode="json")
    del written["images_sha256"]
    assert Backbone.model_validate(written) == HEADER, "headers of earlier versions stay readable"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plain", "no TWIST header"), ("page", "not a safetensors file"), ("absent", "no weights file"),
        ("x", "the header is not valid"),
    ],
)  # fmt: skip
def test_what_is_no_artefact_is_refused_in_a_sentence(name: str, says: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write(tmp_path / "page.safetensors", "<html>")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"twist": '{"format_version": 1}'})
    with pytest.raises(UserError, match=says):
        read_header(tmp_path / f"{name}.safetensors")


def test_a_header_belongs_to_its_weights_and_to_itself(resnet18: nn.Module) -> None:
    with pytest.raises(UserError, match="These weights are not resnet50"):
        network_of(Backbone(architecture="resnet50", method="x"), resnet18.state_dict())
    with pytest.raises(ValueError, match="does not belong"):
        Backbone(architecture="vit_small_patch16", method="x", image_size=224)
    with pytest.raises(ValueError, match="a ViT has width 1 and states the image size"):
        Backbone(architecture="vit_small_patch16", stem="patch16", method="x")


@pytest.mark.parametrize(
    "damage",
    [lambda tensors: {**tensors, "a": tensors["a"].view(torch.int32)}, lambda tensors: {"a": tensors["a"]}],
    ids=["a number format", "a tensor less"],
)
def test_an_artefact_that_does_not_read_back_is_not_written(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    save_file = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, *a, **k: save_file(damage(tensors), *a, **k))
    with pytest.raises(OSError, match="does not read back equal"):
        write_backbone(tmp_path / "a.safetensors", {"a": torch.ones(2), "b": torch.ones(1)}, HEADER)
    assert list(tmp_path.iterdir()) == []


# Networks


# timm has no name for the others, which differ from these in the patches alone.
TIMM_LACKS = re.compile(r"vit_.*_patch(8|14)|vit_(tiny|huge|giant)_patch32|vit_(huge|giant)_patch16")


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if not TIMM_LACKS.fullmatch(name)])
def test_networks_are_the_libraries_own(architecture: str) -> None:
    """Names and shapes equal torchvision's and timm's (a manifest nobody else has to keep)."""
    import timm
    import torchvision

    with torch.device("meta"):
        ours = {k: v.shape for k, v in build_backbone(architecture).state_dict().items()}
        if architecture.startswith("vit_"):
            theirs = timm.create_model(f"{architecture}_224", num_classes=0).state_dict()
        elif architecture == "resnet200":
            assert len(ours) == 6 * (1 + 3 * (3 + 24 + 36 + 3) + 4)
            return
        else:
            theirs = torchvision.models.get_model(architecture).state_dict()
    assert ours == {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}


def test_width_two_doubles_every_width() -> None:
    with torch.device("meta"):
        wide = build_backbone("resnet50", width=2).state_dict()
    assert (wide["conv1.weight"].shape, wide["layer4.2.conv3.weight"].shape) == ((128, 3, 7, 7), (4096, 1024, 1, 1))
    # 94M parameters: the size that the TWIST README states for R50w2.
    assert round(sum(v.numel() for k, v in wide.items() if "running" not in k) / 1e6) == 94


def test_same_padding_is_tensorflows() -> None:
    """Known answer: 4 pixels, kernel 3, stride 2 pads (0, 1), so the last window sees one zero on the right."""
    conv = SameConv2d(1, 1, 3, 2, bias=False)
    nn.init.ones_(conv.weight)
    out = conv(torch.ones(1, 1, 4, 4))
    assert out.tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


def test_variants_compute_something_else(resnet18: nn.Module) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensors = resnet18.state_dict()
    plain = network_of(HEADER, tensors)
    same = network_of(HEADER.model_copy(update={"padding": "same"}), tensors)
    with torch.inference_mode():
        x = normalise(images, HEADER)
        a, b = stage_features(plain, x), stage_features(same, x)
        assert list(a) == ["res2", "res3", "res4", "res5"]
        assert torch.allclose(plain(x), a["res5"].mean((2, 3)), atol=1e-6)
        assert all(a[k].shape == b[k].shape and not torch.allclose(a[k], b[k], atol=1e-2) for k in a)
        msra = HEADER.model_copy(
            update={"channel_order": "BGR", "mean": (0, 0, 0), "std": (1, 1, 1), "input_range": 255}
        )
        assert torch.equal(normalise(images, msra), images.flip(1).float())


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


# Images


def test_images_are_found_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    """Notes of other programs are no images, and a link leads round no circle."""
    root = tmp_path / "train"
    for name in ("a/1.jpg", "a/._1.jpg", "a/.ipynb_checkpoints/1-checkpoint.jpg", ".cache/2.jpg", "a/1.jpg.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / name, "no image")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (5, 4), (255, 0, 0)).save(tmp_path / "elsewhere" / "3.PNG")
    (root / "a/linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/round").symlink_to(root)
    (root / "itself").symlink_to(root / "itself")
    assert image_names(root) == ["a/1.jpg", "a/linked/3.PNG"]
    assert read_image(root / "a/linked/3.PNG").shape == (3, 4, 5)
    with pytest.raises(UnreadableImage, match=r"1\.jpg"):
        read_image(root / "a/1.jpg")


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refused(folder: Any) -> Any:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)  # root may look into any
    with pytest.raises(UserError, match=r"look into the folder .*closed: Permission denied"):
        image_names(tmp_path)


BAR = """
import fcntl, struct, termios, time
fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 40, {width}, 0, 0))
from twist.contracts.progress import Progress
values = dict(loss=-3.12345, lr=0.12, row_entropy=3.4567, mean_entropy_share=0.98, agreement=0.4, classes=401, norm=1.2)
with Progress("pretrain r50_multicrop_850ep", total=123456, unit="step") as progress:
    for _ in range(4):
        time.sleep(0.15)
        progress.advance(100, **values)
"""


@pytest.mark.parametrize("width", [60, 120])
def test_the_bar_keeps_count_rate_and_time_left_on_a_terminal_of_any_width(width: int) -> None:
    child, terminal = pty.fork()
    if child == 0:
        environment = {"PATH": os.environ["PATH"], "TERM": "xterm-256color"}  # without COLUMNS, which readline sets
        os.execve(sys.executable, [sys.executable, "-c", BAR.format(width=width)], environment)
    written = b""
    with contextlib.suppress(OSError):  # Linux says with an input/output error that the other side is closed
        while part := os.read(terminal, 65536):
            written += part
    assert os.waitpid(child, 0)[1] == 0, written.decode()
    lines = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", written).decode().replace("\r", "\n").split("\n")
    bars = [line for line in lines if "/123456" in line]
    assert re.search(r"400/123456 [\d.,]+ steps/s 0:00:0\d \d:\d\d:\d\d left", bars[-1])
    shown = [line for line in lines if line.startswith("  loss -3.123")][-1]
    assert len(shown) <= width
    assert ("norm 1.2" in shown) == (width >= 120)
