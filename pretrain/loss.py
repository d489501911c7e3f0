"""The TWIST objective: consistency + (1 + lam1)·sharpness − lam2·diversity, in closed form over the distinct views.

Source: arXiv 2110.07402, section 3. The paper sums over pairs of views (i, j), i ∈ {0, 1}, j > i. Every term of a pair
is a sum over its two views or a product of their distributions, so each view's softmax and logarithm is needed once,
with a weight that says in how many pairs the view stands: 14 views make 25 pairs, but 14 softmaxes.

Shapes: `V` views (two global ones first), `B` images a rank, `K` classes. Natural logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

    A global view stands in V − 1 pairs, a local one in two.
    """
    views = len(per_view)
    return ((views - 1) * per_view[:2].sum() + 2 * per_view[2:].sum()) / (2 * _pairs(views))


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
    views, _, classes = logits.shape
    if views < 2:
        raise ValueError(f"twist_loss compares views of one image and got {views}: give at least two.")

    consistency, sharpness, mean = _LocalTerms.apply(logits, eps)
    if tau != 1:
        _, sharpness, mean = _LocalTerms.apply(logits / tau, eps)

    packed = mean_over_ranks(torch.cat([consistency.view(1), sharpness.view(1), mean.flatten()]))
    consistency, sharpness = packed[0], packed[1]
    diversity = pair_mean(_entropy(packed[2:].view(views, classes), eps))
    return LossTerms(consistency, sharpness, diversity, consistency + (1 + lam1) * sharpness - lam2 * diversity)


class _LocalTerms(torch.autograd.Function):
    """logits (V, B, K) → this rank's consistency, sharpness and each view's mean distribution (V, K).

    With pᵥ the softmax of view v, lᵥ = log(pᵥ + ε), and Oᵥ(x) the sum of x over v's partners (a global view's are all
    other views, a local one's the two global ones, nᵥ in number), and · a sum over rows and classes,

        ½ Σ over pairs KL(pᵢ‖pⱼ) + KL(pⱼ‖pᵢ)  =  ½ Σᵥ pᵥ · (nᵥ lᵥ − Oᵥ(l)),

    whose derivative by pᵥ is (nᵥ lᵥ − Oᵥ(l)) + (nᵥ pᵥ − Oᵥ(p)) / (pᵥ + ε). It is written out because autograd would
    keep and walk through many arrays of (V, B, K); this keeps two, and works view by view.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        views, rows, _ = logits.shape
        p = logits.softmax(-1)
        log_p = p.add(eps).log_()
        own = [_dot(p[v], log_p[v]) for v in range(views)]
        # Of the local views the others need only the sums.
        sum_p, sum_log_p = p[2:].sum(0), log_p[2:].sum(0)  # (B, K)
        first, second = log_p[:2]
        cross = _dot(p[0], second + sum_log_p) + _dot(p[1], first + sum_log_p) + _dot(sum_p, first + second)
        entropy = -pair_mean(torch.stack(own)) / rows
        # Not `save_for_backward`: the gradient will be written over p, view by view, and needs no memory of its own.
        ctx.kept, ctx.eps = (p, log_p, sum_p, sum_log_p), eps
        return -entropy - cross / (2 * _pairs(views) * rows), entropy, p.mean(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_consistency, of_sharpness, of_mean = gradients
        kept, ctx.kept = ctx.kept, None
        assert kept is not None, "the loss's graph has been used: compute the loss again for a second backward pass"
        p, log_p, sum_p, sum_log_p = kept
        views, rows, _ = p.shape
        scale = 1 / (2 * _pairs(views) * rows)
        unlike = -scale * of_consistency
        sums_p = _over_partners(p[:2] * unlike, sum_p * unlike, views)
        sums_log_p = _over_partners(log_p[:2] * unlike, sum_log_p * unlike, views)
        for v in range(views):
            partners = views - 1 if v < 2 else 2
            alike = partners * scale * (of_consistency - of_sharpness)
            by_p = torch.addcdiv(sums_log_p[v], torch.addcmul(sums_p[v], p[v], alike), p[v] + ctx.eps)
            by_p.addcmul_(log_p[v], alike).add_(of_mean[v] / rows)
            # Through the softmax: p ⊙ (g − Σ p g).
            p[v].mul_(by_p.sub_(torch.linalg.vecdot(by_p, p[v])[:, None]))
        return p, None


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


def _pairs(views: int) -> int:
    return 2 * views - 3


def _over_partners(globals_: Tensor, sum_of_locals: Tensor, views: int) -> list[Tensor]:
    """For each view the sum over the views it is paired with: V tensors (B, K), most of them the same one."""
    first, second = globals_
    return [second + sum_of_locals, first + sum_of_locals] + [first + second] * (views - 2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a.flatten().dot(b.flatten())


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
