"""Copy run records into this repository, without the pictures, which may show photographs of others.

    python -m benchmarks.publish FROM TO [--pretrain RUN]

FROM is any `results/` folder of `twist transfer`, `suite` or `demo`; curves (`metrics.jsonl`) come along. With
`--pretrain`, the `metrics.jsonl` and `online_eval.jsonl` of that pretraining run are put beside them; of more than
`ROWS` rows of a curve every so many are kept. TO is replaced.
"""

import argparse
import shutil
import sys
from pathlib import Path

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.record import find_records, read_record, write_record

CURVES = "metrics.jsonl"
ROWS = 500


def publish(source: Path, target: Path, *, pretrain: Path | None = None) -> int:
    """Replace `target` by the records below `source` and their curves; returns how many there were.

    Raises:
        UserError: `source` has no records, or lies in `target`.
    """
    if not (found := list(find_records([source]))):
        raise UserError(f"{source} holds no run record: give the results folder of a transfer, a suite or the demo.")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{target} holds {source}: publish to another folder.")
    beside = target.with_name(target.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    for path in found:
        copy = write_record(read_record(path).model_copy(update={"media": ()}), beside)
        _copy(path.with_suffix("") / CURVES, copy.with_suffix("") / CURVES)
    for name in (CURVES, "online_eval.jsonl") if pretrain is not None else ():
        _copy(pretrain / name, beside / "pretrain" / name)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    return len(found)


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        rows = source.read_text().splitlines(keepends=True)
        every = -(-len(rows) // ROWS)
        # Counted from the end: a curve's last row is what the run ended with.
        files.write_text(target, "".join(rows[::-1][:: max(every, 1)][::-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--pretrain", type=Path)
    given = parser.parse_args()
    try:
        count = publish(given.source, given.target, pretrain=given.pretrain)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{count} records in {given.target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
