"""Masks: which mask of a data card belongs to which picture, and a mask file as class numbers.

The checks, the engines and their evaluation read masks through `read_mask` alone. Forms: a number a pixel (with or
without a palette, 8 or 16 bits), or colours with a table. Pixels that belong to no class become `VOID`.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twist.catalog.card import Card, MaskSplit, MaskValues, Role, Segmentation, chosen
from twist.catalog.data_sets import VOID, DataSet, named
from twist.contracts.errors import UserError
from twist.contracts.images import UnreadableImage, file_entries, image_names, open_picture, picture_size

MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".gif")


class Pair(NamedTuple):
    """A picture and its mask."""

    image: Path
    mask: Path


def read_pairs(card: Card) -> dict[Role, list[Pair]]:
    """Pictures with their masks of both splits, sorted; a card without `val` gives `train` alone.

    `UserError`: a folder is missing, or a picture has no mask.
    """
    section = card.segmentation
    assert section is not None
    splits = card.splits("segmentation", section.train, section.val)
    return {role: _pairs(card, section, split) for role, split in splits.items()}


def _pairs(card: Card, section: Segmentation, split: MaskSplit) -> list[Pair]:
    images, masks = card.place(split.images), card.place(split.masks)
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}: correct [segmentation] in {card.path}.")
    found = {
        _stem(name, section.mask_suffix): name
        for name, _ in file_entries(masks, lambda name: name.lower().endswith(MASK_ENDINGS))
        if Path(name).stem.endswith(section.mask_suffix)
    }
    pictures = [name for name in image_names(images) if Path(name).stem.endswith(section.image_suffix)]
    if images == masks and section.mask_suffix:  # one folder for both: what is a mask is no picture
        pictures = sorted({*pictures} - {*found.values()})
    stems = {name: _stem(name, section.image_suffix) for name in chosen(pictures, split.list, card)}
    absent = [name for name, stem in stems.items() if stem not in found]
    if absent or not stems:
        ends = f"*{section.mask_suffix}.png" if section.mask_suffix else "the same stem"
        raise UserError(
            f"{len(absent)} of the {len(stems)} pictures in {images} have no mask in {masks} ({ends}"
            f"{'; first: ' + absent[0] if absent else ''}): complete the masks, or set image_suffix and mask_suffix in "
            f"{card.path}."
        )
    return [Pair(images / name, masks / found[stem]) for name, stem in stems.items()]


def _stem(name: str, suffix: str) -> str:
    return name.rpartition(".")[0].removesuffix(suffix)


def mask_values(row: DataSet, sample: dict[str, Any] | None) -> MaskValues:
    """What the numbers in the masks of a data set mean, at a root whose sample.json, if any, is `sample`."""
    names = row.label_names(sample)
    assert names is not None, f"{row.name} has masks and no number of classes"
    classes = tuple(map(str, range(names))) if isinstance(names, int) else names
    return MaskValues(classes=classes, reduce_zero_label=row.reduce_zero_label)


def read_mask(path: Path, values: MaskValues) -> NDArray[np.uint8]:
    """The class of every pixel (H, W): 0, 1, … in the order of `values.names`, and `VOID` for none.

    `UserError`: the file cannot be read, is of a form that `values` do not describe, or holds other ones.
    """
    try:
        with open_picture(path) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB") if len(image.getbands()) > 1 else image)
    except UnreadableImage as error:
        raise UserError(f"{error}: replace the mask.") from None
    table, colours = values.table()
    if (pixels.ndim == 3) != colours:
        written = '1 = "road"' if colours else f'"{_first_colour(pixels)}" = "road"'
        raise UserError(
            f"The mask {path} holds {'numbers' if colours else 'colours'} (mode {mode}), and not what its classes say: "
            f"take the original mask, or write classes = {{ {written} }} into a data card."
        )
    numbers = pixels @ np.array([1 << 16, 1 << 8, 1]) if colours else pixels
    if numbers.dtype == np.uint8:  # the usual mask, without sorting its pixels
        found, places = np.flatnonzero(np.bincount(numbers.ravel())), None
    else:
        found, places = np.unique(numbers, return_inverse=True)
    # A table says which values count; the others are no class.
    strange = [] if isinstance(values.classes, dict) else [value for value in found.tolist() if value not in table]
    if strange:
        known = sorted(set(table) - set(values.ignored))
        raise UserError(
            f"The mask {path} holds the value {strange[0]}: classes are {known[0]} to {known[-1]}, and "
            f"{', '.join(map(str, values.ignored))} is no class; take the original mask, or correct classes or ignore "
            "in the card."
        )
    classes = [table.get(value, VOID) for value in found.tolist()]
    if places is not None:
        return np.array(classes, dtype=np.uint8)[places.reshape(numbers.shape)]
    looked_up = np.full(256, VOID, dtype=np.uint8)
    looked_up[found] = classes
    return looked_up[numbers]


def _first_colour(pixels: NDArray[np.uint8]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixels.reshape(-1, pixels.shape[-1])[0][:3])


def check_pair(pair: Pair, values: MaskValues, palette: list[int] | None = None) -> tuple[str, Counter[int]]:
    """What is wrong with a mask beside its picture, "" for nothing, and its pixels of each class.

    A picture program that saves a mask numbers its colours anew, and every number it then holds is still a label: only
    the `palette` (256 × 3 values) that the originals have tells.
    """
    try:
        mask = read_mask(pair.mask, values)
    except UserError as error:
        return str(error), Counter()
    size = picture_size(pair.image)
    if size not in (None, mask.shape[::-1]):
        return (
            f"{pair.mask} is {mask.shape[1]} × {mask.shape[0]} and its picture of another size, seen upright (EXIF): "
            "turn the pixels of the picture, or make the mask again."
        ), Counter()
    if palette is not None:
        with open_picture(pair.mask) as image:
            colours, present = image.getpalette(), np.flatnonzero(image.histogram()).tolist()
        if colours and any(colours[3 * v : 3 * v + 3] != palette[3 * v : 3 * v + 3] for v in present):
            return f"{pair.mask} was numbered anew: its colours are not those of its numbers.", Counter()
    return "", Counter({label: count for label, count in enumerate(np.bincount(mask.ravel()).tolist()) if count})


def summary(pixels: Counter[int], values: MaskValues) -> str:
    """Which classes masks show, with their shares of pixels; a class that none shows is worth a look."""
    total = max(pixels.total(), 1)
    shares = [f"{name} {100 * pixels[index] / total:.1f} %" for index, name in enumerate(values.names)]
    return f"{named(shares)}, no class {100 * pixels[VOID] / total:.1f} %"


def voc_palette() -> list[int]:
    """VOC's 256 colours as Pillow takes them: the bits of the index dealt out to red, green and blue in turn.

    Source: the VOC development kit's colour map (VOCcode/VOClabelcolormap).
    """
    colours = []
    for index in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours += channels
    return colours
