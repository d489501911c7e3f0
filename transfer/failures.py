"""Failures of a run in one sentence, across processes: what a worker raised reaches the user, a dead one is named.

Both frameworks start workers as processes; a parent sees a traceback as text, or an exit code. `guard` in the worker
leaves the sentence in the run folder, `raise_failure` in the parent finds it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from contracts import atomic
from contracts.errors import UsageError, UserError

_FILE = "failure.json"


@contextlib.contextmanager
def guard(output: Path, *, knob: str) -> Iterator[None]:
    """In a worker: running out of memory becomes a `UserError` naming `knob`; each is left for the parent."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        sentence = f"CUDA ran out of memory ({reason}): lower {knob}, or use more GPUs; what was saved before is whole."
        atomic.write_json(output / _FILE, {"message": sentence, "usage": False})
        raise UserError(sentence) from error
    except UserError as error:
        atomic.write_json(output / _FILE, {"message": str(error), "usage": isinstance(error, UsageError)})
        raise


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
        raise
