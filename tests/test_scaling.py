"""What `benchmarks/scaling.py` counts on paper is what a step on two ranks really sends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_on_ranks
from tiny_run import tiny_config
from torch import Tensor

from benchmarks.scaling import traffic
from twist.pretrain import distributed
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import build_model
from twist.pretrain.train import objective

CPU = torch.device("cpu")
BATCH = 4


def config() -> PretrainConfig:
    views = {"global_size": 32, "local_size": 16, "local_count": 2}
    # A hidden matrix of 36 MB is more than a bucket, the last stage's convolutions of 9 MB are less.
    return tiny_config(Path("x"), views=views, model={"hidden_dim": 3000, "bunch_size": 0})


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
