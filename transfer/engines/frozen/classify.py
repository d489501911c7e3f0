"""Image classification from few labels, and VOC 2007's linear SVMs, on one row of frozen features an image.

fewshot: k-NN and logistic regression from n images a class. svm: one linear SVM a class, its cost by cross-validation,
11-point AP (mmselfsup's svm_voc07 and VISSL's voc07 benchmark). `N` images, `D` features, `K` classes.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twist.catalog.class_folders import LabelledImages
from twist.contracts.errors import UserError
from twist.contracts.progress import Progress
from twist.measure.features import FeatureFile
from twist.measure.knn import label_ranks, top_percent, vote_ranks
from twist.transfer.engines.frozen import recipes
from twist.transfer.engines.frozen.images import Pictures
from twist.transfer.engines.plain import search
from twist.transfer.request import Result

if TYPE_CHECKING:
    from twist.transfer.engines.frozen.engine import Setup


# ── Few labels ────────────────────────────────────────────────────────────────────────────────────────────────────────


def few_shot(setup: Setup, train: FeatureFile, val: FeatureFile) -> Result:
    config, classes = setup.config, len(setup.train.classes)
    queries = F.normalize(val[:], dim=1)
    scores: dict[str, list[float]] = {"top1_percent": [], "knn_top1_percent": []}
    with Progress("few-shot", total=config.draws, unit="draw") as progress:
        for draw in range(config.draws):
            chosen = draw_shots(setup.train.labels, config.shots, seed=(setup.request.seed, draw))
            bank, labels = F.normalize(train[:][chosen], dim=1), train.labels[chosen]
            near = search(queries, bank, config.neighbours, config.machine, quiet=True)
            voted = vote_ranks(*near, labels, val.labels, classes=classes, temperature=config.temperature)
            scores["knn_top1_percent"].append(top_percent(voted, 1))
            predicted = _logistic(bank, labels, queries, config.inverse_regularisation)
            scores["top1_percent"].append(top_percent(label_ranks(predicted, val.labels), 1))
            progress.advance()
    spread = ", ".join(f"{name} {np.std(values):.2f}" for name, values in scores.items())
    notes = [f"{config.shots} images a class, the mean of {config.draws} draws (standard deviation: {spread})."]
    return Result({name: float(np.mean(values)) for name, values in scores.items()}, setup.recipe, notes=notes)


def draw_shots(labels: np.ndarray, shots: int, *, seed: tuple[int, int]) -> np.ndarray:
    """Numbers of `shots` images of each class, or of all where a class has fewer."""
    generator = np.random.Generator(np.random.Philox(key=list(seed)))
    order = generator.permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == one][:shots] for one in np.unique(labels)]))


def _logistic(rows: Tensor, labels: Tensor, queries: Tensor, inverse: float) -> Tensor:
    """Class scores (Q, K) of a logistic regression on (N, D) rows."""
    from sklearn.linear_model import LogisticRegression  # seconds to import

    with warnings.catch_warnings(action="ignore"):  # that it stopped at the last iteration is no news here
        fitted = LogisticRegression(C=inverse, max_iter=1000).fit(rows.numpy(), labels.numpy())
    scores = torch.from_numpy(np.atleast_2d(fitted.predict_log_proba(queries.numpy()))).clamp_min(-1e9)
    return scores.float()


# ── VOC 2007 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def svm(setup: Setup, train: FeatureFile, val: FeatureFile) -> Result:
    config: recipes.SvmRecipe = setup.config
    names = [name for name in setup.train.classes if name != "background"]
    truth = {split: image_labels(pictures, names) for split, pictures in (("train", setup.train), ("val", setup.val))}
    rows, queries = (F.normalize(file[:], dim=1).numpy() for file in (train, val))
    if not config.shots:
        known = []
        with Progress("SVMs", total=len(names), unit="SVM") as progress:
            for k in range(len(names)):
                value = _one_class(rows, truth["train"][:, k], queries, truth["val"][:, k], config)
                known += [] if value is None else [value]
                progress.advance()
        notes = [f"{len(known)} of {len(names)} classes have positive images in both splits."]
        return Result({"voc07_svm_map_percent": 100.0 * float(np.mean(known))}, setup.recipe, notes=notes)
    metrics = {}
    with Progress("SVMs", total=len(config.shots), unit="size") as progress:
        for shots in config.shots:
            draws = [
                _low_shot(rows, queries, truth, config, shots, (setup.request.seed, n)) for n in range(config.draws)
            ]
            metrics[f"voc07_svm_k{shots}_map_percent"] = 100.0 * float(np.mean(draws))
            progress.advance()
    return Result(metrics, setup.recipe, notes=[f"The mean of {config.draws} draws of positive images for each k."])


def image_labels(pictures: Pictures | LabelledImages, names: list[str]) -> np.ndarray:
    """(N, K) int8 of VOC's images: 1 for a class that is in it, 0 where it is only as a difficult object, else -1."""
    labels = np.full((len(pictures), len(names)), -1, dtype=np.int8)
    if isinstance(pictures, LabelledImages):  # of a card: one class an image
        labels[np.arange(len(pictures)), pictures.labels] = 1
        return labels
    for index in range(len(pictures)):
        for one in sorted(pictures.objects(index), key=lambda one: not one.get("difficult")):
            if (name := pictures.classes[one["category"]]) in names:
                labels[index, names.index(name)] = 0 if one.get("difficult") else 1
    return labels


def _fit(rows: np.ndarray, positive: np.ndarray, cost: float) -> Any:
    from sklearn.svm import LinearSVC

    # Class weights, loss and stopping of VISSL's and mmselfsup's SVM.
    weights = {True: 2, False: 1}
    with warnings.catch_warnings(action="ignore"):
        return LinearSVC(C=cost, class_weight=weights, loss="squared_hinge", tol=1e-4, max_iter=2000, dual=True).fit(
            rows, positive
        )


def _one_class(
    rows: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray, config: recipes.SvmRecipe
) -> float | None:
    """AP on the test images of the SVM whose cost had the best cross-validated AP; None without positives."""
    from sklearn.model_selection import StratifiedKFold

    known, asked = labels != 0, truth != 0
    rows, positive = rows[known], labels[known] == 1
    if positive.sum() < config.folds or not (truth == 1).any() or positive.all():
        return None
    folds = list(StratifiedKFold(config.folds).split(rows, positive))

    def validated(cost: float) -> float:
        scores = [_fit(rows[fit], positive[fit], cost).decision_function(rows[test]) for fit, test in folds]
        return float(np.mean([average_precision(positive[test], s) for s, (_, test) in zip(scores, folds)]))

    best = max(config.costs, key=validated)
    scores = _fit(rows, positive, best).decision_function(queries[asked])
    return average_precision(truth[asked] == 1, scores)


def _low_shot(
    rows: np.ndarray, queries: np.ndarray, truth: dict[str, np.ndarray], config: recipes.SvmRecipe, shots: int,
    seed: tuple[int, int],
) -> float:  # fmt: skip
    """mAP from `shots` positive images of each class, all others of the draw being its negatives; the best cost."""
    labels = truth["train"]
    generator = np.random.Generator(np.random.Philox(key=list(seed)))
    order = generator.permutation(len(labels))
    drawn = np.unique(np.concatenate([order[labels[order, k] == 1][:shots] for k in range(labels.shape[1])]))
    by_cost = []
    for cost in config.costs:
        values = []
        for k in range(labels.shape[1]):
            known, asked = drawn[labels[drawn, k] != 0], truth["val"][:, k] != 0
            positive, wanted = labels[known, k] == 1, truth["val"][asked, k] == 1
            if positive.any() and not positive.all() and wanted.any():
                scores = _fit(rows[known], positive, cost).decision_function(queries[asked])
                values.append(average_precision(wanted, scores))
        if not values:
            raise UserError(f"{shots} positive images a class leave no class to train: are there annotations?")
        by_cost.append(float(np.mean(values)))
    return max(by_cost)


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """VOC 2007's AP of (N,) bool by (N,) scores: the mean of the best precision at recall ≥ 0, 0.1, …, 1."""
    ranked = positive[np.argsort(-scores, kind="stable")]
    hits = np.cumsum(ranked)
    precision, recall = hits / np.arange(1, len(ranked) + 1), hits / max(int(positive.sum()), 1)
    # A hair lower, so that a recall of 3/10 reaches the point 0.3.
    points = [precision[recall >= point - 1e-9] for point in np.linspace(0, 1, 11)]
    return float(np.mean([reached.max() if len(reached) else 0.0 for reached in points]))
