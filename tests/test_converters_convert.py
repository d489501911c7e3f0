"""Conversion as a whole: files, round trips, byte equality, the report; and without the frameworks, the manifest."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import random_tensors

from twist.contracts.errors import UsageError, UserError
from twist.contracts.weights import Backbone, read_backbone, write_backbone
from twist.converters import convert as convert_module
from twist.converters import proof, reference, stages
from twist.converters.convert import ProofError, convert, render
from twist.converters.output_folder import default_folder
from twist.converters.read import load_artefact, load_source
from twist.converters.sources import BY_NAME
from twist.converters.targets import detectron2, mmseg
from twist.converters.targets.registry import TARGETS

HEADER = Backbone(architecture="resnet18", method="twist", epochs=3, std=(0.228, 0.224, 0.225))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("weights") / "backbone.safetensors", random_tensors(), HEADER)


@pytest.fixture
def no_frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "installed", lambda _: False)


@pytest.mark.parametrize("target", TARGETS)
def test_round_trip_through_every_target(target: str, artefact: Path, tmp_path: Path) -> None:
    done = convert(artefact, target=target, output=tmp_path / "out", verify=False)
    tensors, header = load_artefact(done.weights)
    original, _ = read_backbone(artefact)
    assert header == HEADER
    assert list(tensors) == sorted(original, key=list(tensors).index)
    assert all(torch.equal(tensors[name], original[name]) for name in original)
    assert done.proof == "none"
    assert done.max_difference is None
    assert "not proven" in render(done)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_bytes_are_reproducible(target: str, artefact: Path, tmp_path: Path) -> None:
    options = {"pkl": True} if target == "detectron2" else {}
    for name in ("one", "another"):
        convert(artefact, target=target, output=tmp_path / name, verify=False, **options)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "another").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "another" / name).read_bytes(), name
    assert TARGETS[target].weights in files


def test_outputs_hold_no_code(artefact: Path, tmp_path: Path) -> None:
    done = convert(artefact, target="detectron2", output=tmp_path / "d2", verify=False, pkl=True)
    value = torch.load(done.weights, weights_only=True)
    assert value["matching_heuristics"] is True
    assert value["model"]["res2.0.conv1.norm.running_var"].shape == (64,)
    # The pickle holds plain arrays: our own reader, which knows nothing else, reads it back.
    assert load_source(done.output / "weights.pkl").backbone == HEADER  # its header came along
    overlay = convert(artefact, target="mmseg", output=tmp_path / "mm", verify=False).overlay
    assert overlay is not None
    ast.parse(overlay.read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("no_frameworks")
@pytest.mark.parametrize("target", ["detectron2", "mmseg"])
def test_without_frameworks_the_manifest_proves(target: str, artefact: Path, tmp_path: Path) -> None:
    done = convert(artefact, target=target, output=tmp_path / "out")
    assert done.proof == "manifest"
    assert done.max_difference == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "is not installed" in report["proof"]["by"]
    assert report["source"]["tensors"] == report["source"]["used"] == 120
    assert report["target"]["tensors"] == report["target"]["filled_from_source"] == 120
    assert report["source"]["dropped"] == []
    assert "no framework ran" in render(done)


@pytest.mark.slow
@pytest.mark.usefixtures("no_frameworks")
@pytest.mark.parametrize("change", ["drop", "rename", "add", "transpose", "scale", "exchange"])
def test_a_wrong_writer_is_caught_and_leaves_nothing(
    change: str, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = detectron2.write_torch

    def wrong(path: Path, tensors: dict, **options: object) -> None:
        real(path, mutate(tensors, change), **options)

    monkeypatch.setattr(detectron2, "write_torch", wrong)
    with pytest.raises(UserError):
        convert(artefact, target="detectron2", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def mutate(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    """The written tensors with one mistake of the kind that converters make."""
    tensors = dict(tensors)
    first = next(name for name in tensors if name.endswith("1.conv1.weight"))
    if change == "drop":
        del tensors[first]
    elif change == "rename":
        tensors[first + "s"] = tensors.pop(first)
    elif change == "add":
        tensors["extra.weight"] = torch.ones(3)
    elif change == "transpose":
        tensors[first] = tensors[first].transpose(0, 1).contiguous()
    elif change == "scale":
        tensors[first] = tensors[first] * 1.01
    else:
        norms = [name for name in tensors if name.endswith("running_mean")]
        a = norms[0]
        b = next(name for name in norms[1:] if tensors[name].shape == tensors[a].shape)
        tensors[a], tensors[b] = tensors[b], tensors[a]
    return tensors


def test_proof_that_fails_writes_nothing(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ProofError("The proof does not hold.")

    monkeypatch.setattr(convert_module, "prove", fails)
    with pytest.raises(ProofError) as caught:
        convert(artefact, target="torchvision", output=tmp_path / "out")
    assert caught.value.exit_status == 1
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_conversion_is_replaced_and_nothing_else(artefact: Path, tmp_path: Path) -> None:
    for _ in range(2):
        convert(artefact, target="torchvision", output=tmp_path / "out", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no earlier conversion"):
        convert(artefact, target="torchvision", output=tmp_path / "mine", verify=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_report_of_somebody_else_makes_no_conversion(artefact: Path, tmp_path: Path) -> None:
    for name, report in (("a", "{}"), ("b", "not json"), ("c", '{"source": {"sha256": "x"}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report)
        with pytest.raises(UserError, match="is no earlier conversion"):
            convert(artefact, target="torchvision", output=tmp_path / name, verify=False)
        assert (tmp_path / name / "report.json").read_text() == report
    done = convert(artefact, target="torchvision", output=tmp_path / "out", verify=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no earlier conversion \(it holds notes\.txt\)"):
        convert(artefact, target="torchvision", output=tmp_path / "out", verify=False)
    (tmp_path / "out" / "notes.txt").unlink()
    with pytest.raises(UserError, match=r"out would be replaced, and .*lies in it"):
        convert(done.weights, target="torchvision", output=tmp_path / "out", verify=False)
    assert done.weights.is_file()


def test_another_files_conversion_is_not_replaced(artefact: Path, tmp_path: Path) -> None:
    convert(artefact, target="torchvision", output=tmp_path / "out", verify=False)
    before = (tmp_path / "out" / "backbone.safetensors").read_bytes()
    other = write_backbone(tmp_path / "backbone.safetensors", random_tensors(seed=1), HEADER)
    with pytest.raises(UserError, match=r"conversion of another network \(sha256 .*backbone\.safetensors"):
        convert(other, target="torchvision", output=tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "backbone.safetensors").read_bytes() == before


def test_another_branchs_conversion_is_not_replaced(tmp_path: Path) -> None:
    state = {f"backbone.{name}": tensor for name, tensor in random_tensors().items()}
    other = {f"backbone.{name}": tensor for name, tensor in random_tensors(seed=1).items()}
    torch.save({"student": other, "teacher": state}, tmp_path / "dino.pth")
    for _ in range(2):
        done = convert(tmp_path / "dino.pth", target="torchvision", output=tmp_path / "out", verify=False)
    before = done.weights.read_bytes()
    with pytest.raises(UserError, match=r"another network \(branch teacher, .* has student\)"):
        convert(tmp_path / "dino.pth", target="torchvision", branch="student", output=tmp_path / "out", verify=False)
    assert done.weights.read_bytes() == before


def test_neither_a_link_nor_the_working_directory_is_replaced(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    with pytest.raises(UserError, match="is no folder of its own"):
        convert(artefact, target="torchvision", output=tmp_path / "link", verify=False)
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path("."), Path(".."), tmp_path / "here"):
        with pytest.raises(UserError, match="is the folder you are in, or one above it"):
            convert(artefact, target="torchvision", output=output, verify=False)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("moco_v2_800ep_pretrain.pth.tar", "moco_v2_800ep_pretrain-timm"),
        ("moco.200ep.pth", "moco.200ep-timm"),
        ("r50_twist/backbone.safetensors", "r50_twist-timm"),
        ("hub/model.safetensors", "hub-timm"),
        ("dino", "dino-timm"),
    ],
)
def test_default_folder_says_which_file(file: str, folder: str, tmp_path: Path) -> None:
    assert default_folder(tmp_path / file, "timm") == Path(folder)


def test_default_output_lies_in_the_working_directory(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = convert(artefact, target="timm", verify=False).output
    assert output == Path(f"{artefact.parent.name}-timm")
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json", "model.safetensors", "report.json", "tensors.txt",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_where_nothing_can_be_compared_nothing_is_proven(value: float, tmp_path: Path) -> None:
    tensors = {n: torch.full_like(t, value) if t.is_floating_point() else t for n, t in random_tensors().items()}
    file = write_backbone(tmp_path / "backbone.safetensors", tensors, HEADER)
    with pytest.raises(ProofError, match="There is nothing to prove: at res2 every feature"):
        convert(file, target="torchvision", output=tmp_path / "out", allow_nan=True)
    assert not (tmp_path / "out").exists()
    assert convert(file, target="torchvision", output=tmp_path / "out", allow_nan=True, verify=False).proof == "none"


@pytest.mark.parametrize(
    ("header", "target", "says"),
    [
        ({"architecture": "resnet200"}, "detectron2", "not 200"),
        ({"architecture": "resnet200"}, "mmseg", "not 200"),
        ({"architecture": "resnet18", "width": 2}, "detectron2", "only at width 1"),
        ({"architecture": "resnet50", "width": 2}, "timm", "every width multiplied"),
        ({"architecture": "resnet50", "stride_in": "1x1"}, "timm", "the stride in the 3×3"),
        ({"architecture": "resnet50", "channel_order": "BGR"}, "timm", "no setting for BGR"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(header: dict, target: str, says: str) -> None:
    reason = TARGETS[target].refuse(Backbone(method="x", **header))
    assert reason is not None
    assert says in reason


def test_wrong_usage(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='Did you mean "mmseg"'):
        convert(artefact, target="mmsegg", output=tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--pkl"):
        convert(artefact, target="mmseg", output=tmp_path / "x", pkl=True)


def test_listing_names_every_tensor(tmp_path: Path) -> None:
    tensors = random_tensors()
    state = {f"module.encoder_q.{name}": t for name, t in tensors.items()}
    state |= {"module.encoder_q.fc.weight": torch.ones(2, 2), "module.queue": torch.ones(2, 2)}
    torch.save({"state_dict": state, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}, tmp_path / "m.pth")
    done = convert(tmp_path / "m.pth", target="detectron2", output=tmp_path / "out", verify=False)
    text = (done.output / "tensors.txt").read_text()
    rows = [line.split("  ") for line in text.splitlines() if line]
    assert len({row[0] for row in rows}) >= len(state) + 1
    for name in tensors:
        assert f"encoder_q.{name} " in text
    assert "left aside: optimizer (1 tensors)" in text
    line = next(line for line in text.splitlines() if line.startswith("encoder_q.layer1.0.bn2.weight "))
    assert line.split() == ["encoder_q.layer1.0.bn2.weight", "res2.0.conv2.norm.weight", "(64,)"]
    assert text.count("(dropped)") == 2


def test_overlay_dictionaries_and_files_agree() -> None:
    yaml = pytest.importorskip("yaml")
    for header in (HEADER, Backbone(architecture="resnet50", width=2, method="simclr", mean=(0, 0, 0), std=(1, 1, 1))):
        assert yaml.safe_load(detectron2.overlay_text(header)) == detectron2.detectron2_overlay(header)
    overlay = detectron2.detectron2_overlay(header)
    assert overlay["MODEL"]["PIXEL_STD"] == [255, 255, 255]
    assert overlay["MODEL"]["RESNETS"] == {
        "DEPTH": 50, "STRIDE_IN_1X1": False, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 128, "STEM_OUT_CHANNELS": 128,
        "RES2_OUT_CHANNELS": 512,
    }  # fmt: skip
    assert mmseg.mmseg_overlay(header)["model"]["backbone"]["base_channels"] == 128


def test_measure_is_relative_and_strict_about_nan() -> None:
    a = torch.tensor([100.0, -200.0])
    (difference,) = stages.compare([{"res2": a}], [{"res2": a + 0.001}])
    assert difference.absolute == pytest.approx(0.001, rel=1e-2)
    assert difference.relative == pytest.approx(5e-6, rel=1e-2)
    nan = torch.tensor([float("nan"), 1.0])
    assert stages.compare([{"s": nan}], [{"s": nan.clone()}])[0].absolute == 0
    assert stages.compare([{"s": torch.ones(2)}], [{"s": nan}])[0].absolute > 1e30
    with pytest.raises(ProofError, match="res2 is missing"):
        stages.compare([{"res2": a}], [{}])


def test_the_measure_is_the_worst_of_all_images() -> None:
    ours = [{"s": torch.tensor([1.0])}, {"s": torch.tensor([-4.0])}, {"s": torch.tensor([2.0])}]
    theirs = [{"s": torch.tensor([1.5])}, {"s": torch.tensor([-4.0])}, {"s": torch.tensor([1.75])}]
    (difference,) = stages.compare(ours, theirs)
    assert (difference.absolute, difference.feature, difference.relative) == (0.5, 4.0, 0.125)
    assert stages.Difference("s", 0.5, 0.0).relative == 0.5
    with pytest.raises(ValueError, match="shorter"):
        stages.compare(ours, theirs[:2])
    with pytest.raises(ProofError, match=r"s is \(2,\), expected \(1,\)"):
        stages.compare(ours[:1], [{"s": torch.ones(2)}])


@pytest.mark.parametrize(("difference", "holds"), [(0.9e-5, True), (1.1e-5, False)])
def test_features_may_differ_by_a_hundred_thousandth(
    difference: float, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"res2": torch.ones(2).double(), "res3": torch.tensor([3.0, -4.0]).double()}
    theirs = {"res2": ours["res2"], "res3": ours["res3"] * (1 + difference)}
    monkeypatch.setattr(reference, "reference", lambda *_: ([ours], (), ("a note",)))
    monkeypatch.setattr(proof, "_runner", lambda *_: ("framework", lambda *_: [theirs], "X 1"))
    if holds:
        found = proof.prove("mmseg", tmp_path, HEADER, {})
        assert (found.kind, found.by, found.notes) == ("framework", "X 1", ("a note",))
        assert found.max_difference == pytest.approx(difference)
        assert found.max_absolute_difference == pytest.approx(4 * difference)
    else:
        with pytest.raises(ProofError, match=r"at res3 the features of X 1 differ .* by 1.1e-05"):
            proof.prove("mmseg", tmp_path, HEADER, {})


@pytest.mark.parametrize(
    ("target", "header", "kind", "by"),
    [
        ("torchvision", {"architecture": "resnet50"}, "framework", "torchvision "),
        ("torchvision", {"architecture": "resnet50", "width": 2}, "manifest", "torchvision has no such network"),
        ("torchvision", {"architecture": "resnet50", "stride_in": "1x1"}, "manifest", "no such network"),
        ("torchvision", {"architecture": "resnet50", "padding": "same"}, "manifest", "no such network"),
        ("torchvision", {"architecture": "resnet50", "channel_order": "BGR"}, "manifest", "no such network"),
        ("torchvision", {"architecture": "resnet200"}, "manifest", "no such network"),
        (
            "torchvision",
            {"architecture": "vit_small_patch16", "stem": "patch16", "image_size": 224},
            "framework",
            "timm ",
        ),
        ("timm", {"architecture": "resnet50"}, "framework", "timm "),
        ("detectron2", {"architecture": "resnet50"}, "manifest", "detectron2 is not installed"),
        ("mmseg", {"architecture": "resnet50"}, "manifest", "mmseg is not installed"),
    ],
)
def test_a_proof_says_whose_network_ran(
    target: str, header: dict, kind: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "installed", lambda _: False)
    found = proof._runner(target, Backbone(method="x", **header))
    assert found[0] == kind
    assert by in found[2]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({}, "2 tensors 1 are not filled and 0 have another shape, and 0 have no place in it \\(first: b"),
        ({"b": (3,), "c": (1,)}, "0 are not filled and 0 have another shape, and 1 have no place in it \\(first: c"),
        ({"b": (4,)}, "0 are not filled and 1 have another shape, and 0 have no place in it \\(first: b"),
    ],
)
def test_every_tensor_of_the_target_is_filled(found: dict[str, tuple[int, ...]], says: str) -> None:
    expected = {"a": (1, 2), "b": (3,)}
    stages.check_filled(expected, expected)
    with pytest.raises(ProofError, match=says):
        stages.check_filled(expected, {"a": (1, 2), **found})


def test_a_loaded_network_holds_the_written_bits() -> None:
    written = {"a": torch.tensor([float("nan"), 0.0]), "b": torch.ones(2, 2)}
    stages.check_loaded(written, {name: tensor.clone() for name, tensor in written.items()})
    for other in (torch.tensor([float("nan"), -0.0]), torch.tensor([1.0, 0.0])):
        with pytest.raises(ProofError, match=r"1 tensors of the loaded network are not the written ones \(first: a"):
            stages.check_loaded(written, {**written, "a": other})
    with pytest.raises(ProofError, match=r"1 have no place in it \(first: c"):
        stages.check_loaded(written, {**written, "c": torch.ones(1)})


def test_proof_images_differ_by_channel(tmp_path: Path) -> None:
    from twist.contracts.images import read_image

    for file in reference.write_images(tmp_path, proof.SIZES):
        red, green, blue = read_image(file).float()
        assert min((red - blue).abs().mean(), (red - green).abs().mean()) > 20


def test_the_page_is_current() -> None:
    from twist.converters import document

    assert document.PAGE.read_text() == document.page(), "run `python -m twist.converters.document`"
    assert all(f"| `{layout}` |" in document.page() for layout in BY_NAME)
