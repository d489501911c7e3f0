"""The run folder's own account, `run.json`: which run lives here, so that no other one writes into it.

A run is its protocol, weights, data, seed and recipe. A folder is taken by the first run that is planned in it; the
same run may continue (`--resume`) or be evaluated again, another one is refused with the difference named.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts import atomic
from contracts.errors import UserError

FILE = "run.json"
# Started: the weights are being converted, the recipe is not known yet.
STARTED, RUNNING, DONE = "started", "running", "done"


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Make `folder` if need be; when what follows fails before the run is under way, nothing is left behind."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    was_empty = not any(folder.iterdir())
    try:
        yield
    except BaseException:
        if was_empty and _state(folder) in (None, STARTED):
            shutil.rmtree(folder)
            if existed:
                folder.mkdir()
        raise


def _state(folder: Path) -> str | None:
    path = folder / FILE
    return json.loads(path.read_text()).get("state") if path.exists() else None


def earlier_run(folder: Path, *, resume: bool) -> dict[str, Any] | None:
    """What `run.json` says, or None for a new run in an empty or absent folder.

    Raises:
        UserError: the folder holds a run and `resume` is off, or holds something that is no run of ours.
    """
    path = folder / FILE
    if path.exists():
        try:
            values = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not JSON ({error}): choose another --output.") from None
        if not resume:
            raise UserError(
                f"{folder} holds a {values.get('state', '?')} run of {values.get('protocol', '?')}: pass --resume to "
                "continue it, or choose another --output."
            )
        return values
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run: choose another --output, nothing is overwritten.")
    return None


def note_run(folder: Path, run: dict[str, Any], *, state: str) -> None:
    """Write `run.json`."""
    atomic.write_json(folder / FILE, {**run, "state": state})


def check_same_run(folder: Path, earlier: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuse to continue a run whose protocol, weights, data, seed or recipe have changed; the first is named.

    A run that was killed while it started had no recipe yet, so there is none to differ.
    """
    for path, before, now in differences(earlier, {key: run.get(key) for key in earlier}):
        raise UserError(
            f"{folder} holds another run: {path} was {before!r} and is {now!r} now; a run is resumed as it was begun, "
            "so choose another --output."
        )


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two trees of plain values differ: dotted path, value before, value now (None where there is none).

    A list of numbers or words is one value; lists of tables or of lists are gone through when they are equally long.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif _nested(before) and _nested(now) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{path}.{index}".lstrip("."))
    elif before != now:
        yield path, before, now


def _nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)
