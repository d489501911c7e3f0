"""The TWIST objective: consistency + (1 + lam1)·sharpness − lam2·diversity, in closed form over the distinct views.

Source: arXiv 2110.07402, section 3. The paper sums over pairs of views (i, j), i ∈ {0, 1}, j > i. Every term of a pair
is a sum over its two views or a product of their distributions, so each view's softmax and logarithm is needed once,
with a weight that says in how many pairs the view stands: 14 views make 25 pairs, but 14 softmaxes.

Shapes: `V` views (two global ones first), `B` images a rank, `K` classes. Natural logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """The three terms and what is minimised; scalars in nats, over all ranks' rows."""

    consistency: Tensor
    sharpness: Tensor
    diversity: Tensor
    total: Tensor


def identity(x: Tensor) -> Tensor:
    """The mean over the ranks of a single process."""
    return x


def pair_mean(per_view: Tensor) -> Tensor:
    """The mean over all pairs of ½(xᵢ + xⱼ), from one number a view (V,).

    A global view stands in V − 1 pairs, a local one in two; there are 2V − 3 pairs.
    """
    views = len(per_view)
    return ((views - 1) * per_view[:2].sum() + 2 * per_view[2:].sum()) / (2 * (2 * views - 3))


def twist_loss(
    logits: Tensor | Sequence[Tensor],
    *,
    lam1: float = 0.0,
    lam2: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-5,
    mean_over_ranks: Callable[[Tensor], Tensor] = identity,
) -> LossTerms:
    """The objective of the mutual-information stage.

    Args:
        logits: (V, B, K) or V tensors (B, K), after the head's last batch norm; the global views first. Half
            precision is raised to float32, float64 stays.
        lam1, lam2: weights of sharpness (1 + lam1) and diversity (lam2).
        tau: temperature of sharpness and diversity; consistency has none.
        eps: added inside every logarithm.
        mean_over_ranks: called once, with everything that has to be averaged over ranks packed into one vector.

    Returns:
        Scalars that are equal on every rank. After DDP has averaged the parameters' gradients, they are those of
        the objective over the rows of all ranks.

    Raises:
        ValueError: fewer than two views, or logits that are not (V, B, K).
    """
    logits = _at_least_float32(logits)
    views, rows, classes = logits.shape
    if views < 2:
        raise ValueError(f"twist_loss compares views of one image and got {views}: give at least two.")

    p = logits.softmax(-1)  # (V, B, K)
    log_p = (p + eps).log()
    s, log_s = (p, log_p) if tau == 1 else _softmax_and_log(logits / tau, eps)

    # ½ [KL(pᵢ‖pⱼ) + KL(pⱼ‖pᵢ)] = ½ (pᵢ·log pᵢ + pⱼ·log pⱼ) − ½ (pᵢ·log pⱼ + pⱼ·log pᵢ), and the sum of the second
    # half over all pairs needs the local views only through their sum.
    own = (p * log_p).sum((1, 2))  # (V,)
    cross = (p[0] * log_p[1]).sum() + (p[1] * log_p[0]).sum()
    if views > 2:
        cross = cross + ((p[0] + p[1]) * log_p[2:].sum(0)).sum() + ((log_p[0] + log_p[1]) * p[2:].sum(0)).sum()
    consistency = (pair_mean(own) - cross / (2 * (2 * views - 3))) / rows

    row_entropy = -(own if tau == 1 else (s * log_s).sum((1, 2))) / rows  # (V,)
    sharpness = pair_mean(row_entropy)

    packed = mean_over_ranks(torch.cat([consistency.view(1), sharpness.view(1), s.mean(1).flatten()]))
    consistency, sharpness = packed[0], packed[1]
    diversity = pair_mean(_entropy(packed[2:].view(views, classes), eps))
    return LossTerms(consistency, sharpness, diversity, consistency + (1 + lam1) * sharpness - lam2 * diversity)


def teacher_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    lam1: float = 0.0,
    lam2: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-5,
    mean_over_ranks: Callable[[Tensor], Tensor] = identity,
) -> LossTerms:
    """The objective with a momentum teacher (the ViT recipes).

    Consistency is the mean over i ∈ {0, 1} and all student views j ≠ i of KL(teacherᵢ‖studentⱼ); sharpness and
    diversity are plain means over the student's views. All three are at temperature `tau`.

    Args:
        student: (V, B, K) or V tensors (B, K), the global views first.
        teacher: (2, B, K), the global views; no gradient flows into it.

    The other arguments, the result and the errors are those of `twist_loss`.
    """
    student, teacher = _at_least_float32(student), _at_least_float32(teacher).detach()
    views, rows, classes = student.shape
    if views < 2 or len(teacher) != 2:
        raise ValueError(f"teacher_loss takes ≥ 2 student and 2 teacher views, and got {views} and {len(teacher)}.")

    s, log_s = _softmax_and_log(student / tau, eps)  # (V, B, K)
    t, log_t = _softmax_and_log(teacher / tau, eps)  # (2, B, K)
    # Each teacher view meets the V − 1 student views of another crop.
    own = (views - 1) * (t * log_t).sum()
    others = log_s.sum(0) - log_s[:2]  # (2, B, K): Σ over j ≠ i of log sⱼ
    consistency = (own - (t * others).sum()) / (2 * (views - 1) * rows)
    sharpness = -(s * log_s).sum() / (views * rows)

    packed = mean_over_ranks(torch.cat([consistency.view(1), sharpness.view(1), s.mean(1).flatten()]))
    consistency, sharpness = packed[0], packed[1]
    diversity = _entropy(packed[2:].view(views, classes), eps).mean()
    return LossTerms(consistency, sharpness, diversity, consistency + (1 + lam1) * sharpness - lam2 * diversity)


def _at_least_float32(logits: Tensor | Sequence[Tensor]) -> Tensor:
    stacked = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
    if stacked.dim() != 3:
        raise ValueError(f"logits are (views, images, classes), and got {tuple(stacked.shape)}.")
    return stacked.float() if stacked.dtype in (torch.float16, torch.bfloat16) else stacked


def _softmax_and_log(logits: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    p = logits.softmax(-1)
    return p, (p + eps).log()


def _entropy(p: Tensor, eps: float) -> Tensor:
    return -(p * (p + eps).log()).sum(-1)
