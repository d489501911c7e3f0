"""Clusters against labels: the published implementation's numbers, and k-means that finds what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.preprocessing import normalize

from twist.contracts.errors import UsageError, UserError
from twist.contracts.metrics import check_metrics
from twist.transfer.engines.imagenet.cluster import cluster_metrics, kmeans, matched_accuracy
from twist.transfer.engines.imagenet.recipes import ClusterRecipe, load_recipe

GOLDENS = Path(__file__).parent / "goldens"


def cluster_recipe(*overrides: str) -> ClusterRecipe:
    recipe = load_recipe("sample-cluster", architecture="resnet18", overrides=overrides)
    assert isinstance(recipe, ClusterRecipe)
    return recipe


def test_metrics_equal_the_published_implementation() -> None:
    golden = np.load(GOLDENS / "cluster.npz")
    metrics = cluster_metrics(golden["label"], golden["prediction"])
    check_metrics(metrics, where="cluster")
    assert metrics == pytest.approx(
        {
            "nmi_percent": 100 * float(golden["nmi"]),
            "ami_percent": 100 * float(golden["ami"]),
            "ari_percent": 100 * float(golden["ari"]),
            "cluster_accuracy_percent": 100 * float(golden["accuracy"]),
        },
        abs=1e-10,
    )


def test_accuracy_matches_one_to_one() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    # Renaming the clusters changes nothing.
    assert matched_accuracy(labels, np.array([7, 7, 7, 3, 3, 5])) == 1.0
    # A class split over two clusters counts one of them only; majority voting would give 1.0.
    assert matched_accuracy(labels, np.array([0, 0, 9, 1, 1, 2])) == pytest.approx(5 / 6)
    # Fewer clusters than classes: the class without a cluster is lost.
    assert matched_accuracy(labels, np.array([0, 0, 0, 1, 1, 1])) == pytest.approx(5 / 6)
    assert cluster_metrics(labels, np.zeros(6, dtype=int))["nmi_percent"] == 0.0


@pytest.mark.parametrize(
    "overrides",
    [(), ("algorithm=minibatch", "restarts=1", "max_passes=20", "step_size=40")],
    ids=["lloyd", "minibatch"],
)
def test_kmeans_finds_separate_clouds(overrides: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16)).astype(np.float32)
    truth = np.repeat(np.arange(4), 60)
    rows = (centres[truth] + 0.1 * rng.normal(size=(240, 16))).astype(np.float32)
    # Lengths that differ by a factor of ten must not matter where features are normalised.
    rows *= rng.uniform(0.5, 5, size=(240, 1)).astype(np.float32)
    recipe = cluster_recipe(*overrides)
    assignment = kmeans(rows, rows[::2], clusters=4, recipe=recipe, seed=0)
    assert matched_accuracy(truth[::2], assignment) == 1.0
    assert np.array_equal(assignment, kmeans(rows, rows[::2], clusters=4, recipe=recipe, seed=0))


def test_restarts_and_passes_are_those_of_the_recipe() -> None:
    rows = normalize(np.random.default_rng(0).normal(size=(300, 8)))
    recipe = cluster_recipe("restarts=4", "max_passes=3")
    found = kmeans(rows, rows, clusters=9, recipe=recipe, seed=5)
    assert np.array_equal(found, KMeans(9, n_init=4, max_iter=3, random_state=5).fit_predict(rows))
    for other in ({"n_init": 1, "max_iter": 3}, {"n_init": 4, "max_iter": 300}):
        assert not np.array_equal(found, KMeans(9, random_state=5, **other).fit_predict(rows))


def test_a_minibatch_pass_takes_whole_blocks_of_shuffled_images_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[np.ndarray] = []
    monkeypatch.setattr(MiniBatchKMeans, "partial_fit", lambda _self, rows: blocks.append(rows[:, 0]))
    monkeypatch.setattr(MiniBatchKMeans, "predict", lambda _self, rows: np.zeros(len(rows), dtype=np.int32))
    options = ("algorithm=minibatch", "restarts=1", "max_passes=2", "step_size=40", "normalise=false")
    rows = np.arange(120.0)[:, None]
    for count, steps in ((119, 2), (120, 3)):
        blocks.clear()
        kmeans(rows[:count], rows[:1], clusters=4, recipe=cluster_recipe(*options), seed=0)
        assert [len(block) for block in blocks] == [40] * 2 * steps
        first, second = np.concatenate(blocks[:steps]), np.concatenate(blocks[steps:])
        assert len(set(first)) == len(set(second)) == 40 * steps
        assert not np.array_equal(first, second)
    blocks.clear()
    kmeans(rows, rows[:1], clusters=50, recipe=cluster_recipe(*options), seed=0)
    assert [len(block) for block in blocks] == [50] * 4, "a first block holds a row a cluster"
    blocks.clear()
    kmeans(rows, rows, clusters=4, recipe=cluster_recipe("normalise=false"), seed=0)
    assert not blocks


def test_as_many_images_as_clusters_are_enough() -> None:
    found = kmeans(np.eye(3), np.eye(3), clusters=3, recipe=cluster_recipe(), seed=0)
    assert sorted(found) == [0, 1, 2]


def test_too_few_images_and_half_a_head_are_refused() -> None:
    with pytest.raises(UserError, match="3 images cannot form 10 clusters"):
        kmeans(np.ones((3, 2)), np.ones((3, 2)), clusters=10, recipe=cluster_recipe(), seed=0)
    with pytest.raises(UsageError, match=r'by = "head" and head = FILE'):
        cluster_recipe("by=head")
    with pytest.raises(UsageError, match="restarts belong to"):
        cluster_recipe("algorithm=minibatch")


def test_recipe_of_a_head_does_not_mention_kmeans_or_the_file() -> None:
    recorded = cluster_recipe("by=head", "head=/somewhere/checkpoint.pth").recorded()
    assert recorded["by"] == "head"
    assert not {"head", "clusters", "restarts", "fit_on"} & recorded.keys()
