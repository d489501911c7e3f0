"""Masks of a data card: which mask belongs to which picture, and a mask file as class numbers.

The check, the engine and its evaluation read masks through `read_mask` alone. Forms: a number a pixel (with or without
a palette, 8 or 16 bits), or colours with a table. Pixels that belong to no class become `VOID`.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from twist.catalog.card import Card, MaskSplit, Role, Segmentation, chosen
from twist.catalog.data_sets import VOID
from twist.catalog.report import named
from twist.contracts.errors import UserError
from twist.contracts.images import UnreadableImage, file_entries, image_names, open_picture

MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".gif")


class Pair(NamedTuple):
    """A picture and its mask."""

    image: Path
    mask: Path


def read_pairs(card: Card) -> dict[Role, list[Pair]]:
    """Pictures with their masks of both splits, sorted; a card without `val` gives `train` alone.

    Raises:
        UserError: a folder is missing, or a picture has no mask.
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
    named_masks = {
        _stem(name, section.mask_suffix): name
        for name, _ in file_entries(masks, lambda name: name.lower().endswith(MASK_ENDINGS))
        if Path(name).stem.endswith(section.mask_suffix)
    }
    pictures = [name for name in image_names(images) if Path(name).stem.endswith(section.image_suffix)]
    if images == masks:  # one folder for both: what is a mask is no picture
        of_masks = set(named_masks.values()) if section.mask_suffix else set()
        pictures = [name for name in pictures if name not in of_masks]
    pictures = chosen(pictures, split.list, card)
    stems = [(name, _stem(name, section.image_suffix)) for name in pictures]
    absent = [name for name, stem in stems if stem not in named_masks]
    if absent or not pictures:
        ends = f"*{section.mask_suffix}.png" if section.mask_suffix else "the same stem"
        raise UserError(
            f"{len(absent)} of the {len(pictures)} pictures in {images} have no mask in {masks} ({ends}"
            f"{'; first: ' + absent[0] if absent else ''}): complete the masks, or set image_suffix and mask_suffix in "
            f"{card.path}."
        )
    return [Pair(images / name, masks / named_masks[stem]) for name, stem in stems]


def _stem(name: str, suffix: str) -> str:
    return name.rpartition(".")[0].removesuffix(suffix)


def read_mask(path: Path, section: Segmentation) -> NDArray[np.uint8]:
    """The class of every pixel (H, W): 0, 1, … in the order of `section.names`, and `VOID` for none.

    Raises:
        UserError: the file cannot be read, is of a form that the section does not describe, or holds other values.
    """
    try:
        with open_picture(path) as image:
            mode, values = image.mode, np.asarray(image)
    except UnreadableImage as error:
        raise UserError(f"{error}: replace the mask.") from None
    if mode == "1":
        values = values.astype(np.uint8)
    colours = isinstance(section.classes, dict) and any(key.startswith("#") for key in section.classes)
    if values.ndim == 3:
        if not colours:
            raise UserError(
                f"The mask {path} holds colours (mode {mode}): write a table of them into [segmentation], as classes = "
                f'{{ "{_first_colour(values)}" = "road" }}.'
            )
        red, green, blue = (values[..., channel].astype(np.int64) for channel in range(3))
        numbers = (red << 16) + (green << 8) + blue
    elif colours:
        raise UserError(
            f"The mask {path} holds numbers (mode {mode}) and [segmentation] names colours: write the numbers, as "
            'classes = { 1 = "road" }.'
        )
    else:
        numbers = values.astype(np.int64)
    table = _table(section)
    found, places = np.unique(numbers, return_inverse=True)
    known = isinstance(section.classes, dict)  # a table says which values count; the others are no class
    strange = [] if known else [int(value) for value in found if int(value) not in table]
    if strange:
        first = 1 if section.reduce_zero_label else 0
        raise UserError(
            f"The mask {path} holds the value {strange[0]}: classes are {first} to "
            f"{first + len(section.names) - 1}, and {', '.join(map(str, section.ignored))} is no class; correct "
            "classes or ignore in the card."
        )
    looked_up = np.array([table.get(int(value), VOID) for value in found], dtype=np.uint8)
    return looked_up[places.reshape(numbers.shape)]


def _table(section: Segmentation) -> dict[int, int]:
    """Value (or colour as 0xRRGGBB) in a mask file → class, `VOID` for those that are ignored."""
    if isinstance(section.classes, dict):
        try:
            table = {
                int(key.removeprefix("#"), 16) if key.startswith("#") else int(key): section.names.index(name)
                for key, name in section.classes.items()
            }
        except ValueError as error:
            raise UserError(f'classes of [segmentation]: {error}; write 3 = "sky" or "#804080" = "road".') from None
    else:
        first = 1 if section.reduce_zero_label else 0
        table = {value: index for index, value in enumerate(range(first, first + len(section.classes)))}
        if section.reduce_zero_label:
            table[0] = VOID
    return {**table, **dict.fromkeys(section.ignored, VOID)}


def _first_colour(values: NDArray[np.uint8]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*values.reshape(-1, values.shape[-1])[0][:3])


def check_pair(pair: Pair, section: Segmentation, size: tuple[int, int] | None) -> tuple[str, Counter[int]]:
    """What is wrong with a mask beside its picture of `size` (None: unreadable), "" for nothing; pixels a class."""
    try:
        mask = read_mask(pair.mask, section)
    except UserError as error:
        return str(error), Counter()
    height, width = mask.shape
    if size is not None and size != (width, height):
        return (
            f"{pair.mask} is {width} × {height} and its picture, seen upright, {size[0]} × {size[1]}: turn the pixels "
            "of the picture as its EXIF says, or make the mask again."
        ), Counter()
    values, counts = np.unique(mask, return_counts=True)
    return "", Counter(dict(zip(values.tolist(), counts.tolist())))


def summary(pixels: Counter[int], section: Segmentation) -> str:
    """Which classes masks show, with their shares of pixels; a class that none shows is worth a look."""
    total = max(sum(pixels.values()), 1)
    shares = [f"{name} {100 * pixels[index] / total:.1f} %" for index, name in enumerate(section.names)]
    return f"{named(shares)}, no class {100 * pixels[VOID] / total:.1f} %"
