"""Writing tensors so that equal input gives equal bytes, and reading back what was written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor


def write_torch(path: Path, tensors: Mapping[str, Tensor], *, entry: str, extras: Mapping[str, Any]) -> None:
    """`{entry: tensors, **extras}` as a torch file that loads with `weights_only=True`, atomically, and read back.

    `extras` are strings, numbers and booleans. The bytes depend on the contents alone: torch writes no times, and
    names the archive after the file only when it is given a path, so it gets a stream.
    """
    import torch

    plain = {name: _alone(tensor) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            torch.save({entry: plain, **extras}, file)
            file.flush()
            os.fsync(file.fileno())
        reread = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        same = reread[entry].keys() == plain.keys() and all(same_bytes(reread[entry][n], plain[n]) for n in plain)
        if not same or any(reread[key] != value for key, value in extras.items()):
            raise OSError(f"{path}: what was written does not read back equal; the disk may be full or failing.")


def _alone(tensor: Tensor) -> Tensor:
    # torch.save writes the whole storage under a view: a slice of a stacked table would bring the table along.
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equality of shape and bytes, not of values, so that NaN equals itself."""
    import torch

    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
