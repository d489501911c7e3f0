"""A live table of the runs of a suite on a terminal; plain lines elsewhere, so that a log stays readable."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass
class _Line:
    title: str
    log: Path
    attempt: int
    began: float


class SuiteDisplay:
    """`with SuiteDisplay(total=12) as display: display.start(key, title, log=…, attempt=1) … display.done(…)`."""

    def __init__(self, *, total: int) -> None:
        self._total, self._finished, self._failed = total, 0, 0
        self._running: dict[str, _Line] = {}
        self._waiting: set[str] = set()
        self._live: Any = None

    def __enter__(self) -> SuiteDisplay:
        if sys.stderr.isatty() and self._total:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self._table(), console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def start(self, key: str, title: str, *, log: Path, attempt: int) -> None:
        self._running[key] = _Line(title, log, attempt, time.monotonic())
        self._say(f"started  {title}" + (" (second try)" if attempt > 1 else ""))

    def wait(self, key: str, title: str) -> None:
        """Another process is at this run; said once."""
        if key not in self._waiting:
            self._waiting.add(key)
            self._say(f"waiting  {title}: a process of an earlier suite is still at it")

    def done(self, key: str, title: str, *, wall_s: float) -> None:
        self._running.pop(key, None)
        self._finished += 1
        self._say(f"done     {title} in {duration(wall_s)}")

    def retry(self, key: str, title: str, *, reason: str) -> None:
        self._running.pop(key, None)
        self._say(f"failed   {title}, trying once more: {reason}")

    def failed(self, key: str, title: str, *, reason: str) -> None:
        self._running.pop(key, None)
        self._failed += 1
        self._say(f"failed   {title}: {reason}")

    def refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _say(self, text: str) -> None:
        line = f"[{self._finished + self._failed}/{self._total}] {text}"
        if self._live is not None:
            # markup=False: overrides stand in square brackets.
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        failed = f", {self._failed} failed" if self._failed else ""
        table = Table(title=f"{self._finished} of {self._total} runs done{failed}", title_justify="left", expand=True)
        table.add_column("running", no_wrap=True)
        table.add_column("for", justify="right", no_wrap=True)
        table.add_column("last word", no_wrap=True, overflow="ellipsis", ratio=1)
        for line in self._running.values():
            title = line.title + (" (second try)" if line.attempt > 1 else "")
            table.add_row(Text(title), duration(time.monotonic() - line.began), Text(last_words(line.log)))
        return table


def last_words(log: Path, *, size: int = 2048) -> str:
    """The last line of a log that is being written; empty while there is none."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - size, 0))
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
