"""A picture of what the network sees: some images, where their crops lie, and every view of them, finished and back.

The views come from the loader that training uses (first epoch, the run's seed): they are the run's own pixels, each
shown as several where views are small.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from twist.contracts.errors import UserError
from twist.contracts.files import atomic_path
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data.loader import ImageStream, ViewLoader, open_images
from twist.pretrain.data.photometric import denormalise
from twist.pretrain.data.views import Stage, View, ViewSampler, plan_views

GAP = 8  # pixels between pictures
LABEL_HEIGHT = 16
FONT_SIZE = 12
# Views are shown at least so large, or their labels would not fit beside each other.
LEAST_SIDE = 96
INK, PAPER = (30, 30, 30), (255, 255, 255)
# Outlines of the crops on the image: first global, second global, local.
COLOURS = ((214, 69, 65), (38, 110, 188), (245, 190, 65))


def contact_sheet(
    config: PretrainConfig, count: int, path: str | os.PathLike[str], *, stage: Stage = "mutual_information"
) -> Path:
    """Write a PNG with a row for each of `count` images: the image with its crops outlined, then its V views, labelled.

    Raises:
        UserError: there are fewer images, or `path` is no .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: a contact sheet is a PNG, give it a name that ends in .png.")
    images = open_images(config.data)
    if isinstance(images, ImageStream):
        images = images.first(count)
    if not 0 < count <= len(images):
        raise UserError(f"{config.data.root} holds {len(images)} images: ask for 1 to {len(images)}, not {count}.")
    seed = config.run.seed
    loader = ViewLoader(images, config.views, batch_size=count, seed=seed, bad_image_share=config.data.bad_image_share)
    batch = next(loader.epoch(0, stage=stage))
    plan = plan_views(config.views, stage)
    draw = ViewSampler(plan).draw(seed, epoch=0, indices=batch.indices.numpy())
    groups = [denormalise(group).permute(0, 2, 3, 1).numpy() for group in batch.views]  # (V·B, S, S, 3)

    zoom = -(-LEAST_SIDE // plan[0].size)
    rows = []
    for place, index in enumerate(batch.indices.tolist()):
        image = images.decode(index)
        boxes = draw.place(place, height=image.shape[1], width=image.shape[2])["box"].tolist()
        views = [
            Image.fromarray(view.repeat(zoom, 0).repeat(zoom, 1)) for group in groups for view in group[place::count]
        ]
        picture = _outlined(image, boxes, zoom * plan[0].size)
        rows.append(_row(picture, os.path.basename(images.name(index)), views, plan))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)
    return path


def _outlined(image: torch.Tensor, boxes: list[list[int]], side: int) -> Image.Image:
    """The image as high as a global view is shown, `side`, with the outline of each crop."""
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    ratio = side / picture.height
    # A panorama keeps to twice the height, so that one image does not stretch the sheet.
    ratio = min(ratio, 2 * side / picture.width)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    for view in reversed(range(len(boxes))):
        top, left, height, width = (ratio * side for side in boxes[view])
        outline = COLOURS[min(view, 2)]
        pen.rectangle((left, top, left + width - 1, top + height - 1), outline=outline, width=1 if view > 1 else 3)
    return picture


def _row(image: Image.Image, name: str, views: list[Image.Image], plan: tuple[View, ...]) -> Image.Image:
    """Image and global views side by side, the local views in a block of two lines or as many as fit."""
    side = views[0].width
    cells = [(image, name), (views[0], plan[0].name), (views[1], plan[1].name)]
    image_width = 2 * side  # the widest that `_outlined` makes
    lefts = [GAP, image_width + 2 * GAP, image_width + side + 3 * GAP]
    width = image_width + 2 * side + 4 * GAP
    height = side + LABEL_HEIGHT + GAP
    places = [(left, 0) for left in lefts]
    if len(views) > 2:
        local_side = views[2].width
        step_x, step_y = max(local_side, 48) + GAP, local_side + LABEL_HEIGHT
        lines = max(1, (side + LABEL_HEIGHT) // step_y)
        columns = -(-(len(views) - 2) // lines)
        for number, view in enumerate(views[2:]):
            line, column = divmod(number, columns)
            cells.append((view, plan[number + 2].name))
            places.append((width + column * step_x, line * step_y))
        width += columns * step_x
        height = max(height, lines * step_y + GAP)
    row = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(row)
    font = ImageFont.load_default(FONT_SIZE)
    for (picture, label), (left, top) in zip(cells, places):
        pen.text((left, top), label, fill=INK, font=font)
        row.paste(picture, (left, top + LABEL_HEIGHT))
    return row
