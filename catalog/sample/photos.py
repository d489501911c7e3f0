"""The `photos` source of the sample: real cut-outs pasted on real photographs, from Debian packages.

Cut-outs are Tux Paint's photographic stamps, backgrounds are GCompris' photographs of monuments and the sea and some
wallpapers of Lomiri and MATE. Pictures stay in the user's cache: none is part of this project, and each package's
`/usr/share/doc/<package>/copyright` says whose they are. Train and val show the same stamps, posed and lit anew, on
disjoint photographs: to know an object again in another place can be learned from them. That a bird never seen is a
bird cannot, from as few birds as there are.
"""

import functools
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from twist.catalog.sample.scene import DISTRACTOR, Array, Cutout, Split
from twist.contracts import files
from twist.contracts.config import read_toml
from twist.contracts.errors import UserError
from twist.contracts.files import cache_folder, sha256_file
from twist.contracts.images import UnreadableImage, open_picture
from twist.contracts.progress import Progress
from twist.contracts.run_folder import temporary_folder

TAKEN = read_toml(Path(__file__).with_name("photos.toml"))
CLASSES = tuple(kind for kind in TAKEN["stamps"] if kind != "distractor")
LEFT_OUT = {name for kind, names in TAKEN["left_out"].items() if kind != "drawings" for name in names}
# Changes when what is prepared changes, so that an old cache is not taken for a new one.
PREPARED_VERSION = 2
RCC_FOLDER = "usr/share/gcompris-qt/rcc"
SMALLEST_STAMP = 45  # pixels on the longer side
STAMP_SIDE, BACKGROUND_SIDE = 288, 640
# Stamps that are taken of each class. The small sample's 600 labelled pictures then show each one ten times; with all
# of them (up to forty a class) a picture's nearest neighbours could not be of its own stamp.
SPECIMENS = 6
VAL_SHARE = 0.25
TIMEOUT_S = 900  # of one call of apt
# A tree entry of a Qt resource file: name offset, flags, two numbers, time.
ENTRY = struct.Struct(">IHIIQ")
COMPRESSED_ZLIB, FOLDER, COMPRESSED_ZSTD = 1, 2, 4
MAX_FILE_BYTES, MAX_BYTES, MAX_ENTRIES = 64 * 2**20, 512 * 2**20, 100_000


def prepare_photos(*, progress: bool = True) -> Path:
    """The folder of prepared cut-outs and backgrounds in the user's cache; made on the first call (280 MB of packages).

    Packages and what they unpack to are removed again; about 40 MB of resized pictures stay, and `provenance.json`.

    Raises:
        UserError: the packages cannot be had, or hold too few of the pictures that are looked for.
    """
    target = cache_folder() / f"photos-{PREPARED_VERSION}"
    if (target / "provenance.json").exists():
        return target
    with temporary_folder(target) as work:
        packages = []
        with Progress("photos: fetch", total=len(TAKEN["packages"]), unit="package", quiet=not progress) as bar:
            for package in fetch(TAKEN["packages"], work):
                packages.append(package)
                bar.advance()
        prepared = work / "prepared"
        with Progress("photos: prepare", total=None, unit="picture", quiet=not progress) as bar:
            stamps = _prepare_stamps(work / "root" / "usr/share/tuxpaint/stamps", prepared / "stamps", bar)
            backgrounds = _prepare_backgrounds(work / "root", prepared / "backgrounds", bar)
        provenance = {"packages": packages, "stamps": stamps, "backgrounds": backgrounds}
        files.write_json(prepared / "provenance.json", provenance)
        try:
            prepared.replace(target)
        except OSError:
            # Another process was faster; what it made is the same.
            if not (target / "provenance.json").exists():
                raise
    return target


class Photos:
    """The `photos` source on a folder of `prepare_photos`."""

    classes = CLASSES

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = prepare_photos() if folder is None else folder
        self._provenance = files.read_json(self.folder / "provenance.json", remedy="remove its folder")

    def background(self, rng: np.random.Generator, height: int, width: int, split: Split) -> Array:
        names = self._provenance["backgrounds"][split]
        picture = _picture(self.folder / "backgrounds" / f"{names[rng.integers(len(names))]}.png")
        # The largest window of the frame's shape that fits, times a random share.
        scale = min(picture.height / height, picture.width / width) * float(rng.uniform(0.35, 1.0))
        rows, columns = scale * height, scale * width
        top, left = rng.uniform(0, picture.height - rows), rng.uniform(0, picture.width - columns)
        window = picture.resize(
            (width, height), Image.Resampling.BICUBIC, box=(left, top, left + columns, top + rows), reducing_gap=2.0
        )
        if rng.random() < 0.5:
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _behind(rng, window)

    def cutout(self, rng: np.random.Generator, class_index: int, size: int, light: tuple[float, float]) -> Cutout:
        kind = "distractor" if class_index == DISTRACTOR else self.classes[class_index]
        names = self._provenance["stamps"][kind]
        stamp = _picture(self.folder / "stamps" / kind / f"{names[rng.integers(len(names))]}.png")
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Shrink first (cheap and free of aliasing), turn, then cut to what is left of it.
        factor = 1.3 * size / max(stamp.size)
        shape = (max(4, round(stamp.width * factor)), max(4, round(stamp.height * factor)))
        small = stamp.resize(shape, Image.Resampling.BICUBIC, reducing_gap=2.0)
        turned = small.rotate(float(rng.uniform(-28, 28)), Image.Resampling.BICUBIC, expand=True)
        turned = turned.crop(turned.getchannel("A").point(lambda alpha: 255 * (alpha > 40)).getbbox())
        factor = size / max(turned.size)
        shape = (max(3, round(turned.width * factor)), max(3, round(turned.height * factor)))
        pixels = np.asarray(turned.resize(shape, Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)
        return Cutout(_relit(rng, pixels[..., :3], light), pixels[..., 3])

    def provenance(self) -> dict[str, Any]:
        taken = {kind: self._provenance[kind].items() for kind in ("stamps", "backgrounds")}
        return {
            "packages": self._provenance["packages"],
            "licence": "each package's /usr/share/doc/<package>/copyright; the pictures are not ours to pass on",
            "split": "train and val use the same stamps on disjoint backgrounds",
            **{kind: {part: len(names) for part, names in parts} for kind, parts in taken.items()},
        }


def _behind(rng: np.random.Generator, photograph: Image.Image) -> Array:
    """The photograph as a lens shows what lies behind its subject: out of focus, hazy, pale; (H, W, 3).

    There are few photographs, and vivid ones are all that two crops of a picture need to be matched: objects would not
    be learned (`shapes.py` draws muted grounds for the same reason).
    """
    blur = max(photograph.size) * float(rng.uniform(0.004, 0.025))
    pixels = np.asarray(photograph.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32) / np.float32(255)
    grey = pixels.mean(axis=2, keepdims=True)
    pale = grey + np.float32(rng.uniform(0.1, 0.6)) * (pixels - grey)
    haze = np.float32(rng.uniform(0.3, 0.7))
    return haze + np.float32(rng.uniform(0.35, 0.75)) * (pale - haze)


def _relit(rng: np.random.Generator, rgb: Array, light: tuple[float, float]) -> Array:
    """Brighter towards the light, with a little change of exposure and colour, (h, w, 3)."""
    height, width, _ = rgb.shape
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    slope = 1 + np.float32(rng.uniform(0, 0.25)) * (np.float32(light[0]) * x + np.float32(light[1]) * y)
    tint = rng.uniform(0.92, 1.08, 3).astype(np.float32) * np.float32(rng.uniform(0.75, 1.2))
    return np.clip(rgb * slope * tint, 0, 1)


@functools.lru_cache(maxsize=1024)
def _picture(path: Path) -> Image.Image:
    with open_picture(path) as image:
        image.load()
        return image


def _prepare_stamps(root: Path, target: Path, bar: Progress) -> dict[str, list[str]]:
    """Write `SPECIMENS` stamps a class, and every distractor, as RGBA PNGs below `target`/<kind>; kind → names."""
    stamps: dict[str, list[str]] = {}
    for kind, folders in TAKEN["stamps"].items():
        names: list[str] = []
        paths = (path.relative_to(root).as_posix() for folder in folders for path in (root / folder).rglob("*.png"))
        for path in sorted(paths, key=_digest):
            drawing = any(mark in path.lower() for mark in TAKEN["left_out"]["drawings"])
            if drawing or Path(path).stem in LEFT_OUT:
                continue
            stamp = _open(root / path).convert("RGBA")
            if max(stamp.size) < SMALLEST_STAMP:
                continue
            stamp.thumbnail((STAMP_SIDE, STAMP_SIDE), Image.Resampling.LANCZOS)
            name = path.removesuffix(".png").replace("/", "-")
            (target / kind).mkdir(parents=True, exist_ok=True)
            stamp.save(target / kind / f"{name}.png", compress_level=1)
            names.append(name)
            bar.advance()
            if len(names) == SPECIMENS and kind in CLASSES:
                break
        if len(names) < SPECIMENS:
            raise UserError(
                f"tuxpaint-stamps-default has only {len(names)} photographic stamps of {kind}: its version differs "
                "from the one this sample was made for (2022.06.04); use --source shapes."
            )
        stamps[kind] = sorted(names)
    return stamps


def _prepare_backgrounds(root: Path, target: Path, bar: Progress) -> dict[str, list[str]]:
    """Write every taken photograph as an RGB PNG below `target`; split → names, a fixed quarter of them for val."""
    target.mkdir(parents=True)
    names = []
    for name, picture in _background_files(root):
        picture = picture.convert("RGB")
        picture.thumbnail((BACKGROUND_SIDE, BACKGROUND_SIDE), Image.Resampling.LANCZOS)
        picture.save(target / f"{name}.png", compress_level=1)
        names.append(name)
        bar.advance()
    if len(names) < 8:
        raise UserError(f"Only {len(names)} photographs for backgrounds are in the packages: use --source shapes.")
    ordered = sorted(sorted(names), key=_digest)
    count = max(2, round(len(names) * VAL_SHARE))
    return {"train": sorted(ordered[count:]), "val": sorted(ordered[:count])}


def _background_files(root: Path) -> Iterator[tuple[str, Image.Image]]:
    for file_name, wanted in TAKEN["backgrounds"]["gcompris"].items():
        path = root / RCC_FOLDER / file_name

        def taken(name: PurePosixPath, wanted: list[str] = wanted) -> bool:
            return name.suffix == ".webp" and (not wanted or name.stem in wanted)

        for name, content in read_rcc(path, taken) if path.exists() else ():
            picture = _open(content)
            # The monuments' file holds maps and buttons too: photographs are the large pictures without alpha.
            if picture.mode == "RGB" and min(picture.size) >= 300:
                yield f"{path.stem}-{name.stem}", picture
    for wallpaper in TAKEN["backgrounds"]["wallpapers"]:
        path = root / "usr/share/backgrounds" / wallpaper
        if path.exists():
            yield f"wallpaper-{path.stem}", _open(path)


def _open(file: Path | bytes) -> Image.Image:
    try:
        with open_picture(file, name="of the packages" if isinstance(file, bytes) else "") as image:
            # A JPEG can be decoded at a half or a quarter, which is still more than is kept.
            image.draft("RGB", (2 * BACKGROUND_SIDE, 2 * BACKGROUND_SIDE))
            image.load()
            return image
    except UnreadableImage as error:
        raise UserError(f"{error}: use --source shapes.") from None


def _digest(name: str) -> int:
    """A key that sorts names in an order that is always the same and says nothing about them."""
    return zlib.crc32(name.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Debian packages as plain archives. No root is needed, nothing is installed and apt's own state stays as it is: it gets
# private folders for its lists and its cache and keeps checking signatures and digests with the system's keys.


def fetch(packages: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Download `packages` into `folder` and unpack them to `folder`/root; yields name, version and SHA-256 of each.

    Raises:
        UserError: apt or dpkg is missing, the machine's sources do not have a package, or the network does not answer.
    """
    absent = [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]
    if absent:
        raise UserError(
            f"This data comes from Debian packages and needs {absent[0]}, which is not on this machine: copy "
            "~/.cache/twist-suite from a Debian or Ubuntu machine that has made it, or use --source shapes."
        )
    downloads, root = folder / "packages", folder / "root"
    for needed in (folder / "lists" / "partial", folder / "cache" / "archives" / "partial", downloads, root):
        needed.mkdir(parents=True, exist_ok=True)
    private = [f"Dir::State::Lists={folder / 'lists'}", f"Dir::Cache={folder / 'cache'}", "Acquire::Languages=none"]
    # As root, apt would drop to a user who may not write here; as anyone else this changes nothing.
    private.append("APT::Sandbox::User=root")
    apt = ["apt-get", "--quiet", *(part for option in private for part in ("-o", option))]
    _run([*apt, "update"], downloads)
    for package in packages:
        _run([*apt, "download", package], downloads)
        archive = next(downloads.glob(f"{package}_*.deb"))
        version = _run(["dpkg-deb", "--field", archive.name, "Version"], downloads).strip()
        _run(["dpkg-deb", "--extract", archive.name, str(root)], downloads)
        yield {"package": package, "version": version, "sha256": sha256_file(archive)}
        archive.unlink()


def _run(command: Sequence[str], folder: Path) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    given = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "timeout": TIMEOUT_S}
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, **given).stdout  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not finish in {TIMEOUT_S} s: check the network and try again.") from None
    except subprocess.CalledProcessError as error:
        errors = [line for line in error.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        raise UserError(
            f"{command[0]} {command[-1]} failed ({(errors or [f'exit status {error.returncode}'])[0]}): check the "
            "network and that Debian's main section is among this machine's apt sources, or use --source shapes."
        ) from None


def read_rcc(path: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Name (with its folders) and content of every `wanted` file in the Qt resource file (`.rcc`) at `path`.

    Big-endian: magic, version, offsets of tree, data and names; a tree entry is a folder with its number of children
    and the first one's index, or a file with its data offset (qtbase `src/tools/rcc/rcc.cpp`, version 2 on). Input is
    not trusted: every offset is checked, sizes and the number of entries are bounded.

    Raises:
        UserError: not a resource file, damaged, or compressed in a way that is not zlib.
    """
    blob = files.read_bytes(path)
    try:
        magic, version, tree, data, names = struct.unpack_from(">4sIIII", blob)
        if magic != b"qres" or version < 2:
            raise ValueError("no Qt resource file of version 2 or later")
        pending, visited, seen, unpacked = [(0, PurePosixPath())], set(), 0, 0
        while pending:
            index, folder = pending.pop()
            name_offset, flags, first, second, _time = ENTRY.unpack_from(blob, tree + index * ENTRY.size)
            start = names + name_offset
            (length,) = struct.unpack_from(">H", blob, start)
            # 4 bytes of hash stand between; the root has no name.
            name = folder / (blob[start + 6 : start + 6 + 2 * length].decode("utf-16-be") if index else "")
            seen += first if flags & FOLDER else 1
            if seen > MAX_ENTRIES or index in visited:
                raise ValueError("its tree has no end")
            visited.add(index)
            if flags & FOLDER:
                pending += [(second + child, name) for child in reversed(range(first))]
            elif wanted(name):
                content = _content(blob, data + second, flags)
                unpacked += len(content)
                if unpacked > MAX_BYTES:
                    raise ValueError("it unpacks to more than any resource file")
                yield name, content
    except (struct.error, IndexError, zlib.error, ValueError) as error:
        raise UserError(
            f"{path} is damaged or no Qt resource file ({error}): remove it, it is fetched again."
        ) from None


def _content(blob: bytes, offset: int, flags: int) -> bytes:
    (length,) = struct.unpack_from(">I", blob, offset)
    content = blob[offset + 4 : offset + 4 + length]
    if len(content) != length:
        raise ValueError("the file ends too early")
    if flags & COMPRESSED_ZSTD:
        raise ValueError("compressed with zstd")
    if flags & COMPRESSED_ZLIB:
        # Four bytes of uncompressed length come before the zlib stream.
        content = zlib.decompressobj().decompress(content[4:], MAX_FILE_BYTES)
    return content
