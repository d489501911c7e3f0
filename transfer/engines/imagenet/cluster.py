"""Clusters against labels: k-means on features, and NMI, AMI, ARI and accuracy of any assignment.

NMI uses the arithmetic mean, AMI and ARI are adjusted for chance (scikit-learn). Accuracy is under the best one-to-one
match of clusters and classes (Hungarian); where there are more clusters than classes, the surplus counts as wrong.
`N` images, `D` features, `C` clusters, `K` classes.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import normalize

from twist.contracts.errors import UserError
from twist.transfer.engines.imagenet.dataset import epoch_order
from twist.transfer.engines.imagenet.recipes import ClusterRecipe


def cluster_metrics(labels: np.ndarray, assignment: np.ndarray) -> dict[str, float]:
    """The four metrics in percent, by their names in `twist.contracts.metrics`.

    Args:
        labels: (N,) class of each image.
        assignment: (N,) cluster of each image; the numbers need not be consecutive.
    """
    return {
        "nmi_percent": 100.0 * float(normalized_mutual_info_score(labels, assignment)),
        "ami_percent": 100.0 * float(adjusted_mutual_info_score(labels, assignment)),
        "ari_percent": 100.0 * float(adjusted_rand_score(labels, assignment)),
        "cluster_accuracy_percent": 100.0 * matched_accuracy(labels, assignment),
    }


def matched_accuracy(labels: np.ndarray, assignment: np.ndarray) -> float:
    """Share of images that are right when each cluster stands for at most one class, and each class for one cluster."""
    counts = contingency_matrix(labels, assignment)  # (K, C)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(labels))


def kmeans(fit_on: np.ndarray, assign: np.ndarray, *, clusters: int, recipe: ClusterRecipe, seed: int) -> np.ndarray:
    """Cluster (N₁, D) `fit_on` and give the cluster of each row of `assign` (N₂, D): (N₂,) int32.

    Raises:
        UserError: fewer rows than clusters.
    """
    if len(fit_on) < clusters:
        raise UserError(
            f"{len(fit_on)} images cannot form {clusters} clusters: use more images, or fewer with clusters=N."
        )
    if recipe.algorithm == "lloyd":
        model: KMeans | MiniBatchKMeans = KMeans(
            clusters, n_init=recipe.restarts, max_iter=recipe.max_passes, random_state=seed
        ).fit(_rows(fit_on, recipe))
    else:
        model = _minibatch(fit_on, clusters=clusters, recipe=recipe, seed=seed)
    blocks = range(0, len(assign), recipe.step_size)
    return np.concatenate([model.predict(_rows(assign[start : start + recipe.step_size], recipe)) for start in blocks])


def _minibatch(fit_on: np.ndarray, *, clusters: int, recipe: ClusterRecipe, seed: int) -> MiniBatchKMeans:
    """Passes over shuffled blocks of rows; only a block is in memory, so a memory-mapped matrix of any size will do."""
    # k-means++ starts from the first block, which must hold a row a cluster; a smaller remainder of a pass is left out.
    step = min(max(recipe.step_size, clusters), len(fit_on))
    model = MiniBatchKMeans(clusters, random_state=seed)
    for number in range(recipe.max_passes):
        order = epoch_order(len(fit_on), seed=seed, epoch=number)
        for start in range(0, len(order) - step + 1, step):
            model.partial_fit(_rows(fit_on[np.sort(order[start : start + step])], recipe))
    return model


def _rows(rows: np.ndarray, recipe: ClusterRecipe) -> np.ndarray:
    return normalize(rows) if recipe.normalise else np.asarray(rows)
