"""Every ImageNet-style protocol, whole: its own recipe, two real steps at reduced size, its metrics and its notes."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imagenet_tree import ask, write_tree
from PIL import Image
from torch import Tensor

from twist.catalog.class_folders import LabelledImages, open_tree
from twist.contracts.errors import UsageError, UserError
from twist.contracts.files import sha256_json
from twist.contracts.metrics import check_metrics
from twist.contracts.networks import build_backbone
from twist.contracts.weights import Backbone
from twist.measure.features import FeatureFile
from twist.transfer.engines.imagenet import engine
from twist.transfer.engines.imagenet.engine import (
    Setup,
    batch_warnings,
    changes,
    is_imagenet,
    recorded_recipe,
    resolve,
    run,
)
from twist.transfer.engines.imagenet.recipes import ENGINE, FinetuneRecipe, LinearRecipe, load_recipe
from twist.transfer.pictures import prediction_sheet
from twist.transfer.protocols import PROTOCOLS
from twist.transfer.request import Controls, Result

RESNET = Backbone(architecture="resnet18", method="random")
SMALL = ("size=32", "resize=36", "machine.workers=0")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tree(tmp_path_factory.mktemp("tree"))
    (root / "1percent.txt").write_text("".join(f"train_{k}_001.png\n" for k in range(3)))
    (root / "10percent.txt").write_text("".join(f"train_{k}_{i:03d}.png\n" for k in range(3) for i in range(2)))
    return root


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(build_backbone("resnet18").state_dict())


def test_each_imagenet_protocol_has_a_recipe_and_each_recipe_a_protocol() -> None:
    rows = {row.config for row in PROTOCOLS.values() if row.engine == "imagenet"}
    assert rows == {path.stem for path in ENGINE.folder.glob("*.toml") if "vit_" not in path.stem}


@pytest.mark.parametrize("path", sorted(ENGINE.folder.glob("*.toml")), ids=lambda path: path.stem)
def test_each_recipe_loads_and_each_number_names_its_source(path: Path) -> None:
    name, _, architecture = path.stem.partition("-vit_")
    recipe = load_recipe(name, architecture=f"vit_{architecture}" if architecture else "resnet50")
    assert "machine" not in recipe.recorded()
    text = path.read_text()
    assert text.startswith("# ")
    assert "Expected" in text
    for line in text.partition("[machine]")[0].splitlines():
        if "=" in line and not line.startswith(("#", "kind", "by ", "labels =")):
            assert "#" in line, f"{path.name}: {line}"


def test_published_numbers_of_the_recipes() -> None:
    """The README's command lines (TWIST repository, commit 796d36e), read independently of the files."""
    linear = load_recipe("linear", architecture="resnet50")
    assert isinstance(linear, LinearRecipe)
    assert (linear.epochs, linear.batch_size, linear.lr_classifier, linear.weight_decay) == (100, 1024, 0.2, 0.0)
    vits = {"small": 0.02, "base": 0.0015}
    for name, base_rate in vits.items():
        vit = load_recipe("linear", architecture=f"vit_{name}_patch16")
        assert isinstance(vit, LinearRecipe)
        assert vit.lr_classifier == pytest.approx(base_rate * vit.batch_size / 256)
        assert (vit.last_blocks, vit.batch_size, vit.interpolation) == (4, 8 * 128, "bicubic")
    for name, rate, epochs in (("semi-1pct", 0.04, 20), ("semi-10pct", 0.02, 20), ("finetune-100pct", 0.01, 30)):
        recipe = load_recipe(name, architecture="resnet50")
        assert isinstance(recipe, FinetuneRecipe)
        assert (recipe.lr_backbone, recipe.lr_classifier, recipe.epochs) == (rate, 0.2, epochs)
        assert (recipe.batch_size, recipe.weight_decay, recipe.momentum) == (256, 0.0, 0.9)


def test_a_batch_larger_than_the_training_set_is_said_with_overrides_that_fit(tree: Path) -> None:
    def resolved(name: str, *overrides: str, gpus: int = 0) -> Setup:
        return resolve(*ask(name, RESNET, tree, *SMALL, *overrides, gpus=gpus))

    linear = resolved("linear")
    assert "batch_size 1024 is more than the 18 labelled images" in linear.notes[0]
    assert "batch_size=18 lr_classifier=0.00352 would fit" in linear.notes[0]
    assert linear.notes[0] in linear.plan
    assert "images a step 18 (18 a process)" in linear.plan
    fit = ("batch_size=16", "lr_classifier=0.0125", "lr_backbone=0.000625")
    assert f"{' '.join(fit)} would" in resolved("finetune-100pct", gpus=4).plan
    fitting = resolved("linear", "batch_size=18", "lr_classifier=0.00352")
    assert "warning" not in fitting.plan


def test_unknown_key_and_unknown_recipe_get_the_near_match() -> None:
    meant_by = {"arch=resnet50": '"architecture"', "lr=0.3": '"lr_classifier"', "workers=0": '"machine.workers"'}
    for override, meant in meant_by.items():
        with pytest.raises(UsageError, match=rf"unknown key \w+\. Did you mean {meant}\?"):
            load_recipe("linear", architecture="resnet50", overrides=[override])
    for name, override, message in (
        ("sample-knn", "resize=24", "resize = 24 is smaller than size = 32"),
        ("sample-cluster", "by=head", r'by = "head" and head = FILE'),
        ("sample-cluster", "algorithm=minibatch", "restarts belong to"),
        ("semi-1pct", "augment=false", "augment"),
    ):
        with pytest.raises(UsageError, match=message):
            load_recipe(name, architecture="resnet18", overrides=[override])


def measure(
    name: str,
    tree: Path,
    weights: dict[str, Tensor],
    output: Path,
    *overrides: str,
    header: Backbone = RESNET,
    **how: Any,
) -> Result:
    asked = ask(name, header, tree, *SMALL, *overrides, tensors=weights, output=output, **how)
    result = run(*asked, resolve(*asked))
    check_metrics(result.metrics, where=name)
    assert set(result.metrics) == set(PROTOCOLS[name].metrics)
    assert all(0 <= value <= 100 for value in result.metrics.values())
    sha256_json(result.recipe)
    assert str(tree) not in json.dumps(result.recipe)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "sample-cluster"])
def test_knn_and_clusters(name: str, tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    keep = "sample" not in name
    result = measure(name, tree, weights, tmp_path, f"machine.keep_features={str(keep).lower()}")
    if "knn" in name:
        assert result.metrics["knn_top5_percent"] == 100.0, "three classes, 18 neighbours of each"
        assert any("Top-5 of 3 classes is 100" in note for note in result.notes)
    else:
        assert result.notes[0].startswith("k-means with 3 clusters, found on the train images")
    assert any("bit-equal before and after" in note for note in result.notes)
    assert Image.open(result.media[0]).size[0] > 200
    assert result.media[0].stat().st_size < 200_000
    assert len(list(tmp_path.glob("features/*.f32"))) == 2 * keep


def test_runs_with_a_shared_folder_compute_features_once(
    tree: Path, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    fill = FeatureFile.fill
    monkeypatch.setattr(FeatureFile, "fill", lambda self, *how: (computed.append(self), fill(self, *how)))
    shared = {"controls": Controls(shared=str(tmp_path / "shared"))}
    first, second = (measure("sample-knn", tree, weights, tmp_path / f"{seed}", seed=seed, **shared) for seed in (0, 1))
    assert len(computed) == 2  # train and val, by the first run alone
    assert first.metrics == second.metrics
    measure("sample-linear", tree, weights, tmp_path / "2", "epochs=1", **shared)
    assert len(computed) == 4, "bilinear where k-NN is bicubic"


@pytest.mark.slow
def test_cluster_by_the_head_of_a_checkpoint(tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = torch.nn.Module()
    head.hidden = torch.nn.Sequential(
        *(torch.nn.Linear(512, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU()),
        *(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU()),
    )
    head.output, head.norm = torch.nn.Linear(16, 11), torch.nn.BatchNorm1d(11, affine=False)
    state = {f"backbone.{k}": v for k, v in weights.items()} | {f"head.{k}": v for k, v in head.state_dict().items()}
    torch.save({"model": state}, tmp_path / "step.pt")
    overrides = ("by=head", f"head={tmp_path / 'step.pt'}", "head_activation=relu")
    result = measure("cluster", tree, weights, tmp_path / "run", *overrides)
    assert result.notes[0].startswith("TWIST's own head with 11 outputs")
    assert str(tmp_path) not in json.dumps(result.recipe)
    assert not {"head", "clusters", "restarts", "fit_on"} & result.recipe.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("linear", ("batch_size=9", "epochs=1")),
        ("semi-1pct", ("batch_size=3", "epochs=2")),
        ("semi-10pct", ("batch_size=3", "epochs=1")),
        ("finetune-100pct", ("batch_size=9", "epochs=1")),
        ("linear-grid", ("epochs=1", "batch_size=9", "holdout_every=4")),
    ],
)
def test_two_steps_of_each_classifier(
    name: str, overrides: tuple[str, ...], tree: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    result = measure(name, tree, weights, tmp_path, *overrides)
    assert result.curves is not None
    rows = [json.loads(line) for line in result.curves.read_text().splitlines()]
    assert rows[-1]["step"] >= 2
    assert {"step", "epoch", "loss", "top1_percent"} <= rows[-1].keys()
    assert any(key.startswith("lr_classifier") for key in rows[-1])
    assert any("held-out training images" in note for note in result.notes) == ("grid" in name)
    assert [path.name for path in result.media] == ["predictions.png", "losses.png"]
    # The run folder says what ran and how it went.
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert written.pop("machine")["workers"] == 0
    assert {name: written[name] for name in result.recipe} == result.recipe
    log = (tmp_path / "log.txt").read_text()
    assert "plan: 1 process on the CPU" in log
    assert f"epoch {rows[-1]['epoch'] + 1}: loss " in log
    assert f"result: top1_percent {result.metrics['top1_percent']:.4f}" in log
    assert list((tmp_path / "tensorboard").iterdir())
    frozen_note = any("bit-equal before and after" in note for note in result.notes)
    assert frozen_note == ("linear" in name)


@pytest.mark.slow
def test_linear_probe_learns_the_stripes(tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    result = measure("sample-linear", tree, weights, tmp_path, "batch_size=6", "epochs=15")
    assert result.metrics["top1_percent"] >= 60.0, "chance is 33.3"


def test_recipe_hash_is_of_recipe_and_images_not_of_machine_or_place(tree: Path, tmp_path: Path) -> None:
    def recorded(root: Path, *overrides: str) -> str:
        recipe = load_recipe("sample-knn", architecture="resnet18", overrides=overrides)
        return sha256_json(recorded_recipe(recipe, *open_tree(root)))

    first = recorded(tree)
    assert recorded(tree, "machine.max_memory_mb=64") == first
    assert recorded(write_tree(tmp_path / "elsewhere")) == first
    assert recorded(write_tree(tmp_path / "fewer", train=5)) != first
    assert recorded(tree, "neighbours=10") != first


def test_only_the_unchanged_recipe_on_imagenet_is_full_scale() -> None:
    def full(name: str, *overrides: str, train: int = 1_281_167, val: int = 50_000) -> bool:
        recipe = load_recipe(name, architecture="resnet50", overrides=overrides).recorded()
        recipe |= {"images": {"classes": 1000, "train": train, "val": val}}
        header = Backbone(architecture="resnet50", method="twist")
        return is_imagenet(recipe) and not changes(PROTOCOLS[name], header, recipe)

    assert full("linear", "machine.workers=3")
    assert full("semi-1pct", train=12_811)
    assert full("cluster", "by=head", "head=checkpoint.pth")
    assert not full("linear", "epochs=1")
    assert not full("cluster", "clusters=2000")
    assert not full("linear", val=49_999)
    # A tree of 1 % or 10 % is not the ImageNet of a protocol that takes all labels, nor the other way round.
    assert not any(full(name, train=12_811) for name in ("linear", "knn", "finetune-100pct", "semi-10pct"))
    assert not full("semi-1pct")


@pytest.mark.parametrize(
    ("images", "batch", "processes", "size", "of_norm", "refused"),
    [
        (10, 9, 1, 32, 9, 1),
        (10, 9, 1, 33, 9, 0),
        (10, 10, 1, 32, 10, 0),
        (13, 12, 3, 32, 4, 1),
        (16, 12, 3, 32, 4, 0),
        (13, 12, 1, 32, 4, 1),
    ],
)
def test_a_last_batch_of_one_image_is_refused_where_it_has_no_statistics(
    images: int, batch: int, processes: int, size: int, of_norm: int, refused: int
) -> None:
    asked = (f"batch_size={batch}", f"size={size}", f"batch_norm_images={of_norm}")
    recipe = load_recipe("semi-1pct", architecture="resnet18", overrides=asked)
    assert isinstance(recipe, FinetuneRecipe)
    with pytest.raises(UsageError, match="last batch of one image") if refused else contextlib.nullcontext():
        batch_warnings(recipe, images, processes=processes)


@pytest.mark.parametrize("name", ["semi-1pct", "semi-10pct", "finetune-100pct"])
def test_batch_norm_of_fine_tuning_does_not_depend_on_the_number_of_gpus(name: str) -> None:
    recipe = load_recipe(name, architecture="resnet50")
    assert isinstance(recipe, FinetuneRecipe)
    assert recipe.groups == 8
    assert recipe.recorded()["batch_norm_images"] == 32
    for processes in (1, 2, 4, 8):
        assert batch_warnings(recipe, 1000, processes=processes) == []
    with pytest.raises(UsageError, match="8 groups of batch norm does not divide over --gpus 16"):
        batch_warnings(recipe, 1000, processes=16)
    # The samples' recipe is what it was: its hash has no key for it.
    assert "batch_norm_images" not in load_recipe("sample-semi-1pct", architecture="resnet18").recorded()


def test_a_torn_imagenet_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def notes(name: str, train: int, *, classes: int = 1000) -> tuple[str, ...]:
        names = tuple(map(str, range(classes)))
        splits = [LabelledImages(Path("x"), names, np.zeros(n, "S1"), np.zeros(n, int)) for n in (train, 50_000)]
        monkeypatch.setattr(engine, "open_tree", lambda _: splits)
        return resolve(*ask(name, Backbone(architecture="resnet50", method="random"), tmp_path)).notes

    assert notes("linear", 1_281_167) == ()
    (said,) = notes("linear", 1_281_166)
    assert "1281166" in said
    assert "twist data check imagenet" in said
    assert notes("linear", 1_281_166, classes=100) == ()  # another data set


def test_predictions_are_framed_by_whether_they_are_right(tree: Path, tmp_path: Path) -> None:
    _, val = open_tree(tree)
    few = val.spread(3)
    with Image.open(prediction_sheet(tmp_path / "p.png", few, [0, 2, 2])) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    blue, orange = ((np.abs(pixels - colour).sum(axis=1) < 30).sum() for colour in ((0, 114, 178), (213, 94, 0)))
    assert 1.5 * orange < blue < 6 * orange, "two whole frames and one broken one"


def test_plan_says_what_will_be_done(tree: Path) -> None:
    def plan(name: str, *overrides: str, **how: Any) -> str:
        return resolve(*ask(name, RESNET, tree, *SMALL, *overrides, **how)).plan

    text = plan("semi-10pct", "batch_size=4", "batch_norm_images=2", "size=33", gpus=2)
    assert text.startswith("plan: 2 GPUs\n")
    assert "images a step 4 (2 a process), lr_classifier 0.2, lr_backbone 0.02, 20 epochs of 2 steps, " in text
    assert "2 steps, batch norm over 2 images" in text
    assert "6 labelled images of 18; 9 validation images of 3 classes at 33 pixels" in text
    assert "nothing is trained" in plan("sample-linear", eval_only=True)
    assert "the 18 nearest of 18 training images vote" in plan("sample-knn")
    assert "k-means (lloyd), 3 clusters on train images" in plan("sample-cluster", eval_only=True)


FEATURES = "twist.measure.features.Extractor.features"


@pytest.mark.parametrize(
    ("name", "place", "sentence"),
    [
        ("sample-knn", FEATURES, "a lower machine.feature_batch_size"),
        ("sample-knn", "twist.transfer.engines.plain.nearest", "a lower machine.max_memory_mb"),
        ("sample-knn", "twist.transfer.engines.imagenet.engine.network_of", "free the device of other processes"),
        ("sample-semi-1pct", "twist.measure.features.normalise", "lower batch_size and every lr_*"),
        ("sample-cluster", "twist.measure.clusters.kmeans", "algorithm=minibatch restarts=1"),
    ],
)
def test_memory_that_runs_out_is_one_sentence_with_the_setting(
    name: str,
    place: str,
    sentence: str,
    tree: Path,
    weights: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(place, run_out)
    with pytest.raises(UserError) as caught:
        measure(name, tree, weights, tmp_path)
    assert str(caught.value).startswith("CUDA ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert f"stopped: {caught.value}" in (tmp_path / "log.txt").read_text()


def test_misuse_is_one_sentence(tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"batch_size = 64 does not divide over --gpus 3"):
        measure("sample-linear", tree, weights, tmp_path / "a", gpus=3)
    with pytest.raises(UsageError, match=r"last_blocks = 4 is for ViTs, not for a resnet18"):
        measure("linear", tree, weights, tmp_path / "b", "last_blocks=4")
    with pytest.raises(UserError, match="no ImageNet-like tree"):
        measure("sample-knn", tmp_path / "nothing", weights, tmp_path / "c")


@pytest.mark.slow
def test_vit_linear_by_its_own_recipe(tree: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    header = Backbone(architecture="vit_small_patch16", stem="patch16", image_size=32, method="random")
    tensors = dict(build_backbone("vit_small_patch16", image_size=32).state_dict())
    result = measure("linear", tree, tensors, tmp_path, "batch_size=9", "epochs=1", header=header)
    assert result.recipe["last_blocks"] == 4
    assert result.recipe["interpolation"] == "bicubic"
