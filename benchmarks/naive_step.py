"""The step as the method's description reads, without any of our shortcuts: what `benchmarks/step.py` compares with.

Written from the algorithm (arXiv 2110.07402 and the published code's behaviour, commit 796d36e): the loss pair by pair,
LARS tensor by tensor with its norms read on the host, fp16 with a loss scaler, no channels_last, some values read on
the host every step, the device waited for at the end. On one rank, so its 150 small all-reduces a step are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 1e-5


def pair_by_pair_loss(views: Sequence[Tensor]) -> Tensor:
    """Mean over the pairs (i, j), i ∈ {0, 1}, j > i, each with its own softmaxes, logarithms and sums."""
    losses = [pair_loss(views[i], views[j]) for i in (0, 1) for j in range(i + 1, len(views))]
    return sum(losses[1:], losses[0]) / len(losses)


def pair_loss(a: Tensor, b: Tensor, *, tau: float = 1.0) -> Tensor:
    """Consistency + sharpness − diversity of one pair of views (B, K)."""
    p, q = a.softmax(-1), b.softmax(-1)
    s, t = (a / tau).softmax(-1), (b / tau).softmax(-1)
    consistency = 0.5 * (_divergence(p, q) + _divergence(q, p))
    sharpness = 0.5 * (_row_entropy(s) + _row_entropy(t))
    diversity = 0.5 * (_mean_entropy(s) + _mean_entropy(t))
    return consistency + sharpness - diversity


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p + EPS).log() - p * (q + EPS).log()).sum(dim=1).mean()


def _row_entropy(p: Tensor) -> Tensor:
    return -(p * (p + EPS).log()).sum(dim=1).mean()


def _mean_entropy(p: Tensor) -> Tensor:
    mean = p.mean(dim=0)
    return -(mean * (mean + EPS).log()).sum()


@torch.no_grad()
def per_tensor_lars(
    parameters: Sequence[Tensor],
    buffers: dict[Tensor, Tensor],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 1.5e-6,
    eta: float = 0.001,
) -> None:
    """One LARS step, a tensor at a time, each norm read on the host; `buffers` is kept by the caller."""
    for weight in parameters:
        gradient = weight.grad
        assert gradient is not None
        if weight.dim() <= 1:
            rate, decay = lr, 0.0
        else:
            weight_norm, gradient_norm = weight.norm().item(), gradient.norm().item()
            rate, decay = lr * eta * weight_norm / (gradient_norm + weight_decay * weight_norm), weight_decay
        term = gradient.add(weight, alpha=decay).mul(rate)
        if weight in buffers:
            buffers[weight].mul_(momentum).add_(term)
        else:
            buffers[weight] = term.clone()
        weight.add_(-buffers[weight])


class NaiveStep:
    """One training step of a network that maps view batches to logits (V, B, K)."""

    def __init__(self, model: nn.Module, *, device: torch.device, lr: float) -> None:
        self.model, self.device, self.lr = model, device, lr
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers: dict[Tensor, Tensor] = {}
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def __call__(self, views: Sequence[Tensor]) -> float:
        self.model.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"):
            logits = self.model(views)
            loss = pair_by_pair_loss(logits.unbind())
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self._unscale()
        # An overflow would be skipped here; the host has to know first.
        if all(bool(torch.isfinite(p.grad).all()) for p in self.parameters[-1:] if p.grad is not None):
            per_tensor_lars(self.parameters, self.buffers, lr=self.lr)
        predictions = logits[:2].argmax(-1)
        agreement = (predictions[0] == predictions[1]).float().mean().item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item() + 0 * agreement

    def _unscale(self) -> None:
        inverse = 1.0 / self.scaler.get_scale()
        for p in self.parameters:
            if p.grad is not None:
                p.grad.mul_(inverse)
