"""`--show-views`: a picture of the views as training sees them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision
from torchvision.utils import draw_bounding_boxes, make_grid

from twist.contracts.errors import UserError
from twist.contracts.files import atomic_path
from twist.contracts.images import decode
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data.loader import ViewMaker
from twist.pretrain.data.photometric import denormalise
from twist.pretrain.data.source import RankShare, open_images
from twist.pretrain.data.views import ViewSampler, plan_views

GAP, FRAME = 8, 3  # pixels between pictures, and around each
COLUMNS = 8
LEAST_SIDE = 96  # small views are enlarged to this
# Frames of the views and outlines of their crops: first global, second global, local.
COLOURS = ((214, 69, 65), (38, 110, 188), (245, 190, 65))
PAPER = 255


def contact_sheet(config: PretrainConfig, count: int, path: Path) -> Path:
    """Write a PNG: each of `count` images with its crops outlined, then its V views, framed in the crops' colours. They
    are the run's own pixels (first epoch, the run's seed)."""
    images, seed = open_images(config.data), config.run.seed
    if not 0 < count <= len(images):
        raise UserError(f"{config.data.root} holds {len(images)} images: ask for 1 to {len(images)}, not {count}.")
    request = next(images.requests(RankShare(seed, count), epoch=0, stage="mutual_information"))
    made = ViewMaker(images, config.views, seed=seed, pipeline="cpu")[request]
    if made.failure is not None:
        raise UserError(made.failure)
    plan = plan_views(config.views)
    draw = ViewSampler(plan).draw(seed, epoch=0, indices=request.indices)
    of_stream = dict(zip(request.indices.tolist(), request.encoded or ()))
    side = max(plan[0].size, LEAST_SIDE)
    lines = -(-(1 + len(plan)) // COLUMNS)
    columns = -(-(1 + len(plan)) // lines)
    cells = []
    for place, index in enumerate(made.indices.tolist()):
        image = decode(of_stream[index] if of_stream else images.encoded(index), name=str(index))
        boxes = draw.place(place, height=image.shape[1], width=image.shape[2])["box"]
        views = [view for group in made.groups for view in denormalise(group[place::count])]
        row = [_framed(_outlined(image, boxes, side), (PAPER,) * 3, side)]
        row += [_framed(_fitted(view, side), COLOURS[min(number, 2)], side) for number, view in enumerate(views)]
        cells += row + [torch.full_like(row[0], PAPER)] * (lines * columns - len(row))
    sheet = make_grid(cells, nrow=columns, padding=GAP, pad_value=PAPER)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(temporary, "PNG", optimize=True)
    return path


def _outlined(image: Tensor, boxes: np.ndarray, side: int) -> Tensor:
    """`image` with the outlines of its crops (top, left, height, width), at most `side` high and wide."""
    small = _fitted(image, side)
    top, left, height, width = torch.from_numpy(boxes * (max(small.shape) / max(image.shape))).T
    corners = torch.stack([left, top, left + width - 1, top + height - 1], dim=1)
    for number in reversed(range(len(boxes))):  # the global ones on top
        colour, pen = COLOURS[min(number, 2)], 3 if number < 2 else 1
        small = draw_bounding_boxes(small, corners[number, None], colors=[colour], width=pen)
    return small


def _fitted(image: Tensor, side: int) -> Tensor:
    """`image` resized so that its longer side is `side`; pixels of a small one stay visible."""
    ratio = side / max(image.shape)
    size = [max(1, round(length * ratio)) for length in image.shape[1:]]
    return vision.resize(image, size, InterpolationMode.NEAREST if ratio >= 1 else InterpolationMode.BILINEAR)


def _framed(image: Tensor, colour: tuple[int, int, int], side: int) -> Tensor:
    """(3, side + 2·FRAME, side + 2·FRAME), the rest of which is paper."""
    cell = torch.full((3, side + 2 * FRAME, side + 2 * FRAME), PAPER, dtype=torch.uint8)
    height, width = image.shape[1:]
    cell[:, : height + 2 * FRAME, : width + 2 * FRAME] = torch.tensor(colour).view(3, 1, 1)
    cell[:, FRAME : FRAME + height, FRAME : FRAME + width] = image
    return cell
