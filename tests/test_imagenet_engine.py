"""Every ImageNet-style protocol, whole: its own recipe, two real steps at reduced size, its metrics and its notes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_tree import write_tree
from PIL import Image
from torch import Tensor

from contracts.errors import UsageError, UserError
from contracts.hashing import sha256_json
from contracts.metrics import check_metrics
from contracts.networks import build_backbone
from contracts.weights import Backbone
from transfer.imagenet.dataset import open_tree
from transfer.imagenet.engine import at_full_scale, recorded_recipe, run
from transfer.imagenet.recipes import FOLDER, FinetuneRecipe, LinearRecipe, load_recipe, recipe_names
from transfer.protocols import PROTOCOLS
from transfer.result import EngineResult

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
    assert rows == {name for name in recipe_names() if "vit_" not in name}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
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


def test_unknown_key_and_unknown_recipe_get_the_near_match() -> None:
    with pytest.raises(UsageError, match=r'unknown key lr_clasifier\. Did you mean "lr_classifier"\?'):
        load_recipe("linear", architecture="resnet50", overrides=["lr_clasifier=0.1"])
    with pytest.raises(UsageError, match=r'no ImageNet recipe "liner"\. Did you mean "linear"\?'):
        load_recipe("liner", architecture="resnet50")
    with pytest.raises(UsageError, match="resize = 24 is smaller than size = 32"):
        load_recipe("sample-knn", architecture="resnet18", overrides=["resize=24"])


def measure(
    name: str,
    tree: Path,
    weights: dict[str, Tensor],
    output: Path,
    *overrides: str,
    header: Backbone = RESNET,
    **how: Any,
) -> EngineResult:
    result = run(
        PROTOCOLS[name], weights, header, data=tree, seed=0, output=output, overrides=(*SMALL, *overrides), **how
    )
    check_metrics(result.metrics, where=name)
    assert set(result.metrics) == set(PROTOCOLS[name].metrics)
    assert all(0 <= value <= 100 for value in result.metrics.values())
    sha256_json(result.recipe)
    assert str(tree) not in json.dumps(result.recipe)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "sample-knn"])
def test_knn(name: str, tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    result = measure(name, tree, weights, tmp_path)
    assert result.metrics["knn_top5_percent"] == 100.0, "three classes, 18 neighbours of each"
    assert "bit-equal before and after" in result.notes[0]
    assert Image.open(result.media[0]).size[0] > 200
    assert result.media[0].stat().st_size < 200_000
    assert not (tmp_path / "features").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cluster", "sample-cluster"])
def test_cluster(name: str, tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    result = measure(name, tree, weights, tmp_path, "machine.keep_features=true")
    assert result.notes[0].startswith("k-means with 3 clusters, found on the train images")
    assert len(list((tmp_path / "features").iterdir())) == 2
    assert result.media[0].stat().st_size < 200_000


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("linear", ("batch_size=9", "epochs=1")),
        ("semi-1pct", ("batch_size=3", "epochs=2")),
        ("semi-10pct", ("batch_size=3", "epochs=1")),
        ("finetune-100pct", ("batch_size=9", "epochs=1")),
        ("sample-linear", ("epochs=2",)),
        ("sample-semi-1pct", ("epochs=2",)),
        ("sample-semi-10pct", ("epochs=2",)),
    ],
)
def test_two_steps_of_each_classifier(
    name: str, overrides: tuple[str, ...], tree: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    result = measure(name, tree, weights, tmp_path, *overrides)
    assert result.curves is not None
    rows = [json.loads(line) for line in result.curves.read_text().splitlines()]
    assert rows[-1]["step"] >= 2
    assert {"step", "epoch", "loss", "lr_classifier", "top1_percent"} <= rows[-1].keys()
    frozen_note = any("bit-equal before and after" in note for note in result.notes)
    assert frozen_note == ("linear" in name)


@pytest.mark.slow
def test_linear_probe_learns_the_stripes(tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    result = measure("sample-linear", tree, weights, tmp_path, "batch_size=6", "epochs=30")
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
        recipe |= {"images": {"classes": 1000, "train": train, "val": val}, "architecture": "resnet50"}
        return at_full_scale(PROTOCOLS[name], Backbone(architecture="resnet50", method="twist"), recipe)

    assert full("linear")
    assert full("linear", "machine.workers=3")
    assert full("semi-1pct", train=12_811)
    assert full("cluster", "by=head", "head=checkpoint.pth")
    assert not full("linear", "epochs=1")
    assert not full("cluster", "clusters=2000")
    assert not full("linear", val=49_999)
    assert not full("semi-1pct", train=600)


@pytest.mark.slow
def test_resume_goes_on_and_refuses_another_seed(tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    first = measure("sample-linear", tree, weights, tmp_path, "epochs=2")
    again = measure("sample-linear", tree, weights, tmp_path, "epochs=2", resume=True)
    assert first.metrics == again.metrics
    with pytest.raises(UserError, match="another recipe"):
        measure("sample-linear", tree, weights, tmp_path, "epochs=3", resume=True)
    with pytest.raises(UserError, match="another seed"):
        run(
            PROTOCOLS["sample-linear"],
            weights,
            RESNET,
            data=tree,
            seed=1,
            output=tmp_path,
            overrides=(*SMALL, "epochs=2"),
            resume=True,
        )


def test_misuse_is_one_sentence(tree: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"batch_size = 64 does not divide over --gpus 3"):
        measure("sample-linear", tree, weights, tmp_path / "a", gpus=3)
    with pytest.raises(UsageError, match=r"last_blocks = 4 is for ViTs, and these weights are a resnet18"):
        measure("linear", tree, weights, tmp_path / "b", "last_blocks=4")
    with pytest.raises(UserError, match="no ImageNet-like tree"):
        measure("sample-knn", tmp_path / "nothing", weights, tmp_path / "c")
    unknown = replace(PROTOCOLS["sample-knn"], config="sample-knnn")
    with pytest.raises(UsageError, match="Did you mean"):
        run(unknown, weights, RESNET, data=tree, seed=0, output=tmp_path / "d")


@pytest.mark.slow
def test_vit_linear_by_its_own_recipe(tree: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    header = Backbone(architecture="vit_small_patch16", stem="patch16", image_size=32, method="random")
    tensors = dict(build_backbone("vit_small_patch16", image_size=32).state_dict())
    result = measure("linear", tree, tensors, tmp_path, "batch_size=9", "epochs=1", header=header)
    assert result.recipe["last_blocks"] == 4
    assert result.recipe["interpolation"] == "bicubic"
