"""Frozen features, the k-NN vote and clusters: bit-equal backbones, exact searches within a stated memory, goldens."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from twist.contracts.errors import UsageError, UserError
from twist.contracts.metrics import check_metrics
from twist.contracts.networks import network_of, normalise
from twist.contracts.weights import Backbone
from twist.measure.clusters import cluster_metrics, kmeans
from twist.measure.features import Extractor, FeatureFile, effective_rank, frozen, state_digest
from twist.measure.knn import (
    READ,
    RESERVE_MB,
    Blocks,
    label_ranks,
    nearest,
    plan_blocks,
    top_percent,
    vote_ranks,
    votes,
)

CPU = torch.device("cpu")
HEADER = Backbone(architecture="resnet18", method="random")


# --- features ---------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A convolution and a batch norm: small, and with buffers that training mode would change."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.convolution(images)).mean((2, 3))


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def test_frozen_backbone_passes_and_a_single_changed_buffer_does_not(tiny: nn.Module) -> None:
    images = torch.randn(4, 3, 16, 16)
    with frozen(tiny) as digest:
        tiny(images)
    assert digest == state_digest(tiny)
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    with pytest.raises(RuntimeError, match="frozen backbone changed"), frozen(tiny):
        tiny.train()  # the mistake that this proof is for: running statistics move, no parameter does
        tiny(images)
    with pytest.raises(RuntimeError, match="frozen backbone changed"), frozen(tiny), torch.no_grad():
        next(tiny.parameters()).view(-1)[0] += 1e-7


PIXELS = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def extract(network: nn.Module, folder: Path, *, split: int = 2, **key: object) -> FeatureFile:
    decoded = zip(PIXELS.split(split), torch.arange(9).split(split), strict=True)
    return Extractor(network, HEADER, CPU).to_file(decoded, np.arange(9), key=key, folder=folder, title="t")


def test_features_are_a_plain_forward_passes_and_reused_for_the_same_alone(tiny: nn.Module, tmp_path: Path) -> None:
    with frozen(tiny):
        file = extract(tiny, tmp_path, images="a")
    with torch.no_grad():
        torch.testing.assert_close(file[0:9], tiny(normalise(PIXELS, HEADER)))
    assert len(file) == 9
    assert torch.equal(file[2:100], file[0:9][2:])
    assert torch.equal(torch.from_numpy(file.mapped().copy()), file[0:9])
    first, written = file.path, file.path.stat().st_mtime_ns
    assert extract(tiny, tmp_path, images="a", split=3).path == first
    assert first.stat().st_mtime_ns == written
    assert extract(tiny, tmp_path, images="b").path != first
    whole = first.read_bytes()
    for damaged in (whole[:-4], whole[:5] + bytes([whole[5] ^ 0x40]) + whole[6:]):  # torn or flipped: not believed
        first.write_bytes(damaged)
        extract(tiny, tmp_path, images="a")
        assert first.read_bytes() == whole
    tiny.convolution.weight[0] += 1
    assert extract(tiny, tmp_path, images="a").path != first


def test_vit_features_are_class_tokens_after_the_norm() -> None:
    network = network_of(tiny_vit(side=2)).eval()
    images = torch.randn(2, 3, 32, 32)
    extractor = Extractor(network, HEADER, CPU, last_blocks=2)
    with torch.no_grad():
        one, two = Extractor(network, HEADER, CPU).features(images), extractor.features(images)
    assert extractor.dimension == 2 * 192 == two.shape[1]
    # The last of the two is the network's own output; the other is an earlier block's.
    assert torch.allclose(two[:, 192:], one, atol=1e-6)
    assert not torch.allclose(two[:, :192], one, atol=1e-3)


# --- k-NN -------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("blocks", [Blocks(90, 25), Blocks(20, 4), Blocks(1, 1)])
def test_blocks_of_any_size_equal_brute_force(blocks: Blocks) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 12, generator=generator).double()
    bank_labels, labels = (torch.randint(0, 7, (count,), generator=generator) for count in (90, 25))
    bank, queries = (centres[k] + 1.5 * torch.randn(len(k), 12, generator=generator) for k in (bank_labels, labels))
    similarity, index = nearest(queries, bank, neighbours=20, blocks=blocks, quiet=True)
    expected = brute_force_scores(queries, bank, bank_labels, k=20, temperature=0.07, classes=7)
    ours = votes(similarity, bank_labels[index], classes=7, temperature=0.07)
    assert torch.allclose(ours / ours.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True), atol=1e-12)
    ranks = vote_ranks(similarity, index, bank_labels, labels, classes=7, temperature=0.07)
    own = expected.gather(1, labels[:, None])
    assert torch.equal(ranks, torch.where((own == 0).squeeze(1), 7, (expected > own).sum(1)))
    assert 20.0 < top_percent(ranks, 1) < 95.0, "a task on which nothing can go wrong proves nothing"


@pytest.mark.parametrize("blocks", [Blocks(2 * READ + 70, READ + 40), Blocks(READ + 1, READ + 39)])
def test_blocks_of_more_rows_than_are_read_at_a_time_are_whole(blocks: Blocks) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(rows, 6, generator=generator).double() for rows in (2 * READ + 70, READ + 40))
    similarity, index = nearest(queries, bank, neighbours=5, blocks=blocks, quiet=True)
    expected = (F.normalize(queries) @ F.normalize(bank).T).topk(5)
    assert torch.allclose(similarity, expected.values, atol=1e-12)
    assert torch.equal(index, expected.indices)


def test_votes_do_not_overflow_and_a_label_without_one_is_never_among_the_five() -> None:
    scores = votes(torch.tensor([[1.0, 0.9, -1.0]]), torch.tensor([[0, 1, 1]]), classes=2, temperature=0.001)
    assert torch.isfinite(scores).all()
    assert scores[0, 0] == 1.0
    similarity, index = torch.tensor([[0.9, 0.8]]), torch.tensor([[0, 1]])
    ranks = vote_ranks(similarity, index, torch.tensor([3, 4]), torch.tensor([0]), classes=6, temperature=0.07)
    assert top_percent(ranks, 5) == 0.0


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
    limit = (max_memory_mb - RESERVE_MB) * 2**20
    try:
        blocks = plan_blocks(queries, bank, dimension, neighbours=neighbours, max_memory_mb=max_memory_mb)
    except UsageError:
        # Only where even 256 bank rows (or k of them) and one query do not fit beside the running best.
        least = 12 * queries * neighbours + 4 * dimension * (2 * READ + max(neighbours, 256) + 1)
        assert least + 2**20 > limit
        return
    assert 1 <= blocks.bank <= bank
    assert 1 <= blocks.queries <= queries
    held = (blocks.bank + blocks.queries + 2 * READ) * dimension * 4
    similarities = 2 * blocks.bank * blocks.queries * 4
    running_best = (queries + blocks.queries) * neighbours * (4 + 8)
    assert held + similarities + running_best <= limit


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch had allocated at a time while it did `work`, inside its own functions too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


class Drawn:
    """Rows that take no memory before they are read."""

    def __init__(self, count: int, dimension: int) -> None:
        self.count, self.dimension, self.generator = count, dimension, torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.randn(rows.stop - rows.start, self.dimension, generator=self.generator)


@pytest.mark.parametrize(
    ("queries", "neighbours", "largest"),
    [(8, 5, "the bank"), (400, 20, "the similarities"), (12_000, 20, "the running best")],
)
def test_the_search_allocates_no_more_than_was_planned(queries: int, neighbours: int, largest: str) -> None:
    dimension, bank, most = 128, 50_000, 6 * 2**20
    limit = RESERVE_MB + most // 2**20
    blocks = plan_blocks(queries, bank, dimension, neighbours=neighbours, max_memory_mb=limit)
    parts = {
        "the bank": blocks.bank * dimension * 4,
        "the similarities": blocks.bank * blocks.queries * 4,
        "the running best": queries * neighbours * 12,
    }
    assert max(parts, key=lambda name: parts[name]) == largest
    assert bank > 3 * blocks.bank
    rows = Drawn(queries, dimension), Drawn(3 * blocks.bank + 1, dimension)

    def peak(size: Blocks) -> int:
        return peak_bytes(lambda: nearest(*rows, neighbours=neighbours, blocks=size, quiet=True))  # type: ignore[arg-type]

    assert 0.5 * most < peak(blocks) <= most
    # The control: what is planned is not so much more than what is needed that nothing could exceed it.
    assert peak(Blocks(bank=3 * blocks.bank, queries=blocks.queries)) > most


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(UsageError, match=r"machine.max_memory_mb = 8 is too little .* give at least (\d+)") as caught:
        plan_blocks(50_000, 1_281_167, 2048, neighbours=20, max_memory_mb=8)
    enough = int(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    plan_blocks(50_000, 1_281_167, 2048, neighbours=20, max_memory_mb=enough)


def test_ranks_are_topks_ties_go_to_the_lower_class_and_nan_is_refused() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.randn(200, 30, generator=generator), torch.randint(0, 30, (200,), generator=generator)
    hits, ranks = scores.topk(5).indices == labels[:, None], label_ranks(scores, labels)
    assert top_percent(ranks, 1) == pytest.approx(100 * hits[:, 0].double().mean().item())
    assert top_percent(ranks, 5) == pytest.approx(100 * hits.any(1).double().mean().item())
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert label_ranks(scores, torch.tensor([0, 1])).tolist() == [0, 1]
    for bad in (float("nan"), float("inf")):
        scores[1, 2] = bad
        with pytest.raises(UserError, match="not finite"):
            label_ranks(scores, torch.tensor([0, 1]))


# --- clusters ---------------------------------------------------------------------------------------------------------

LLOYD = {"algorithm": "lloyd", "restarts": 10, "max_passes": 300, "step_size": 16384, "normalise": True, "seed": 0}
MINIBATCH = {**LLOYD, "algorithm": "minibatch", "restarts": 1, "max_passes": 20, "step_size": 40}


def test_metrics_equal_the_published_implementation() -> None:
    golden = np.load(Path(__file__).parent / "goldens" / "cluster.npz")
    metrics = cluster_metrics(golden["label"], golden["prediction"])
    check_metrics(metrics, where="cluster")
    names = {"nmi_percent": "nmi", "ami_percent": "ami", "ari_percent": "ari", "cluster_accuracy_percent": "accuracy"}
    assert metrics == pytest.approx({name: 100 * float(golden[key]) for name, key in names.items()}, abs=1e-10)


@pytest.mark.parametrize(
    ("assignment", "accuracy"),
    [
        ([7, 7, 7, 3, 3, 5], 1),  # renaming the clusters changes nothing
        ([0, 0, 9, 1, 1, 2], 5 / 6),  # a class split over two clusters counts one; majority voting would give 1
        ([0, 0, 0, 1, 1, 1], 5 / 6),  # fewer clusters than classes: the class without a cluster is lost
        ([0, 0, 0, 0, 0, 0], 3 / 6),
    ],
)
def test_accuracy_matches_one_to_one(assignment: list[int], accuracy: float) -> None:
    metrics = cluster_metrics(np.array([0, 0, 0, 1, 1, 2]), np.array(assignment))
    assert metrics["cluster_accuracy_percent"] == pytest.approx(100 * accuracy)
    assert len(set(assignment)) > 1 or metrics["nmi_percent"] == 0.0


@pytest.mark.parametrize("how", [LLOYD, MINIBATCH], ids=["lloyd", "minibatch"])
def test_kmeans_finds_separate_clouds(how: dict) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16)).astype(np.float32)
    truth = np.repeat(np.arange(4), 60)
    rows = (centres[truth] + 0.1 * rng.normal(size=(240, 16))).astype(np.float32)
    # Lengths that differ by a factor of ten must not matter where features are normalised.
    rows *= rng.uniform(0.5, 5, size=(240, 1)).astype(np.float32)
    assignment = kmeans(rows, rows[::2], clusters=4, **how)
    assert cluster_metrics(truth[::2], assignment)["cluster_accuracy_percent"] == 100.0
    assert np.array_equal(assignment, kmeans(rows, rows[::2], clusters=4, **how))


def test_a_minibatch_pass_takes_whole_blocks_of_shuffled_images_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[np.ndarray] = []
    monkeypatch.setattr(MiniBatchKMeans, "partial_fit", lambda _self, rows: blocks.append(rows[:, 0]))
    monkeypatch.setattr(MiniBatchKMeans, "predict", lambda _self, rows: np.zeros(len(rows), dtype=np.int32))
    rows, how = np.arange(120.0)[:, None], {**MINIBATCH, "max_passes": 2, "normalise": False}
    for count, steps in ((119, 2), (120, 3)):
        blocks.clear()
        kmeans(rows[:count], rows[:1], clusters=4, **how)
        assert [len(block) for block in blocks] == [40] * 2 * steps
        first, second = np.concatenate(blocks[:steps]), np.concatenate(blocks[steps:])
        assert len(set(first)) == len(set(second)) == 40 * steps
        assert not np.array_equal(first, second)
    blocks.clear()
    kmeans(rows, rows[:1], clusters=50, **how)
    assert [len(block) for block in blocks] == [50] * 4, "a first block holds a row a cluster"


def test_as_many_images_as_clusters_are_enough_and_fewer_are_refused() -> None:
    assert sorted(kmeans(np.eye(3), np.eye(3), clusters=3, **LLOYD)) == [0, 1, 2]
    with pytest.raises(UserError, match="3 images cannot form 10 clusters"):
        kmeans(np.eye(3), np.eye(3), clusters=10, **LLOYD)


def test_effective_rank_is_rankmes() -> None:
    """`d` equal directions have rank d; the entropy of the singular values' shares otherwise (arXiv 2210.02885)."""
    assert effective_rank(torch.eye(5).repeat(3, 1)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 4)) == pytest.approx(1, abs=1e-4)
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 3, 1, 0.3, 0.1, 0])
    shares = torch.linalg.svdvals(rows.double())
    shares = shares / shares.sum()
    assert effective_rank(rows) == pytest.approx(float((-torch.special.xlogy(shares, shares).sum()).exp()), rel=1e-4)
