"""A small ImageNet-like tree: striped images whose class is the stripes' direction, so that a probe can learn it.

Light imports only: processes that tests start import this file.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from twist.contracts.errors import UserError
from twist.contracts.weights import Backbone
from twist.transfer.protocols import find_protocol
from twist.transfer.request import Request, Weights

if TYPE_CHECKING:
    from torch import Tensor


def write_tree(root: Path, *, classes: int = 3, train: int = 6, val: int = 3, side: int = 40) -> Path:
    """root/{train,val}/class_<k>/<split>_<k>_<i>.png; file names are unique over the tree, as ImageNet's are."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side]
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            angle = np.pi * label / classes
            for index in range(count):
                wave = np.sin(0.6 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6))
                image = 128 + 90 * wave[..., None] * rng.uniform(0.5, 1, 3) + rng.normal(0, 10, (side, side, 3))
                pixels = image.clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{split}_{label}_{index:03d}.png")
    return root


def wait(rank: Any) -> None:
    """Return when every process has come here."""
    import torch.distributed

    if rank.count > 1:
        torch.distributed.barrier()


def second_is_killed(rank: Any) -> None:
    """Work in which the second process is killed, as the kernel does for lack of memory; the first waits for it."""
    wait(rank)
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait(rank)


def no_room(rank: Any) -> None:
    """Work that finds the GPU full in its last process."""
    import torch

    if rank.index + 1 == rank.count:
        raise torch.OutOfMemoryError("no room")
    wait(rank)


def second_says_no(rank: Any) -> None:
    """Work of a rank that fails in the second process; here, because a new process imports the file it lies in."""
    if rank.index == 1:
        raise UserError("the second of two says no")
    wait(rank)


def ask(
    protocol: str, header: Backbone, data: Path, *overrides: str, tensors: dict[str, Tensor] | None = None, **more: Any
) -> tuple[Request, Weights]:
    """What `twist transfer` asks of the ImageNet engine."""
    more = {"output": Path(), **more}
    return Request(find_protocol(protocol), data, overrides=overrides, **more), Weights(header, tensors=tensors or {})
