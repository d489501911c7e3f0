"""Where images come from, and in which order: a folder of any depth, shards, a list, or Hugging Face `datasets`.

Images have numbers, 0 … N − 1. An epoch is a permutation of them that depends on (seed, epoch) alone. Global batch t is
positions [start + t·W·B, start + (t+1)·W·B) of it, of which rank r takes the r-th part of B. So a resume starts at any
position at once, also with another number of ranks, and each image still appears once an epoch; the last partial global
batch is dropped. A stream can promise less (`ImageStream`).

Shapes: `N` images, `B` images a rank, `W` ranks.
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from twist.catalog.card import find_card
from twist.catalog.card_data import pretraining_images
from twist.catalog.class_folders import READERS, TableImages
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, require
from twist.contracts.images import EXTENSIONS, MAX_PIXELS, UnreadableImage, image_bytes, image_names
from twist.pretrain.config import DataConfig
from twist.pretrain.data.views import ORDER_STREAM, REPLACEMENT_STREAM, Philox, Stage

# Sizes asked for at a time: on a network file system each is a round trip.
STAT_THREADS, STAT_PART = 16, 4096
# Unreadable images in a row after which no further replacement is looked for.
REPLACEMENT_TRIES = 100
# Batches that the thread which reads a stream is ahead of the workers.
BATCHES_AHEAD = 2
# Characters of a path (Linux's PATH_MAX).
LONGEST_PATH = 4096
# Folders that by their names are there to measure with.
HELD_OUT = frozenset({"val", "valid", "validation", "test"})


class RankShare(NamedTuple):
    """What decides the batches of one rank."""

    seed: int
    batch_size: int  # B
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Request:
    """One batch for a worker to make: image numbers (B,), and of a stream the encoded images too."""

    epoch: int
    stage: Stage
    indices: np.ndarray
    encoded: tuple[bytes, ...] | None = None


class Images:
    """Images by number, in a fixed order; those of more than `max_pixels` are unreadable.

    `remarks` are sentences for the user. `order` is the SHA-256 over the relative names in their order: with equal ones
    every number means the same image. None where there are no names.
    """

    max_pixels = MAX_PIXELS
    remarks: Sequence[str] = ()
    order: str | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """For messages: the image's path, or the data set and row."""
        raise NotImplementedError

    def encoded(self, index: int) -> bytes:
        """The image file's bytes; raises `UnreadableImage` when there are none."""
        raise NotImplementedError

    def requests(self, share: RankShare, *, epoch: int, stage: Stage, start_sample: int = 0) -> Iterator[Request]:
        """This rank's batches of an epoch from position `start_sample`, step by step."""
        seed, batch_size, rank, ranks = share
        order = permutation(len(self), seed=seed, epoch=epoch)
        for step in range(steps(len(self) - start_sample, share)):
            begin = start_sample + (step * ranks + rank) * batch_size
            yield Request(epoch, stage, order[begin : begin + batch_size])

    def fingerprint(self) -> str | None:
        """SHA-256 over the relative names and sizes of image files, sorted: the same images, in any place. None for
        Hugging Face's, whose own fingerprints differ between machines."""


def open_images(config: DataConfig) -> Images:
    """The images that `config` names; `UserError` in one sentence when there are none or they cannot be opened."""
    images = _open(config)
    images.max_pixels = config.max_pixels
    return images


def _open(config: DataConfig) -> Images:
    if config.format == "folder":
        config = _as_shards(config)
    if config.format == "datasets":
        if config.dataset_options.get("streaming"):
            return ImageStream(config)
        rows, column = _load_rows(config)
        return HubImages(f"{config.root} ({config.dataset_options.get('split', 'train')})", column, rows)
    if config.format == "list":
        return _listed(Path(config.root))
    card = find_card(Path(config.root))
    pictures, held_out = (Path(config.root), set()) if card is None else pretraining_images(card)
    if isinstance(pictures, TableImages):
        return HubImages(str(pictures.folder), pictures.column, pictures.chosen_rows())
    return _in_folder(pictures, config.exclude, held_out)


def _as_shards(config: DataConfig) -> DataConfig:
    """`config` for `datasets` where `data.root` is Parquet or tar shards, or an address; any other as it is."""
    root, hub = config.root, "hf://datasets/"
    shards = root if "://" in root else _shard_files(Path(root))
    if not shards:
        return config
    ending = PurePosixPath(shards if isinstance(shards, str) else shards[0]).suffix
    if ending in READERS:
        reader, options = READERS[ending], {"data_files": shards, **config.dataset_options}
    elif root.startswith(hub):
        reader, options = root.removeprefix(hub), config.dataset_options
    else:
        raise UsageError(f"data.root={root} names no shards: end it with a pattern, as {root.rstrip('/')}/*.tar.")
    return config.model_copy(update={"format": "datasets", "root": reader, "dataset_options": options})


def _shard_files(place: Path) -> list[str]:
    """The shards that `place` is (a file or a pattern) or holds."""
    if place.suffix in (".lmdb", ".mdb") or (place / "data.mdb").is_file():
        raise UsageError(
            f"{place} is an LMDB, whose images come out of the published code's pickles alone: pass the folder that it "
            "was made from, or write the images to Parquet or tar shards."
        )
    inside = [*(place.iterdir() if place.is_dir() else place.parent.glob(place.name))]
    # Archives beside pictures or class folders are no shards: they are what those were unpacked from.
    if any(path.is_dir() or path.suffix.lower() in EXTENSIONS for path in inside if path.name[0] != "."):
        return []
    ending = next((ending for ending in READERS if any(path.suffix == ending for path in inside)), None)
    return sorted(str(path) for path in inside if path.suffix == ending)


def permutation(images: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of the N images in an epoch, (N,) int64; 20 ms for ImageNet's 1.28 million."""
    return Philox().at(seed, ORDER_STREAM, epoch=epoch).permutation(images)


def steps(images: int, share: RankShare) -> int:
    """Whole global batches among so many images."""
    return max(images, 0) // (share.batch_size * share.world_size)


def replacements(images: int, *, seed: int, epoch: int, index: int) -> Iterator[int]:
    """Where to look when image `index` cannot be read: numbers that depend on (seed, epoch, index) alone."""
    generator = Philox().at(seed, REPLACEMENT_STREAM, epoch=epoch, index=index)
    for _ in range(REPLACEMENT_TRIES):
        yield int(generator.integers(images))


class ImageFiles(Images):
    """Image files by their paths relative to `root`.

    Their names are in one numpy array: a forked worker that reads a Python string writes its reference count, so its
    memory page is copied into every worker; of a million strings that is gigabytes.
    """

    def __init__(self, root: Path, names: Sequence[str], remarks: Sequence[str] = ()) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._root, self._names, self.remarks = os.fsencode(root), np.array(encoded), remarks
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.order = hashlib.sha256(b"".join(encoded) + ends.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._root, self._names[index]))

    def encoded(self, index: int) -> bytes:
        return image_bytes(self.name(index))

    def fingerprint(self) -> str:
        parts = [range(len(self))[start : start + STAT_PART] for start in range(0, len(self), STAT_PART)]
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            lines = pool.map(lambda part: [*map(self._size_and_name, part)], parts)
            return hashlib.sha256(b"".join(sorted(itertools.chain(*lines)))).hexdigest()

    def _size_and_name(self, index: int) -> bytes:
        try:
            size = os.path.getsize(self.name(index))
        except (OSError, ValueError):  # an unreadable image, which the loader names and counts
            size = -1
        return b"%d %s\n" % (size, self._names[index])


def _in_folder(root: Path, exclude: Sequence[str], held_out: set[Path]) -> ImageFiles:
    """Every image below `root`, at any depth, in the order of their relative paths, but for those that a pattern of
    `exclude` meets, or that are `held_out` (resolved paths) to measure with."""
    if not root.is_dir():
        raise UserError(
            f"There is no image folder at {root}: check data.root, or make a sample with `twist data sample`."
        )
    found = image_names(root)
    names = [
        name
        for name in found
        if not any(fnmatch(name, pattern) for pattern in exclude)
        and not (held_out and (root / name).resolve() in held_out)
    ]
    if not names:
        raise UserError(f"{root} holds no images ({', '.join(sorted(EXTENSIONS))} are looked for, at any depth).")
    remarks = []
    if len(names) < len(found):
        remarks.append(f"{len(found) - len(names)} images are left out: held out by the data card, or by data.exclude.")
    # Trained on, pictures that are later measured with make numbers too high.
    measured_with = [] if held_out else [name for name in names if {*name.lower().split("/")[:-1]} & HELD_OUT]
    if measured_with:
        folder = measured_with[0].rpartition("/")[0]
        remarks.append(
            f"Note: {len(measured_with)} of the images lie in folders such as {folder}/ and are trained on; to measure "
            f"with them later, leave them out with data.exclude='[\"{folder}/*\"]'."
        )
    return ImageFiles(root, names, remarks)


def _listed(path: Path) -> ImageFiles:
    """One path a line, in the list's order; relative paths are relative to the list file. Empty lines are skipped."""
    remedy = 'data.root with data.format = "list" names a text file with one image path a line'
    # Split at line feeds alone: other separators that `splitlines` knows may be part of a name.
    lines = files.read_text(path, remedy=remedy, most=files.MOST_DATA, errors="surrogateescape").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    if not names or max(map(len, names)) > LONGEST_PATH:  # every name has the room of the longest
        raise UserError(f"{path} lists no images, or has lines that are no paths: put one image path on each line.")
    return ImageFiles(path.parent, names)


class HubImages(Images):
    """Images of a Hugging Face data set (Parquet, tar shards, a hub name), memory-mapped. The files' bytes are taken as
    they are in the set; decoding is ours, so pixels do not depend on the format."""

    def __init__(self, title: str, column: str, rows: Any) -> None:
        self._title, self._column = title, column
        # One column only: other columns (captions, masks) are then never read.
        self._rows = rows.select_columns([column])

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self._title}"

    def encoded(self, index: int) -> bytes:
        return _image_bytes(self._rows[index][self._column], name=self.name(index))


class ImageStream(Images):
    """A Hugging Face data set with `streaming = true` (object stores, tar shards), which has no numbers.

    - Order: shards are shuffled by (seed, epoch), then images within a buffer of `data.stream_shuffle_buffer`. It is
      the same again for the same number of ranks, whatever the workers.
    - Ranks: each reads its own shards (every W-th image when the shards do not divide), and starts again when they are
      shorter than the epoch; so an image may appear twice in an epoch, and another not at all.
    - Resume within an epoch: the same batches, on the same number of ranks, after reading the images before again.
    - An image's number, on which its views depend, is a digest of its bytes.
    """

    def __init__(self, config: DataConfig) -> None:
        self._rows, self._column = _load_rows(config)
        self._buffer = config.stream_shuffle_buffer
        split = (self._rows.info.splits or {}).get(str(self._rows.split))
        self._length = config.stream_images or (split.num_examples if split is not None else 0)
        if not self._length:
            raise UserError(
                f"The stream {config.root} does not say how many images it has: set data.stream_images to the images "
                "of an epoch."
            )

    def __len__(self) -> int:
        """Images of an epoch, over all ranks."""
        return self._length

    def requests(self, share: RankShare, *, epoch: int, stage: Stage, start_sample: int = 0) -> Iterator[Request]:
        """Read by a thread a few ahead: reading from a network must not hold up the training process."""
        images = itertools.islice(self._encoded(share, epoch), start_sample // share.world_size, None)

        def read() -> Request:
            encoded = tuple(itertools.islice(images, share.batch_size))
            return Request(epoch, stage, np.array([*map(image_number, encoded)], dtype=np.int64), encoded)

        pool, ahead = ThreadPoolExecutor(1, thread_name_prefix="image stream"), deque[Any]()
        try:
            for _ in range(steps(len(self) - start_sample, share)):
                ahead.append(pool.submit(read))
                if len(ahead) > BATCHES_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _encoded(self, share: RankShare, epoch: int) -> Iterator[bytes]:
        from datasets.distributed import split_dataset_by_node

        # One number for seed and epoch: not everything that is done to a stream keeps the library's own epoch.
        order = int(Philox().at(share.seed, ORDER_STREAM, epoch=epoch).integers(2**63))
        shuffled = self._rows.shuffle(seed=order, buffer_size=self._buffer)
        rows = split_dataset_by_node(shuffled, rank=share.rank, world_size=share.world_size)
        while True:
            row = None
            for row in rows:
                _require_column(self._column, row)
                try:
                    yield _image_bytes(row[self._column], name="of the stream")
                except UnreadableImage:
                    yield b""  # the worker names and replaces it, as it does with any other damage
            if row is None:
                raise UserError(f"The stream has no image for rank {share.rank}: it needs more shards or images.")


def image_number(data: bytes) -> int:
    """63 bits of the bytes' BLAKE2b digest: the number of an image of a stream."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def _load_rows(config: DataConfig) -> tuple[Any, str]:
    """`datasets.load_dataset` as `config` asks, one split, and its image column, left as bytes: `data.image_column`, or
    the one column of images where there is no `image` (`jpg` of tar shards)."""
    require("hub")
    import datasets

    options = {"split": "train", **config.dataset_options}
    try:
        rows = datasets.load_dataset(config.root, **options)
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Hugging Face datasets cannot open {config.root} with {options}: {reason.rstrip('.')}; check "
            "data.root and data.dataset_options, which go to load_dataset as they are."
        ) from None
    if isinstance(rows, dict):
        raise UsageError(
            f"{config.root} gives several splits ({', '.join(rows)}): name one in data.dataset_options.split."
        )
    column, names = config.image_column, rows.column_names
    if names is not None:  # a stream may not know them before its first row
        images = [name for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.Image)]
        column = images[0] if column == "image" and column not in names and len(images) == 1 else column
        _require_column(column, names)
    return rows.cast_column(column, datasets.Image(decode=False)), column


def _require_column(column: str, found: Iterable[str]) -> None:
    if column not in found:
        raise UsageError(f"The data set has no column {column} (it has {', '.join(found)}): set data.image_column.")


def _image_bytes(value: Any, *, name: str) -> bytes:
    """The file's bytes of an undecoded `datasets.Image` value: in the set, or in a file whose path it has."""
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    if isinstance(value, dict) and value.get("path"):
        return image_bytes(value["path"])
    raise UnreadableImage(f"Cannot read the image {name}: the row has neither bytes nor a path")
