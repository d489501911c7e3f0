"""The run folder's own account, `run.json`: which run lives here, so that no other one writes into it.

A run is its protocol, weights, data, seed and recipe. A folder is taken by the first run that is planned in it; the
same run may continue (`--resume`) or be evaluated again, another one is refused with the difference named. Of a run
that is done the folder says where its record is.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from twist.contracts import files
from twist.contracts.errors import UserError

FILE = "run.json"
# What makes a run this run, in the order in which a difference is named.
IDENTITY = ("protocol", "weights", "data", "seed", "recipe")
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


def earlier_run(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says, or None for a new run in an empty or absent folder.

    Raises:
        UserError: the folder holds something that is no run of ours.
    """
    path = folder / FILE
    if path.exists():
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not JSON ({error}): choose another --output.") from None
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run: choose another --output, nothing is overwritten.")
    return None


def note_run(folder: Path, run: dict[str, Any], *, state: str, record: Path | None = None) -> None:
    """Write `run.json`; `record` is where a run that is done has its record."""
    # Relative where it lies in the folder, which may be moved.
    place = (
        {} if record is None else {"record": str(record.relative_to(folder) if folder in record.parents else record)}
    )
    files.write_json(folder / FILE, {**run, "state": state, **place})


def check_same_run(folder: Path, earlier: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuse a run whose protocol, weights, data, seed or recipe are not the earlier one's; the first is named.

    What either does not say is not compared: a run that was killed while it started had no recipe yet.
    """
    for key in (key for key in IDENTITY if key in earlier and key in run):
        found = list(differences(earlier[key], run[key], key))
        # Whose weights they are says more than their network.
        for path, before, now in sorted(found, key=lambda one: one[0] not in ("weights.name", "weights.sha256")):
            raise UserError(
                f"{folder} holds another run: {path} was {before!r} and is {now!r} now; a run is resumed as it was "
                "begun, so choose another --output."
            )


def refuse_again(folder: Path, earlier: dict[str, Any]) -> NoReturn:
    """Say what the folder holds of the run that was asked for without --resume or --eval-only, and what may be done."""
    if earlier.get("state") != DONE:
        raise UserError(
            f"{folder} holds this run, unfinished: pass --resume to continue it as it was begun, or choose another "
            "--output."
        )
    there = record_of(folder, earlier)
    raise UserError(
        f"{folder} holds this run, done{f' (its record is {there})' if there else ''}: pass --resume to "
        f"{'print' if there else 'collect'} its record again, --eval-only to measure it again, or choose another "
        "--output."
    )


def record_of(folder: Path, earlier: dict[str, Any], *, results: Path | None = None) -> Path | None:
    """The record of a run that is done, None where there is none any more, or not in `results`."""
    if earlier.get("state") != DONE or "record" not in earlier:
        return None
    path = folder / earlier["record"]
    return path if path.is_file() and results in (None, path.parent.parent) else None


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
