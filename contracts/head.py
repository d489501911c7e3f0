"""TWIST's head: what a training checkpoint holds beside the backbone, and the published code's names for it.

The pretrainer trains it; clustering by its classes reads it back from a checkpoint, ours or the published code's
(commit 796d36e, train.py `ProjectionHead`). `N` images, `D` features, `K` classes.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn

# Module prefixes of published checkpoints → the names here. Their number 3 is a dropout that ours does without; early
# files call the last two layers `cls_heads`.
PUBLISHED_NAMES: Final = {
    "projection_heads.projection_head.0.": "hidden.0.",
    "projection_heads.projection_head.1.": "hidden.1.",
    "projection_heads.projection_head.4.": "hidden.3.",
    "projection_heads.projection_head.5.": "hidden.4.",
    "projection_heads.last_linear.": "output.",
    "projection_heads.norm.": "norm.",
    "projection_heads.cls_heads.0.0.": "output.",
    "projection_heads.cls_heads.0.1.": "norm.",
}
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Head(nn.Module):
    """Linear–BN–act–Linear–BN–act–Linear, then batch norm without affine parameters: (N, D) → (N, K) logits."""

    def __init__(self, features: int, hidden: int, classes: int, *, activation: Literal["relu", "gelu"]) -> None:
        super().__init__()
        act = _ACTIVATIONS[activation]
        self.hidden = nn.Sequential(
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            act(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            act(),
        )
        self.output = nn.Linear(hidden, classes)
        # The paper's normalisation before the softmax; in training over a bunch of images.
        self.norm: nn.Module = nn.BatchNorm1d(classes, affine=False)

    def forward(self, features: Tensor) -> Tensor:
        raw = self.output(self.hidden(features))
        # Never in half precision: what follows is a softmax over thousands of classes.
        with torch.autocast(raw.device.type, enabled=False):
            return self.norm(raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw)
