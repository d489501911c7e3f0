"""What a run reports: `metrics.jsonl`, TensorBoard, the progress line, `curves.png`, and an alarm when it collapses.

Each step leaves one vector on the device. Every `run.log_every_steps` steps the vectors are averaged over ranks and
sent to the host together; they are written when the next ones are sent, so nothing waits for the device.

Shapes: `B` images a rank, `K` classes, `S` steps, `N` numbers of a step.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from twist.contracts.curves import CURVES, Curves, Panel, draw, read_rows
from twist.contracts.errors import UserError
from twist.contracts.progress import Progress
from twist.contracts.trackers import Logger
from twist.pretrain import distributed

EVALUATIONS = "online_eval.jsonl"
# Read by the run itself and not written.
STREAK = "nonfinite_streak"
SHOWN = ("total", "agreement", "mean_entropy_share", "classes_used", "lr", "images_per_s", "data_wait_share")
# Of the alarm, in shares of ln K: rows above are uniform; with a mean distribution below, (nearly) one class is left.
UNIFORM_ABOVE, CONSTANT_BELOW, PATIENCE = 0.995, 0.05, 20


class Observed(NamedTuple):
    """A step's numbers on the device: (N + 2·K,), the last 2·K being the mean prediction and the used classes."""

    names: tuple[str, ...]
    numbers: Tensor


@torch.no_grad()
def observe(logits: Tensor, values: Mapping[str, Tensor]) -> Observed:
    """`values` by name, and how the global views of `logits` (V, B, K) are classified. Waits for nothing."""
    p = logits[:2].detach().float().softmax(-1)  # (2, B, K)
    arg_max = p.argmax(-1)  # (2, B)
    agreement = (arg_max[0] == arg_max[1]).float().mean()
    named = {**values, "agreement": agreement, "row_entropy": _entropy(p).mean()}
    scalars = torch.stack([value.detach().float() for value in named.values()])
    used = torch.zeros_like(p[0, 0]).index_fill_(0, arg_max.flatten(), 1.0)
    return Observed(tuple(named), torch.cat([scalars, p.mean((0, 1)), used]))


@torch.no_grad()
def condense(steps: Tensor, *, classes: int) -> Tensor:
    """(S, N + 2·K) means over ranks → (S, N + 2): entropy and number of used classes instead of the distributions."""
    scalars, mean, used = steps.split([steps.shape[1] - 2 * classes, classes, classes], dim=1)
    return torch.cat([scalars, _entropy(mean)[:, None], (used > 0).sum(1, keepdim=True)], dim=1)


def rows_of(numbers: Tensor, names: tuple[str, ...], *, classes: int) -> list[dict[str, Any]]:
    """The numbers of each step by name, from what `condense` gives; None where one is not finite."""
    rows = []
    for values in numbers.tolist():
        row = {n: v if math.isfinite(v) else None for n, v in zip((*names, "mean_entropy"), values)}
        row["mean_entropy_share"] = None if row["mean_entropy"] is None else row["mean_entropy"] / math.log(classes)
        rows.append({**row, "classes_used": int(values[-1])})
    return rows


class CollapseAlarm:
    """Goes off when predictions are uniform (a constant output is, after the head's last norm), or the same for all
    images, for `patience` steps in a row. At initialisation rows have about ln K − ½ nats."""

    def __init__(self, classes: int, patience: int = PATIENCE) -> None:
        self._top, self._patience, self._streaks = math.log(classes), patience, {"uniform": 0, "constant": 0}

    def look(self, row: dict[str, Any]) -> str | None:
        """The alarm's sentence when it goes off at this step (once for each time it begins), else None."""
        rows, mean = row["row_entropy"], row["mean_entropy_share"]
        if rows is None or mean is None:  # a skipped step
            return None
        for kind, is_so in (("uniform", rows > UNIFORM_ABOVE * self._top), ("constant", mean < CONSTANT_BELOW)):
            self._streaks[kind] = self._streaks[kind] + 1 if is_so else 0
            if self._streaks[kind] == self._patience:
                return (
                    f"Predictions have collapsed since step {row['step'] - self._patience + 1}: they are {kind}. Look "
                    "at the views and the learning rate (--show-views, optim.lr), and check loss.lam1 and loss.lam2."
                )
        return None


class Monitor:
    """Collects steps and writes them. Every rank has one; rank 0's writes. `nonfinite_streak` is how many steps in a
    row were skipped up to the last one written."""

    def __init__(
        self,
        folder: Path,
        *,
        classes: int,
        steps: int,
        first_step: int,
        first_epoch: int = 0,
        logger: Logger | None = None,
    ) -> None:
        self._folder, self._classes, self._first, self._logger = folder, classes, (first_step, first_epoch), logger
        self._pending: list[tuple[dict[str, Any], list[float], Observed]] = []
        self._write_sent: Callable[[], str | None] = lambda: None  # what was sent before, once
        self._alarm = CollapseAlarm(classes)
        self._curves: Curves | None = None
        self._progress = Progress("pretrain", total=steps, start=first_step, quiet=distributed.rank() != 0)
        self.nonfinite_streak = 0

    def __enter__(self) -> Self:
        if distributed.rank() == 0:
            board = self._folder / "tensorboard"
            self._curves = Curves(self._folder / CURVES, start=self._first[0], board=board, logger=self._logger)
        self._progress.__enter__()
        self._since = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None or issubclass(error[0], UserError):  # the device works, and the last rows say why
            self._write_sent()
        self._progress.__exit__(*error)
        if self._curves is not None:
            self._curves.close()

    def note(
        self, row: dict[str, Any], observed: Observed, *, images: int, data_wait_s: float, bad_images: int
    ) -> None:
        """Keep one step for the next `pass_on` or `flush`; `row` is written as it is. Waits for nothing."""
        self._pending.append((row, [images, data_wait_s, bad_images], observed))

    def pass_on(self) -> str | None:
        """Send the kept steps, and write those sent before, which have arrived by now; returns the collapse alarm's
        sentence if it went off. Every rank must call it."""
        alarm = self._write_sent()
        self._write_sent = self._send() if self._pending else lambda: None
        return alarm

    def flush(self) -> str | None:
        """Write everything, and wait for it; as `pass_on` otherwise."""
        alarm = self.pass_on()
        return self.pass_on() or alarm

    def _send(self) -> Callable[[], str | None]:
        """Send the kept steps to the host; the result writes them."""
        rows, of_host, observed = zip(*self._pending)
        self._pending = []
        hosts, stacked = torch.tensor(of_host), torch.stack([one.numbers for one in observed])
        if stacked.is_cuda:
            hosts = hosts.pin_memory()
        packed = distributed.averaged(torch.cat([stacked, hosts.to(stacked.device, non_blocking=True)], dim=1))
        numbers = torch.cat([condense(packed[:, :-3], classes=self._classes), packed[:, -3:]], dim=1)
        arrived = None
        if numbers.is_cuda:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        now = time.monotonic()
        wall_s, self._since = max(now - self._since, 1e-9), now
        return functools.partial(self._write, rows, observed[0].names, numbers, arrived, wall_s)

    def _write(
        self, rows: Sequence[dict[str, Any]], names: tuple[str, ...], numbers: Tensor, arrived: Any, wall_s: float
    ) -> str | None:
        if arrived is not None:
            arrived.synchronize()
        ranks = distributed.world_size()
        images, waits, bad = numbers[:, -3:].T.tolist()
        speed = {"images_per_s": sum(images) * ranks / wall_s, "data_wait_share": min(sum(waits) / wall_s, 1.0)}
        alarm, row = None, {}
        for known, found, mean_bad in zip(rows, rows_of(numbers[:, :-3], names, classes=self._classes), bad):
            self.nonfinite_streak = int(found.pop(STREAK, None) or 0)
            row = {**known, **found, **speed, "bad_images": round(mean_bad * ranks)}
            row["nonfinite_steps"] = int(row.get("nonfinite_steps") or 0)
            alarm = self._alarm.look(row) or alarm
            step = row.pop("step")
            if self._curves is not None:
                self._curves.add(step, row)
        if self._curves is not None:  # one row is enough for TensorBoard
            self._curves.plot(step, row, tag="pretrain/")
        self._progress.advance(len(rows), **{name: row[name] for name in SHOWN if row.get(name) is not None})
        return alarm

    @functools.cached_property
    def _evaluations(self) -> Curves:
        return Curves(self._folder / EVALUATIONS, start=self._first[1], key="epoch")

    def has_evaluation(self, epoch: int) -> bool:
        """Whether `online_eval.jsonl` has a row for `epoch`. Every rank must ask, and gets the same answer."""
        rows = distributed.on_main_rank(lambda: read_rows(self._evaluations.path, "epoch"))
        return any(row["epoch"] == epoch for row in rows)

    def note_evaluation(self, metrics: dict[str, float], *, epoch: int) -> None:
        """Write what the online evaluation found after `epoch` into `online_eval.jsonl` and TensorBoard."""
        if self._curves is not None:
            self._evaluations.add(epoch, metrics)
            self._curves.plot(epoch, metrics, tag="online_eval/")


def draw_curves(folder: Path, *, classes: int) -> Path:
    """Draw the `metrics.jsonl` in `folder`, of a run with K = `classes`, as `folder`/curves.png; the title of each
    panel says how a healthy run looks."""
    rows, top = read_rows(folder / CURVES), math.log(classes)
    nats, from_zero = {"ylabel": "nats"}, {"ylim": (0, None)}
    entropies = {"row_entropy": "of an image (sharpness)", "mean_entropy": "of the mean (diversity); dashed: ln K"}
    panels = [
        Panel("loss: falls (self-labelling has another)", {"total": "total"}, nats),
        Panel(
            "entropy: an image's falls, the mean's stays high", entropies, {**nats, "ylim": (0, 1.08 * top)}, level=top
        ),
        Panel("agreement of two views on a class: rises", {"agreement": "share"}, {"ylim": (0, 1)}),
        Panel(f"classes used in a batch, of {classes}: stay many", {"classes_used": "classes"}, from_zero),
        Panel("gradient norm", {"gradient_norm": "norm"}, {"yscale": "log"}),
        Panel("learning rate", {"lr": "lr"}, from_zero, smooth=False),
    ]
    second = next((row["step"] for row in rows if row.get("stage") == "self_label"), None)
    mark = None if not rows or second == rows[0]["step"] else second
    return draw(rows, panels, folder / "curves.png", columns=3, mark=mark)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)
