"""Top-1 and top-5 by the exact rank of the label, so ties and non-finite scores cannot flatter a number.

`torch.topk` may order equal scores as it likes, and every comparison with NaN is false: a diverged classifier would
count as perfect where the label's rank is taken naively. `N` images, `K` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twist.contracts.errors import UserError


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label's, (N,): higher score first, equal scores by class index.

    Args:
        scores: (N, K).
        labels: (N,) class indices.

    Raises:
        UserError: a score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise UserError(
            "The classifier's scores are not finite: the training diverged; lower lr_classifier or lr_backbone."
        )
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)


def top_percent(ranks: Tensor) -> tuple[float, float]:
    """(top-1, top-5) in percent from label ranks."""
    return tuple(100.0 * (ranks < k).double().mean().item() for k in (1, 5))  # type: ignore[return-value]
