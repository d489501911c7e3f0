"""The folder of a run: who may write there, which run is in it, whether it is done.

The rules of all folders that a user names: one process writes at a time, a folder with anything else in it is refused,
a run goes on only as it was started, what fails before it has begun leaves nothing behind. A transfer run describes
itself in `run.json`: protocol, weights, data, seed, recipe, its state, and, once it is done, where its record is.
"""

import contextlib
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict

from twist.contracts import files
from twist.contracts.config import validate
from twist.contracts.errors import UsageError, UserError

RUN_FILE, LOCK = "run.json", "lock"
# Started: the weights are being converted, the recipe is not known yet.
STARTED, RUNNING, DONE = "started", "running", "done"
# What makes a transfer run this run, in the order in which a difference is named.
IDENTITY = ("protocol", "weights", "data", "seed", "recipe")
# `.<name>.<eight characters>`, and what Python's tempfile or `replaced_whole` put after them.
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")


class _RunFile(BaseModel):
    """`run.json`, as far as its fields are read; earlier versions lack some."""

    model_config = ConfigDict(strict=True)
    protocol: str = ""
    weights: dict[str, Any] = {}
    data: str | None = None
    seed: int = 0
    recipe: dict[str, Any] = {}
    state: Literal["started", "running", "done"] | None = None
    record: str = ""


def try_lock(path: Path, *, inherited: bool = False) -> int | None:
    """An open descriptor that holds the lock file `path`, or None where another process holds it.

    The lock ends with the process, however that dies. With `inherited` child processes that are given the descriptor
    hold the lock too; without, they never do, so data workers that outlive a killed trainer do not block the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        (fcntl.flock if inherited else fcntl.lockf)(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for the lock file `path` and hold it: of processes that want to make the same thing, one makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, made where it is absent, and removed where nothing was written in it; `UserError`
    where another process holds it."""
    made = not folder.exists()
    descriptor = try_lock(folder / LOCK)
    if descriptor is None:
        raise UserError(f"Another process is writing in {folder}: stop it first, or choose another --output.")
    try:
        yield
    finally:
        if made and not _holds_more_than_lock(folder):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _holds_more_than_lock(folder: Path) -> bool:
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


def refuse_foreign(folder: Path, *, run_file: str = RUN_FILE, written: Sequence[str] = ("*",)) -> None:
    """`UserError` where `folder` has no `run_file` and holds what a run would replace, the `written` patterns."""
    if (folder / run_file).exists():
        return
    for found in (path for pattern in written for path in folder.glob(pattern) if path.name != LOCK):
        raise UserError(
            f"{folder} holds {found.relative_to(folder)} and no {run_file}, so it is no run to continue: choose "
            "another --output, nothing is overwritten."
        )


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says, None in an empty or absent folder; `UserError` where the folder holds anything else."""
    refuse_foreign(folder)
    path = folder / RUN_FILE
    if not path.exists():
        return None
    values: dict[str, Any] = files.read_json(path, remedy="choose another --output")
    try:
        validate(values, _RunFile, where=str(path))
    except UsageError as error:
        raise UserError(f"{error} Choose another --output.") from None
    return values


def write_run(folder: Path, run: Mapping[str, Any], *, state: str, record: Path | None = None) -> None:
    """Write `run.json`; `record` is where a finished run has its record, relative where it lies in the folder."""
    place = {}
    if record is not None:
        place = {"record": str(record.relative_to(folder) if folder in record.parents else record)}
    files.write_json(folder / RUN_FILE, {**run, "state": state, **place})


def record_of(folder: Path, run: Mapping[str, Any], *, results: Path | None = None) -> Path | None:
    """The record of a finished run; None where the file is gone, or is not in the folder `results`."""
    if run.get("state") != DONE or "record" not in run:
        return None
    path = folder / run["record"]
    return path if path.is_file() and results in (None, path.parent.parent) else None


def refuse_second_start(folder: Path, run: Mapping[str, Any]) -> NoReturn:
    """Refuse to start a run anew in its own folder; say whether it is done and what may be done with it."""
    if run.get("state") == DONE:
        raise UserError(
            f"{folder} holds this run, done (its record is {record_of(folder, run) or 'gone'}): pass --resume to print "
            "or make its record again, --eval-only to measure it again, or choose another --output."
        )
    raise UserError(f"{folder} already holds this run: pass --resume to continue it, or choose another --output.")


def refuse_other_run(folder: Path, before: Any, now: Any) -> None:
    """`UserError` naming the first difference between two descriptions of a run."""
    found = list(differences(before, now))
    if found:
        path, was, value = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"{folder} holds another run: {path} was {was!r} and is {value!r} now{more}; a run continues as it was "
            "started, so choose another --output."
        )


def refuse_other_transfer(folder: Path, earlier: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """`refuse_other_run` on what both say: a run that was killed while it started had no recipe yet. Weights with the
    same SHA-256 are the same, whatever their file or its folder is called now."""
    # A difference of the name is named before one of the digest.
    one, other = ({"name": None, **(said.get("weights") or {})} for said in (earlier, run))
    if one.get("sha256") and one["sha256"] == other.get("sha256"):
        one["name"] = other["name"]
    before, now = (
        {key: weights if key == "weights" else said[key] for key in IDENTITY if key in earlier and key in run}
        for said, weights in ((earlier, one), (run, other))
    )
    refuse_other_run(folder, before, now)


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two trees of JSON values differ: dotted path, value before, value now (None where there is none). Lists of
    tables or of lists are compared item by item when equally long; any other is one value."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif _nested(before) and _nested(now) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{path}.{index}".lstrip("."))
    elif before != now:
        yield path, before, now


def _nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)


@contextlib.contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Make `folder`; when what follows fails before the run is in state `running`, nothing is left behind."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    was_empty = not _holds_more_than_lock(folder)
    try:
        yield
    except BaseException:
        path = folder / RUN_FILE
        if was_empty and (not path.exists() or files.read_json(path).get("state") == STARTED):
            shutil.rmtree(folder)
            if existed:
                folder.mkdir()
        raise


@contextlib.contextmanager
def replaced_whole(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `folder` when nothing fails; an older one goes only then."""
    with temporary_folder(folder) as new:
        yield new
        (new / LOCK).unlink()
        old = folder.parent / f"{new.name}.old"
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, locked folder beside `folder`, removed at the end where it has not been moved. Those that killed
    processes left for the same `folder` are removed first: nobody holds their lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent.glob(f".{glob.escape(folder.name)}.*"))
    new = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, new, ignore_errors=True)
        if (descriptor := try_lock(new / LOCK)) is not None:
            stack.callback(os.close, descriptor)
        yield new


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing in a run's `folder`, whose lock must be held. What another node of the
    run is writing stays."""
    _remove_stale(folder.rglob(".*"))


def _remove_stale(paths: Iterable[Path]) -> None:
    for path in [path for path in paths if _LEFTOVER.fullmatch(path.name)]:
        if path.is_file():
            path.unlink(missing_ok=True)
        elif path.is_dir() and (descriptor := try_lock(path / LOCK)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)
