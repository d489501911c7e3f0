"""Where images come from: a folder of any depth, a list file, or Hugging Face `datasets`; each by number, as bytes.

Names lie in one array of bytes, not in a million Python strings: a forked worker that only reads a string writes its
reference count, so its memory page is copied into every worker, and a million names into each of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from twist.contracts.errors import UsageError, UserError
from twist.contracts.images import EXTENSIONS, UnreadableImage, decode, image_names
from twist.pretrain.config import DataConfig

# Sizes asked for at a time: on a network file system each is a round trip.
STAT_THREADS, STAT_PART = 16, 4096


class ImageSource(Protocol):
    """Images by number, 0 … len − 1, in a fixed order."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls the image: its path, or the data set and row."""

    def label(self, index: int) -> int | None:
        """Its class, where the source has classes."""

    def encoded(self, index: int) -> bytes:
        """The image file's bytes; raises `UnreadableImage` when there are none."""

    def decode(self, index: int) -> Tensor:
        """uint8 RGB (3, H, W), upright; raises `UnreadableImage`."""


def open_images(config: DataConfig) -> ImageSource:
    """The images that `config` names; `UserError` in one sentence when there are none or they cannot be opened."""
    if config.format == "folder":
        return FolderImages(config.root)
    if config.format == "list":
        return ListedImages(config.root)
    return HubImages(config)


def is_stream(config: DataConfig) -> bool:
    """Whether `config` asks for a stream, which has no numbers: `twist.pretrain.data.stream.ImageStream`."""
    return config.format == "datasets" and bool(config.dataset_options.get("streaming"))


def fingerprint(config: DataConfig) -> str | None:
    """SHA-256 over the relative names and sizes of the image files, sorted: the same images, wherever they lie.

    None for `datasets`: a stream has no names, and the library's own fingerprints tell machines apart, not images.

    Raises:
        UserError: there are no images.
    """
    return fingerprint_of(open_images(config)) if config.format != "datasets" else None


def fingerprint_of(images: object) -> str | None:
    """The same for images that are open already."""
    return images.fingerprint() if isinstance(images, _Files) else None


def order_of(images: object) -> str | None:
    """SHA-256 over the relative names in their order: two sources of one order give every number the same image."""
    return images.order() if isinstance(images, _Files) else None


class Names:
    """Strings in one uint8 array with offsets: cheap to fork, to pickle, and to hold by the million."""

    def __init__(self, names: Iterable[str]) -> None:
        # surrogateescape keeps file names that are no valid UTF-8.
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def digest(self) -> str:
        return hashlib.sha256(self._bytes.tobytes() + self._ends.tobytes()).hexdigest()

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = self._ends[index - 1] if index else 0
        return self._bytes[begin : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")


class _Files:
    """Image files below a folder, by relative path."""

    def __init__(self, root: Path, names: Sequence[str], labels: np.ndarray | None = None) -> None:
        self._root = str(root)
        self._names = Names(names)
        self._labels = labels

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._names[index])

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def order(self) -> str:
        return self._names.digest()

    def fingerprint(self) -> str:
        parts = [range(start, min(start + STAT_PART, len(self))) for start in range(0, len(self), STAT_PART)]
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            lines = sorted(line for part in pool.map(self._names_and_sizes, parts) for line in part)
        return hashlib.sha256(b"".join(lines)).hexdigest()

    def _names_and_sizes(self, part: range) -> list[bytes]:
        return [b"%d %s\n" % (self._size(i), self._names[i].encode("utf-8", "surrogateescape")) for i in part]

    def _size(self, index: int) -> int:
        try:
            return os.path.getsize(self.name(index))
        except OSError:  # a bad image, which the loader names and counts when it meets it
            return -1

    def encoded(self, index: int) -> bytes:
        name = self.name(index)
        try:
            with open(name, "rb") as file:
                return file.read()
        except OSError as error:
            raise UnreadableImage(f"Cannot read the image {name}: {error.strerror or error}") from None

    def decode(self, index: int) -> Tensor:
        return decode(self.encoded(index), name=self.name(index))


class FolderImages(_Files):
    """Every image below `root`, at any depth, in the order of their relative paths.

    Labels exist when every image lies in a folder below `root` and there are at least two such folders: the class is
    the first folder of the path, as in ImageNet's train/<class>/.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        root = Path(root)
        if not root.is_dir():
            raise UserError(
                f"There is no image folder at {root}: check data.root, or make a sample with `twist data sample`."
            )
        names = image_names(root)
        if not names:
            raise UserError(f"{root} holds no images ({', '.join(sorted(EXTENSIONS))} are looked for, at any depth).")
        super().__init__(root, names, _folder_labels(names))


class ListedImages(_Files):
    """One path a line, in the list's order; relative paths are relative to the list file. Empty lines are skipped."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        try:
            # By line feeds alone: other separators that `splitlines` knows may be part of a name.
            text = path.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
            lines = text.split("\n")
        except OSError as error:
            raise UserError(
                f"Cannot read the list of images {path} ({error.strerror or error}): data.root with "
                'data.format = "list" names a text file with one image path a line.'
            ) from None
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            raise UserError(f"{path} lists no images: put one image path on each line.")
        super().__init__(path.parent, names)


class HubImages:
    """Images of a Hugging Face data set (Parquet, tar shards, a hub name), memory-mapped; `datasets` must be installed.

    The image files' bytes are taken as they lie in the set; decoding is ours, so pixels do not depend on the format.
    """

    def __init__(self, config: DataConfig) -> None:
        self._title = f"{config.root} ({config.dataset_options.get('split', 'train')})"
        self._column = config.image_column
        self._rows: Any = load_rows(config)
        labels = class_column(self._rows)
        values = None if labels is None else self._rows[labels]
        # A row without a class makes it a set without classes, which pretraining does not need.
        self._labels = None if values is None or None in values else np.asarray(values, dtype=np.int64)
        # One column only: a row then costs one lookup, and other columns (captions, masks) are never read.
        self._rows = self._rows.select_columns([self._column])

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self._title}"

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def encoded(self, index: int) -> bytes:
        return image_bytes(self._rows[index][self._column], name=self.name(index))

    def decode(self, index: int) -> Tensor:
        return decode(self.encoded(index), name=self.name(index))


def load_rows(config: DataConfig) -> Any:
    """`datasets.load_dataset` as `config` asks, one split, the image column left as bytes."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            'data.format = "datasets" needs the Hugging Face package: pip install "twist-suite[hub]".'
        ) from None
    options = {"split": "train", **config.dataset_options}
    try:
        rows = datasets.load_dataset(config.root, **options)
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Hugging Face datasets cannot open {config.root} with {options}: {reason.rstrip('.')}; check "
            "data.root and data.dataset_options, which go to load_dataset as they are."
        ) from None
    if isinstance(rows, dict):
        raise UsageError(
            f"{config.root} gives several splits ({', '.join(rows)}): name one in data.dataset_options.split."
        )
    # A stream may not know its columns before its first row; the column is then checked when a row arrives.
    if rows.column_names is not None and config.image_column not in rows.column_names:
        raise UsageError(
            f"{config.root} has no column {config.image_column} (it has {', '.join(rows.column_names)}): "
            "set data.image_column."
        )
    return rows.cast_column(config.image_column, datasets.Image(decode=False))


def image_bytes(value: Any, *, name: str) -> bytes:
    """The file's bytes of an undecoded `datasets.Image` value: inside the set, or beside it under its path."""
    if isinstance(value, dict):
        if value.get("bytes"):
            return bytes(value["bytes"])
        if value.get("path"):
            try:
                return Path(value["path"]).read_bytes()
            except OSError as error:
                raise UnreadableImage(f"Cannot read the image {name}: {error.strerror or error}") from None
    raise UnreadableImage(f"Cannot read the image {name}: the row has neither bytes nor a path")


def _folder_labels(names: Sequence[str]) -> np.ndarray | None:
    tops = [name.split(os.sep, 1)[0] for name in names if os.sep in name]
    classes = sorted(set(tops))
    if len(tops) < len(names) or len(classes) < 2:
        return None
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[top] for top in tops], dtype=np.int32)


def class_column(rows: Any) -> str | None:
    """The one column of class labels, when there is exactly one."""
    import datasets

    found = [name for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.ClassLabel)]
    return found[0] if len(found) == 1 else None
