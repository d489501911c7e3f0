"""Failures of a run in one sentence, across processes: what a worker raised reaches the user, a dead one is named.

Both frameworks start workers as processes; a parent sees a traceback as text, or an exit code. `guard` in the worker
leaves the sentence in the run folder, `raise_failure` in the parent finds it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError

_FILE = "failure.json"
# How a collective fails where a peer is gone (gloo, NCCL); the parent may learn of that before it learns of the death.
_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


@contextlib.contextmanager
def guard(output: Path, *, knob: str) -> Iterator[None]:
    """In a worker: what commonly ends a run becomes a `UserError` with its remedy; each is left for the parent.

    `knob` says how to need less memory.
    """
    try:
        yield
    except UserError as error:
        files.write_json(output / _FILE, {"message": str(error), "usage": isinstance(error, UsageError)})
        raise
    except Exception as error:
        sentence = _sentence(error, knob)
        if sentence is None:
            raise
        if not (output / _FILE).exists():  # the first to fail has said why; that its peers lose it follows from that
            files.write_json(output / _FILE, {"message": sentence, "usage": False})
        raise UserError(sentence) from error


def _sentence(error: Exception, knob: str) -> str | None:
    """What happened and what to do, for failures that are nobody's bug; None for all others."""
    import torch

    reason = (str(error).splitlines() or [""])[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError):
        # More GPUs alone do not help: the linear rule keeps the images on each.
        return (
            f"CUDA ran out of memory ({reason}): lower {knob}, or use more GPUs with keep_batch=true; what was saved "
            "before is whole."
        )
    if isinstance(error, FloatingPointError):
        return (
            f"The loss became infinite or NaN ({reason}): lower the learning rate; what was saved before may hold it "
            "already, so start in another --output."
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return (
            f"A data worker died ({reason}), mostly of too little memory or too small a /dev/shm: use fewer workers or "
            "give the container more (docker run --shm-size), then --resume; the last checkpoint is whole."
        )
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_LOST):
        return (
            f"Another process of the run died ({reason}), most often for lack of memory or by the scheduler; the last "
            "checkpoint is whole: --resume continues from it."
        )
    return None


@contextlib.contextmanager
def raise_failure(output: Path) -> Iterator[None]:
    """In the parent: what `guard` left is raised here; a worker that was killed becomes one sentence."""
    from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

    left = output / _FILE
    left.unlink(missing_ok=True)
    try:
        yield
    except UserError:
        left.unlink(missing_ok=True)
        raise
    except ProcessException as error:
        if left.exists():
            values = json.loads(left.read_text())
            left.unlink()
            raise (UsageError if values["usage"] else UserError)(values["message"]) from None
        if isinstance(error, ProcessExitedException):
            how = error.signal_name or f"exit status {error.exit_code}"
            raise UserError(
                f"Worker {error.error_index} died ({how}), most often for lack of memory or by the scheduler; the last "
                f"checkpoint in {output} is whole: --resume continues from it."
            ) from None
        # Its text is the worker's whole traceback; the last line says what happened.
        raise RuntimeError(str(error).strip().splitlines()[-1]) from error
