"""One object in each image without any training: LOST's box, and how many images it is right in (CorLoc).

LOST (Siméoni et al. 2021, arXiv 2109.14279; valeoai/LOST @fcedbec, object_discovery.py): patches of an object are few
and alike, so the seed is the patch that is similar to the fewest others; patches that resemble the seed vote for the
rest, and the seed's connected part is the object. Boxes are (x0, y0, x1, y1) in pixels, the right and lower edge
outside. `D` features, `h` `w` the sides of the map.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

Box = tuple[float, float, float, float]


def lost_box(features: Tensor, *, image_size: tuple[int, int], scale: tuple[float, float], candidates: int) -> Box:
    """The box of one image of `image_size` (height, width) from its map (D, h, w).

    Args:
        scale: pixels of the image in a place of the map, down and across.
        candidates: of so many patches with the fewest similar ones, those alike the seed join it.
    """
    height, width = features.shape[1:]
    rows = features.flatten(1).T  # (h·w, D)
    similarity = rows @ rows.T
    # A patch is not counted as its own neighbour; the sign alone counts, so lengths do not matter.
    degree = (similarity > 0).sum(dim=1) - (similarity.diagonal() > 0).long()
    order = degree.argsort(stable=True)
    seed = int(order[0])
    near = order[:candidates]
    similar = near[similarity[seed, near] > 0]
    vote = similarity[similar].sum(dim=0).view(height, width) > 0
    parts, _ = ndimage.label(vote.cpu().numpy())
    part = parts[divmod(seed, width)]
    if part == 0:  # features of zeros: nothing resembles anything
        return 0.0, 0.0, float(image_size[1]), float(image_size[0])
    down, across = np.nonzero(parts == part)
    y0, y1, x0, x1 = down.min(), down.max() + 1, across.min(), across.max() + 1
    return (
        float(x0 * scale[1]), float(y0 * scale[0]),
        min(float(x1 * scale[1]), float(image_size[1])), min(float(y1 * scale[0]), float(image_size[0])),
    )  # fmt: skip


def layer_normalised(features: Tensor) -> Tensor:
    """(D, h, w) with mean 0 and variance 1 over all its values: what LOST makes of convolutional features."""
    return torch.nn.functional.layer_norm(features, features.shape)


def overlaps(box: Box, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of `box` with each of (n, 4) boxes."""
    one, many = np.asarray(box, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    sides = np.minimum(one[2:], many[:, 2:]) - np.maximum(one[:2], many[:, :2])
    shared = sides.clip(min=0).prod(axis=1)
    areas = (one[2:] - one[:2]).prod() + (many[:, 2:] - many[:, :2]).prod(axis=1)
    return shared / np.maximum(areas - shared, 1e-12)
