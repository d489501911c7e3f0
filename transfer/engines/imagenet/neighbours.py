"""Weighted k-nearest-neighbour classification with cosine similarity, in blocks that fit a stated memory.

Each of a query's k most similar bank rows votes for its class with weight exp(s / T) (Wu et al. 2018, arXiv
1805.01978, section 3.4; DINO's eval_knn.py). The bank is read once, block by block; a running best-k per query makes
the result that of one search over everything. `Q` queries, `N` bank rows, `D` features, `K` classes, `k` neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twist.contracts.errors import UsageError
from twist.contracts.progress import Progress
from twist.transfer.engines.imagenet.accuracy import label_ranks

# Reads rows [start, stop) of a feature matrix: a `FeatureFile`'s method, or a slice of a tensor.
Rows = Callable[[int, int], Tensor]

# Rows read at a time: beside the normalised block, only so many lie in memory as they were read.
READ = 256
# MiB of the limit that are left to others: buffers of the matrix product, and what a library loads when first called.
RESERVE_MB = 32


@dataclass(frozen=True)
class Blocks:
    """How many bank rows and queries are in memory at once."""

    bank: int
    queries: int


def plan_blocks(*, queries: int, bank: int, dimension: int, neighbours: int, max_memory_mb: int) -> Blocks:
    """Block sizes with which the search, above what the process holds before it, takes at most `max_memory_mb` MiB.

    Counted in float32: both blocks, what is read at a time (the old and the new while one takes the other's place), the
    similarities and what the selection of the best copies of them, the running best of all queries (value and index)
    and its merge for a block of them. `RESERVE_MB` of the limit stay free.

    Raises:
        UsageError: not even small blocks fit.
    """
    # In float32 values; an index is two of them.
    fixed = queries * neighbours * 3 + 2 * READ * dimension
    budget = (max_memory_mb - RESERVE_MB) * 2**20 // 4 - fixed
    least = min(bank, max(neighbours, 256))
    query_block = min(queries, 1024)
    while query_block:
        # The similarities, and as much again for the selection; of the merge three pairs of (values, indices).
        rows = (budget - query_block * (dimension + 16 * neighbours)) // (dimension + 2 * query_block)
        if rows >= least:
            return Blocks(bank=min(bank, rows), queries=query_block)
        query_block //= 2
    enough = 4 * (fixed + (least + 1) * (dimension + 2) + 16 * neighbours)
    raise UsageError(
        f"machine.max_memory_mb = {max_memory_mb} is too little for a search of {queries} queries among {bank} rows of "
        f"{dimension} features: give at least {RESERVE_MB + enough // 2**20 + 1}."
    )


@torch.no_grad()
def nearest(
    queries: Rows,
    bank: Rows,
    *,
    query_count: int,
    bank_count: int,
    neighbours: int,
    blocks: Blocks,
    device: torch.device | None = None,
    quiet: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and bank indices of each query's k nearest rows, (Q, k) each, most similar first.

    A row of zeros has similarity 0 with everything. Both blocks and the running best are one piece of memory each from
    beginning to end: what is made anew for every block is only sometimes given back in time.
    """
    device = device or torch.device("cpu")
    one = bank(0, 1).to(device)
    bank_rows, query_rows = (one.new_empty(count, one.shape[1]) for count in (blocks.bank, blocks.queries))
    best_similarity = one.new_empty(query_count, min(neighbours, bank_count))
    best_index = torch.empty_like(best_similarity, dtype=torch.int64)
    starts = range(0, query_count, blocks.queries)
    bank_starts = range(0, bank_count, blocks.bank)
    with Progress("k-NN search", total=len(starts) * len(bank_starts), unit="block", quiet=quiet) as progress:
        for bank_start in bank_starts:
            bank_block = _normalised(bank, bank_start, min(bank_start + blocks.bank, bank_count), out=bank_rows)
            kept = min(neighbours, bank_start)  # of each query, before this block
            for start in starts:
                asked = slice(start, min(start + blocks.queries, query_count))
                query_block = _normalised(queries, asked.start, asked.stop, out=query_rows)
                similarity, index = (query_block @ bank_block.T).topk(min(neighbours, len(bank_block)), dim=1)
                index += bank_start
                if kept:
                    merged = torch.cat([best_similarity[asked, :kept], similarity], dim=1)
                    similarity, position = merged.topk(min(neighbours, merged.shape[1]), dim=1)
                    index = torch.cat([best_index[asked, :kept], index], dim=1).gather(1, position)
                best_similarity[asked, : similarity.shape[1]] = similarity
                best_index[asked, : index.shape[1]] = index
                progress.advance()
    return best_similarity, best_index


def _normalised(rows: Rows, start: int, stop: int, *, out: Tensor) -> Tensor:
    """Rows [start, stop) of length 1, as the first rows of `out`; a row of zeros stays one."""
    for begin in range(start, stop, READ):
        part = rows(begin, min(begin + READ, stop)).to(out.device)
        place = begin - start
        torch.div(part, part.norm(dim=1, keepdim=True).clamp_min_(1e-12), out=out[place : place + len(part)])
    return out[: stop - start]


def votes(similarity: Tensor, neighbour_labels: Tensor, *, classes: int, temperature: float) -> Tensor:
    """(Q, K) sums of exp(s / T) over each query's neighbours of each class; a class without neighbours has 0.

    The largest similarity of a query is subtracted first: that scales its votes alike and cannot overflow.
    """
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return torch.zeros(len(similarity), classes, dtype=weights.dtype, device=weights.device).scatter_add_(
        1, neighbour_labels, weights
    )


def vote_ranks(
    similarity: Tensor, index: Tensor, bank_labels: Tensor, labels: Tensor, *, classes: int, temperature: float
) -> Tensor:
    """Rank of each query's label in the vote, (Q,); a label that got no vote is behind every class.

    Args:
        similarity: (Q, k), index: (Q, k) of `nearest`.
        bank_labels: (N,), labels: (Q,).
    """
    ranks = []
    # 4096 queries at a time: (Q, K) of all 50,000 × 1000 would be most of the memory the search was kept from using.
    for block in torch.arange(len(labels)).split(4096):
        scores = votes(
            similarity[block].cpu(), bank_labels[index[block].cpu()], classes=classes, temperature=temperature
        )
        rank = label_ranks(scores, labels[block])
        unseen = scores.gather(1, labels[block][:, None]).squeeze(1) == 0
        ranks.append(torch.where(unseen, classes, rank))
    return torch.cat(ranks)
