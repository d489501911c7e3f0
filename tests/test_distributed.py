"""Several gloo ranks against one process on all their rows: batch norms, groups, the vote, a whole training step."""

import datetime
import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo import run_on_ranks
from imagenet_tree import write_tree
from tiny_run import tiny_config
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from twist.contracts.errors import UserError
from twist.contracts.failures import sentence_of
from twist.contracts.ranks import failing_together
from twist.pretrain import distributed
from twist.pretrain.config import PretrainConfig
from twist.pretrain.distributed import SynchronisedBatchNorm, synchronise
from twist.pretrain.model import build_model
from twist.pretrain.online_eval import evaluate
from twist.pretrain.optim import LARS, parameter_groups
from twist.pretrain.slurm import Requeue
from twist.pretrain.train import objective

CPU = torch.device("cpu")
ROWS = 4


# --- how many ranks share a bunch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bunch", "batch", "ranks", "expected"),
    [(256, 128, 16, 2), (0, 128, 16, 16), (128, 128, 1, 1), (256, 256, 8, 1), (240, 60, 32, 4)],
)
def test_ranks_of_a_bunch(bunch: int, batch: int, ranks: int, expected: int) -> None:
    assert distributed.ranks_per_bunch(bunch, batch_size=batch, world_size=ranks) == expected


@pytest.mark.parametrize(("bunch", "batch", "ranks"), [(256, 128, 1), (100, 64, 2), (32, 64, 2)])
def test_a_bunch_that_does_not_divide_is_refused(bunch: int, batch: int, ranks: int) -> None:
    with pytest.raises(UserError, match=rf"multiple of {batch} that divides {batch * ranks}; .*bunch_size=0") as error:
        distributed.ranks_per_bunch(bunch, batch_size=batch, world_size=ranks)
    assert f"bunch_size = {bunch} with run.batch_size = {batch} on {ranks} rank" in str(error.value)


# --- batch norm -------------------------------------------------------------------------------------------------------


def rows(rank: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    # A mean far from zero: sums of squares would lose digits here.
    return 1000 + torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64)


def targets(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(100 + rank), dtype=torch.float64)


def normalised_on_rank(rank: int) -> list[dict[str, Tensor]]:
    return [normalised(rank, *case) for case in CASES]


def normalised(rank: int, group_size: int, shape: tuple[int, ...], affine: bool) -> dict[str, Tensor]:
    norm = SynchronisedBatchNorm(shape[0], affine=affine, group=distributed.consecutive_group(group_size)).double()
    x = rows(rank, shape).requires_grad_()
    before = count_collectives()
    out = norm(x)
    # Each rank's own loss: the sum over ranks is what one process would have.
    (out * targets(rank, shape)).sum().backward()
    calls = count_collectives() - before
    norm.eval()
    found = {"out": out.detach(), "gradient": x.grad, "eval": norm(x.detach()).detach(), "calls": torch.tensor(calls)}
    weight = norm.weight.grad if affine else torch.zeros(shape[0])
    return {**found, "mean": norm.running_mean, "var": norm.running_var, "weight": weight}


_CALLS = {"count": 0}


def count_collectives() -> int:
    """How many collectives this process has asked for since the first call."""
    if "installed" not in _CALLS:
        _CALLS["installed"] = 1
        for name in ("all_reduce", "all_gather_into_tensor"):
            setattr(dist, name, _counting(getattr(dist, name)))
    return _CALLS["count"]


def _counting(function):
    def counted(*args, **kwargs):
        _CALLS["count"] += 1
        return function(*args, **kwargs)

    return counted


# Ranks of a group among four, shape of a row, and whether the norm has weights.
CASES = [(4, (3,), False), (4, (3, 2, 2), True), (2, (5,), False)]


@pytest.fixture(scope="module")
def four_ranks() -> list[list[dict[str, Tensor]]]:
    return run_on_ranks(4, normalised_on_rank)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_batch_norm_over_ranks_is_one_process(number: int, four_ranks) -> None:
    (group_size, shape, affine), ranks = CASES[number], [rank[number] for rank in four_ranks]
    for start in range(0, 4, group_size):
        group = range(start, start + group_size)
        x = torch.cat([rows(rank, shape) for rank in group]).requires_grad_()
        reference = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0], affine=affine).double()
        out = reference(x)
        (out * torch.cat([targets(rank, shape) for rank in group])).sum().backward()
        reference.eval()
        for key, expected in (("out", out), ("gradient", x.grad), ("eval", reference(x))):
            assert (torch.cat([ranks[rank][key] for rank in group]) - expected).abs().max() < 1e-9, key
        for rank in group:
            assert (ranks[rank]["mean"] - reference.running_mean).abs().max() < 1e-9
            assert (ranks[rank]["var"] - reference.running_var).abs().max() < 1e-9
            assert ranks[rank]["calls"] == 2  # one forwards, one backwards
        if affine:
            total = sum(ranks[rank]["weight"] for rank in group)
            assert (total - reference.weight.grad).abs().max() < 1e-8


def test_alone_it_is_torchs_own() -> None:
    x = torch.randn(6, 3, 4, 4)
    ours, torchs = SynchronisedBatchNorm(3), nn.BatchNorm2d(3)
    assert torch.equal(ours(x), torchs(x))
    assert torch.equal(ours.running_var, torchs.running_var)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    module = nn.Sequential(nn.BatchNorm2d(3))
    assert synchronise(module) is module


# --- a whole step -----------------------------------------------------------------------------------------------------

VIEWS = 4


def step_config(world_size: int, *, bunch: int = 0) -> PretrainConfig:
    views = {"global_size": 32, "local_count": VIEWS - 2, "local_size": 16}
    run = {"epochs": 1, "mutual_information_epochs": 1, "batch_size": 8 // world_size}
    return tiny_config(Path("x"), views=views, model={"bunch_size": bunch}, run=run)


def views_of(images: slice) -> list[Tensor]:
    """View-major batches of some of 8 fixed images."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(2, 8, 3, 32, 32, generator=generator, dtype=torch.float64)
    small = torch.randn(VIEWS - 2, 8, 3, 16, 16, generator=generator, dtype=torch.float64)
    return [large[:, images].flatten(0, 1), small[:, images].flatten(0, 1)]


def learned(rank: int, world_size: int) -> dict[str, Tensor]:
    """Two LARS steps of the whole network in float64; returns losses, weights and what was counted."""
    config = step_config(world_size)
    student, _ = build_model(config, device=CPU)
    student.double()
    model = distributed.data_parallel(student, CPU)
    optimizer = LARS(parameter_groups(student, weight_decay=1e-4), lr=0.2, weight_decay=1e-4)
    share = 8 // world_size
    losses, calls = [], []
    for _ in range(2):
        optimizer.zero_grad()
        before = count_collectives() if world_size > 1 else 0
        logits = model(views_of(slice(rank * share, (rank + 1) * share)))
        loss = objective(logits, None, config.loss, stage="mutual_information", quantile=0)
        loss.total.backward()
        calls.append((count_collectives() if world_size > 1 else 0) - before)
        optimizer.step()
        losses.append(loss.total.detach())
    flat = torch.cat([p.detach().flatten() for p in student.parameters()])
    statistics = torch.cat([b.flatten().double() for name, b in student.named_buffers() if "running" in name])
    norms = sum(isinstance(m, SynchronisedBatchNorm) for m in student.modules())
    counts = {"calls": torch.tensor(calls), "norms": torch.tensor(norms)}
    return {"losses": torch.stack(losses), "weights": flat, "statistics": statistics, **counts}


@pytest.mark.slow
def test_a_step_on_two_ranks_is_the_step_on_one() -> None:
    alone = learned(0, 1)
    ranks = run_on_ranks(2, learned, 2)
    for rank in ranks:
        assert (rank["losses"] - alone["losses"]).abs().max() < 1e-9
        assert (rank["weights"] - alone["weights"]).abs().max() < 1e-8
        assert (rank["statistics"] - alone["statistics"]).abs().max() < 1e-8
        # Backbone norms run once a resolution, head norms once; each has one collective each way. The loss has one.
        backbone, head = 20, 3
        assert rank["norms"] == backbone + head
        assert rank["calls"].tolist() == [2 * (2 * backbone + head) + 1] * 2
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


# --- the rest ---------------------------------------------------------------------------------------------------------


def small_things(rank: int) -> dict[str, Tensor]:
    vote = distributed.Vote()
    answers = [vote.any(rank == 1 and step == 2) for step in range(5)]
    vote.close()
    try:
        distributed.on_main_rank(refuse)
        refused = False
    except UserError as error:
        refused = str(error) == "no"
    group = distributed.consecutive_group(2)
    return {
        "answers": torch.tensor(answers),
        "refused": torch.tensor(refused),
        "value": torch.tensor(distributed.on_main_rank(lambda: 10 + rank)),
        "group_mean": distributed.averaged(torch.tensor([float(rank)]), group),
        "gathered": distributed.gathered(torch.tensor([rank])),
    }


def evaluated(rank: int, root: str, bunch: int) -> dict[str, Tensor]:
    """What online evaluation says on two ranks with a bunch each, and when all continue from rank 0's state."""
    config = step_config(2, bunch=bunch)
    config = config.model_copy(update={"run": config.run.model_copy(update={"online_eval_root": root})})
    student, _ = build_model(config, device=CPU)
    for norm in (m for m in student.head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(rank))
    saved = {name: value.clone() for name, value in student.state_dict().items()}
    whole = [saved if rank == 0 else None]
    dist.broadcast_object_list(whole, src=0)
    first = evaluate(student, config, device=CPU)
    student.load_state_dict(whole[0])
    again = evaluate(student, config, device=CPU)
    return {"first": torch.tensor([*first.values()]), "again": torch.tensor([*again.values()])}


@pytest.mark.slow
def test_online_evaluation_does_not_depend_on_the_rank_and_a_resume_repeats_it(tmp_path: Path) -> None:
    write_tree(tmp_path, val=8)
    ranks = run_on_ranks(2, evaluated, str(tmp_path), 4)
    assert torch.equal(ranks[0]["first"], ranks[1]["first"])
    assert torch.equal(ranks[0]["first"], ranks[0]["again"])


def refuse() -> None:
    raise UserError("no")


@pytest.mark.slow
def test_votes_groups_and_errors_reach_all_ranks() -> None:
    ranks = run_on_ranks(4, small_things)
    for number, rank in enumerate(ranks):
        assert rank["answers"].tolist() == [False, False, False, True, False]  # asked at step 2, answered at 3
        assert bool(rank["refused"])
        assert rank["value"] == 10
        assert rank["group_mean"].item() == (0.5 if number < 2 else 2.5)
        assert rank["gathered"].flatten().tolist() == [0, 1, 2, 3]


def fail_on_one(rank: int, folder: str, kind: str) -> None:
    """Rank 1 fails while rank 0 waits for it. Where that is under NCCL the connection stays, and only an abort ends the
    wait; here there is gloo alone, so the wait and the abort are played."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    began, said, aborted = time.monotonic(), "nothing", threading.Event()
    distributed_c10d._abort_process_group = aborted.set
    try:
        with failing_together():
            if rank and kind == "nccl":
                raise OSError(errno.ENOSPC, "No space left on device", "/run/x")
            if rank and kind == "gloo":
                raise UserError("29 images cannot be read.")
            if kind == "stop":
                raise Requeue("saved")
            if kind == "nccl" and aborted.wait(15):
                raise RuntimeError("NCCL communicator was aborted on rank 0.")
            dist.all_reduce(torch.zeros(3))
    except (UserError, OSError, Requeue) as error:
        said = str(error) if isinstance(error, Requeue) else sentence_of(error)
    Path(folder, f"{rank}.json").write_text(json.dumps([said, time.monotonic() - began]))
    time.sleep(20 if rank and kind == "nccl" else 0)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sentence"), [("gloo", "29 images cannot be read."), ("nccl", "The disk is full"), ("stop", "saved")]
)
def test_what_fails_on_one_rank_is_said_on_all_of_them_at_once(kind: str, sentence: str, tmp_path: Path) -> None:
    ranks = torch.multiprocessing.start_processes(
        fail_on_one, args=(str(tmp_path), kind), nprocs=2, join=False, start_method="forkserver"
    )
    ranks.processes[0].join(90)
    for _ in range(600):  # rank 1 may say it a moment later
        if (tmp_path / "1.json").exists():
            break
        time.sleep(0.1)
    ranks.processes[1].kill()
    (first, seconds), (second, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert seconds < 10, "it waited for a timeout"
    assert first.startswith(f"Rank 1: {sentence}" if kind in ("gloo", "nccl") else sentence)
    assert second.startswith(sentence)


def start_of_a_rank(rank: int, port: int, file: str) -> None:
    """As torchrun starts it; rank 0 comes late, so that the other one looks first."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    time.sleep(0 if rank else 0.5)
    with distributed.process_group("cpu"):
        total = torch.ones(1)
        dist.all_reduce(total)
        Path(f"{file}.{rank}").write_text(str(total.item()))
        time.sleep(600)


@pytest.mark.slow
def test_ten_starts_after_a_kill_meet_in_the_store_that_torchrun_keeps(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for number in range(11):
        ranks = torch.multiprocessing.start_processes(
            start_of_a_rank,
            args=(store.port, str(tmp_path / str(number))),
            nprocs=2,
            join=False,
            start_method="forkserver",
        )
        while len(written := list(tmp_path.glob(f"{number}.*"))) < 2 or not all(p.read_text() for p in written):
            assert all(one.is_alive() for one in ranks.processes), f"start {number} has died"
            time.sleep(0.05)
        assert {path.read_text() for path in written} == {"2.0"}
        for one in ranks.processes:
            one.kill()
            one.join()


def test_a_rank_that_nobody_joins_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "JOINING", datetime.timedelta(seconds=1))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"Rank 0 of 2 .*MASTER_ADDR"), distributed.process_group("cpu"):
        pass


def test_without_a_process_group_everything_is_one_rank() -> None:
    x = torch.randn(3, requires_grad=True)
    assert distributed.mean_over_ranks(x) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gathered(x.detach()).shape == (1, 3)
    assert distributed.on_main_rank(lambda: 3) == 3
    vote = distributed.Vote()
    assert [vote.any(False), vote.any(True)] == [False, True]
    vote.close()
    model = nn.Linear(2, 2)
    assert distributed.data_parallel(model, CPU) is model
    with distributed.process_group("cpu") as device:
        assert device == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_an_absent_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.device=cpu"), distributed.process_group("cuda"):
        pass
