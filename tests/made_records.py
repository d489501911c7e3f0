"""Records for the tests of tables, pages and suites, made without running anything."""

from typing import Any

from twist.contracts.files import sha256_json
from twist.contracts.record import RunRecord, WeightsProvenance


def make_record(
    method: str = "twist",
    protocol: str = "sample-knn",
    *,
    seed: int = 0,
    metrics: dict[str, float] | None = None,
    recipe: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    **others: Any,
) -> RunRecord:
    """A record of `method` under `protocol`; whatever isn't given is the same in every record."""
    given = {"name": method, "sha256": None if method == "random" else sha256_json(method), "architecture": "resnet50"}
    values = {
        "task": "classification",
        "scale": "sample",
        "software": {"python": "3.11.9"},
        "hardware": {"processor": "test", "cores": 1, "gpus": 0, "gpu": None},
        "wall_s": 60.0,
        "git_commit": None,
        "created": "2026-01-02T03:04:05+00:00",
    }
    return RunRecord(
        method=method,
        protocol=protocol,
        seed=seed,
        metrics={"knn_top1_percent": 50.0} if metrics is None else metrics,
        recipe={"k": 20} if recipe is None else recipe,
        weights=WeightsProvenance(**{**given, **(weights or {})}),
        **{**values, **others},
    )


def runs(method: str, values: list[float], metric: str = "knn_top1_percent", **others: Any) -> list[RunRecord]:
    """One record a value, seeds 0, 1, …"""
    return [make_record(method, seed=seed, metrics={metric: value}, **others) for seed, value in enumerate(values)]
