"""Clusters against labels: k-means on features, and NMI, AMI, ARI and accuracy of any assignment.

NMI uses the arithmetic mean, AMI and ARI are adjusted for chance (scikit-learn). Accuracy is under the best one-to-one
match of clusters and classes (Hungarian); where there are more clusters than classes, the surplus counts as wrong.
`N` images, `D` features, `C` clusters, `K` classes.
"""

from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import normalize

from twist.contracts.errors import UserError


def cluster_metrics(labels: np.ndarray, assignment: np.ndarray) -> dict[str, float]:
    """The four metrics in percent, by their names in `twist.contracts.metrics`, of (N,) classes and (N,) clusters."""
    counts = contingency_matrix(labels, assignment)  # (K, C)
    matched = counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels)
    return {
        "nmi_percent": 100.0 * float(normalized_mutual_info_score(labels, assignment)),
        "ami_percent": 100.0 * float(adjusted_mutual_info_score(labels, assignment)),
        "ari_percent": 100.0 * float(adjusted_rand_score(labels, assignment)),
        "cluster_accuracy_percent": 100.0 * float(matched),
    }


def kmeans(
    fit_on: np.ndarray,
    assign: np.ndarray,
    *,
    clusters: int,
    algorithm: Literal["lloyd", "minibatch"],
    restarts: int,
    max_passes: int,
    step_size: int,
    normalise: bool,
    seed: int,
) -> np.ndarray:
    """Cluster (N₁, D) `fit_on` and give the cluster of each row of `assign` (N₂, D): (N₂,) int32.

    `lloyd` keeps the tightest of `restarts`. `minibatch` makes `max_passes` over shuffled blocks of `step_size` rows
    and holds only one block, so a memory-mapped matrix of any size will do. `normalise` scales rows to length 1 first.
    `UserError` for fewer rows than clusters.
    """
    if len(fit_on) < clusters:
        raise UserError(
            f"{len(fit_on)} images cannot form {clusters} clusters: use more images, or fewer with clusters=N."
        )
    prepare = normalize if normalise else np.asarray
    model: KMeans | MiniBatchKMeans
    if algorithm == "lloyd":
        model = KMeans(clusters, n_init=restarts, max_iter=max_passes, random_state=seed).fit(prepare(fit_on))
    else:
        model = MiniBatchKMeans(clusters, random_state=seed)
        # k-means++ starts from the first block, which must hold a row a cluster; the rest of a pass is left out.
        step = min(max(step_size, clusters), len(fit_on))
        for number in range(max_passes):
            order = np.random.Generator(np.random.Philox(key=[seed, number])).permutation(len(fit_on))
            for start in range(0, len(order) - step + 1, step):
                model.partial_fit(prepare(fit_on[np.sort(order[start : start + step])]))
    blocks = range(0, len(assign), step_size)
    return np.concatenate([model.predict(prepare(assign[start : start + step_size])) for start in blocks])
