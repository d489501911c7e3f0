"""LARS as TWIST uses it, and the split of parameters into those with and those without decay and layer-wise rate.

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
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert named, "the model has no trainable parameter"
    decayed = [p for name, p in named if not _is_excluded(name, p)]
    excluded = [p for name, p in named if _is_excluded(name, p)]
    return [
        {"params": decayed, "name": "decayed", "weight_decay": weight_decay, "lars_exclude": False},
        {"params": excluded, "name": "excluded", "weight_decay": 0.0, "lars_exclude": True},
    ]


def _is_excluded(name: str, parameter: Tensor) -> bool:
    return parameter.dim() <= 1 or name.endswith(".bias") or any(part in name for part in NEVER_DECAYED)


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
    """Layer-wise adaptive rates, without one wait for the device.

    `eta` is the trust coefficient; a group with `lars_exclude=True` has rate `lr`, and so have tensors whose norm, or
    whose gradient's, is zero. `step` overwrites the gradients, and changes nothing when the scalar tensor in the
    attribute `found_inf` (GradScaler's protocol) is 1. Norms, decay and rates are foreach operations, the rest is
    torch's fused SGD kernel.
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
            gradients = [_flat(_like(p.grad, p)) for p in weights]
            buffers = [_flat(self._buffer(p)) for p in weights]
            weights = [_flat(p) for p in weights]
            rates = group["lr"] if group["lars_exclude"] else _layer_rates(weights, gradients, group)
            if group["weight_decay"]:
                torch._foreach_add_(gradients, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(gradients, rates)
            # buffer ← momentum·buffer + gradient; w ← w − buffer: plain SGD with a rate of one.
            torch._fused_sgd_(
                weights,
                gradients,
                buffers,
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=1.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=found_inf,
            )

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


def _like(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """The gradient in its parameter's memory layout."""
    assert gradient is not None
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _flat(x: Tensor) -> Tensor:
    """A dense tensor of any layout as one row, in the order of its memory: the fused kernel copies other layouts."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    assert extent == x.numel(), "a parameter that is a part of another tensor"
    return x.as_strided((x.numel(),), (1,))
