"""The k-NN vote: exact against one search over everything, within the memory it states, honest about ties and NaN."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from twist.contracts.errors import UsageError, UserError
from twist.transfer.engines.imagenet.accuracy import label_ranks, top_percent
from twist.transfer.engines.imagenet.neighbours import READ, RESERVE_MB, Blocks, nearest, plan_blocks, vote_ranks, votes


def brute_force_scores(
    queries: Tensor, bank: Tensor, labels: Tensor, *, k: int, temperature: float, classes: int
) -> Tensor:
    """The definition, one query and one neighbour at a time."""
    scores = torch.zeros(len(queries), classes, dtype=torch.float64)
    for row, query in enumerate(queries.double()):
        similarity = [float(query @ other / (query.norm() * other.norm())) for other in bank.double()]
        for index in sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]:
            scores[row, labels[index]] += torch.tensor(similarity[index] / temperature, dtype=torch.float64).exp()
    return scores


@pytest.fixture(scope="module")
def clouds() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 12, generator=generator)
    bank_labels = torch.randint(0, 7, (90,), generator=generator)
    labels = torch.randint(0, 7, (25,), generator=generator)
    bank = centres[bank_labels] + 1.5 * torch.randn(90, 12, generator=generator)
    queries = centres[labels] + 1.5 * torch.randn(25, 12, generator=generator)
    return queries.double(), bank.double(), labels, bank_labels


@pytest.mark.parametrize("blocks", [Blocks(90, 25), Blocks(20, 4), Blocks(7, 25), Blocks(90, 1), Blocks(1, 1)])
def test_blocks_of_any_size_equal_brute_force(clouds: tuple[Tensor, Tensor, Tensor, Tensor], blocks: Blocks) -> None:
    queries, bank, labels, bank_labels = clouds
    similarity, index = nearest(
        lambda a, b: queries[a:b],
        lambda a, b: bank[a:b],
        query_count=25,
        bank_count=90,
        neighbours=20,
        blocks=blocks,
        quiet=True,
    )
    expected = brute_force_scores(queries, bank, bank_labels, k=20, temperature=0.07, classes=7)
    ours = votes(similarity, bank_labels[index], classes=7, temperature=0.07)
    assert torch.allclose(ours / ours.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True), atol=1e-12)
    ranks = vote_ranks(similarity, index, bank_labels, labels, classes=7, temperature=0.07)
    own = expected.gather(1, labels[:, None])
    unseen = (own == 0).squeeze(1)
    assert torch.equal(ranks, torch.where(unseen, 7, (expected > own).sum(1)))
    assert 20.0 < top_percent(ranks)[0] < 95.0, "a task on which nothing can go wrong proves nothing"


@pytest.mark.parametrize("blocks", [Blocks(2 * READ + 70, READ + 40), Blocks(READ + 1, READ + 39)])
def test_blocks_of_more_rows_than_are_read_at_a_time_are_whole(blocks: Blocks) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(rows, 6, generator=generator).double() for rows in (2 * READ + 70, READ + 40))
    similarity, index = nearest(
        lambda a, b: queries[a:b],
        lambda a, b: bank[a:b],
        query_count=len(queries),
        bank_count=len(bank),
        neighbours=5,
        blocks=blocks,
        quiet=True,
    )
    expected = (F.normalize(queries) @ F.normalize(bank).T).topk(5)
    assert torch.allclose(similarity, expected.values, atol=1e-12)
    assert torch.equal(index, expected.indices)


def test_similarity_is_cosine_not_dot_product() -> None:
    bank = torch.tensor([[10.0, 10.0], [1.0, 0.0]])
    _, index = nearest(
        lambda a, b: torch.tensor([[1.0, 0.1]])[a:b],
        lambda a, b: bank[a:b],
        query_count=1,
        bank_count=2,
        neighbours=1,
        blocks=Blocks(2, 1),
        quiet=True,
    )
    assert index.item() == 1


def test_votes_do_not_overflow_at_low_temperature() -> None:
    scores = votes(torch.tensor([[1.0, 0.9, -1.0]]), torch.tensor([[0, 1, 1]]), classes=2, temperature=0.001)
    assert torch.isfinite(scores).all()
    assert scores[0, 0] == 1.0


def test_label_without_a_vote_is_never_among_the_five() -> None:
    ranks = vote_ranks(
        torch.tensor([[0.9, 0.8]]),
        torch.tensor([[0, 1]]),
        torch.tensor([3, 4]),
        torch.tensor([0]),
        classes=6,
        temperature=0.07,
    )
    assert top_percent(ranks) == (0.0, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 60_000),
    bank=st.integers(20, 2_000_000),
    dimension=st.sampled_from([384, 512, 2048, 8192]),
    neighbours=st.sampled_from([1, 20, 200]),
    max_memory_mb=st.integers(64, 8192),
)
def test_planned_blocks_stay_within_the_stated_memory(
    queries: int, bank: int, dimension: int, neighbours: int, max_memory_mb: int
) -> None:
    try:
        blocks = plan_blocks(
            queries=queries, bank=bank, dimension=dimension, neighbours=neighbours, max_memory_mb=max_memory_mb
        )
    except UsageError:
        # Only where even 256 bank rows (or k of them) and one query do not fit beside the running best.
        least = 12 * queries * neighbours + 4 * dimension * (2 * READ + max(neighbours, 256) + 1)
        assert least + 2**20 > (max_memory_mb - RESERVE_MB) * 2**20
        return
    assert 1 <= blocks.bank <= bank
    assert 1 <= blocks.queries <= queries
    held = (blocks.bank + blocks.queries + 2 * READ) * dimension * 4
    similarities = 2 * blocks.bank * blocks.queries * 4
    running_best = (queries + blocks.queries) * neighbours * (4 + 8)
    assert held + similarities + running_best <= (max_memory_mb - RESERVE_MB) * 2**20


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch had allocated at a time while it did `work`, inside its own functions too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize(
    ("queries", "neighbours", "largest"),
    [(8, 5, "the bank"), (400, 20, "the similarities"), (12_000, 20, "the running best")],
)
def test_the_search_allocates_no_more_than_was_planned(queries: int, neighbours: int, largest: str) -> None:
    dimension, bank, most = 128, 50_000, 6 * 2**20
    blocks = plan_blocks(
        queries=queries,
        bank=bank,
        dimension=dimension,
        neighbours=neighbours,
        max_memory_mb=RESERVE_MB + most // 2**20,
    )
    parts = {
        "the bank": blocks.bank * dimension * 4,
        "the similarities": blocks.bank * blocks.queries * 4,
        "the running best": queries * neighbours * 12,
    }
    assert max(parts, key=lambda name: parts[name]) == largest
    assert bank > 3 * blocks.bank
    generator = torch.Generator().manual_seed(0)

    def drawn(start: int, stop: int) -> Tensor:
        return torch.randn(stop - start, dimension, generator=generator)

    def search(size: Blocks) -> None:
        nearest(
            drawn, drawn, query_count=queries, bank_count=3 * blocks.bank + 1, neighbours=neighbours, blocks=size,
            quiet=True,
        )  # fmt: skip

    peak = peak_bytes(lambda: search(blocks))
    assert 0.5 * most < peak <= most
    # The control: what is planned is not so much more than what is needed that nothing could exceed it.
    assert peak_bytes(lambda: search(Blocks(bank=3 * blocks.bank, queries=blocks.queries))) > most


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(UsageError, match=r"machine.max_memory_mb = 8 is too little .* give at least (\d+)") as caught:
        plan_blocks(queries=50_000, bank=1_281_167, dimension=2048, neighbours=20, max_memory_mb=8)
    enough = int(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    plan_blocks(queries=50_000, bank=1_281_167, dimension=2048, neighbours=20, max_memory_mb=enough)


def test_ties_go_to_the_lower_class_and_nan_is_refused() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert label_ranks(scores, torch.tensor([0, 1])).tolist() == [0, 1]
    for bad in (float("nan"), float("inf")):
        scores[1, 2] = bad
        with pytest.raises(UserError, match="not finite"):
            label_ranks(scores, torch.tensor([0, 1]))


def test_top_percent_agrees_with_topk_where_there_are_no_ties() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = F.normalize(torch.randn(200, 30, generator=generator))
    labels = torch.randint(0, 30, (200,), generator=generator)
    hits = scores.topk(5).indices == labels[:, None]
    expected = (100 * hits[:, 0].double().mean().item(), 100 * hits.any(1).double().mean().item())
    assert top_percent(label_ranks(scores, labels)) == pytest.approx(expected)
