"""Memory that ran out becomes one sentence naming the setting that needs less, wherever a protocol needs much of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from twist.contracts.errors import UserError

FEATURES = "go on with --resume and a lower machine.feature_batch_size"
SEARCH = "go on with --resume and a lower machine.max_memory_mb"
# Another batch is another recipe, which a resumed run may not take.
TRAINING = "go on with --resume on more GPUs, or lower batch_size and every lr_* by the same factor in another --output"
# Where a network does not even lie in memory yet: another process most likely holds the rest of it.
START = "free the device of other processes, then --resume with a lower machine.feature_batch_size"


@contextlib.contextmanager
def memory(remedy: str) -> Iterator[None]:
    """Inside, running out of memory (the GPU's or the machine's) raises a `UserError` with `remedy`.

    Contexts nest: the innermost, which knows best, speaks.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        whose = "CUDA" if isinstance(error, torch.OutOfMemoryError) else "The machine"
        reason = (str(error).splitlines() or ["no more was given"])[0].rstrip(".")
        raise UserError(f"{whose} ran out of memory ({reason}): {remedy}.") from error
