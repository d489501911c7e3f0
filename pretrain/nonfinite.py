"""A non-finite loss or gradient never reaches weights, teacher, running statistics or disk.

Every decision is taken on the device, so no step waits for another: the backward pass of a non-finite loss is seeded
with NaN, which DDP spreads to every rank; a gradient norm that is not finite makes the optimiser skip (`found_inf`) and
puts the batch norms' running statistics back. After too many such steps in a row the run ends and leaves a capture:
the state and the batch that fail, to be replayed (`python -m twist.pretrain.replay CAPTURE`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twist.contracts import files


class NonFiniteGuard:
    """Skips steps and counts them; all tensors stay on the device.

    `total` counts skipped steps of the whole run, `streak` those in a row up to now.
    """

    def __init__(self, networks: Iterable[nn.Module], *, device: torch.device) -> None:
        self._statistics = [b for network in networks for b in network.buffers() if b.is_floating_point()]
        self._sizes = [b.numel() for b in self._statistics]
        self._before = self._flat()
        self.total = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)

    def seed(self, loss: Tensor) -> Tensor:
        """What to start the backward pass with: 1, or NaN when the loss is not finite."""
        return torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)

    @torch.no_grad()
    def settle(self, gradient_norm: Tensor) -> Tensor:
        """Decide over this step, before the optimiser's: 1.0 to skip it, else 0.0 (a scalar on the device)."""
        skip = ~torch.isfinite(gradient_norm)
        if self._statistics:
            chosen = torch.where(skip, self._before, self._flat())
            parts = [part.view_as(b) for part, b in zip(chosen.split(self._sizes), self._statistics)]
            torch._foreach_copy_(self._statistics, parts)
            self._before = chosen
        self.total = self.total + skip
        self.streak = (self.streak + 1) * skip
        return skip.float()

    def refresh(self) -> None:
        """Take the statistics as they are now as the last good ones (after a state was loaded)."""
        self._before = self._flat()

    def _flat(self) -> Tensor:
        return torch.cat([b.flatten() for b in self._statistics]) if self._statistics else torch.empty(0)


def write_capture(path: Path, *, config: dict[str, Any], state: dict[str, Any], batch: dict[str, Any]) -> Path:
    """Write what fails: the resolved config, the state before the step, and this rank's batch."""
    with files.atomic_path(path) as temporary:
        torch.save({"config": config, "state": state, "batch": batch}, temporary)
    return path
