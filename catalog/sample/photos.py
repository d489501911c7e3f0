"""The `photos` source of the sample: real cut-outs pasted on real photographs, from Debian packages.

Cut-outs are Tux Paint's photographic stamps, backgrounds are GCompris' photographs of monuments and the sea and some
wallpapers of Lomiri and MATE. Pictures stay in the user's cache: none is part of this project, and each package's
`/usr/share/doc/<package>/copyright` says whose they are. Train and val show the same stamps, posed and lit anew, on
disjoint photographs: to know an object again in another place can be learned from them. That a bird never seen is a
bird cannot, from as few birds as there are.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, UnidentifiedImageError

from twist.catalog.sample.debian import cache_folder, fetch
from twist.catalog.sample.qt_resources import read_rcc
from twist.catalog.sample.scene import DISTRACTOR, Cutout, Split
from twist.catalog.sample.textures import Array
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.progress import Progress

PACKAGES = (
    "tuxpaint-stamps-default",
    "gcompris-qt-data",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
)
# Changes when what is prepared changes, so that an old cache is not taken for a new one.
PREPARED_VERSION = 2

# Class → folders of stamps (below /usr/share/tuxpaint/stamps; subfolders too). Chosen by looking at every stamp: these
# are the ten kinds of which there are enough photographs.
CLASSES = {
    "bird": ("animals/birds",),
    "coin": (
        "symbols/money/canadian/coins",
        "symbols/money/euro/coins",
        "symbols/money/japanese",
        "symbols/money/us/coins",
    ),
    "fish": ("animals/fish",),
    "flower": ("plants/flowers",),
    "fruit": ("food/fruit",),
    "hoofed": ("animals/mammals/bovines", "animals/mammals/camel", "animals/mammals/deer", "animals/mammals/equines"),
    "insect": ("animals/insects",),
    "instrument": ("hobbies/music",),
    "tool": ("household/tools", "household/arttools"),
    "vehicle": ("vehicles", "military/vehicles"),
}
# Of no class: they occlude.
DISTRACTORS = ("household/dishes", "plants/mushrooms", "animals/shellfish", "food/nuts", "sports")

# Stamps in those folders that are not taken. Drawings by their path or name; then one by one, with the reason.
DRAWING_MARKS = ("cartoon", "tux", "_outline")
NOT_TAKEN = {
    # Not of the class that the folder stands for.
    "lobster",
    "shrimp",
    "seahorse",
    "Brown_slug",
    "Woodlouse",
    "7spoke256",
    "wheel_tractor",
    "balloon360",
    "747",
    "f22_raptor",
    "walnutBoat",
    "chineseJunk",
    "pink_tricycle",
    "highlighter",
    "pen_dryerase",
    "chuvanna_plastic_poo",
    # Mostly see-through, or a line without a body.
    "fly",
    "glass",
    "rugby_goal_posts",
    # The same photograph mirrored; objects are mirrored here anyway.
    "measuring_tape_mirror",
    "sedan_police_mirror",
    "dumper_mirror",
    "bradley_mirror",
}
SMALLEST_STAMP = 45  # pixels on the longer side
STAMP_SIDE, BACKGROUND_SIDE = 288, 640
# Stamps that are taken of each class. The small sample's 600 labelled pictures then show each one ten times; with all
# of them (up to forty a class) a picture's nearest neighbours could not be of its own stamp.
SPECIMENS = 6

# Photographs without any object of the ten classes, as (package's file, names or None for all).
RCC_FOLDER = "usr/share/gcompris-qt/rcc"
RCC_BACKGROUNDS = {
    "explore_monuments.rcc": None,
    "clickgame.rcc": ("sea1", "sea2", "sea3", "sea4", "sea5", "sea6"),
    "details.rcc": (
        "EgeskovSlotSpejling_background",
        "EilanDonanCastle_background",
        "FanoeWindmill_background",
        "GizahPyramids_background",
        "Nagoya_background",
    ),
}
WALLPAPERS = (
    "Bridge_by_Sander_Klootwijk.jpg",
    "aitzgorri_by_Aitzol_Berasategi.jpg",
    "life_by_Aitzol_Berasategi.jpg",
    "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "sunset_by_Aitzol_Berasategi.jpg",
    "mate/nature/Aqua.jpg",
    "mate/nature/Blinds.jpg",
    "mate/nature/Dune.jpg",
    "mate/nature/GreenMeadow.jpg",
    "mate/nature/RainDrops.jpg",
    "mate/nature/Storm.jpg",
    "mate/nature/Wood.jpg",
)
VAL_SHARE = 0.25


def prepare_photos(*, progress: bool = True) -> Path:
    """The folder of prepared cut-outs and backgrounds in the user's cache; made on the first call (280 MB of packages).

    Packages and what they unpack to are removed again; about 40 MB of resized pictures stay, and `provenance.json`.

    Raises:
        UserError: the packages cannot be had, or hold too few of the pictures that are looked for.
    """
    target = cache_folder() / f"photos-{PREPARED_VERSION}"
    if (target / "provenance.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="photos-", dir=target.parent))
    try:
        packages = []
        with Progress("photos: fetch", total=len(PACKAGES), unit="package", quiet=not progress) as bar:
            for package in fetch(PACKAGES, work):
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
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


class Photos:
    """The `photos` source on a folder of `prepare_photos`."""

    classes = tuple(CLASSES)

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = prepare_photos() if folder is None else folder
        self._provenance = json.loads((self.folder / "provenance.json").read_text())

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
        turned = stamp.resize(shape, Image.Resampling.BICUBIC, reducing_gap=2.0).rotate(
            float(rng.uniform(-28, 28)), Image.Resampling.BICUBIC, expand=True
        )
        turned = turned.crop(turned.getchannel("A").point(_above_edge).getbbox())
        factor = size / max(turned.size)
        shape = (max(3, round(turned.width * factor)), max(3, round(turned.height * factor)))
        pixels = np.asarray(turned.resize(shape, Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)
        return Cutout(_relit(rng, pixels[..., :3], light), pixels[..., 3])

    def provenance(self) -> dict[str, Any]:
        stamps = self._provenance["stamps"]
        return {
            "packages": self._provenance["packages"],
            "licence": "each package's /usr/share/doc/<package>/copyright; the pictures are not ours to pass on",
            "split": "train and val use the same stamps on disjoint backgrounds",
            "stamps": {kind: len(names) for kind, names in stamps.items()},
            "backgrounds": {part: len(names) for part, names in self._provenance["backgrounds"].items()},
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


def _above_edge(alpha: int) -> int:
    return 255 * (alpha > 40)


@functools.lru_cache(maxsize=1024)
def _picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def _prepare_stamps(root: Path, target: Path, bar: Progress) -> dict[str, list[str]]:
    """Write `SPECIMENS` stamps a class, and every distractor, as RGBA PNGs below `target`/<kind>; kind → names."""
    stamps: dict[str, list[str]] = {}
    for kind, folders in {**CLASSES, "distractor": DISTRACTORS}.items():
        names: list[str] = []
        paths = (path.relative_to(root).as_posix() for folder in folders for path in (root / folder).rglob("*.png"))
        for path in sorted(paths, key=_digest):
            drawing = any(mark in path.lower() for mark in DRAWING_MARKS)
            if drawing or Path(path).stem in NOT_TAKEN:
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
    """Write every taken photograph as an RGB PNG below `target`; split → names."""
    target.mkdir(parents=True)
    names = []
    for name, picture in _background_files(root):
        picture = picture.convert("RGB")
        picture.thumbnail((BACKGROUND_SIDE, BACKGROUND_SIDE), Image.Resampling.LANCZOS)
        picture.save(target / f"{name}.png", compress_level=1)
        names.append(name)
        bar.advance()
    if len(names) < 8:
        raise UserError(
            f"Only {len(names)} of the photographs for backgrounds are in the packages: use --source shapes."
        )
    return _split(sorted(names))


def _background_files(root: Path) -> Iterable[tuple[str, Image.Image]]:
    for file_name, wanted in RCC_BACKGROUNDS.items():

        def taken(name: str, wanted: tuple[str, ...] | None = wanted) -> bool:
            return name.endswith(".webp") and (wanted is None or Path(name).stem in wanted)

        path = root / RCC_FOLDER / file_name
        if not path.exists():
            continue
        for name, content in read_rcc(path, taken):
            picture = _open(io.BytesIO(content))
            # The monuments' file holds maps and buttons too: photographs are the large pictures without alpha.
            if picture.mode == "RGB" and min(picture.size) >= 300:
                yield f"{path.stem}-{Path(name).stem}", picture
    for wallpaper in WALLPAPERS:
        path = root / "usr/share/backgrounds" / wallpaper
        if path.exists():
            yield f"wallpaper-{path.stem}", _open(path)


def _open(file: Any) -> Image.Image:
    try:
        image = Image.open(file)
        # A JPEG can be decoded at a half or a quarter, which is still more than is kept.
        image.draft("RGB", (2 * BACKGROUND_SIDE, 2 * BACKGROUND_SIDE))
        image.load()
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"A picture of the packages cannot be read ({error}): use --source shapes.") from None
    return image


def _split(names: list[str]) -> dict[str, list[str]]:
    """A fixed quarter (at least two) of the names for val, chosen by their digest so that order says nothing."""
    ordered = sorted(names, key=_digest)
    count = max(2, round(len(names) * VAL_SHARE))
    return {"train": sorted(ordered[count:]), "val": sorted(ordered[:count])}


def _digest(name: str) -> int:
    """Sorts names in an order that is always the same and says nothing about them."""
    return zlib.crc32(name.encode())
