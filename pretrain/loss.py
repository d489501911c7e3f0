"""The losses of the two stages: TWIST's objective, with or without a momentum teacher, and self-labelling.

    objective = consistency + (1 + lam1)·sharpness − lam2·diversity

Source: arXiv 2110.07402, sections 3.1 to 3.4, and the published code (commit 796d36e). The paper sums over pairs of
views (i, j), i ∈ {0, 1}, j > i. Every term of a pair is a sum over its two views or a product of their distributions,
so each view's softmax and logarithm is needed once: 14 views make 25 pairs, but 14 softmaxes.

Shapes: `V` views (two global ones first), `B` images a rank, `K` classes. Natural logarithms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twist.pretrain.config import LossConfig


class LossTerms(NamedTuple):
    """The three terms and the total, which is minimised; scalars in nats, over all ranks' rows."""

    consistency: Tensor
    sharpness: Tensor
    diversity: Tensor
    total: Tensor


class SelfLabelTerms(NamedTuple):
    """The loss (this rank's), and the confidence above which images are kept."""

    total: Tensor
    self_label_threshold: Tensor


Loss = LossTerms | SelfLabelTerms


UNWEIGHTED = LossConfig()


def identity(x: Tensor) -> Tensor:
    """The mean over the ranks of a single process."""
    return x


def twist_loss(
    logits: Tensor, weights: LossConfig = UNWEIGHTED, *, mean_over_ranks: Callable[[Tensor], Tensor] = identity
) -> LossTerms:
    """The objective of the mutual-information stage, of logits (V, B, K) after the head's last batch norm.

    Sharpness and diversity are at temperature `tau`. Half precision is raised to float32. `mean_over_ranks` is called
    once, with all that is averaged over ranks in one vector; the scalars are equal on every rank, and after DDP has
    averaged the parameters' gradients, they are those of the objective over the rows of all ranks.
    """
    logits = _at_least_float32(logits)
    if len(logits) < 2:
        raise ValueError(f"twist_loss compares views of one image and got {len(logits)}: give at least two.")
    consistency, sharpness, mean = _LocalTerms.apply(logits, weights.eps)
    if weights.tau != 1:
        _, sharpness, mean = _LocalTerms.apply(logits / weights.tau, weights.eps)
    consistency, sharpness, mean = _over_ranks(consistency, sharpness, mean, mean_over_ranks)
    return _terms(consistency, sharpness, _pair_mean(_entropy(mean, weights.eps)), weights)


class _LocalTerms(torch.autograd.Function):
    """logits (V, B, K) → this rank's consistency, sharpness and each view's mean distribution (V, K).

    With pᵥ the softmax of view v, lᵥ = log(pᵥ + ε), and Oᵥ(x) the sum of x over v's partners (a global view's are all
    other views, a local one's the two global ones, nᵥ in number), and · a sum over rows and classes,

        ½ Σ over pairs KL(pᵢ‖pⱼ) + KL(pⱼ‖pᵢ)  =  ½ Σᵥ pᵥ · (nᵥ lᵥ − Oᵥ(l)),

    whose derivative by pᵥ is (nᵥ lᵥ − Oᵥ(l)) + (nᵥ pᵥ − Oᵥ(p)) / (pᵥ + ε). Autograd would keep many arrays of
    (V, B, K); this keeps two, and works view by view.
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
        entropy = -_pair_mean(torch.stack(own)) / rows
        # Not `save_for_backward`: the gradient is written over p, view by view.
        ctx.kept, ctx.eps = (p, log_p, sum_p, sum_log_p), eps
        return -entropy - cross / (2 * _pairs(views) * rows), entropy, p.mean(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_consistency, of_sharpness, of_mean = gradients
        kept, ctx.kept = ctx.kept, None
        assert kept is not None, "for a second backward pass, compute the loss again"
        p, log_p, sum_p, sum_log_p = kept
        views, rows, _ = p.shape
        scale = 1 / (2 * _pairs(views) * rows)
        unlike = -scale * of_consistency
        # Of the partners: Oᵥ(p) and Oᵥ(log p), (B, K); the local views have the same ones.
        (first, second), local = (p[:2] * unlike), sum_p * unlike
        (log_first, log_second), log_local = (log_p[:2] * unlike), sum_log_p * unlike
        partners_p = [second + local, first + local] + [first + second] * (views - 2)
        partners_log_p = [log_second + log_local, log_first + log_local] + [log_first + log_second] * (views - 2)
        for v in range(views):
            alike = (views - 1 if v < 2 else 2) * scale * (of_consistency - of_sharpness)
            by_p = torch.addcdiv(partners_log_p[v], torch.addcmul(partners_p[v], p[v], alike), p[v] + ctx.eps)
            by_p.addcmul_(log_p[v], alike).add_(of_mean[v] / rows)
            # Through the softmax: p ⊙ (g − Σ p g).
            p[v].mul_(by_p.sub_(torch.linalg.vecdot(by_p, p[v])[:, None]))
        return p, None


def teacher_loss(
    student: Tensor,
    teacher: Tensor,
    weights: LossConfig = UNWEIGHTED,
    *,
    mean_over_ranks: Callable[[Tensor], Tensor] = identity,
) -> LossTerms:
    """The objective with a momentum teacher (the ViT recipes), for student (V, B, K) and teacher (2, B, K).

    Consistency is the mean over i ∈ {0, 1} and all student views j ≠ i of KL(teacherᵢ‖studentⱼ); sharpness and
    diversity are plain means over the student's views. All three are at temperature `tau`. No gradient flows into the
    teacher. Otherwise as `twist_loss`.
    """
    student, teacher = _at_least_float32(student), _at_least_float32(teacher).detach()
    views, rows, _ = student.shape
    if views < 2 or len(teacher) != 2:
        raise ValueError(f"teacher_loss takes ≥ 2 student and 2 teacher views, and got {views} and {len(teacher)}.")

    s, t = (student / weights.tau).softmax(-1), (teacher / weights.tau).softmax(-1)  # (V, B, K), (2, B, K)
    log_s, log_t = (s + weights.eps).log(), (t + weights.eps).log()
    # Each teacher view meets the V − 1 student views of another crop.
    own = (views - 1) * (t * log_t).sum()
    others = log_s.sum(0) - log_s[:2]  # (2, B, K): Σ over j ≠ i of log sⱼ
    consistency = (own - (t * others).sum()) / (2 * (views - 1) * rows)
    sharpness = -(s * log_s).sum() / (views * rows)
    consistency, sharpness, mean = _over_ranks(consistency, sharpness, s.mean(1), mean_over_ranks)
    return _terms(consistency, sharpness, _entropy(mean, weights.eps).mean(), weights)


def self_label_loss(logits: Tensor, *, quantile: float, teacher: Tensor | None = None) -> SelfLabelTerms:
    """The second stage: cross-entropy to the arg-max of an image's more confident global view.

    An image's confidence is the greater of its two global views' highest probabilities. The threshold is the confidence
    at rank ⌊quantile · B⌋ of the batch, from the top; images above it are kept, so about the share `quantile`, and with
    0 every image. The more confident global view chooses the label and gets no gradient; the other global view and all
    local views learn it. With a `teacher` (2, B, K), its global views choose instead.

    Returns scalars of this rank. The loss is zero, with a zero gradient, when no image is kept; the host never waits.
    """
    logits = _at_least_float32(logits)
    views, rows, _ = logits.shape
    with torch.no_grad():
        chooser = (logits[:2] if teacher is None else teacher.to(logits.dtype)).softmax(-1)  # (2, B, K)
        confidence, arg_max = chooser.max(-1)  # (2, B)
        first_labels = confidence[0] > confidence[1]  # (B,)
        label = torch.where(first_labels, arg_max[0], arg_max[1])
        best = torch.maximum(confidence[0], confidence[1])
        threshold = best.new_zeros(())
        if quantile > 0:
            threshold = best.sort(descending=True).values[min(int(quantile * rows), rows - 1)]
        kept = (best > threshold).to(logits.dtype)

    other = torch.where(first_labels[:, None], logits[1], logits[0])  # (B, K)
    learners = torch.cat([other[None], logits[2:]])  # (V − 1, B, K)
    entropy = F.cross_entropy(learners.flatten(0, 1), label.repeat(views - 1), reduction="none")
    per_image = entropy.view(views - 1, rows).mean(0)  # (B,)
    # `clamp` instead of a branch: with no image kept the sum is zero and stays in the graph.
    return SelfLabelTerms((per_image * kept).sum() / kept.sum().clamp(min=1), threshold)


def _terms(consistency: Tensor, sharpness: Tensor, diversity: Tensor, weights: LossConfig) -> LossTerms:
    total = consistency + (1 + weights.lam1) * sharpness - weights.lam2 * diversity
    return LossTerms(consistency, sharpness, diversity, total)


def _over_ranks(
    consistency: Tensor, sharpness: Tensor, mean: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Two scalars and the views' mean distributions (V, K), averaged over ranks in one vector."""
    packed = mean_over_ranks(torch.cat([consistency.view(1), sharpness.view(1), mean.flatten()]))
    return packed[0], packed[1], packed[2:].view_as(mean)


def _pairs(views: int) -> int:
    return 2 * views - 3


def _pair_mean(per_view: Tensor) -> Tensor:
    """The mean of ½(xᵢ + xⱼ) over all pairs, from (V,): a global view is in V − 1 pairs, a local one in 2."""
    views = len(per_view)
    return ((views - 1) * per_view[:2].sum() + 2 * per_view[2:].sum()) / (2 * _pairs(views))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a.flatten().dot(b.flatten())


def _at_least_float32(logits: Tensor) -> Tensor:
    if logits.dim() != 3:
        raise ValueError(f"logits are (views, images, classes), and got {tuple(logits.shape)}.")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _entropy(p: Tensor, eps: float) -> Tensor:
    return -(p * (p + eps).log()).sum(-1)
