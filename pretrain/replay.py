"""Steps whose loss or gradient is not finite: skipped, counted, and after too many in a row captured and replayed.

They never reach weights, teacher, running statistics or disk. Every decision is taken on the device, so no step waits:
the backward pass of a non-finite loss starts from NaN, which DDP spreads to every rank; a gradient norm that is not
finite makes the optimiser skip (`found_inf`) and restores the batch norms' running statistics. A capture holds the
state and the batch that fail: `python -m twist.pretrain.replay CAPTURE.pt`.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twist.contracts.config import validate
from twist.contracts.errors import UserError
from twist.contracts.pickles import read_state
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import build_model


class NonFiniteGuard:
    """Skips steps and counts them: `total` those of the run, `streak` those in a row. Its tensors are on the device."""

    def __init__(self, networks: Iterable[nn.Module], *, device: torch.device) -> None:
        self._statistics = [b for network in networks for b in network.buffers() if b.is_floating_point()]
        self._sizes = [b.numel() for b in self._statistics]
        self.total, self.streak = torch.zeros((), device=device), torch.zeros((), device=device)
        self._good = self._flat()

    def backward_start(self, loss: Tensor) -> Tensor:
        """The gradient that the backward pass starts from: 1, or NaN when the loss is not finite."""
        return torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)

    @torch.no_grad()
    def settle(self, gradient_norm: Tensor) -> Tensor:
        """Before the optimiser's step: 1.0 when it is to be skipped, else 0.0 (a scalar on the device)."""
        skip = ~torch.isfinite(gradient_norm)
        if self._statistics:
            good = torch.where(skip, self._good, self._flat())
            parts = [part.view_as(b) for part, b in zip(good.split(self._sizes), self._statistics)]
            torch._foreach_copy_(self._statistics, parts)
            self._good = good
        self.total = self.total + skip
        self.streak = (self.streak + 1) * skip
        return skip.float()

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total, "streak": self.streak}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.total, self.streak = state["total"], state["streak"]

    def refresh(self) -> None:
        """Take the statistics as they are now as the last good ones (after a state was loaded)."""
        self._good = self._flat()

    def _flat(self) -> Tensor:
        return torch.cat([b.flatten() for b in self._statistics]) if self._statistics else torch.empty(0)


def replay(path: Path) -> dict[str, Any]:
    """Run the captured batch through the captured state, on the CPU in float32.

    Returns `loss`, `gradient_norm`, and the names of the gradients that are not finite. The last batch norm then has
    this rank's own statistics.
    """
    from twist.pretrain.train import objective

    capture = read_state(path, "config", "state", "batch", remedy="name a nonfinite_rank….pt of a run's folder")
    config = validate(capture["config"], PretrainConfig, where=str(path))
    alone = config.model_copy(update={"model": config.model.model_copy(update={"bunch_size": 0})})
    student, teacher = build_model(alone, device=torch.device("cpu"))
    student.load_state_dict(capture["state"]["model"])
    if teacher is not None:
        teacher.load_state_dict(capture["state"]["teacher"])
    batch = capture["batch"]
    views = batch["views"]
    torch.manual_seed(batch["seed"])
    logits, teacher_logits = student(views), None if teacher is None else teacher(views[:1])
    loss = objective(logits, teacher_logits, config.loss, stage=batch["stage"], quantile=batch["quantile"])
    loss.total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {
        "loss": float(loss.total),
        "gradient_norm": float(torch.nn.utils.get_total_norm(list(gradients.values()))),
        "nonfinite_gradients": [name for name, g in gradients.items() if not torch.isfinite(g).all()],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m twist.pretrain.replay CAPTURE.pt")
    try:
        for name, value in replay(Path(sys.argv[1])).items():
            print(f"{name}: {value}")
    except UserError as error:
        raise SystemExit(f"twist: {error}") from None
