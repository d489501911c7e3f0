"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

# Called at each step with title, done, total and elapsed seconds (`twist demo` shows them).
Listener = Callable[[str, int, int | None, float], None]
listeners: list[Listener] = []


class Progress:
    """`with Progress("pretrain", total=100, unit="step") as p: p.advance(1, loss=0.3)`.

    On a terminal it draws a rich bar; elsewhere it prints a line at most every `every_s` seconds, so a log stays
    readable. `quiet` prints nothing (ranks other than 0). `total=None` counts without an end.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int | None,
        unit: str = "step",
        start: int = 0,
        every_s: float = 10.0,
        quiet: bool = False,
    ) -> None:
        self.title, self.total, self.unit, self.every_s, self.quiet = title, total, unit, every_s, quiet
        self.done, self._first = start, start
        self._began = self._printed = time.monotonic()
        self._values: dict[str, Any] = {}
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._began = self._printed = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich import progress as rich_progress
            from rich.console import Console

            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("[bold]{task.description}"),
                rich_progress.BarColumn(bar_width=None),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TextColumn("{task.fields[values]}"),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TextColumn("left"),
                rich_progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, values="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self.quiet and kind is None:
            self._line(final=True)

    def advance(self, steps: int = 1, **values: Any) -> None:
        """Count `steps` more and show `values` (numbers are printed with four significant digits)."""
        self.done += steps
        self._values = values or self._values
        for listener in listeners:
            listener(self.title, self.done, self.total, time.monotonic() - self._began)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, values=_text(self._values))
        elif not self.quiet and time.monotonic() - self._printed >= self.every_s:
            self._line()

    def _line(self, *, final: bool = False) -> None:
        now = time.monotonic()
        self._printed = now
        elapsed = now - self._began
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        total = "" if self.total is None else f"/{self.total}"
        line = f"{self.title}: {self.done}{total} {self.unit}s, "
        line += f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        line += f" {self.unit}s/s, {duration(elapsed)}"
        if not final and self.total is not None and rate > 0:
            line += f", {duration((self.total - self.done) / rate)} left"
        line += f" | {_text(self._values)}" if self._values else ""
        print(line, file=sys.stderr, flush=True)


def _text(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
