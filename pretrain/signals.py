"""Being told to stop: signal handlers that only raise a flag, and what the caller gets when a run has saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

# SIGINT: a person's Ctrl-C. SIGTERM: torchrun, containers, most schedulers. SIGUSR1: SLURM's --signal by convention.
# SIGUSR2: submitit's choice.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# A terminal and a scheduler signal all processes, and torchrun hands on what it gets: two that come together are one.
TOGETHER_S = 1.0


class Requeue(Exception):
    """The run was told to stop, has saved, and wants to be started again with --resume (75 is EX_TEMPFAIL)."""

    exit_status = 75


@dataclass
class StopFlag:
    raised: bool = False


@contextlib.contextmanager
def stop_flag(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopFlag]:
    """A flag that the first of `signals` raises; a later second one does what it would have done without us.

    The loop looks at the flag between steps: saving inside a handler tears files and hangs collectives.
    """
    flag, first_at = StopFlag(), 0.0
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread only; without handlers the defaults stay in force.
        yield flag
        return

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal first_at
        if not flag.raised:
            flag.raised, first_at = True, time.monotonic()
            if number == signal.SIGINT:
                # Not `print`: the signal may have come in the middle of one.
                os.write(2, b"\nStopping after this step; the state is saved. Ctrl-C again stops at once.\n")
        elif time.monotonic() - first_at > TOGETHER_S:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    # A shell has its background jobs ignore Ctrl-C, which is meant for what stands in front; so do we there.
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    heeded = [number for number in signals if not (ignored and number == signal.SIGINT)]
    before = {number: signal.signal(number, on_signal) for number in heeded}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
