"""What the processes of one run say to each other beside the work: that they are of one run, and why one failed.

Ranks are those of torch.distributed; alone, everything here does nothing.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from twist.contracts.errors import UserError
from twist.contracts.failures import is_lost_peer, sentence_of
from twist.contracts.run_folder import differences

# Keys of the group's store: why a rank failed, and how many ranks know it.
_FAILURE, _KNOWN = "twist/failure", "twist/known"
POLL_S = 0.5
# How long a rank that failed waits until the others know why; one that was killed never will.
PATIENCE_S = 10.0


def require_equal(describe: Callable[[], dict[str, Any]]) -> None:
    """Every rank says what it is about to do (JSON values); `UserError` on all of them where one says something else,
    or raised one: none waits for one that has ended."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        describe()
        return
    mine: dict[str, Any] | UserError
    try:
        mine = describe()
    except UserError as error:
        mine = error
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    for number, theirs in enumerate(said):
        if isinstance(theirs, UserError):
            raise type(theirs)(f"Rank {number}: {theirs}")
    for number, theirs in enumerate(said):
        for path, first, other in differences(said[0], theirs):
            raise UserError(
                f"The ranks are not of one run: {path} is {first!r} on rank 0 and {other!r} on rank {number}; give "
                "every machine the same data, config and code."
            )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Inside, what fails on one rank is a `UserError` on every rank at once, whatever collective the others wait in.

    The rank leaves its sentence in the group's store. A thread of each rank looks there and aborts the group, which
    ends a wait in NCCL (torch's `_abort_process_group` calls ncclCommAbort; without it the wait lasts until its
    timeout). A wait in gloo ends when the rank that failed closes its connections, once the others know why.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    rank, ranks = dist.get_rank(), dist.get_world_size()
    default: Any = dist.distributed_c10d._get_default_store()
    store, over = default.clone(), threading.Event()
    watching = threading.Thread(target=_abort_when_one_fails, args=(store.clone(), over, rank), daemon=True)
    watching.start()
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # the store has gone with rank 0
            failed = json.loads(store.get(_FAILURE)) if store.check([_FAILURE]) else None
            # A stop that is to be resumed has an exit status, too; all ranks agreed on it.
            speaks, mistake = hasattr(error, "exit_status"), isinstance(error, UserError)
            if failed is None and not is_lost_peer(error) and (mistake or not speaks):
                store.set(_FAILURE, json.dumps([rank, sentence_of(error)]))
                end = time.monotonic() + PATIENCE_S
                while store.add(_KNOWN, 0) < ranks and time.monotonic() < end:
                    time.sleep(0.1)
            elif failed is not None and failed[0] != rank and not speaks:
                raise UserError(f"Rank {failed[0]}: {failed[1]}") from error
        raise
    finally:
        over.set()
        watching.join()


def _abort_when_one_fails(store: Any, over: threading.Event, rank: int) -> None:
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):
        while not over.wait(POLL_S):
            if store.check([_FAILURE]):
                store.add(_KNOWN, 1)
                if json.loads(store.get(_FAILURE))[0] != rank:
                    dist.distributed_c10d._abort_process_group()
                return
