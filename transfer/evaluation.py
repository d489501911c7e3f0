"""From the workers of a run to its caller, through the run folder: what was planned, what was measured.

A worker may be another process, so it leaves `evaluation.json`; the caller makes the engine's result of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twist.contracts import files
from twist.contracts.curves import CURVES
from twist.contracts.errors import UserError
from twist.transfer.pictures import plot_losses
from twist.transfer.request import Request
from twist.transfer.result import EngineResult

_FILE = "evaluation.json"


@dataclass(frozen=True)
class Resolved:
    """What will run: the framework's final config, the record's recipe, the plan's text, and whether it is reduced.

    Reduced means that the run is no longer the protocol: fewer images are seen than it asks for, or an override changed
    something that can change the number, other than the learning rate and what goes with it (`transfer/overrides.py`).
    Such a record never stands beside published numbers.
    """

    config: Any
    recipe: dict[str, Any]
    plan: str
    reduced: bool
    notes: tuple[str, ...] = ()


def require_finished(output: Path, *, done: int, of: int) -> None:
    """Refuse to evaluate a run before its end: its last checkpoint is a state that the protocol never measures."""
    if done == 0:
        raise UserError(f"{output} holds no checkpoint to evaluate: run the protocol first.")
    if done < of:
        raise UserError(
            f"{output} stands at iteration {done} of {of}: --eval-only measures finished runs, so finish this one with "
            "--resume."
        )


def leave(
    output: Path,
    metrics: Mapping[str, float],
    *,
    images: Mapping[str, int],
    media: Sequence[Path],
    notes: Sequence[str],
) -> None:
    """In a worker: write what was measured. `images` counts those of each set."""
    values = {"metrics": dict(metrics), "images": dict(images), "media": [str(p) for p in media], "notes": list(notes)}
    files.write_json(output / _FILE, values)


def collect(request: Request, resolved: Resolved) -> EngineResult:
    """In the caller: metrics (the main ones first), recipe with the sizes of the data, pictures, the plot of losses."""
    values = json.loads((request.output / _FILE).read_text())
    media = [Path(path) for path in values["media"]]
    curves = request.output / CURVES
    if curves.exists() and curves.stat().st_size:
        media.append(plot_losses(curves, request.output / "losses.png", title=request.protocol.name))
    return EngineResult(
        metrics={name: values["metrics"][name] for name in request.protocol.metrics},
        recipe={**resolved.recipe, "data": values["images"]},
        media=media,
        curves=curves if curves.exists() else None,  # None on a node that is not the first, in a folder of its own
        notes=[*resolved.notes, *values["notes"]],
    )
