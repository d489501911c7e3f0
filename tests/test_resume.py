"""A run that is interrupted and resumed is the run that was not, bit by bit: losses, weights, optimiser, teacher."""

import functools
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from gloo import run_on_ranks
from tiny_run import Crash, crash_after, differing, final_state, make_images, rows, run, tiny_config, tiny_networks

from twist.contracts.config import added
from twist.contracts.errors import UserError
from twist.contracts.run_folder import locked
from twist.contracts.weights import read_backbone
from twist.pretrain import checkpoint, train
from twist.pretrain.config import LossConfig, PretrainConfig
from twist.pretrain.data.loader import ViewLoader
from twist.pretrain.slurm import stop_flag
from twist.pretrain.train import Requeue, pretrain

KINDS = {
    "two-crop": {"views": {"kind": "barlow", "local_count": 0}},
    "multi-crop": {
        "model": {"teacher": True, "bunch_size": 0, "hidden_dim": 16, "classes": 12},
        "optim": {"name": "adamw", "lr": 0.1, "clip_norm": 3.0},
    },
    "stage-switch": {"run": {"mutual_information_epochs": 1}},
}
# Beside those, the pipeline that a run has to ask for: workers that finish the views.
RUNS = {**KINDS, "cpu-pipeline": {**KINDS["stage-switch"], "data": {"pipeline": "cpu"}}}
STEPS = 10


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As in the runs that are killed: sums over several threads are rounded otherwise."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The uninterrupted run of a kind, in one process without workers."""

    @functools.cache
    def of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        run(tiny_config(images, **RUNS[kind]), folder)
        return folder

    return of


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert [row["step"] for row in rows(one)] == list(range(STEPS))
    assert differing(final_state(one), final_state(other)) == []
    a, b = read_backbone(one / "backbone.safetensors"), read_backbone(other / "backbone.safetensors")
    assert differing(a[0], b[0]) == []
    assert a[1] == b[1]


# Kind, workers and the step after which the run dies. Five steps an epoch: 3 is in the middle of the first, 5 its edge
# (and the switch of stages), 8 in the second.
CASES = [*((kind, 0, steps) for kind in KINDS for steps in (3, 5)), ("cpu-pipeline", 0, 3)]
CASES += [("multi-crop", 2, 5), ("stage-switch", 2, 3), ("cpu-pipeline", 2, 5), ("cpu-pipeline", 2, 8)]


@pytest.mark.parametrize(
    ("kind", "workers", "steps"), [pytest.param(*case, marks=pytest.mark.slow if case[1] else []) for case in CASES]
)
def test_a_resumed_run_is_the_whole_one(
    kind: str, workers: int, steps: int, images: Path, whole, tmp_path: Path
) -> None:
    data = {**RUNS[kind].get("data", {}), "workers": workers}
    config = tiny_config(images, **{**RUNS[kind], "data": data})
    with crash_after(steps), pytest.raises(Crash):
        run(config, tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()
    run(config, tmp_path, resume=True)
    assert_same_run(tmp_path, whole(kind))
    if kind == "cpu-pipeline":
        assert rows(tmp_path) == rows(whole("stage-switch"))  # the other pipeline's pictures, bit by bit


def test_another_seed_is_not_the_same_run(images: Path, whole, tmp_path: Path) -> None:
    # The negative control of the comparison above.
    run(tiny_config(images, **KINDS["two-crop"], run={"seed": 1}), tmp_path)
    assert rows(tmp_path) != rows(whole("two-crop"))
    assert len(differing(final_state(tmp_path), final_state(whole("two-crop")))) > 10


# --- killed -----------------------------------------------------------------------------------------------------------


def train_in_child(config, folder: Path, resume: bool) -> None:
    # As a command starts its data workers. They look whether their parent lives; a fork server's children have none to
    # look at, and would stay when the run is killed.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    with tiny_networks():
        try:
            pretrain(config, output=folder, resume=resume)
        except Requeue as stopped:
            os._exit(stopped.exit_status)


def started(config, folder: Path, *, resume: bool = False):
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "twist.pretrain.train", "hypothesis"])
    child = multiprocessing.get_context("forkserver").Process(target=train_in_child, args=(config, folder, resume))
    child.start()
    return child


def wait_for_rows(folder: Path, count: int, child) -> None:
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert child.is_alive(), f"the run ended with {child.exitcode} before it had {count} rows"
        time.sleep(0.02)


@pytest.mark.slow
def test_sigkill_at_any_moment(images: Path, tmp_path: Path) -> None:
    # Long enough to be killed twice on the way, wherever that happens to be.
    config = tiny_config(images, run={"epochs": 6, "mutual_information_epochs": 4}, data={"workers": 2})
    for number, count in enumerate((4, 12)):
        child = started(config, tmp_path / "killed", resume=number > 0)
        wait_for_rows(tmp_path / "killed", count, child)
        if number == 0:
            with pytest.raises(UserError, match="Another process"), locked(tmp_path / "killed"):
                pass
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    run(config, tmp_path / "killed", resume=True)
    run(config, tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert differing(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == []


@pytest.mark.slow
def test_a_signal_saves_and_asks_for_requeue(images: Path, tmp_path: Path) -> None:
    config = tiny_config(images, run={"epochs": 40, "mutual_information_epochs": 40, "checkpoint_every_steps": None})
    child = started(config, tmp_path)
    wait_for_rows(tmp_path, 7, child)
    os.kill(child.pid, signal.SIGUSR1)
    child.join()
    assert child.exitcode == 75
    # Everything up to the signal is there: not only what the last epoch's end had saved.
    found = sorted((tmp_path / "checkpoints").glob("step_*.pt"))[-1]
    assert int(found.stem.split("_")[1]) == len(rows(tmp_path))


def test_a_signal_in_the_loop_is_heeded_at_the_step(images: Path, whole, tmp_path: Path, monkeypatch) -> None:
    from twist.pretrain.run import Run

    original = Run.learn

    def learn(self, loss):
        if self.position.steps == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, loss)

    monkeypatch.setattr(Run, "learn", learn)
    monkeypatch.setattr("twist.pretrain.train.end_with_torchrun", lambda: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    before = signal.getsignal(signal.SIGTERM)
    config = tiny_config(images, **KINDS["two-crop"])
    with pytest.raises(Requeue, match=r"after step 7.*torchrun makes exit status 1 of our 75") as stopped:
        run(config, tmp_path)
    assert stopped.value.exit_status == 75
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    run(config, tmp_path, resume=True)
    assert_same_run(tmp_path, whole("two-crop"))


def test_signals_that_come_together_are_one_and_a_later_one_ends(monkeypatch, capfd) -> None:
    """torchrun hands on what its workers have got from the terminal; a person who presses again means it."""
    now = 100.0
    monkeypatch.setattr("twist.pretrain.slurm.time.monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), stop_flag() as flag:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert flag.raised
        now += 2
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C was ignored")
    assert capfd.readouterr().err.count("Stopping after this step") == 1


def test_ctrl_c_that_a_background_job_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_flag() as flag:
            os.kill(os.getpid(), signal.SIGINT)
            assert not flag.raised
    finally:
        signal.signal(signal.SIGINT, before)


# --- on several ranks -------------------------------------------------------------------------------------------------


def recorded(rank: int, config, folder: Path, resume: bool, signal_at: int | None) -> dict[str, object]:
    """Train, keep the image numbers of every batch, and tell how it ended."""
    from twist.pretrain.run import Run

    seen: list[tuple[int, list[int]]] = []
    epochs, learn = ViewLoader.epoch, Run.learn

    def epoch(self, number, **options):
        for batch in epochs(self, number, **options):
            seen.append((number, batch.indices.tolist()))
            yield batch

    def learn_and_signal(self, loss):
        if signal_at is not None and rank == 1 and self.position.steps == signal_at:
            os.kill(os.getpid(), signal.SIGUSR1)  # one rank only
        return learn(self, loss)

    ViewLoader.epoch, Run.learn = epoch, learn_and_signal  # type: ignore[method-assign]
    try:
        with tiny_networks():
            pretrain(config, output=folder, resume=resume)
        ended = "done"
    except Requeue:
        ended = "requeue"
    finally:
        ViewLoader.epoch, Run.learn = epochs, learn  # type: ignore[method-assign]
    return {"seen": seen, "ended": ended}


@pytest.mark.slow
def test_other_ranks_go_on_and_use_each_image_once(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 36)
    config = tiny_config(images, run={"batch_size": 3, "checkpoint_every_steps": None}, model={"bunch_size": 0})
    folder = tmp_path / "run"
    # Two ranks, six steps an epoch, one rank is told to stop during the third step; all agree on one a little later.
    first = run_on_ranks(2, recorded, config, folder, False, 2)
    assert [rank["ended"] for rank in first] == ["requeue", "requeue"]
    done = len(rows(folder))
    assert 3 <= done < 6
    # One rank goes on, with twice the steps.
    second = recorded(0, config, folder, True, None)
    assert second["ended"] == "done"
    # The ranks read one batch ahead at most; what counts is what was trained on.
    used = [index for rank in first for _, batch in rank["seen"][:done] for index in batch]
    used += [index for epoch, batch in second["seen"] if epoch == 0 for index in batch]
    assert sorted(used) == list(range(36))
    again = [index for epoch, batch in second["seen"] if epoch == 1 for index in batch]
    assert sorted(again) == list(range(36))
    assert [row["step"] for row in rows(folder)] == list(range(done + (36 - 6 * done) // 3 + 12))


def refused(rank: int, pairs: list[tuple[object, object, str]], folder: str) -> list[str]:
    """What each rank says when the two are given a pair of configs, and rank 1 other code where that is the pair's."""
    said = []
    digest = train.code_sha256
    for number, (first, second, code) in enumerate(pairs):
        train.code_sha256 = lambda *rooms, code=code: code if rank and code else digest(*rooms)
        try:
            with tiny_networks():
                pretrain((first, second)[rank], output=Path(folder) / str(number))
            said.append("trained")
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_ranks_that_are_not_of_one_run_are_refused_in_one_sentence_on_each(tmp_path: Path) -> None:
    def config(count: int, prefix: str = "", **run):
        folder = make_images(tmp_path / f"{prefix}{count}", count)
        for path in [*folder.iterdir()] if prefix else ():
            path.rename(folder / f"{prefix}{path.name}")
        return tiny_config(folder, run={"batch_size": 3, **run})

    usual, absent = config(12), config(13)
    shutil.rmtree(tmp_path / "13")
    shutil.copytree(tmp_path / "12", tmp_path / "same")
    elsewhere = tiny_config(tmp_path / "same", run={"batch_size": 3})
    pairs = {
        "names_sha256 is": (usual, config(12, "x"), ""),
        "run.seed is 0 on rank 0 and 7 on rank 1": (usual, config(12, "", seed=7), ""),
        "'other' on rank 1": (usual, usual, "other"),
        "Rank 1: There is no image folder at": (usual, absent, ""),
        "trained": (usual, elsewhere, ""),
    }
    ranks = run_on_ranks(2, refused, [*pairs.values()], str(tmp_path / "runs"))
    for number, expected in enumerate(pairs):
        assert all(expected in rank[number] for rank in ranks), (expected, ranks[0][number])
        assert (tmp_path / "runs" / str(number)).exists() == (expected == "trained")


# --- a run folder of an earlier version -------------------------------------------------------------------------------

# A tiny run with a teacher and both stages, stopped in its second one by commit 9b5e91f.
STORED = Path(__file__).parent / "stored" / "pretrain"
SETTINGS = {"model": {"teacher": True}, "run": {"mutual_information_epochs": 1, "keep_checkpoints": 1}}


def test_a_run_folder_of_an_earlier_version_is_resumed_to_the_same_end(images: Path, tmp_path: Path) -> None:
    config = tiny_config(images, **SETTINGS)
    shutil.copytree(STORED, tmp_path / "stored")
    run(config, tmp_path / "stored", resume=True)
    run(config, tmp_path / "whole")
    assert_nearly_same_run(tmp_path / "stored", tmp_path / "whole")
    run(tiny_config(images, **{**SETTINGS, "run": {**SETTINGS["run"], "seed": 1}}), tmp_path / "other")
    with pytest.raises(AssertionError):  # the control: not every run ends like that
        assert_nearly_same_run(tmp_path / "stored", tmp_path / "other")


def test_it_is_resumed_after_a_key_with_a_default_was_added(images: Path, tmp_path: Path) -> None:
    class Loss(LossConfig):
        new_term: float = added(0.0)

    class Extended(PretrainConfig):
        loss: Loss = Loss()

    extended = Extended.model_validate(tiny_config(images, **SETTINGS).model_dump())
    shutil.copytree(STORED, tmp_path / "stored")
    checkpoint.prepare(tmp_path / "stored", extended, resume=True)
    assert checkpoint.recipe_hash(extended) == checkpoint.recipe_hash(tiny_config(images, **SETTINGS))


def assert_nearly_same_run(one: Path, other: Path) -> None:
    """Another processor rounds otherwise, and the stored steps were done on one."""
    states = final_state(one), final_state(other)
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)] == list(range(STEPS))
    for part in ("model", "teacher"):
        for name, tensor in states[0][part].items():
            torch.testing.assert_close(tensor, states[1][part][name], rtol=0.01, atol=0.001)
