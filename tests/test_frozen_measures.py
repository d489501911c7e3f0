"""Retrieval, linear heads, object discovery and VOC's AP beside reference implementations and planted truths."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import Tensor

from twist.contracts.networks import build_backbone, network_of
from twist.contracts.weights import Backbone
from twist.measure.dense import DenseExtractor, DenseFile, Layers
from twist.measure.knn import Blocks, nearest
from twist.measure.segmentation import (
    VOID,
    Box,
    Confusion,
    lost_box,
    patch_labels,
    predict,
    retrieved_labels,
    sample_patches,
)
from twist.transfer.engines.frozen import linear_seg
from twist.transfer.engines.frozen.classify import average_precision, draw_shots
from twist.transfer.engines.frozen.recipes import LinearRecipe, load_recipe

CPU = torch.device("cpu")


def planted(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (N, 64, 16), four classes' prototypes mixed as a patch's pixels are, with noise; maps (N, 64, 64)."""
    generator = np.random.default_rng(seed)
    masks = np.roll(np.kron(generator.integers(0, 4, (images, 4, 4)), np.ones((1, 16, 16), dtype=int)), 3, axis=2)
    prototypes = np.random.default_rng(0).normal(size=(4, 16))
    patches = masks.reshape(images, 8, 8, 8, 8).transpose(0, 1, 3, 2, 4).reshape(images, 8, 8, 64)
    shares = np.stack([(patches == label).mean(-1) for label in range(4)], -1)
    features = shares @ prototypes + 0.8 * generator.normal(size=(images, 8, 8, 16))
    return torch.tensor(features.reshape(images, 64, 16), dtype=torch.float32), torch.tensor(masks)


def retrieve(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], *, k: int = 7, soft: bool = True) -> float:
    how: dict[str, Any] = {"classes": 4, "void": "background", "soft": soft}
    labels = torch.cat([patch_labels(mask, 8, 8, **how).float() for mask in train[1]])
    memory, confusion = train[0].flatten(0, 1), Confusion(4)
    for rows, mask in zip(*val, strict=True):
        near = nearest(rows, memory, neighbours=k, blocks=Blocks(len(memory), 64), quiet=True)
        scores = retrieved_labels(*near, labels, temperature=0.02)
        confusion.add(mask, predict(scores.T.reshape(4, 8, 8), (64, 64)))
    return confusion.metrics()["miou_percent"]


def test_retrieval_is_open_hummingbirds() -> None:
    """0.75006214: hbird.hbird_eval.HbirdEvaluation @5e79da2 on this fixture, its search replaced by an exact one."""
    train, val = planted(6, 1), planted(5, 2)
    assert retrieve(train, val) == pytest.approx(75.00621429, abs=1e-4)
    assert retrieve(train, val, soft=False) != pytest.approx(75.00621429, abs=0.1)  # another recipe


@pytest.mark.parametrize(
    ("seed", "expected"),
    enumerate([(0.0, 0.0, 64.0, 64.0), (0.0, 32.0, 64.0, 96.0), (32.0, 0.0, 140.0, 64.0), (0.0, 0.0, 80.0, 80.0)]),
)
def test_boxes_are_losts(seed: int, expected: Box) -> None:
    """Expected: `lost` of valeoai/LOST @fcedbec on these features, patches of 16 pixels, an image of 105 × 140."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(12, 7, 9)) + 0.9
    top, left = generator.integers(0, 3), generator.integers(0, 4)
    features[:6, top : top + 3, left : left + 4] -= 2.4
    box = lost_box(torch.tensor(features), image_size=(105, 140), scale=(16, 16), candidates=20)
    assert box == expected


# ── Labels and IoU ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shares_of_a_patch_and_what_becomes_of_void() -> None:
    labels = torch.tensor([[1, 1, VOID, VOID], [2, 1, VOID, VOID]])
    left_out = patch_labels(labels, 1, 2, classes=3, void="left out")
    assert left_out.tolist() == [[0, 0.75, 0.25], [0, 0, 0]]
    assert patch_labels(labels, 1, 2, classes=3, void="background").tolist() == [[0, 0.75, 0.25], [1, 0, 0]]
    assert patch_labels(labels, 1, 2, classes=3, void="left out", soft=False).tolist() == [[0, 1, 0], [0, 0, 0]]
    chosen = sample_patches(left_out, 5, generator=torch.Generator().manual_seed(0))
    assert chosen.tolist() == [0]  # a patch without a class is never in the memory


def test_rare_classes_are_sampled_more() -> None:
    shares = torch.zeros(100, 2)
    shares[:95, 0], shares[95:, 1] = 1, 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([sample_patches(shares, 10, generator=generator) for _ in range(20)])
    assert (drawn >= 95).float().mean() > 0.3  # of 5 % of the patches


def test_iou_is_scikit_learns_and_void_counts_nowhere() -> None:
    generator = np.random.default_rng(3)
    labels, predicted = generator.integers(0, 4, 500), generator.integers(0, 5, 500)
    labels[:50] = VOID
    confusion = Confusion(6)  # class 5 occurs nowhere, and is in no mean
    confusion.add(torch.tensor(labels), torch.tensor(predicted))
    expected = jaccard_score(labels[50:], predicted[50:], average="macro", labels=[0, 1, 2, 3, 4])
    assert confusion.metrics()["miou_percent"] == pytest.approx(100 * expected)


def test_clusters_are_named_by_their_pixels() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 1])
    confusion = Confusion(2, 4)
    confusion.add(truth, torch.tensor([3, 3, 2, 0, 0, 0]))
    assert confusion.matched().metrics()["miou_percent"] == 100
    swapped = Confusion(2, 2)
    swapped.add(truth, 1 - truth)
    assert swapped.matched().metrics()["miou_percent"] == 100


# ── Linear heads ──────────────────────────────────────────────────────────────────────────────────────────────────────


def dense_file(folder: Path, features: Tensor, name: str = "x") -> DenseFile:
    path = folder / f"{name}.f32"
    features.numpy().tofile(path)
    return DenseFile(path, len(features), 8, 8, features.shape[2])


def linear_recipe(**changes: Any) -> LinearRecipe:
    settings = {"iterations": 60, "warmup_iterations": 3, "batch_size": 4, "loss_size": 0}
    overrides = tuple(f"{key}={value}" for key, value in {**settings, **changes}.items())
    recipe = load_recipe("sample-linear-seg", overrides)
    assert isinstance(recipe, LinearRecipe)
    return recipe


def fit(file: DenseFile, masks: Tensor, recipe: LinearRecipe) -> linear_seg.HeadGrid:
    small = torch.nn.functional.interpolate(masks[:, None].float(), size=(8, 8), mode="nearest-exact")[:, 0].long()
    return linear_seg.train(
        file, lambda image: small[image], np.arange(file.images), recipe, classes=4, seed=0, device=CPU,
        curves=Mock(),
    )  # fmt: skip


def test_heads_of_a_grid_are_those_of_single_runs(tmp_path: Path) -> None:
    """All rates in one pass train what each would alone."""
    features, masks = planted(6, 1)
    file = dense_file(tmp_path, features)
    together = fit(file, masks, linear_recipe(learning_rates=[1e-3, 1e-2], weight_decays=[0.0, 0.1]))
    for head, (rate, decay) in enumerate([(1e-3, 0.0), (1e-3, 0.1), (1e-2, 0.0), (1e-2, 0.1)]):
        alone = fit(file, masks, linear_recipe(learning_rates=[rate], weight_decays=[decay]))
        torch.testing.assert_close(together.weights[head], alone.weights[0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(together.weights[0], together.weights[2])


def coloured(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (N, 64, 128) of a random ResNet-18's second stage; maps (N, 64, 64) of squares, a colour a class."""
    generator = np.random.default_rng(seed)
    masks = np.kron(generator.integers(0, 4, (images, 2, 2)), np.ones((1, 32, 32), dtype=int))
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [190, 190, 60]])
    pixels = (colours[masks] + generator.normal(0, 25, (images, 64, 64, 3))).clip(0, 255).astype(np.uint8)
    torch.manual_seed(7)
    header, layers = Backbone(architecture="resnet18", method="random"), Layers(stages=(2,))
    network = network_of(header, build_backbone("resnet18").state_dict(), output_stride=layers.output_stride)
    maps = DenseExtractor(network, header, CPU, layers).maps(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return maps.flatten(2).transpose(1, 2).contiguous(), torch.tensor(masks)


def test_planted_patches_are_found_and_shuffled_labels_are_not(tmp_path: Path) -> None:
    """A probe that measures nothing must be seen: random features tell colours apart, not noise."""
    train, val = coloured(24, 1), coloured(8, 2)
    chance = torch.tensor(np.random.default_rng(5).permutation(train[1].numpy()[:, ::32, ::32].ravel()))
    shuffled = chance.view(24, 2, 2).repeat_interleave(32, 1).repeat_interleave(32, 2)
    recipe = linear_recipe(learning_rates=[1e-2], weight_decays=[0.0], iterations=100)
    file, asked = dense_file(tmp_path, train[0]), dense_file(tmp_path, val[0], "val")
    found = {}
    for name, masks in (("true", train[1]), ("shuffled", shuffled)):
        heads = fit(file, masks, recipe)
        linear = linear_seg.evaluate(heads, asked, lambda i: val[1][i], np.arange(8), classes=4, device=CPU)
        found[name] = linear[0]["miou_percent"], retrieve((train[0], masks), val, k=30)
    assert min(found["true"]) >= 80
    assert max(found["shuffled"]) < 30  # a guess of four equal classes has 14


# ── Few labels ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shots_are_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 3, 50])
    chosen = draw_shots(labels, 5, seed=(0, 0))
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 5]
    assert not np.array_equal(chosen, draw_shots(labels, 5, seed=(0, 1)))


def test_average_precision_is_the_11_point_one() -> None:
    positive, scores = np.array([True, False, True, False]), np.array([0.9, 0.8, 0.7, 0.1])
    # Precision 1 up to recall 0.5 (six points), then 2/3 (five points).
    assert average_precision(positive, scores) == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert average_precision(np.array([True, False]), np.array([0.1, 0.9])) == pytest.approx(0.5)
