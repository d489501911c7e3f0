"""What a run says about itself: `metrics.jsonl`, TensorBoard, the progress line, and an alarm when it collapses.

Steps leave one vector each on the device; every `run.log_every_steps` steps they are averaged over ranks and sent to
the host together, and written when the next ones are sent: by then they have arrived, so nothing waits for the device.
Shapes: `B` images a rank, `K` classes, `S` steps.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.progress import Progress
from twist.pretrain import distributed

# In nats, except agreement (a share) and gradient_norm; NaN where a stage has no such quantity.
DEVICE_VALUES = (
    "total",
    "consistency",
    "sharpness",
    "diversity",
    "self_label_threshold",
    "agreement",
    "row_entropy",
    "gradient_norm",
    "nonfinite_steps",
    "nonfinite_streak",
)
# Not written: what the run itself looks at.
_INTERNAL = ("nonfinite_streak",)
# Of those, the ones that only one stage has.
STAGE_VALUES = {
    "mutual_information": ("consistency", "sharpness", "diversity"),
    "self_label": ("self_label_threshold",),
}
SHOWN = ("total", "agreement", "mean_entropy_share", "classes_used", "lr", "images_per_s", "data_wait_share")


@torch.no_grad()
def observe(logits: Tensor, values: dict[str, Tensor]) -> Tensor:
    """One step's vector (values + 2·K,) on the device: `values` by name, what the global views' predictions look like,
    their mean distribution (K,), and which classes they use (K,)."""
    p = logits[:2].detach().float().softmax(-1)  # (2, B, K)
    arg_max = p.argmax(-1)  # (2, B)
    seen = {
        **values,
        "agreement": (arg_max[0] == arg_max[1]).float().mean(),
        "row_entropy": _entropy(p).mean(),
    }
    absent = logits.new_full((), math.nan, dtype=torch.float32)
    scalars = torch.stack([seen.get(name, absent).detach().float() for name in DEVICE_VALUES])
    used = torch.zeros_like(p[0, 0]).index_fill_(0, arg_max.flatten(), 1.0)
    return torch.cat([scalars, p.mean((0, 1)), used])


@torch.no_grad()
def condense(steps: Tensor, *, classes: int) -> Tensor:
    """(S, values + 2) from stacked vectors that are already means over ranks: entropy and number of used classes in
    place of the distributions. Stays on the device."""
    scalars, mean, used = steps.split([len(DEVICE_VALUES), classes, classes], dim=1)
    return torch.cat([scalars, _entropy(mean)[:, None], (used > 0).sum(1, keepdim=True)], dim=1)


def rows_of(numbers: Tensor, *, classes: int) -> list[dict[str, Any]]:
    """Names and numbers of each step, from what `condense` gives."""
    rows = []
    for *values, entropy, count in numbers.tolist():
        # JSON has no NaN: a step without a number says null.
        row: dict[str, Any] = {n: v if math.isfinite(v) else None for n, v in zip(DEVICE_VALUES, values)}
        row["mean_entropy"] = entropy if math.isfinite(entropy) else None
        row["mean_entropy_share"] = entropy / math.log(classes) if math.isfinite(entropy) else None
        row["classes_used"] = int(count)
        rows.append(row)
    return rows


@dataclass
class CollapseAlarm:
    """Says so when predictions have been the same for all images, or uniform, for `patience` steps in a row.

    The head's last norm makes a constant output a uniform prediction, so that is the face collapse mostly has here.
    At initialisation rows have about ln K − ½ nats, which is below the limit for every K.
    """

    classes: int
    patience: int = 20
    # Shares of ln K: rows above are uniform; a mean distribution below means that (nearly) one class is left.
    uniform_above: float = 0.995
    constant_below: float = 0.05
    _uniform: int = field(default=0, init=False)
    _constant: int = field(default=0, init=False)

    def look(self, row: dict[str, Any]) -> str | None:
        """The alarm's sentence when it goes off at this step (once for each time it begins), else None."""
        rows, mean = row["row_entropy"], row["mean_entropy_share"]
        if rows is None or mean is None:  # a skipped step says nothing
            return None
        self._uniform = self._uniform + 1 if rows / math.log(self.classes) > self.uniform_above else 0
        self._constant = self._constant + 1 if mean < self.constant_below else 0
        if self._uniform == self.patience:
            return self._sentence("uniform: every image gets every class alike", row)
        if self._constant == self.patience:
            return self._sentence("constant: nearly all images get one class", row)
        return None

    def _sentence(self, what: str, row: dict[str, Any]) -> str:
        return (
            f"Predictions have collapsed since step {row['step'] - self.patience + 1}: they are {what}. Look at views "
            "and learning rate (--show-views, optim.lr), and check loss.lam1 and loss.lam2."
        )


@dataclass(frozen=True)
class StepNote:
    """What the host knows of a step without asking the device."""

    step: int
    epoch: int
    stage: Literal["mutual_information", "self_label"]
    lr: float
    images: int
    data_wait_s: float
    bad_images: int


class _Sent(NamedTuple):
    """Steps on their way to the host, and what the host knew when it sent for them."""

    notes: tuple[StepNote, ...]
    numbers: Tensor  # (S, values + 2 + 2), there when `arrived` says so
    arrived: torch.cuda.Event | None
    wall_s: float


class Monitor:
    """Collects steps and writes them out. Every rank has one; rank 0's writes. Use it in a `with`.

    `nonfinite_streak` is how many steps in a row were skipped up to the last one written.
    """

    def __init__(self, folder: Path, *, classes: int, steps: int, first_step: int, first_epoch: int = 0) -> None:
        self._classes, self._path = classes, folder / "metrics.jsonl"
        self._evaluations, self._first_epoch = folder / "online_eval.jsonl", first_epoch
        self._pending: list[tuple[StepNote, Tensor]] = []
        self._sent: _Sent | None = None
        self.nonfinite_streak = 0
        self._alarm = CollapseAlarm(classes)
        self._is_main = distributed.rank() == 0
        self._progress = Progress("pretrain", total=steps, start=first_step, quiet=not self._is_main)
        self._board: Any = None
        self._board_folder, self._first_step = folder / "tensorboard", first_step
        self._since = time.monotonic()

    def __enter__(self) -> Monitor:
        if self._is_main:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, and only rank 0 needs it

            keep_rows_before(self._path, step=self._first_step)
            keep_rows_before(self._evaluations, epoch=self._first_epoch)
            self._board = SummaryWriter(str(self._board_folder), purge_step=self._first_step)
        self._progress.__enter__()
        self._since = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None or issubclass(error[0], UserError):  # the device is well, and the last rows tell why
            self._write_sent()
        self._progress.__exit__(*error)
        if self._board is not None:
            self._board.close()

    def note(self, note: StepNote, seen: Tensor) -> None:
        """Keep one step for the next `pass_on` or `flush`; waits for nothing."""
        self._pending.append((note, seen))

    def pass_on(self) -> str | None:
        """Send for the kept steps, and write those sent for before; waits for nothing that is not long done.

        Returns the collapse alarm's sentence if it went off. Every rank must call it.
        """
        alarm = self._write_sent()
        self._send()
        return alarm

    def flush(self) -> str | None:
        """Write everything, and wait for it; as `pass_on` otherwise."""
        alarm = self.pass_on()
        return self._write_sent() or alarm

    def _send(self) -> None:
        if not self._pending:
            return
        notes, seen = zip(*self._pending)
        self._pending = []
        hosts = torch.tensor([[note.data_wait_s, note.bad_images] for note in notes], dtype=torch.float32)
        stacked = torch.stack(seen)
        if stacked.is_cuda:
            hosts = hosts.pin_memory()
        packed = torch.cat([stacked, hosts.to(stacked.device, non_blocking=True)], dim=1)
        packed = distributed.averaged(packed)
        numbers = torch.cat([condense(packed[:, :-2], classes=self._classes), packed[:, -2:]], dim=1)
        arrived = None
        if numbers.is_cuda:
            there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = there.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        now = time.monotonic()
        self._sent = _Sent(notes, numbers, arrived, max(now - self._since, 1e-9))
        self._since = now

    def _write_sent(self) -> str | None:
        if self._sent is None:
            return None
        (notes, numbers, arrived, wall_s), self._sent = self._sent, None
        if arrived is not None:
            arrived.synchronize()
        waits, bad = numbers[:, -2:].T.tolist()
        images = sum(note.images for note in notes) * distributed.world_size()
        alarm = None
        lines = []
        for note, row, bad_mean in zip(notes, rows_of(numbers[:, :-2], classes=self._classes), bad):
            self.nonfinite_streak = int(row["nonfinite_streak"] or 0)
            absent = {name for stage, names in STAGE_VALUES.items() if stage != note.stage for name in names}
            kept = {name: value for name, value in row.items() if name not in absent.union(_INTERNAL)}
            line = {"step": note.step, "epoch": note.epoch, "stage": note.stage, **kept, "lr": note.lr}
            line["nonfinite_steps"] = int(line["nonfinite_steps"] or 0)
            line["bad_images"] = round(bad_mean * distributed.world_size())
            line["images_per_s"] = images / wall_s
            line["data_wait_share"] = min(sum(waits) / wall_s, 1.0)
            alarm = self._alarm.look(line) or alarm
            lines.append(line)
        if self._is_main:
            self._write(lines)
        self._progress.advance(len(lines), **{name: lines[-1][name] for name in SHOWN if lines[-1][name] is not None})
        return alarm

    def has_evaluation(self, epoch: int) -> bool:
        """Whether `online_eval.jsonl` has what was found after `epoch`; every rank must ask, and hears the same."""
        return distributed.on_main_rank(
            lambda: (
                self._evaluations.exists()
                and any(json.loads(line)["epoch"] == epoch for line in self._evaluations.read_text().splitlines())
            )
        )

    def note_evaluation(self, metrics: dict[str, float], *, epoch: int) -> None:
        """Write what the online evaluation found after `epoch` into `online_eval.jsonl` and TensorBoard."""
        if not self._is_main:
            return
        with self._evaluations.open("a") as file:
            file.write(json.dumps({"epoch": epoch, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(f"online_eval/{name}", value, epoch)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with self._path.open("a") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        last = lines[-1]
        for name, value in last.items():
            if isinstance(value, (int, float)) and name not in ("step",):
                self._board.add_scalar(f"pretrain/{name}", value, last["step"])


def keep_rows_before(path: Path, **first: int) -> None:
    """Drop the rows that a resumed run will write again, from `step=` or `epoch=` on, and a line torn by a kill."""
    if not path.exists():
        return
    ((name, number),) = first.items()
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # torn: nothing after it was written
        if row[name] < number:
            kept.append(line)
    files.write_text(path, "".join(line + "\n" for line in kept))


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)
