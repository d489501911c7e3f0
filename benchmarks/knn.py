"""Memory and time of the k-NN search in blocks, and whether it keeps the limit it is given.

    python -m benchmarks.knn [--bank 64000] [--queries 500] [--max-memory-mb 128 512] [--repeats 5] [--json FILE]
    python -m benchmarks.knn --whole                                         beside one search over everything
    python -m benchmarks.knn --bank 1281167 --queries 50000                  ImageNet's size (10.5 GB of disk)
    python -m benchmarks.knn --bank 1000000 --dimension 384 --faiss PYTHON   a ViT-S, beside FAISS's IndexFlatIP

PYTHON is that of an environment of its own with `faiss-cpu`, which is no package of ours; its neighbours must be ours.

Writes random features of a ResNet-50's width to a file, as `twist transfer knn` does, and searches the 20 nearest rows
of each query, for every limit in a fresh process. Memory is that process's peak while it searches, above what it held
before; the first search, in which libraries load what they need, counts like the others. A peak above its limit is
said, and makes the exit status 1.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.side_by_side import heading, write
from twist.measure.features import FeatureFile
from twist.measure.knn import nearest, plan_blocks

NEIGHBOURS = 20
# Run by another Python, with the files of queries and bank, where the neighbours go, width, k and repeats.
FAISS = """
import sys, time, faiss, numpy as np
queries, bank, out = sys.argv[1:4]
width, k, repeats = map(int, sys.argv[4:])
for _ in range(repeats):
    began = time.perf_counter()
    rows = [np.fromfile(path, dtype=np.float32).reshape(-1, width) for path in (queries, bank)]
    for one in rows:
        faiss.normalize_L2(one)
    index = faiss.IndexFlatIP(width)
    index.add(rows[1])
    found = index.search(rows[0], k)[1]
    print(time.perf_counter() - began)
np.save(out, found)
"""
Runs = dict[str, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=64_000, help="a twentieth of ImageNet's training images")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--max-memory-mb", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dimension", type=int, default=2048, help="a ResNet-50's features")
    parser.add_argument("--faiss", metavar="PYTHON", help="also FAISS, by the Python that has it")
    parser.add_argument("--whole", action="store_true", help="also one search over everything (it needs the memory)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    limits = [*arguments.max_memory_mb, *([None] if arguments.whole else [])]
    runs = figures(
        bank=arguments.bank, queries=arguments.queries, limits=limits, repeats=arguments.repeats,
        dimension=arguments.dimension, faiss=arguments.faiss,
    )  # fmt: skip
    print(heading(f"{arguments.queries} queries among {arguments.bank} × {arguments.dimension}"))
    for name, run in runs.items():
        times = run["wall_s"]
        print(
            f"{name:>9}: peak {run['peak_mb']:6.0f} MiB, median {statistics.median(times):.2f} s "
            f"({min(times):.2f}–{max(times):.2f}, n = {len(times)})"
        )
    settings = {"bank": arguments.bank, "queries": arguments.queries, "dimension": arguments.dimension, "k": NEIGHBOURS}
    write(arguments.json, {**settings, "runs": runs})
    for name in (exceeded := above_limit(runs)):
        print(f"ABOVE ITS LIMIT: a search in {name} took {runs[name]['peak_mb']:.1f} MiB.", file=sys.stderr)
    return 1 if exceeded else 0


def above_limit(runs: Runs) -> list[str]:
    """The runs whose peak was above the limit they were given."""
    return [name for name, run in runs.items() if run["limit_mb"] is not None and run["peak_mb"] > run["limit_mb"]]


def figures(
    *, bank: int, queries: int, limits: list[int | None], repeats: int, dimension: int = 2048, faiss: str | None = None
) -> Runs:
    """`wall_s` (a list), `peak_mb` and `limit_mb` of the search by limit; None is one search over everything."""
    runs: Runs = {}
    expected: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as folder:
        files = (
            write_features(Path(folder) / "queries.f32", queries, dimension, seed=1),
            write_features(Path(folder) / "bank.f32", bank, dimension, seed=0),
        )
        for limit in limits:
            # A process for each: memory that an earlier search left behind would hide what this one takes.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                run, found = fresh.submit(measure, *files, limit=limit, repeats=repeats).result()
            expected = found if expected is None else expected
            assert (found == expected).mean() > 0.999, "the blocks changed the neighbours"
            runs["at once" if limit is None else f"{limit} MiB"] = run
        if faiss:
            out = Path(folder) / "faiss.npy"
            given = [*(file.path for file in files), out, dimension, NEIGHBOURS, repeats]
            done = subprocess.run([faiss, "-c", FAISS, *map(str, given)], check=True, capture_output=True, text=True)
            assert expected is not None
            assert (np.load(out) == expected).mean() > 0.999, "FAISS found other neighbours"
            times = [float(line) for line in done.stdout.split()]
            runs["FAISS"] = {"wall_s": times, "peak_mb": 0.0, "limit_mb": None}  # not measured
    return runs


def write_features(path: Path, count: int, dimension: int, *, seed: int) -> FeatureFile:
    """Random rows, written in blocks so that the writing does not count as memory."""
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, count, 4096):
            rows = min(4096, count - start)
            file.write(rng.standard_normal((rows, dimension), dtype=np.float32).tobytes())
    return FeatureFile(path, torch.zeros(count, dtype=torch.int64), dimension)


def measure(
    queries: FeatureFile, bank: FeatureFile, *, limit: int | None, repeats: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Times and peak memory of `repeats` searches in this process, and the neighbours (Q, k) found."""
    times, peaks = [], []
    for _ in range(repeats):
        before = _memory_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
        began = time.perf_counter()
        found = search_whole(queries, bank) if limit is None else search(queries, bank, max_memory_mb=limit)
        times.append(time.perf_counter() - began)
        peaks.append(_memory_mb("VmHWM") - before)
    return {"wall_s": times, "peak_mb": max(peaks), "limit_mb": limit}, found.numpy()


def search(queries: FeatureFile, bank: FeatureFile, *, max_memory_mb: int) -> torch.Tensor:
    blocks = plan_blocks(len(queries), len(bank), bank.dimension, neighbours=NEIGHBOURS, max_memory_mb=max_memory_mb)
    return nearest(queries, bank, neighbours=NEIGHBOURS, blocks=blocks, quiet=True)[1]


def search_whole(queries: FeatureFile, bank: FeatureFile) -> torch.Tensor:
    return (F.normalize(queries[:]) @ F.normalize(bank[:]).T).topk(NEIGHBOURS).indices


def _memory_mb(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    raise SystemExit(main())
