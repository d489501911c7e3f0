"""What `benchmarks/scaling.py` counts on paper is what a step on two ranks really sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_on_ranks
from torch import Tensor

from benchmarks.scaling import BUCKET, FIRST_BUCKET, Traffic, buckets, model_ms, seconds, traffic
from contracts.config import validate
from contracts.errors import UserError
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.model import build_model
from pretrain.train import objective

CPU = torch.device("cpu")
BATCH = 4


def config(*, bunch: int = 0, local: int = 2) -> PretrainConfig:
    return validate(
        {
            "data": {"root": "x"},
            "views": {"global_size": 32, "local_size": 16, "local_count": local},
            # A hidden matrix of 36 MB is more than a bucket, the last stage's convolutions of 9 MB are less.
            "model": {"backbone": "resnet18", "hidden_dim": 3000, "classes": 12, "bunch_size": bunch},
            "run": {"epochs": 1, "mutual_information_epochs": 1, "batch_size": BATCH},
        },
        PretrainConfig,
        where="test",
    )


def sent_by_a_step(rank: int, local: int) -> dict[str, Tensor]:
    """Number and bytes of everything that a rank puts into collectives in its second step, in float32.

    In the first, DistributedDataParallel has not yet seen the order of the gradients, and sends them as one.
    """
    recipe = config(local=local)
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
    shapes = [(2 * BATCH, 3, 32, 32)] + ([(local * BATCH, 3, 16, 16)] if local else [])
    views = [torch.randn(shape, generator=generator) for shape in shapes]
    for _ in range(2):
        for heard in (gradients, reduced, gathered):
            heard.clear()
        loss = objective(model, None, views, config=recipe, stage="mutual_information", quantile=0)
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
@pytest.mark.parametrize("local", [0, 2])
def test_counts_are_those_of_a_real_step(local: int) -> None:
    counted = traffic(config(local=local))
    waited_for = [counted[kind] for kind in ("batch norms", "bunch norm", "loss")]
    for rank in run_on_ranks(2, sent_by_a_step, local):
        assert rank["gradients"].tolist() == [counted["gradients"].reduces, counted["gradients"].reduced_bytes]
        assert rank["reduced"].tolist() == [
            sum(t.reduces for t in waited_for),
            sum(t.reduced_bytes for t in waited_for),
        ]
        assert rank["gathered"].tolist() == [
            sum(t.gathers for t in waited_for),
            sum(t.gathered_bytes for t in waited_for),
        ]
    assert counted["gradients"].reduces > 2


def test_a_bucket_is_closed_by_the_gradient_that_fills_it() -> None:
    assert buckets([]) == 0
    assert buckets([1]) == buckets([FIRST_BUCKET]) == buckets([FIRST_BUCKET - 1, 3 * BUCKET]) == 1
    assert buckets([FIRST_BUCKET, 1]) == 2
    assert buckets([FIRST_BUCKET, BUCKET - 1, BUCKET - 1, 1]) == 3
    assert buckets([FIRST_BUCKET, 3 * BUCKET, 3 * BUCKET]) == 3


def test_the_model_of_a_ring() -> None:
    cost = {"ranks": 8, "latency_s": 1e-5, "bandwidth": 1e9}
    assert seconds(Traffic(1, 8_000_000), **cost) == pytest.approx(3e-5 + 2 * 7e-3)
    assert seconds(Traffic(0, 0, 1, 8_000_000), **cost) == pytest.approx(3e-5 + 7 * 8e-3)
    assert seconds(Traffic(1, 8, 1, 8), **(cost | {"ranks": 1})) == 0.0


def test_a_bunch_of_zero_is_all_ranks_and_a_bunch_of_one_rank_sends_nothing() -> None:
    def bunch_ms(bunch: int, ranks: int) -> float:
        return model_ms(config(bunch=bunch), ranks=ranks, latency_s=1e-5, bandwidth=1e9)["bunch norm"]

    assert bunch_ms(0, 8) == bunch_ms(8 * BATCH, 8) > bunch_ms(2 * BATCH, 8) == bunch_ms(2 * BATCH, 64) > 0
    assert bunch_ms(BATCH, 8) == 0.0
    with pytest.raises(UserError, match="multiple of 3 ranks"):
        bunch_ms(3 * BATCH, 8)
