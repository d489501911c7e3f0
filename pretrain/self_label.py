"""The second stage: the confident images label themselves, and every other view learns the label.

Source: arXiv 2110.07402, section 3.4, with the details of the published code (commit 796d36e, `engine.py`).
Shapes: `V` views (two global ones first), `B` images a rank, `K` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def self_label_loss(
    logits: Tensor | Sequence[Tensor], *, quantile: float, teacher: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy to the arg-max of an image's more confident global view, over this rank's confident images.

    An image's confidence is the greater of its two global views' highest probabilities. Images whose confidence is
    above the threshold are kept; the threshold is the confidence at rank ⌊quantile · B⌋ of the batch, from the top,
    so about the share `quantile` is kept. The more confident global view chooses the label and gets no gradient; the
    other global view and all local views are the ones that learn.

    Args:
        logits: (V, B, K) or V tensors (B, K); raised to float32 at least.
        quantile: in [0, 1]; 0 keeps every image.
        teacher: (2, B, K) logits of the momentum teacher's global views, which then choose instead.

    Returns:
        (loss, threshold), scalars of this rank. The loss is zero, with a (zero) gradient, when no image is kept.
        Nothing waits for the device.
    """
    logits = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    views, rows, _ = logits.shape
    with torch.no_grad():
        chooser = (logits[:2] if teacher is None else teacher.to(logits.dtype)).softmax(-1)  # (2, B, K)
        confidence, arg_max = chooser.max(-1)  # (2, B)
        first_is_weak = confidence[0] > confidence[1]  # (B,)
        label = torch.where(first_is_weak, arg_max[0], arg_max[1])
        best = torch.maximum(confidence[0], confidence[1])
        if quantile > 0:
            threshold = best.sort(descending=True).values[min(int(quantile * rows), rows - 1)]
        else:
            threshold = best.new_zeros(())
        kept = (best > threshold).to(logits.dtype)

    strong = torch.where(first_is_weak[:, None], logits[1], logits[0])  # (B, K)
    learners = torch.cat([strong[None], logits[2:]])  # (V − 1, B, K)
    entropy = F.cross_entropy(learners.flatten(0, 1), label.repeat(views - 1), reduction="none")
    per_image = entropy.view(views - 1, rows).mean(0)  # (B,)
    # `max(1)` instead of a branch: with nothing kept the sum is zero and stays in the graph.
    return (per_image * kept).sum() / kept.sum().clamp(min=1), threshold
