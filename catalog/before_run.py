"""What a run asks of the data below its root before it starts: are they whole, and which data are they.

Both are quick, seconds for the largest sets. The identity is one short name, so that no number is compared with, or
continued on, other data: of a built-in sample its settings, of the public sets a digest of their lists, names, and
sizes of some files. It has neither places nor times in it; a change of a few images keeps it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from twist.catalog.check import Report, look_at
from twist.catalog.class_folders import class_names, find_subset, split_files
from twist.catalog.data_sets import DataSet, Files, Split, Truth, find_data_set, read_names, read_sample, spread
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_file, sha256_json
from twist.contracts.images import file_entries
from twist.contracts.progress import Progress
from twist.contracts.record import RunRecord, Task

# The annotations that each task reads.
TRUTH: dict[Task, tuple[Truth, ...]] = {
    "detection": ("boxes", "polygons", "instances"),
    "instance-segmentation": ("boxes", "polygons", "instances"),
    "segmentation": ("masks",),
    "classification": (),
    "clustering": (),
}
# Files of a folder whose sizes are looked at, and classes of a tree of class folders that are listed.
SIZED, LISTED = 16, 16


def require_data(
    names: Sequence[str], root: Path, *, task: Task, scale: Literal["full", "sample"]
) -> dict[str, Any] | None:
    """The sample.json of `root` (None when it is no sample), once what a run of `task` reads there is whole.

    Args:
        names: of data sets, rows of the table.
        scale: whether the run is of the built-in sample or of the real data.

    `UserError`: something is missing or not what it should be.
    """
    rows = [find_data_set(name) for name in names]
    sample = read_sample(root)
    if all(row.class_folders for row in rows):
        return sample  # any folder of classes will do, and the engine reads all of it at once
    if scale == "sample" and sample is None:
        raise UserError(
            f"{root} holds no sample.json, and this protocol runs on the sample: `twist data sample {root}` makes it."
        )
    if scale == "full" and sample is not None:
        raise UserError(f"{root} is a sample, and this protocol needs the real data: use a sample-… protocol for it.")
    report = Report(Progress("", total=None, quiet=True), quick=True)
    for row in rows:
        look_at(row, root, sample, report, TRUTH[task])
    if errors := [finding for finding in report.findings if finding.severity == "error"]:
        missing = [str(Path(one.where).relative_to(root)) for one in errors if one.message == "is missing"]
        first = f"{errors[0].where}: {errors[0].message}: {errors[0].remedy}".rstrip(".")
        raise UserError(
            f"{f'{root} lacks ' + ', '.join(missing) if missing else first}; `twist data check {rows[0].group} {root}` "
            "says all that is missing or wrong and where it comes from."
        )
    return sample


def identify_data(names: Sequence[str], root: Path, *, subset: str | None = None) -> str | None:
    """Which data a run on the data sets `names` would read below `root`; `subset`: its list of labelled images.

    None where a part is missing or unreadable, which a run refuses. `UserError`: a damaged sample.json.
    """
    rows = [find_data_set(name) for name in names]
    sample = read_sample(root)
    if sample is not None:
        return _name_sample(sample)
    try:
        facts = [list(_facts(row, row.place(root), subset)) for row in rows]
    except (OSError, UserError):
        return None
    return f"{' + '.join(names)} {sha256_json(facts)[:12]}"


def data_of(record: RunRecord) -> str | None:
    """What `record` was measured on, None where it does not say: earlier versions kept this of samples alone."""
    sample = record.recipe.get("sample")
    return record.data or (_name_sample(sample) if sample else None)


def _name_sample(settings: Mapping[str, Any]) -> str:
    source, size, seed, version = (settings.get(key) for key in ("source", "size", "seed", "format_version"))
    return f"sample of {source}, {size}, seed {seed}, format {version}"


def _facts(row: DataSet, place: Path, subset: str | None) -> Iterator[Any]:
    """What tells data apart. Records hold digests of it: for the existing rows it may not change."""
    splits = [*row.run_splits().values()]
    if row.class_folders:
        for name in row.run_splits():
            found = split_files(place, name)
            if not found:
                raise FileNotFoundError(place / name)
            yield from (_class_facts(found[0]) if found[0].is_dir() else ([x.name, x.stat().st_size] for x in found))
        if subset is not None:
            path = find_subset(place, subset)
            yield None if path is None else sha256_file(path)
        return
    described = [split for split in splits if split.names.endswith(".json")]
    for split in described:
        yield (place / split.names).stat().st_size
    # Where the annotation files name all images, the smaller split stands for both.
    for split in described[-1:] or splits:
        names = read_names(place / split.names) if split.names.endswith(".txt") else _images_of(split, place)
        for files in (split.images, split.truth.get("boxes")):
            if files is not None:
                yield _names_and_sizes(place, files, names)


def _class_facts(folder: Path) -> Iterator[Any]:
    classes = list(class_names(folder))
    yield classes
    for label in spread(classes, LISTED):
        files = sorted(name for name in os.listdir(folder / label) if not name.startswith("."))
        yield _names_and_sizes(folder, Files(label, ""), files)


def _names_and_sizes(place: Path, files: Files, names: Sequence[str]) -> list[Any]:
    """Digest of the file names, and the sizes of some files."""
    if not names:
        raise FileNotFoundError(place / files.folder)
    ends = [f"{name}{files.suffix}" for name in names]
    return [sha256_json(ends), [(place / files.folder / name).stat().st_size for name in spread(ends, SIZED)]]


def _images_of(split: Split, place: Path) -> list[str]:
    suffix = split.images.suffix
    entries = file_entries(place / split.images.folder, lambda name: name.endswith(suffix))
    return sorted(name.removesuffix(suffix) for name, _ in entries)
