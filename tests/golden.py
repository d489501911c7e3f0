"""Golden values of the published implementation, `tests/goldens/*.npz`, as tensors."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "goldens"


def golden(name: str) -> dict[str, Tensor]:
    """The arrays of `tests/goldens/<name>.npz`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key].copy()) for key in file}
