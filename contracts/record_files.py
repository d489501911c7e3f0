"""Where records lie: the results of a study, of a run of `twist transfer`, and what a suite keeps of its runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from twist.contracts.errors import UserError
from twist.contracts.record import RunRecord, is_marked, read_record

# A run folder's account of itself (transfer/folder.py), what else it holds that shares fields with a record, and the
# folder of its records.
RUN_ACCOUNT: Final = "run.json"
RUN_FILES: Final = (RUN_ACCOUNT, "recipe.json", "evaluation.json", "failure.json")
RESULTS: Final = "results"


def find_records(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """The record files under `paths`: a file as it is, a folder searched as `<folder>/<protocol>/*.json`.

    A folder of one protocol (`results/sample-knn`) is searched as `<folder>/*.json`. JSON without any of a record's
    fields is passed over; a file that is not JSON, or that has some of them, is yielded and is for `read_record` to
    refuse.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from filter(_may_be_record, sorted([*path.glob("*.json"), *path.glob("*/*.json")]))
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no record or folder of records at {path}.")


def read_records(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, RunRecord]]:
    """Every record under `paths` with its file.

    Raises:
        UserError: a path is absent or holds no record, or a record is not valid.
    """
    read: dict[str, tuple[Path, RunRecord]] = {}
    for path in map(Path, paths):
        files = _files_under(path)
        if not files:
            raise UserError(_none_under(path))
        for file in files:
            # A file that two of the paths lead to is one record.
            if (place := os.path.abspath(file)) not in read:
                read[place] = file, read_record(file)
    return list(read.values())


def find_collections(folder: Path) -> list[Path]:
    """The folders at or below `folder` whose records make a table each.

    `folder` itself where it holds records. Else the studies side by side in it (an inner folder or its `results`), and
    `folder` again where it holds runs of `twist transfer`: these make one table (`record_folders`). What a suite keeps
    of its runs counts only where there is nothing else, for it has collected those records elsewhere.
    """
    if _is_run(folder):
        return [place for place in (folder / RESULTS,) if _holds_records(place)]
    if _holds_records(folder):
        return [folder]
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    studies = [
        place for path in inner if not _is_run(path) for place in (path, path / RESULTS) if _holds_records(place)
    ]
    runs = [folder] if _of_runs(folder) else []
    if found := [*studies, *runs]:
        return found
    return [folder] if _of_suite(folder) else [place for place in inner if _of_suite(place)]


def record_folders(folder: Path) -> list[Path]:
    """Where the records of the runs in `folder` are, when it holds none itself: each run's `results`, else a suite's
    copies."""
    return [] if _holds_records(folder) else _of_runs(folder) or _of_suite(folder)


def _of_runs(folder: Path) -> list[Path]:
    # runs/<protocol>/<name>/results, as `twist transfer` writes them.
    found = [
        place for pattern in ("*", "*/*") for place in folder.glob(f"{pattern}/{RESULTS}") if _is_run(place.parent)
    ]
    return sorted(filter(_holds_records, found))


def _of_suite(folder: Path) -> list[Path]:
    # <output>/<protocol>/<name>/record, beside the run itself (transfer/suite.py).
    found = [place for pattern in ("*", "*/*") for place in folder.glob(f"{pattern}/record")]
    return sorted(place for place in found if _is_run(place.parent / "run") and _holds_records(place))


def _is_run(folder: Path) -> bool:
    return (folder / RUN_ACCOUNT).is_file()


def _holds_records(folder: Path) -> bool:
    return folder.is_dir() and any(find_records([folder]))


def _files_under(path: Path) -> list[Path]:
    if path.is_dir() and (_is_run(path) or not _holds_records(path)):
        places = find_collections(path)
        if places == [path]:
            return list(find_records(record_folders(path)))
        if places and _is_run(path):
            return list(find_records(places))
    return list(find_records([path]))


def _none_under(path: Path) -> str:
    if studies := find_collections(path):
        listed = " and ".join(map(str, studies))
        return f"There are no run records in {path} itself, but in {listed}: name the folders that you mean."
    return (
        f"There are no run records under {path}: `twist transfer` and `twist suite` write them; `twist compare "
        "--published-only` shows the published numbers alone."
    )


def _may_be_record(file: Path) -> bool:
    # A name that begins with a dot is a record that another process is writing (contracts.atomic).
    if file.name.startswith(".") or file.name in RUN_FILES:
        return False
    try:
        data = file.read_bytes()
        # Nearly every file is a record: what says so is not parsed twice.
        if b'"schema_version"' in data:
            return True
        values = json.loads(data)
    except (OSError, ValueError):
        return True  # reading it says what is wrong
    # `{}` says nothing about what it was.
    return is_marked(values) or values == {}
