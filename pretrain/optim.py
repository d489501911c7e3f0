"""LARS as TWIST uses it, the parameters with and without decay and layer-wise rate, and steps that are not finite.

The learning rate stands *inside* the momentum buffer (published code, commit 796d36e, `lars.py`):

    rate = lr · eta·‖w‖ / (‖g‖ + decay·‖w‖)       buffer ← momentum·buffer + rate·(g + decay·w)       w ← w − buffer

which differs from the usual form whenever the rate changes. One-dimensional tensors, biases and a ViT's position table
and class token have neither decay nor layer-wise rate (rate = lr).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from twist.pretrain.config import OptimConfig

NEVER_DECAYED = ("pos_embed", "cls_token")


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, `decayed` and `excluded`, that hold every trainable parameter exactly once."""
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            excluded = p.dim() <= 1 or name.endswith(".bias") or any(part in name for part in NEVER_DECAYED)
            groups[excluded].append(p)
    return [
        {"params": groups[False], "name": "decayed", "weight_decay": weight_decay, "lars_exclude": False},
        {"params": groups[True], "name": "excluded", "weight_decay": 0.0, "lars_exclude": True},
    ]


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """LARS or AdamW over `parameter_groups(model)`; the rate is set before every step."""
    groups = parameter_groups(model, weight_decay=config.weight_decay)
    if config.name == "lars":
        return LARS(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay, eta=config.eta)
    # Fused, because that one skips a step by a flag on the device, as our LARS does.
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """This step's learning rate for all groups, and its weight decay for the decayed one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["name"] == "decayed":
            group["weight_decay"] = weight_decay


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates with trust coefficient `eta`, without one wait for the device.

    Rate `lr` have groups with `lars_exclude=True`, and tensors whose norm, or whose gradient's, is zero. `step`
    overwrites the gradients, and changes nothing when the scalar tensor in the attribute `found_inf` (GradScaler's
    protocol) is 1.
    """

    # GradScaler then hands its flag over instead of reading it on the host.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Iterable[Any], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, eta: float = 0.001
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "lars_exclude": False}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """One update from the parameters' gradients."""
        assert closure is None
        assert getattr(self, "grad_scale", None) is None, "LARS needs the norms of unscaled gradients"
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            # In their parameters' memory layout.
            gradients = [
                _flat(p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)) for p in weights
            ]
            buffers = [_flat(self._buffer(p)) for p in weights]
            weights = [_flat(p) for p in weights]
            rates = group["lr"] if group["lars_exclude"] else _layer_rates(weights, gradients, group)
            if group["weight_decay"]:
                torch._foreach_add_(gradients, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(gradients, rates)
            # buffer ← momentum·buffer + gradient; w ← w − buffer: plain SGD with a rate of one.
            torch._fused_sgd_(
                weights, gradients, buffers, found_inf=found_inf, momentum=group["momentum"], lr=1.0,
                weight_decay=0.0, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip

    def _buffer(self, parameter: Tensor) -> Tensor:
        # Zero at first: momentum · 0 + the first term is the first term itself, as published.
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _layer_rates(weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> tuple[Tensor, ...]:
    """lr · eta·‖w‖ / (‖g‖ + decay·‖w‖) of each tensor, as scalars on the device."""
    weight_norm = torch.stack(torch._foreach_norm(weights))
    gradient_norm = torch.stack(torch._foreach_norm(gradients))
    ratio = group["eta"] * weight_norm / (gradient_norm + group["weight_decay"] * weight_norm)
    defined = (weight_norm > 0) & (gradient_norm > 0)
    return (group["lr"] * torch.where(defined, ratio, 1.0)).unbind()


def _flat(x: Tensor) -> Tensor:
    """A dense tensor of any layout as one row, in the order of its memory: the fused kernel copies other layouts."""
    return x.as_strided((x.numel(),), (1,))


class NonFiniteGuard:
    """Skips steps whose loss or gradient is not finite, and counts them on the device: `total`, and `streak` in a row.

    They never reach weights, teacher, running statistics or disk, and no step waits for the device: the backward pass
    of a non-finite loss starts from NaN, which DDP spreads to every rank, and a gradient norm that is not finite makes
    the optimiser skip (`found_inf`) and restores the running statistics of the batch norms.
    """

    def __init__(self, networks: Iterable[nn.Module], *, device: torch.device) -> None:
        self._statistics = [b for network in networks for b in network.buffers() if b.is_floating_point()]
        self._sizes = [b.numel() for b in self._statistics]
        self.total, self.streak = torch.zeros((), device=device), torch.zeros((), device=device)
        self.refresh()

    def refresh(self) -> None:
        """Take the statistics as they are now as the last good ones (after a state was loaded)."""
        self._good = torch.cat([b.flatten() for b in self._statistics]) if self._statistics else torch.empty(0)

    def backward_start(self, loss: Tensor) -> Tensor:
        """The gradient that the backward pass starts from: 1, or NaN when the loss is not finite."""
        return torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)

    @torch.no_grad()
    def settle(self, gradient_norm: Tensor) -> Tensor:
        """Before the optimiser's step: 1.0 when it is to be skipped, else 0.0 (a scalar on the device)."""
        skip = ~torch.isfinite(gradient_norm)
        if self._statistics:
            before = self._good
            self.refresh()
            self._good = torch.where(skip, before, self._good)
            parts = [part.view_as(b) for part, b in zip(self._good.split(self._sizes), self._statistics)]
            torch._foreach_copy_(self._statistics, parts)
        self.total = self.total + skip
        self.streak = (self.streak + 1) * skip
        return skip.float()

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total, "streak": self.streak}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.total, self.streak = state["total"], state["streak"]
        self.refresh()
