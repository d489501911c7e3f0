"""Memory and time of the k-NN search in blocks, beside one search over everything, on the same features.

    python -m benchmarks.knn [--bank 128000] [--queries 500] [--max-memory-mb 256 1024] [--repeats 5] [--json FILE]
    python -m benchmarks.knn --bank 1281167 --queries 50000 --skip-whole           ImageNet's size (10.5 GB of disk)

Writes random features of a ResNet-50's width to a file, as `twist transfer knn` does, and searches the 20 nearest rows
of each query. Memory is the process's peak while it searches, above what it held before; the stated limit must hold.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from contracts import atomic, provenance
from transfer.imagenet.features import FeatureFile
from transfer.imagenet.neighbours import nearest, plan_blocks

DIMENSION, NEIGHBOURS = 2048, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=128_000, help="a tenth of ImageNet's training images")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--max-memory-mb", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-whole", action="store_true", help="no search over everything (it needs the memory)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        bank = write_features(Path(folder) / "bank.f32", arguments.bank, seed=0)
        queries = write_features(Path(folder) / "queries.f32", arguments.queries, seed=1)
        results: dict[str, dict[str, Any]] = {}
        # A first pass that does not count: libraries allocate their buffers, and the file is in the page cache.
        search(queries, bank, max_memory_mb=max(arguments.max_memory_mb))
        expected = None
        for limit in arguments.max_memory_mb:
            results[f"{limit} MiB"], found = measure(
                lambda limit=limit: search(queries, bank, max_memory_mb=limit),  # type: ignore[misc]
                arguments.repeats,
            )
            assert expected is None or (found == expected).float().mean() > 0.999, "the blocks changed the neighbours"
            expected = found
        if not arguments.skip_whole:
            results["at once"], found = measure(lambda: search_whole(queries, bank), arguments.repeats)
            assert expected is not None
            assert (found == expected).float().mean() > 0.999, "the blocks changed the neighbours"

    hardware, software = provenance.hardware(), provenance.software()
    print(
        f"{hardware['processor']}, {hardware['cores']} cores, {torch.get_num_threads()} threads, torch "
        f"{software['torch']}; {arguments.queries} queries among {arguments.bank} × {DIMENSION}"
    )
    for name, result in results.items():
        times = result["wall_s"]
        print(
            f"{name:>9}: peak {result['peak_mb']:6.0f} MiB, median {statistics.median(times):.2f} s "
            f"({min(times):.2f}–{max(times):.2f}, n = {len(times)})"
        )
    if arguments.json:
        settings = {"bank": arguments.bank, "queries": arguments.queries, "dimension": DIMENSION, "k": NEIGHBOURS}
        atomic.write_json(arguments.json, {**settings, "runs": results, "hardware": hardware, "software": software})


def write_features(path: Path, count: int, *, seed: int) -> FeatureFile:
    """Random rows, written in blocks so that the writing does not count as memory."""
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, count, 4096):
            rows = min(4096, count - start)
            file.write(rng.standard_normal((rows, DIMENSION), dtype=np.float32).tobytes())
    return FeatureFile(path, torch.zeros(count, dtype=torch.int64), DIMENSION)


def search(queries: FeatureFile, bank: FeatureFile, *, max_memory_mb: int) -> torch.Tensor:
    blocks = plan_blocks(
        queries=len(queries),
        bank=len(bank),
        dimension=DIMENSION,
        neighbours=NEIGHBOURS,
        max_memory_mb=max_memory_mb,
    )
    _, index = nearest(
        queries.rows,
        bank.rows,
        query_count=len(queries),
        bank_count=len(bank),
        neighbours=NEIGHBOURS,
        blocks=blocks,
        quiet=True,
    )
    return index


def search_whole(queries: FeatureFile, bank: FeatureFile) -> torch.Tensor:
    return (F.normalize(queries.all()) @ F.normalize(bank.all()).T).topk(NEIGHBOURS).indices


def measure(work: Callable[[], torch.Tensor], repeats: int) -> tuple[dict[str, Any], torch.Tensor]:
    times, peaks = [], []
    for _ in range(repeats):
        before = _memory_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
        began = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - began)
        peaks.append(_memory_mb("VmHWM") - before)
    return {"wall_s": times, "peak_mb": max(peaks)}, found


def _memory_mb(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
