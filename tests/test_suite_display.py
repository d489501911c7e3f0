"""The suite's display as a person sees it: a live table on a real (pseudo-)terminal, plain lines in a log."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from twist.transfer.suite.display import SuiteDisplay, duration, last_words

# What `twist suite` does to its display, with a run's log growing meanwhile.
SCRIPT = """
import sys
from pathlib import Path
from twist.transfer.suite_display import SuiteDisplay

log = Path(sys.argv[1])
with SuiteDisplay(total=3) as display:
    display.start("a", "sample-knn · twist [views.size=32]", log=log, attempt=1)
    display.refresh()
    log.write_text("loading\\nk-NN: 3/10 images\\n")
    display.refresh()
    display.retry("a", "sample-knn · twist [views.size=32]", reason="killed")
    display.start("a", "sample-knn · twist [views.size=32]", log=log, attempt=2)
    display.start("b", "sample-linear · byol", log=log.with_name("none yet"), attempt=1)
    display.refresh()
    display.done("a", "sample-knn · twist [views.size=32]", wall_s=65)
    display.failed("b", "sample-linear · byol", reason="out of memory")
    display.refresh()
"""
ERASED_LINE = "\x1b[2K"


def on_a_terminal(log: Path, *, columns: int) -> str:
    """Everything that `SCRIPT` sends to a terminal of that width."""
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        variables.pop(name, None)
    running = subprocess.Popen([sys.executable, "-c", SCRIPT, str(log)], stderr=its_end, env=variables)
    os.close(its_end)
    received = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux's word for the other end having closed
            break
        if not part:
            break
        received += part
    os.close(terminal)
    assert running.wait(timeout=60) == 0
    return received.decode()


def plain(sent: str) -> list[str]:
    without = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    return [line.rstrip() for line in re.split(r"[\r\n]+", without)]


def test_a_terminal_shows_what_runs_and_keeps_what_happened(tmp_path: Path) -> None:
    sent = on_a_terminal(tmp_path / "log.txt", columns=100)
    lines = plain(sent)
    assert "0 of 3 runs done" in lines
    assert "1 of 3 runs done, 1 failed" in lines
    # A run with the last word of its log, and what an override has in square brackets is no markup.
    running = [line for line in lines if "k-NN: 3/10 images" in line]
    assert running
    assert all("sample-knn · twist [views.size=32]" in line for line in running)
    assert any("(second try)" in line for line in running)
    assert any(re.search(r"sample-linear · byol +│ +\d+ s", line) for line in lines)
    said = [line for line in lines if line.startswith("[")]
    assert said == [
        "[0/3] started  sample-knn · twist [views.size=32]",
        "[0/3] failed   sample-knn · twist [views.size=32], trying once more: killed",
        "[0/3] started  sample-knn · twist [views.size=32] (second try)",
        "[0/3] started  sample-linear · byol",
        "[1/3] done     sample-knn · twist [views.size=32] in 1 min 05 s",
        "[2/3] failed   sample-linear · byol: out of memory",
    ]
    # The table goes when the suite ends: what follows its last drawing takes lines away and writes none.
    after = sent[sent.rindex("1 of 3 runs done, 1 failed") :]
    assert ERASED_LINE in after
    assert not [line for line in plain(after[after.rindex(ERASED_LINE) :]) if line]


def test_a_narrow_terminal_gets_no_line_that_is_wider(tmp_path: Path) -> None:
    lines = plain(on_a_terminal(tmp_path / "log.txt", columns=60))
    table = [line for line in lines if line[:1] in "┏┃┡│└"]
    assert table
    assert max(map(len, table)) <= 60


def test_a_log_gets_plain_lines_and_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SuiteDisplay(total=1) as display:
        display.start("a", "sample-knn", log=tmp_path / "log.txt", attempt=1)
        display.wait("b", "sample-linear")
        display.wait("b", "sample-linear")
        display.refresh()
        display.done("a", "sample-knn", wall_s=3)
    assert capsys.readouterr().err.splitlines() == [
        "[0/1] started  sample-knn",
        "[0/1] waiting  sample-linear: a process of an earlier suite is still at it",
        "[1/1] done     sample-knn in 3 s",
    ]


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_words(log) == ""
    log.write_text("")
    assert last_words(log) == ""
    log.write_bytes(b"x" * 5000 + b"\nthe end \xff \n\n")
    assert last_words(log) == "the end \ufffd"
    log.write_text("a" * 5000)
    assert last_words(log, size=10) == "a" * 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
