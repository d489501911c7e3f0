"""What `benchmarks/scaling.py` counts on paper is what a step on two ranks really sends; its times are NCCL's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_on_ranks
from tiny_run import tiny_config
from torch import Tensor

from benchmarks.nccl_time import Cluster, all_gather_s, all_reduce_s
from benchmarks.scaling import BUCKET, FIRST_BUCKET, buckets, lost, model_ms, traffic
from twist.contracts.errors import UserError
from twist.pretrain import distributed
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import build_model
from twist.pretrain.train import objective

CPU = torch.device("cpu")
BATCH = 4


def config(*, bunch: int = 0) -> PretrainConfig:
    views = {"global_size": 32, "local_size": 16, "local_count": 2}
    # A hidden matrix of 36 MB is more than a bucket, the last stage's convolutions of 9 MB are less.
    return tiny_config(Path("x"), views=views, model={"hidden_dim": 3000, "bunch_size": bunch})


def sent_by_a_step(rank: int) -> dict[str, Tensor]:
    """Number and bytes of everything that a rank puts into collectives in its second step, in float32.

    In the first, DistributedDataParallel has not yet seen the order of the gradients, and sends them as one.
    """
    recipe = config()
    student, _ = build_model(recipe, device=CPU)
    model = distributed.data_parallel(student, CPU)
    gradients: list[int] = []
    reduced: list[int] = []
    gathered: list[int] = []
    model.register_comm_hook(gradients, summed_bucket)
    listen("all_reduce", reduced, argument=0)
    listen("all_gather", gathered, argument=1)
    listen("all_gather_into_tensor", gathered, argument=1)
    generator = torch.Generator().manual_seed(rank)
    views = [torch.randn(2 * BATCH, 3, side, side, generator=generator) for side in (32, 16)]
    for _ in range(2):
        for heard in (gradients, reduced, gathered):
            heard.clear()
        loss = objective(model(views), None, recipe.loss, stage="mutual_information", quantile=0)
        loss.total.backward()
    kinds = {"gradients": gradients, "reduced": reduced, "gathered": gathered}
    return {name: torch.tensor([len(heard), sum(heard)]) for name, heard in kinds.items()}


def listen(name: str, heard: list[int], *, argument: int) -> None:
    function: Callable[..., Any] = getattr(dist, name)

    def heard_and_done(*args: Any, **kwargs: Any) -> Any:
        heard.append(args[argument].nbytes)
        return function(*args, **kwargs)

    setattr(dist, name, heard_and_done)


def summed_bucket(heard, bucket):  # DistributedDataParallel refuses annotations that are strings
    """What it does with a bucket of gradients, but for the mean, by a way that `listen` does not hear."""
    heard.append(bucket.buffer().nbytes)
    assert dist.group.WORLD is not None
    return dist.group.WORLD.allreduce([bucket.buffer()]).get_future().then(lambda future: future.value()[0])


@pytest.mark.slow
def test_counts_are_those_of_a_real_step() -> None:
    counted = traffic(config())
    waited_for = [counted[kind] for kind in ("batch norms", "bunch norm", "loss")]
    for rank in run_on_ranks(2, sent_by_a_step):
        assert rank["gradients"].tolist() == [len(counted["gradients"].reduced), sum(counted["gradients"].reduced)]
        for heard, sizes in (
            ("reduced", [size for t in waited_for for size in t.reduced]),
            ("gathered", [size for t in waited_for for size in t.gathered]),
        ):
            assert rank[heard].tolist() == [len(sizes), sum(sizes)]
    assert len(counted["gradients"].reduced) > 2


def test_a_bucket_is_closed_by_the_gradient_that_fills_it() -> None:
    assert buckets([]) == []
    assert buckets([1]) == [1]
    assert buckets([FIRST_BUCKET - 1, 3 * BUCKET]) == [FIRST_BUCKET - 1 + 3 * BUCKET]
    assert buckets([FIRST_BUCKET, 1]) == [FIRST_BUCKET, 1]
    assert buckets([FIRST_BUCKET, BUCKET - 1, BUCKET - 1, 1]) == [FIRST_BUCKET, 2 * BUCKET - 2, 1]
    assert buckets([FIRST_BUCKET, 3 * BUCKET, 3 * BUCKET]) == [FIRST_BUCKET, 3 * BUCKET, 3 * BUCKET]


# --- the model --------------------------------------------------------------------------------------------------------

PLAIN = Cluster(nvlink_bytes_s=100e9, card_bytes_s=50e9, switch_s=0.0)


@pytest.mark.parametrize(
    ("seconds_of", "bytes_", "ranks", "microseconds"),
    [
        # An all-reduce takes what the better of ring and tree does. One node: 14 hops of a ring, 6.6 + 14 · 0.6 (LL).
        (all_reduce_s, 0, 8, 15.0),
        # Eight nodes: 2 · 7 hops inside and 2 · 3 between are a tree's; a ring would take 126 hops.
        (all_reduce_s, 0, 64, 6.8 + 14 * 0.6 + 6 * 5.0),
        # Many bytes: the protocol Simple; so many that the hops count for nothing: a ring again.
        (all_reduce_s, 10**11, 256, 8.4 + 446 * 3.4 + 64 * 14.0 + 2 * 255 / 256 * 10**11 / 100e3),
        # An all-gather is a ring; LL has a quarter of the bandwidth, at most 20.4 GB/s between nodes.
        (all_gather_s, 1000, 8, 6.6 + 7 * 0.6 + 7 * 1000 / 25e3),
        (all_gather_s, 10**8, 8, 8.4 + 7 * 3.4 + 7 * 10**8 / 100e3),
    ],
)
def test_a_collective_takes_what_nccls_model_says(seconds_of, bytes_: int, ranks: int, microseconds: float) -> None:
    assert 1e6 * seconds_of(bytes_, ranks=ranks, cluster=PLAIN) == pytest.approx(microseconds)


def test_gradients_are_lost_where_they_exceed_the_backward_pass() -> None:
    found = lost({"loss": 5.0, "gradients": 59.9}, step_s=0.09)
    assert found["gradients"] == {"ms": 0.0, "share_of_step": 0.0}
    assert found["all"] == pytest.approx({"ms": 5.0, "share_of_step": 5 / 95})
    found = lost({"loss": 5.0, "gradients": 65.0}, step_s=0.09)  # 60 ms of them are backward
    assert found["gradients"] == pytest.approx({"ms": 5.0, "share_of_step": 0.05})
    assert found["all"] == pytest.approx({"ms": 10.0, "share_of_step": 0.1})


def test_a_bunch_of_zero_is_all_ranks_and_a_bunch_of_one_rank_sends_nothing() -> None:
    def bunch_ms(bunch: int, ranks: int) -> float:
        return model_ms(config(bunch=bunch), ranks=ranks, cluster=PLAIN)["bunch norm"]

    assert bunch_ms(0, 8) == bunch_ms(8 * BATCH, 8) > bunch_ms(2 * BATCH, 8) == bunch_ms(2 * BATCH, 64) > 0
    assert bunch_ms(BATCH, 8) == 0.0
    with pytest.raises(UserError, match="whole bunches"):
        bunch_ms(3 * BATCH, 8)
