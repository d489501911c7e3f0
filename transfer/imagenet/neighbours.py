"""Weighted k-nearest-neighbour classification with cosine similarity, in blocks that fit a stated memory.

Each of a query's k most similar bank rows votes for its class with weight exp(s / T) (Wu et al. 2018, arXiv
1805.01978, section 3.4; DINO's eval_knn.py). The bank is read once, block by block; a running best-k per query makes
the result that of one search over everything. `Q` queries, `N` bank rows, `D` features, `K` classes, `k` neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.errors import UsageError
from contracts.progress import Progress
from transfer.imagenet.accuracy import label_ranks

# Reads rows [start, stop) of a feature matrix: a `FeatureFile`'s method, or a slice of a tensor.
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Blocks:
    """How many bank rows and queries are in memory at once."""

    bank: int
    queries: int


def plan_blocks(*, queries: int, bank: int, dimension: int, neighbours: int, max_memory_mb: int) -> Blocks:
    """Block sizes whose working memory is at most `max_memory_mb` MiB.

    Counted in float32: both blocks as read and as normalised, the similarities and what the selection of the best
    copies of them, and the running best of all queries (value, index, and their merge).

    Raises:
        UsageError: not even small blocks fit.
    """
    budget = max_memory_mb * 2**20 // 4 - queries * neighbours * 3  # in float32 values; an index is two of them
    query_block = min(queries, 1024)
    while query_block:
        # 2·D a row as read and normalised; the similarities, and as much again for the selection.
        rows = (budget - query_block * (2 * dimension + 8 * neighbours)) // (2 * dimension + 2 * query_block)
        if rows >= min(bank, max(neighbours, 256)):
            return Blocks(bank=min(bank, rows), queries=query_block)
        query_block //= 2
    raise UsageError(
        f"machine.max_memory_mb = {max_memory_mb} is too little for a search of {queries} queries among {bank} rows of "
        f"{dimension} features: give at least {queries * neighbours * 12 // 2**20 + dimension * 512 * 4 // 2**20 + 8}."
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

    A row of zeros has similarity 0 with everything.
    """
    device = device or torch.device("cpu")
    best_similarity: list[Tensor] = []
    best_index: list[Tensor] = []
    starts = range(0, query_count, blocks.queries)
    bank_starts = range(0, bank_count, blocks.bank)
    with Progress("k-NN search", total=len(starts) * len(bank_starts), unit="block", quiet=quiet) as progress:
        for bank_start in bank_starts:
            bank_block = F.normalize(bank(bank_start, bank_start + blocks.bank).to(device), dim=1)
            for number, start in enumerate(starts):
                query_block = F.normalize(queries(start, min(start + blocks.queries, query_count)).to(device), dim=1)
                similarity, index = (query_block @ bank_block.T).topk(min(neighbours, len(bank_block)), dim=1)
                index += bank_start
                if bank_start == 0:
                    best_similarity.append(similarity)
                    best_index.append(index)
                else:
                    merged = torch.cat([best_similarity[number], similarity], dim=1)
                    best_similarity[number], position = merged.topk(min(neighbours, merged.shape[1]), dim=1)
                    best_index[number] = torch.cat([best_index[number], index], dim=1).gather(1, position)
                progress.advance()
                # Freed before the next one is read, or two blocks would be in memory at once.
                del query_block
            del bank_block
    return torch.cat(best_similarity), torch.cat(best_index)


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
