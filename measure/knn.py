"""Weighted k-nearest-neighbour classification with cosine similarity, in blocks that fit a stated memory.

Each of a query's k most similar bank rows votes for its class with weight exp(s / T) (Wu et al. 2018, arXiv
1805.01978, section 3.4; DINO's eval_knn.py). `Q` queries, `N` bank rows, `D` features, `K` classes, `k` neighbours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twist.contracts.errors import UsageError, UserError
from twist.contracts.progress import Progress
from twist.measure.features import RowFile

# What is searched is read in slices, of so many rows at a time.
Rows = RowFile | Tensor
READ = 256
# MiB of the limit for everything else: buffers of the matrix product, and what a library loads when first called.
RESERVE_MB = 32


class Blocks(NamedTuple):
    """How many bank rows and queries are in memory at once."""

    bank: int
    queries: int


def plan_blocks(queries: int, bank: int, dimension: int, *, neighbours: int, max_memory_mb: int) -> Blocks:
    """Blocks with which the search needs at most `max_memory_mb` MiB more than before; `UsageError` if none fit."""
    # In float32 values; an index is two of them. The running best, and rows as they are read (the old and the new).
    fixed = queries * neighbours * 3 + 2 * READ * dimension
    budget = (max_memory_mb - RESERVE_MB) * 2**20 // 4 - fixed
    least = min(bank, max(neighbours, 256))
    query_block = min(queries, 1024)
    while query_block:
        # Both blocks, the similarities and as much again for the selection, three (values, indices) of the merge.
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
    neighbours: int,
    blocks: Blocks,
    device: torch.device | None = None,
    quiet: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and bank indices of each query's k nearest rows, (Q, k) each, most similar first.

    The bank is read once, block by block; a running best-k makes the result that of one search over everything. A row
    of zeros has similarity 0 with everything. `device` is where the search runs, by default where the queries are.
    """
    one = queries[0:1].to(device)
    # One piece of memory each from beginning to end: what is allocated for every block is not always freed in time.
    bank_rows, query_rows = (one.new_empty(count, one.shape[1]) for count in (blocks.bank, blocks.queries))
    best_similarity = one.new_empty(len(queries), min(neighbours, len(bank)))
    best_index = torch.empty_like(best_similarity, dtype=torch.int64)
    starts = range(0, len(queries), blocks.queries)
    bank_starts = range(0, len(bank), blocks.bank)
    with Progress("k-NN search", total=len(starts) * len(bank_starts), unit="block", quiet=quiet) as progress:
        for bank_start in bank_starts:
            bank_block = _normalised(bank, bank_start, bank_start + blocks.bank, out=bank_rows)
            kept = min(neighbours, bank_start)  # of each query, before this block
            for start in starts:
                query_block = _normalised(queries, start, start + blocks.queries, out=query_rows)
                asked = slice(start, start + len(query_block))
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
    """Rows [start, stop), or to the last, scaled to length 1, as the first rows of `out`; a row of zeros stays one."""
    stop = min(stop, len(rows))
    for begin in range(start, stop, READ):
        part = rows[begin : min(begin + READ, stop)].to(out.device)
        place = begin - start
        torch.div(part, part.norm(dim=1, keepdim=True).clamp_min_(1e-12), out=out[place : place + len(part)])
    return out[: stop - start]


def votes(similarity: Tensor, neighbour_labels: Tensor, *, classes: int, temperature: float) -> Tensor:
    """(Q, K) sums of exp(s / T) over each query's neighbours of each class; a class without neighbours has 0.

    The largest similarity of a query is subtracted first: that scales its votes alike and cannot overflow.
    """
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return weights.new_zeros(len(similarity), classes).scatter_add_(1, neighbour_labels, weights)


def vote_ranks(
    similarity: Tensor, index: Tensor, bank_labels: Tensor, labels: Tensor, *, classes: int, temperature: float
) -> Tensor:
    """Rank of each query's label in the vote, (Q,), from what `nearest` found; without a vote it comes last."""
    ranks = []
    # 4096 queries at a time: (Q, K) of all 50,000 × 1000 would be more memory than the search was allowed.
    for part in zip(similarity.split(4096), index.split(4096), labels.split(4096), strict=True):
        near, rows, own = (tensor.cpu() for tensor in part)
        scores = votes(near, bank_labels.cpu()[rows], classes=classes, temperature=temperature)
        unseen = scores.gather(1, own[:, None]).squeeze(1) == 0
        ranks.append(torch.where(unseen, classes, label_ranks(scores, own)))
    return torch.cat(ranks)


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label's, (B,): higher score (B, K) first, equal scores by class index.

    `UserError` for a score that is not finite.
    """
    if not torch.isfinite(scores).all():
        raise UserError("The scores are not finite: the training diverged; lower its learning rates.")
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)


def top_percent(ranks: Tensor, k: int) -> float:
    """Share in percent of labels that are among the `k` first, from their ranks."""
    return 100.0 * (ranks < k).double().mean().item()
