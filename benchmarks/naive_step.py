"""The step as the method's description reads, without any of our shortcuts: what `benchmarks/step.py` compares with.

Written from the algorithm (arXiv 2110.07402 and the published code's behaviour, commit 796d36e): the loss pair by pair
(100 softmaxes for 14 views), LARS tensor by tensor with its norms read on the host (112 reads for ResNet-50), fp16 with
torch's GradScaler (one read a step), no channels_last, fifteen values of a log each read on the host by itself, the
device waited for at the end. It runs on one rank, so the published step's 150 small all-reduces are left out: among
several ranks it would be slower than it is here.

Shapes: `B` images, `V` views, `K` classes.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

EPS = 1e-5


def pair_by_pair_loss(views: Sequence[Tensor]) -> Tensor:
    """Consistency + sharpness − diversity of views (B, K), a mean over their pairs."""
    consistency, sharpness, diversity = pair_by_pair_terms(views)
    return consistency + sharpness - diversity


def pair_by_pair_terms(views: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's three terms, means over the pairs (i, j), i ∈ {0, 1}, j > i, each pair with its own softmaxes,
    logarithms and sums."""
    pairs = [pair_terms(views[i], views[j]) for i in (0, 1) for j in range(i + 1, len(views))]
    consistency, sharpness, diversity = (sum(terms[1:], terms[0]) / len(terms) for terms in zip(*pairs))
    return consistency, sharpness, diversity


def pair_terms(a: Tensor, b: Tensor, *, tau: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Consistency, sharpness and diversity of one pair of views (B, K)."""
    p, q = a.softmax(-1), b.softmax(-1)
    s, t = (a / tau).softmax(-1), (b / tau).softmax(-1)
    consistency = 0.5 * (_divergence(p, q) + _divergence(q, p))
    sharpness = 0.5 * (_row_entropy(s) + _row_entropy(t))
    diversity = 0.5 * (_mean_entropy(s) + _mean_entropy(t))
    return consistency, sharpness, diversity


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


class PerTensorLARS(torch.optim.Optimizer):
    """`per_tensor_lars` as an optimiser, so that a loss scaler can unscale its gradients and leave it out."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.buffers: dict[Tensor, Tensor] = {}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            per_tensor_lars(group["params"], self.buffers, lr=group["lr"])


class NaiveStep:
    """One training step of a network that maps view batches to logits (V, B, K); returns what it would log.

    `skipped` counts the steps that the loss scaler left out because a gradient overflowed: those are shorter.
    """

    def __init__(self, model: nn.Module, *, device: torch.device, lr: float) -> None:
        self.model, self.device = model, device
        self.optimizer = PerTensorLARS([p for p in model.parameters() if p.requires_grad], lr=lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.skipped = 0
        self._scale = self.scaler.get_scale()

    def __call__(self, views: Sequence[Tensor]) -> dict[str, float]:
        self.model.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"):
            logits = self.model(views)
            consistency, sharpness, diversity = pair_by_pair_terms(logits.unbind())
            loss = consistency + sharpness - diversity
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        terms = {"loss": loss, "consistency": consistency, "sharpness": sharpness, "diversity": diversity}
        logged = {name: value.item() for name, value in {**terms, **_seen(logits)}.items()}
        logged["loss_scale"] = self.scaler.get_scale()
        self.skipped += logged["loss_scale"] < self._scale
        self._scale = logged["loss_scale"]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return logged


@torch.no_grad()
def _seen(logits: Tensor) -> dict[str, Tensor]:
    """Ten scalars about the global views' predictions, from logits (V, B, K)."""
    p = logits[:2].float().softmax(-1)  # (2, B, K)
    classes = p.argmax(-1)  # (2, B)
    values = {
        "agreement": (classes[0] == classes[1]).float().mean(),
        "logit_spread": logits.float().std(),
    }
    for view in range(2):
        values |= {
            f"row_entropy_{view}": _row_entropy(p[view]),
            f"mean_entropy_{view}": _mean_entropy(p[view]),
            f"confidence_{view}": p[view].amax(-1).mean(),
            f"largest_share_{view}": p[view].mean(0).amax(),
        }
    return values
