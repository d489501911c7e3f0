"""What an engine hands back to `transfer/run.py`, which alone writes the run record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EngineResult:
    """One finished training and evaluation.

    `metrics` has names of `contracts.metrics`. `recipe` is JSON-able and holds what decides the number but no weights,
    path or seed: two weights under one protocol give equal recipes. `media` are small PNGs for the report, `curves` a
    `metrics.jsonl` (one object a line, `step` and losses). `notes` are sentences that belong beside the number.
    """

    metrics: dict[str, float]
    recipe: dict[str, Any]
    media: list[Path] = field(default_factory=list)
    curves: Path | None = None
    notes: list[str] = field(default_factory=list)
