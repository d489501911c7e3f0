"""Records read beside the table of protocols: a metric that its protocol does not measure is refused.

`twist.contracts.record` knows the vocabulary of metrics; which protocol measures which is known on this floor alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from twist.contracts.errors import UserError
from twist.contracts.record import RunRecord, read_records
from twist.transfer.protocols import PROTOCOLS


def read_known_records(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, RunRecord]]:
    """`twist.contracts.record.read_records`, each checked by `check_protocol`."""
    found = read_records(paths)
    for path, record in found:
        check_protocol(path, record)
    return found


def check_protocol(path: Path, record: RunRecord) -> None:
    """Raise `UserError` for a record whose task or metrics are not its protocol's.

    A protocol that is not in the table may be another version's: its records are shown, in columns of their own.
    """
    row = PROTOCOLS.get(record.protocol)
    if row is None:
        return
    if record.task != row.task:
        raise UserError(f"{path}: {record.protocol} is {row.task}, and the record says {record.task}; run it again.")
    foreign = sorted(record.metrics.keys() - set(row.metrics))
    if foreign:
        raise UserError(
            f"{path}: {record.protocol} does not measure {foreign[0]} (it measures {', '.join(row.metrics)}); run it "
            "again."
        )
