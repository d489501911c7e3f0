"""Being told to stop: signal handlers that only raise a flag, and what the caller gets when a run has saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

# SIGTERM: torchrun, containers, most schedulers. SIGUSR1: SLURM's --signal by convention. SIGUSR2: submitit's choice.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Requeue(Exception):
    """The run was told to stop, has saved, and wants to be started again with --resume (75 is EX_TEMPFAIL)."""

    exit_status = 75


@dataclass
class StopFlag:
    raised: bool = False


@contextlib.contextmanager
def stop_flag(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopFlag]:
    """A flag that the first of `signals` raises; a second one does what it would have done without us.

    The loop looks at the flag between steps: saving inside a handler tears files and hangs collectives.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread only; without handlers the defaults stay in force.
        yield flag
        return

    def on_signal(number: int, _: FrameType | None) -> None:
        if flag.raised:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        flag.raised = True

    before = {number: signal.signal(number, on_signal) for number in signals}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
