"""How long `twist compare` takes for many records: reading, checking, building the table, and the page.

    python -m benchmarks.compare [--records 10000] [--repeats 5] [--json FILE]

The goal is 10,000 records in less than 3 s, from files to Markdown. Prints the machine, versions, median and spread.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twist.compare.page import render_page
from twist.compare.table import build_table
from twist.compare.writers import render
from twist.contracts import machine
from twist.contracts.files import sha256_json
from twist.contracts.published import load_published
from twist.contracts.record import RunRecord, WeightsProvenance, find_records, read_record

METHODS = ("twist", "moco-v2", "byol", "swav", "simclr", "dino", "vicreg", "barlow-twins", "supervised", "random")
PROTOCOLS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_records(root / "results", arguments.records)
        times: dict[str, list[Time]] = {"read": [], "table": [], "markdown": [], "total": [], "page": []}
        for _ in range(arguments.repeats):
            found, read_s = _timed(lambda: [(p, read_record(p)) for p in find_records([root / "results"])])
            records = [record for _, record in found]
            table, table_s = _timed(lambda: build_table(records, published=load_published(), baseline="random"))  # noqa: B023
            _, markdown_s = _timed(lambda: render(table, "markdown"))  # noqa: B023
            _, page_s = _timed(lambda: (root / "page.html").write_text(render_page(table, found, folder=root)))  # noqa: B023
            for name, value in zip(times, (read_s, table_s, markdown_s, read_s + table_s + markdown_s, page_s)):
                times[name].append(value)
        page_bytes = (root / "page.html").stat().st_size

    hardware, software = machine.hardware(), machine.software()
    print(
        f"{hardware['processor']}, {hardware['cores']} cores, Python {software['python']}; {arguments.records} records"
    )
    for name, both in times.items():
        values, cpu_s = [one.wall_s for one in both], statistics.median(one.cpu_s for one in both)
        spread = f"{min(values):.2f}–{max(values):.2f} (n = {len(values)})"
        print(f"{name:9} median {statistics.median(values):.2f} s, {spread}; processor time {cpu_s:.2f} s")
    print(f"page      {page_bytes / 1e6:.1f} MB")
    # Imported when all is measured: it brings torch along, whose thousands of objects every garbage collection visits.
    from benchmarks.side_by_side import write

    write(arguments.json, {"records": arguments.records, "times": times, "page_bytes": page_bytes})


@dataclass(frozen=True)
class Time:
    """Wall time, and the processor time of this process, which other load on the machine doesn't stretch."""

    wall_s: float
    cpu_s: float

    def __add__(self, other: Time) -> Time:
        return Time(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


def _timed(work: Callable[[], Any]) -> tuple[Any, Time]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Time(time.perf_counter() - wall, time.process_time() - cpu)


def _write_records(root: Path, count: int) -> None:
    """Records as the engines write them in size: a recipe of some sixty keys, three metrics."""
    generator = random.Random(0)
    for index, (seed, protocol, method) in enumerate(itertools.product(range(count), range(PROTOCOLS), METHODS)):
        if index == count:
            return
        record = RunRecord(
            method=method,
            protocol=f"made-up-{protocol:02}",
            task="segmentation",
            scale="sample",
            seed=seed,
            metrics={name: 50 + generator.random() for name in ("miou_percent", "macc_percent", "aacc_percent")},
            weights=WeightsProvenance(name=method, sha256=sha256_json(method), architecture="resnet50"),
            recipe={"protocol": protocol, **{f"section{i}": {f"key{j}": i * j for j in range(10)} for i in range(6)}},
            software={"python": "3.11"},
            hardware={"processor": "made up", "cores": 1, "gpus": 0, "gpu": None},
            wall_s=1.0,
            git_commit=None,
        )
        path = root / record.protocol / f"{record.run_name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.model_dump_json())


if __name__ == "__main__":
    main()
