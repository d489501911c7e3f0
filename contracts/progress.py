"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines every few seconds elsewhere."""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Self


def is_quiet() -> bool:
    """`twist -q`: no progress and no plans. In the environment, so that the processes of a run know it too."""
    return bool(os.environ.get("TWIST_QUIET"))


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
        self.title, self.total, self.unit, self.every_s = title, total, unit, every_s
        self.quiet = quiet or is_quiet()
        self.done, self._first = start, start
        self._began = self._printed = time.monotonic()
        self._values: list[str] = []
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._began = self._printed = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            self._bar = _rich_bar(self)
            self._bar.add_task(self.title, total=self.total, completed=self.done)
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self.quiet and error[0] is None:
            self._line(final=True)

    def advance(self, steps: int = 1, **values: Any) -> None:
        """Count `steps` more and show `values` (numbers are printed with four significant digits)."""
        self.done += steps
        self._values = _texts(values) or self._values
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done)
        elif not self.quiet and time.monotonic() - self._printed >= self.every_s:
            self._line()

    def _line(self, *, final: bool = False) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._began
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        total = "" if self.total is None else f"/{self.total}"
        line = f"{self.title}: {self.done}{total} {self.unit}s, {_rate(rate)} {self.unit}s/s, {duration(elapsed)}"
        if not final and self.total is not None and rate > 0:
            line += f", {duration((self.total - self.done) / rate)} left"
        line += f" | {'  '.join(self._values)}" if self._values else ""
        print(line, file=sys.stderr, flush=True)

    @property
    def below(self) -> str:
        """The line of values under a bar."""
        return "".join(f"  {value}" for value in self._values)


def _rich_bar(of: Progress) -> Any:
    """A bar whose count, rate and times stay at any width; values stand below it as far as they fit."""
    from rich import progress
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    class Bar(progress.Progress):
        def get_renderables(self) -> Any:
            yield self.make_tasks_table(self.tasks)
            yield Text(of.below, style="dim", no_wrap=True, overflow="crop")

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{_rate(speed)} {of.unit}s/s", no_wrap=True)

    def narrow() -> Column:
        return Column(no_wrap=True)

    return Bar(
        progress.TextColumn("{task.description}", table_column=Column(overflow="ellipsis", no_wrap=True, ratio=2)),
        progress.BarColumn(bar_width=None, table_column=Column(ratio=3)),
        progress.MofNCompleteColumn(table_column=narrow()),
        Rate(table_column=narrow()),
        progress.TimeElapsedColumn(table_column=narrow()),
        progress.TimeRemainingColumn(table_column=narrow()),
        progress.TextColumn("left", table_column=narrow()),
        console=Console(stderr=True),
        expand=True,
    )


def _texts(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()]


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
