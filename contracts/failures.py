"""What ends a run and is nobody's bug, as one sentence with a remedy: memory, disk, a process that died, a path.

torch's errors are recognised by name, so that it is not imported for them.
"""

import contextlib
import errno
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError

AGAIN = "start the same command again (pretrain and transfer: with --resume)"
RESUME = "the last checkpoint is whole, --resume continues from it"
_BATCH = "lower the batch (pretraining: run.batch_size or model.activation_checkpointing=true), or end other processes"
_REPORT = "failure.json"
# How gloo, NCCL and torch's store say that another process is gone: closed, reset, refused, timed out, aborted.
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "gloo/transport", "Socket Timeout",
    "Timed out waiting", "Application timeout caused pair closure", "client socket has timed out",
    "remote process exited", "collective operation timeout", "NCCL communicator was aborted", "ncclCommAbort",
    "connectFullMesh failed", "Connection was likely closed",
)  # fmt: skip


class Failure(NamedTuple):
    """What is said of errors of these `types`, with these `texts` in them, or about a file with these `codes`."""

    kind: str
    sentence: str
    remedy: str
    types: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()

    def matches(self, error: BaseException) -> bool:
        return (
            any(kind.__name__ in self.types for kind in type(error).__mro__)
            or any(text in str(error) for text in self.texts)
            or (getattr(error, "errno", None) in self.codes and bool(getattr(error, "filename", None)))
        )


FAILURES = (
    # torch's own words for it, tempfile's, and those of a limit on a file's size among them.
    Failure("disk", "The disk is full ({reason})", f"free some space and {AGAIN}", texts=(
        "No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "unexpected pos",
        "basic_ios::clear: iostream error", "No usable temporary directory", "File too large",
    )),
    Failure("memory", "CUDA ran out of memory ({reason})", _BATCH, types=("OutOfMemoryError",)),
    Failure("memory", "The machine ran out of memory ({reason})", _BATCH, ("MemoryError",), ("can't allocate memory",)),
    Failure(
        "diverged", "The loss became infinite or NaN ({reason})",
        "lower the learning rate; what was saved may hold it already, so start in another --output",
        types=("FloatingPointError",),
    ),
    Failure(
        "worker", "A data worker died ({reason}), mostly of too little memory or too small a /dev/shm",
        f"use fewer workers, or give the container more (docker run --shm-size); {RESUME}",
        texts=("DataLoader worker",),
    ),
    Failure(
        "peer", "{peer} ({reason}), most often for lack of memory or by the scheduler", RESUME,
        ("DistBackendError", "DistNetworkError"), _LOST,
    ),
    Failure("permission", "{file} may not be written or read", "check its permissions", types=("PermissionError",)),
    Failure("path", "{file} cannot be used ({reason})", "give another path", codes=(
        errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
        errno.EBUSY,
    )),
)  # fmt: skip


def _find(error: BaseException) -> Failure | None:
    return next((one for one in FAILURES if one.matches(error)), None)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` only says that another process of the run is gone."""
    failure = _find(error)
    return failure is not None and failure.kind == "peer"


def sentence_of(error: BaseException) -> str:
    """One line that says what happened, also where the table has none."""
    if isinstance(error, UserError):
        return str(error)
    return describe(error) or f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def describe(error: BaseException, **remedies: str) -> str | None:
    """One sentence for `error`, None where the table has none; `remedies`, by kind, replace the table's."""
    failure = _find(error)
    if failure is None:
        return None
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    rank = os.environ.get("RANK")
    peer = "Another process of the run died" if rank is None else f"Rank {rank} lost another process of the run"
    what = failure.sentence.format(reason=reason, file=getattr(error, "filename", None), peer=peer)
    return f"{what}: {remedies.get(failure.kind, failure.remedy)}."


@contextlib.contextmanager
def explained(report: Path | None = None, **remedies: str) -> Iterator[None]:
    """Inside, failures of these kinds become a `UserError` with that remedy; of nested ones the innermost speaks. With
    `report`, in a worker process, those of every kind do, and are left in that folder for `raise_reported`."""
    try:
        yield
    except UserError as error:
        if report is not None:
            files.write_json(report / _REPORT, {"message": str(error), "usage": isinstance(error, UsageError)})
        raise
    except Exception as error:
        sentence = describe(error, **remedies)
        if sentence is None or (report is None and not any(f.matches(error) for f in FAILURES if f.kind in remedies)):
            raise
        if report is not None and not (report / _REPORT).exists():  # the first to fail says why, its peers follow
            files.write_json(report / _REPORT, {"message": sentence, "usage": False})
        raise UserError(sentence) from error


@contextlib.contextmanager
def raise_reported(folder: Path) -> Iterator[None]:
    """In the parent of spawned workers: what one of them reported is raised; one that was killed is one sentence."""
    from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

    left = folder / _REPORT
    left.unlink(missing_ok=True)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM: Python would wait for the workers' own end
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    except ProcessException as error:
        if left.exists():
            values = files.read_json(left)
            raise (UsageError if values["usage"] else UserError)(values["message"]) from None
        if isinstance(error, ProcessExitedException):
            how = error.signal_name or f"exit status {error.exit_code}"
            raise UserError(
                f"Worker {error.error_index} died ({how}), most often for lack of memory or by the scheduler: {RESUME}."
            ) from None
        # Its text is the worker's whole traceback; the last line says what happened.
        raise RuntimeError(str(error).strip().splitlines()[-1]) from error
    finally:
        left.unlink(missing_ok=True)
