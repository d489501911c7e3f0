"""Conversion as a whole: files, round trips, byte equality, reports old and new, the proof, targets of one's own."""

import ast
import json
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import random_tensors, saved, tiny_vit, under, write_drawn, write_stored_source

from benchmarks import conversions
from twist.contracts.errors import UsageError, UserError
from twist.contracts.images import read_image
from twist.contracts.weights import Backbone, read_backbone, write_backbone
from twist.converters import proof, sources
from twist.converters.convert import conversion_text, convert, name_of
from twist.converters.proof import ProofError
from twist.converters.read import load_artefact, load_source
from twist.converters.targets import TARGETS, detectron2

STORED = Path(__file__).parent / "stored" / "conversion"
EXTENDING = Path(__file__).parent.parent / "docs" / "extending.md"
HEADER = Backbone(architecture="resnet18", method="twist", epochs=3, std=(0.228, 0.224, 0.225))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("weights") / "backbone.safetensors", random_tensors(), HEADER)


@pytest.fixture
def no_frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "installed", lambda _: False)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "onnx"])  # a graph is not read back
def test_round_trip_through_every_target(target: str, artefact: Path, tmp_path: Path) -> None:
    done = convert(artefact, to=target, output=tmp_path / "out", verify=False)
    tensors, header = load_artefact(done.weights)
    original, _ = read_backbone(artefact)
    assert header == HEADER
    assert set(tensors) == set(original)
    assert all(torch.equal(tensors[name], original[name]) for name in original)
    assert (done.proof.kind, done.proof.max_difference) == ("none", None)
    assert "not proven" in conversion_text(done)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_bytes_are_reproducible(target: str, artefact: Path, tmp_path: Path) -> None:
    if target == "onnx":  # whose export takes its time by the network
        artefact = write_drawn(tmp_path, tiny_vit())
    for name in ("one", "another"):
        convert(artefact, to=target, output=tmp_path / name, verify=False, pkl=target == "detectron2")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "another").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "another" / name).read_bytes(), name
    assert TARGETS[target].weights in files


def test_outputs_hold_no_code(artefact: Path, tmp_path: Path) -> None:
    done = convert(artefact, to="detectron2", output=tmp_path / "d2", verify=False, pkl=True)
    assert torch.load(done.weights, weights_only=True)["matching_heuristics"] is True
    # The pickle holds plain arrays: our own reader, which knows nothing else, reads it back.
    assert load_source(done.output / "weights.pkl").backbone == HEADER  # its header came along
    overlay = convert(artefact, to="mmseg", output=tmp_path / "mm", verify=False).overlay
    assert overlay is not None
    ast.parse(overlay.read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("no_frameworks")
@pytest.mark.parametrize("change", ["drop", "add", "transpose", "scale", "exchange"])
def test_a_wrong_writer_is_caught_and_leaves_nothing(
    change: str, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = detectron2.write_torch

    def wrong(path: Path, tensors: dict, **options: object) -> None:
        real(path, mutate(tensors, change), **options)

    monkeypatch.setattr(detectron2, "write_torch", wrong)
    with pytest.raises(ProofError) as caught:
        convert(artefact, to="detectron2", output=tmp_path / "out")
    assert caught.value.exit_status == 1
    assert list(tmp_path.iterdir()) == []


def mutate(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    """The written tensors with one mistake of the kind that converters make."""
    first = next(name for name in tensors if name.endswith("1.conv1.weight"))
    a, b = [name for name, t in tensors.items() if name.endswith("running_mean") and t.shape == (64,)][:2]
    rest = {name: tensor for name, tensor in tensors.items() if name != first}
    return {
        "drop": rest,
        "add": {**tensors, "extra.weight": torch.ones(3)},
        "transpose": {**tensors, first: tensors[first].transpose(0, 1).contiguous()},
        "scale": {**tensors, first: tensors[first] * 1.01},
        "exchange": {**tensors, a: tensors[b], b: tensors[a]},
    }[change]


def test_an_earlier_conversion_is_replaced_and_nothing_else(artefact: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = convert(artefact, to="torchvision", output=tmp_path / "out", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # Folders that are no conversions: files of the user's, reports of other programs.
    for name, text in (("thesis.tex", "years of work"), ("report.json", '{"source": {"sha256": "x"}}')):
        mine = tmp_path / name.partition(".")[0]
        mine.mkdir()
        (mine / name).write_text(text)
        with pytest.raises(UserError, match="exists and is no earlier conversion"):
            convert(artefact, to="torchvision", output=mine, verify=False)
        assert (mine / name).read_text() == text
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no earlier conversion \(it holds notes\.txt\)"):
        convert(artefact, to="torchvision", output=tmp_path / "out", verify=False)
    (tmp_path / "out" / "notes.txt").unlink()
    with pytest.raises(UserError, match=r"out would be replaced, and .*lies in it"):
        convert(done.weights, to="torchvision", output=tmp_path / "out", verify=False)
    assert done.weights.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["detectron2", "mmseg"])
def test_a_conversion_from_before_the_restructure_is_understood(target: str, artefact: Path, tmp_path: Path) -> None:
    """Stored are report, settings and list of a conversion at commit 9b5e91f, without its weights."""
    folder = tmp_path / "out"
    shutil.copytree(STORED / target, folder)
    with pytest.raises(UserError, match=r"another network \(sha256 2e27a152.*resnet18\.safetensors"):
        convert(artefact, to=target, output=folder, verify=False)
    assert not (folder / "weights.pth").exists()
    source = write_stored_source(tmp_path / "resnet18.safetensors")
    overlay = convert(source, to=target, output=folder, verify=False).overlay
    before, after = (json.loads((place / "report.json").read_text()) for place in (STORED / target, folder))
    assert not before["source"].pop("dropped")
    assert not after["source"].pop("dropped")
    assert all(after[part] == before[part] for part in ("target", "backbone"))
    assert set(after["notes"]) >= set(before["notes"])
    assert after["source"].items() >= before["source"].items()
    assert after.keys() >= before.keys()
    assert after["proof"].keys() == before["proof"].keys()
    assert (folder / "tensors.txt").read_text() == (STORED / target / "tensors.txt").read_text()
    assert overlay is not None
    now, then = overlay.read_text(), (STORED / target / overlay.name).read_text()
    if overlay.suffix == ".yaml":
        assert yaml.safe_load(now) == yaml.safe_load(then)
    else:  # the weights are found from any folder since, where a comment asked for their full path
        assert now.replace("{{ fileDirname }}/", "").partition("model =")[2] == then.partition("model =")[2]


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section of docs/extending.md."""
    text = EXTENDING.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_a_target_of_ones_own(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example of docs/extending.md, proven, and caught when it writes something else."""
    example: dict[str, Any] = {}
    exec(compile(blocks("A new target", "python")[0], str(EXTENDING), "exec"), example)
    monkeypatch.setitem(TARGETS, "numpy", example["TARGET"])
    for _ in range(2):  # the second replaces the first
        done = convert(artefact, to="numpy", output=tmp_path / "out")
    assert (done.proof.kind, done.proof.max_difference) == ("manifest", 0)
    assert "numpy runs no networks" in json.loads((tmp_path / "out" / "report.json").read_text())["proof"]["by"]
    tensors, _ = load_artefact(done.weights)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in read_backbone(artefact)[0].items())

    def wrong(path: Path, tensors: dict, backbone: Backbone) -> None:
        example["write"](path, mutate(tensors, "scale"), backbone)

    monkeypatch.setitem(TARGETS, "numpy", replace(example["TARGET"], write=wrong))
    with pytest.raises(ProofError, match="at res2 the features"):
        convert(artefact, to="numpy", output=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_source_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example of docs/extending.md: one table, and the file is known by its contents."""
    ((name, row),) = tomllib.loads(blocks("A new source layout", "toml")[0])["layout"].items()
    layout = sources.layout_of(name, row)
    monkeypatch.setattr(sources, "LAYOUTS", (layout, *sources.LAYOUTS))
    tensors = random_tensors()
    state = under("trunk.", tensors) | {"projection.0.weight": torch.ones(2, 2)}
    source = load_source(saved(tmp_path / "mynet.pth", {"net": state, "epoch": 100}))
    assert (source.backbone.source_layout, source.backbone.epochs) == ("mynet", 100)
    assert source.dropped == ("projection.0.weight",)
    assert all(torch.equal(source.tensors[key], tensor) for key, tensor in tensors.items())


def test_neither_a_link_nor_the_working_directory_is_replaced(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    with pytest.raises(UserError, match="is no folder of its own"):
        convert(artefact, to="torchvision", output=tmp_path / "link", verify=False)
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path("."), Path(".."), tmp_path / "here"):
        with pytest.raises(UserError, match="is the folder you are in, or one above it"):
            convert(artefact, to="torchvision", output=output, verify=False)
    assert (tmp_path / "link").is_symlink()


def test_the_default_folder_says_which_file(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, name in (
        ("moco_v2_800ep_pretrain.pth.tar", "moco_v2_800ep_pretrain"), ("moco.200ep.pth", "moco.200ep"),
        ("r50_twist/backbone.safetensors", "r50_twist"), ("hub/model.safetensors", "hub"), ("dino", "dino"),
    ):  # fmt: skip
        assert name_of(tmp_path / file) == name
    monkeypatch.chdir(tmp_path)
    output = convert(artefact, to="timm", verify=False).output
    assert output == Path(f"{artefact.parent.name}-timm")
    files = {"README.md", "config.json", "model.safetensors", "report.json", "tensors.txt"}
    assert {path.name for path in output.iterdir()} == files


def test_where_nothing_can_be_compared_nothing_is_proven(tmp_path: Path) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in random_tensors().items()}
    file = write_backbone(tmp_path / "backbone.safetensors", tensors, HEADER)
    with pytest.raises(ProofError, match="at res2 every feature of the source is 0 or NaN"):
        convert(file, to="torchvision", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def header(architecture: str = "resnet50", **more: Any) -> Backbone:
    return HEADER.model_copy(update={"architecture": architecture, **more})


@pytest.mark.parametrize(
    ("network", "target", "says"),
    [
        (header("resnet200"), "detectron2", "not 200"),
        (header("resnet200"), "mmseg", "not 200"),
        (header("resnet18", width=2), "detectron2", "only at width 1"),
        (header(width=2), "timm", "every width multiplied"),
        (header(stride_in="1x1"), "timm", "the stride in the 3×3"),
        (header(channel_order="BGR"), "timm", "no setting for BGR"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(network: Backbone, target: str, says: str) -> None:
    assert says in (TARGETS[target].refuse(network) or "")


@pytest.mark.parametrize(("more", "says"), [({"to": "mmsegg"}, 'Did you mean "mmseg"'), ({"pkl": True}, "--pkl")])
def test_wrong_usage(more: dict[str, Any], says: str, artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        convert(artefact, **{"to": "mmseg", "output": tmp_path / "x", **more})


def test_listing_names_every_tensor(tmp_path: Path) -> None:
    state = under("module.encoder_q.", random_tensors())
    state |= {"module.encoder_q.fc.weight": torch.ones(2, 2), "module.queue": torch.ones(2, 2)}
    value = {"state_dict": state, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    done = convert(saved(tmp_path / "m.pth", value), to="detectron2", output=tmp_path / "out", verify=False)
    text = (done.output / "tensors.txt").read_text()
    assert all(f"{name.removeprefix('module.')} " in text for name in state)
    assert "left aside: optimizer (1 tensors)" in text
    line = next(line for line in text.splitlines() if line.startswith("encoder_q.layer1.0.bn2.weight "))
    assert line.split() == ["encoder_q.layer1.0.bn2.weight", "res2.0.conv2.norm.weight", "(64,)"]
    assert text.count("(dropped)") == 2


def test_the_measure_is_relative_the_worst_of_all_images_and_strict_about_nan() -> None:
    ours = [{"s": torch.tensor([value])} for value in (1.0, -4.0, 2.0)]
    theirs = [{"s": torch.tensor([value])} for value in (1.5, -4.0, 1.75)]
    (difference,) = proof.compare(ours, theirs)
    assert (difference.absolute, difference.feature, difference.relative) == (0.5, 4.0, 0.125)
    assert proof.Difference("s", 0.5, 0.0).relative == 0.5
    nan = torch.tensor([float("nan"), 1.0])
    assert proof.compare([{"s": nan}], [{"s": nan.clone()}])[0].absolute == 0
    assert proof.compare([{"s": torch.ones(2)}], [{"s": nan}])[0].absolute > 1e30
    for other, says in (({"s": torch.ones(2)}, r"s is \(2,\), expected \(1,\)"), ({}, "s is missing")):
        with pytest.raises(ProofError, match=says):
            proof.compare(ours[:1], [other])


@pytest.mark.parametrize(
    ("target", "network", "kind", "by"),
    [
        ("torchvision", header(), "framework", "torchvision "),
        ("torchvision", header(width=2), "manifest", "torchvision has no such network"),
        ("torchvision", header(padding="same"), "manifest", "no such network"),
        ("torchvision", tiny_vit(), "framework", "timm "),
        ("timm", header(), "framework", "timm "),
        ("detectron2", header(), "manifest", "detectron2 is not installed"),
    ],
)
def test_a_proof_says_whose_network_ran(
    target: str, network: Backbone, kind: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "installed", lambda package: package not in ("detectron2", "mmseg"))
    found = proof.runner(TARGETS[target], network)
    assert found[0] == kind
    assert by in found[2]


def test_a_loaded_network_holds_the_written_bits() -> None:
    written = {"a": torch.tensor([float("nan"), 0.0]), "b": torch.ones(2, 2)}
    proof.check_loaded(written, {name: tensor.clone() for name, tensor in written.items()})
    for other in (torch.tensor([float("nan"), -0.0]), torch.tensor([1.0, 0.0])):
        with pytest.raises(ProofError, match=r"1 with other values \(first: a"):
            proof.check_loaded(written, {**written, "a": other})
    with pytest.raises(ProofError, match=r"1 extra \(first: c"):
        proof.check_loaded(written, {**written, "c": torch.ones(1)})


def test_proof_images_differ_by_channel(tmp_path: Path) -> None:
    for file in proof.write_images(tmp_path, proof.SIZES):
        red, green, blue = read_image(file).float()
        assert min((red - blue).abs().mean(), (red - green).abs().mean()) > 20


def test_the_page_is_current() -> None:
    assert conversions.PAGE.read_text() == conversions.page(), "run `python -m benchmarks.conversions`"
