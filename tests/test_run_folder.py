"""Who may write in a folder, which run is in it, what ends a run, and what keeps its identity over versions."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from twist.contracts import files, run_folder
from twist.contracts.config import Config, added, identity_of
from twist.contracts.errors import UsageError, UserError
from twist.contracts.failures import describe, explained, raise_reported
from twist.contracts.files import sha256_json
from twist.contracts.run_folder import DONE, RUN_FILE, RUNNING, STARTED, differences

RUN = {"protocol": "knn", "seed": 0, "weights": {"name": "random", "architecture": "resnet18"}, "data": "imagenet a"}

# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    target, run = tmp_path / "run", {**RUN, "recipe": {"SOLVER": {"BASE_LR": 0.02}}}
    assert run_folder.read_run(target) is None
    with run_folder.removed_on_failure(target):
        run_folder.write_run(target, run, state=RUNNING)
    earlier = run_folder.read_run(target)
    assert earlier is not None
    run_folder.refuse_other_transfer(target, earlier, run)
    with pytest.raises(UserError, match=r"already holds this run: pass --resume"):
        run_folder.refuse_second_start(target, earlier)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex and no run\.json"):
        run_folder.read_run(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"recipe": {"k": 10}}, "recipe.k was 20 and is 10 now"),
        ({"data": "imagenet b", "protocol": "linear"}, "protocol was 'knn' and is 'linear' now (and 1 more)"),
        ({"weights": {"name": "r50", "sha256": "ab"}}, "weights.name was 'random' and is 'r50' now"),
        ({"weights": {"name": "random", "architecture": "resnet50"}}, "weights.architecture was 'resnet18'"),
    ],
)
def test_the_first_difference_to_another_run_is_named(tmp_path: Path, change: dict, sentence: str) -> None:
    run = {**RUN, "recipe": {"k": 20}}
    with pytest.raises(UserError) as caught:
        run_folder.refuse_other_transfer(tmp_path, run, {**run, **change})
    assert sentence in str(caught.value)
    # What an early kill left out and a renamed file are no differences.
    run_folder.refuse_other_transfer(tmp_path, RUN, run)
    before, after = ({"weights": {"name": name, "sha256": "5e1"}} for name in ("before.pth", "renamed.pth"))
    run_folder.refuse_other_transfer(tmp_path, before, after)


def test_a_finished_run_says_where_its_record_is(tmp_path: Path) -> None:
    record = tmp_path / "run" / "results" / "knn" / "x.json"
    record.parent.mkdir(parents=True)
    record.touch()
    run_folder.write_run(tmp_path / "run", RUN, state=DONE, record=record)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    earlier = run_folder.read_run(moved)
    assert earlier is not None
    there = moved / "results" / "knn" / "x.json"
    assert run_folder.record_of(moved, earlier) == there
    assert run_folder.record_of(moved, earlier, results=tmp_path / "other") is None
    with pytest.raises(UserError, match=rf"done \(its record is {there}\): pass --resume .*--eval-only"):
        run_folder.refuse_second_start(moved, earlier)
    there.unlink()
    assert run_folder.record_of(moved, earlier) is None


@pytest.mark.parametrize("state", [None, STARTED, RUNNING])
def test_a_failed_start_leaves_nothing_behind(state: str | None, tmp_path: Path) -> None:
    target = tmp_path / "run"
    if state is None:
        target.mkdir()  # the user's own
    with pytest.raises(UserError), run_folder.removed_on_failure(target):
        if state:
            run_folder.write_run(target, RUN, state=state)
        (target / "weights").mkdir()
        raise UserError("no")
    assert target.exists() == (state != STARTED)
    assert (target / RUN_FILE).exists() == (state == RUNNING), "a run under way can be resumed"
    assert state == RUNNING or not list(tmp_path.rglob("weights"))


def test_lists_are_compared_by_item_where_they_hold_tables() -> None:
    for before, after, found in (
        ([1, 2], [1, 3], ("a", [1, 2], [1, 3])),
        ([[1], [2]], [[1], [3]], ("a.1", [2], [3])),
        ([{"b": 1}], [{"b": 1}, {"b": 2}], ("a", [{"b": 1}], [{"b": 1}, {"b": 2}])),
    ):
        assert list(differences({"a": before}, {"a": after})) == [found]


def test_an_inherited_lock_belongs_to_the_open_file(tmp_path: Path) -> None:
    lock = run_folder.try_lock(tmp_path / "lock", inherited=True)
    assert lock is not None
    copy = os.dup(lock)
    os.close(lock)
    assert run_folder.try_lock(tmp_path / "lock", inherited=True) is None, "a child's copy holds it"
    os.close(copy)
    other = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(UserError), run_folder.replaced_whole(tmp_path / "out") as folder:
        (folder / "new").touch()
        raise UserError("no")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    with run_folder.replaced_whole(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_killed_processes_left_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    for name in (".out.0123abcd", ".out.0123abcd.old", ".other.0123abcd", ".out.by_hand"):
        (tmp_path / name).mkdir()
    with files.atomic_path(tmp_path / "run" / "deep" / "weights.pth") as left:
        pass
    left.touch()  # as a kill between its bytes leaves it
    (tmp_path / "run" / ".suite-lock").touch()
    code = "import sys, time; from pathlib import Path; from twist.contracts.run_folder import temporary_folder\n"
    code += "with temporary_folder(Path(sys.argv[1])) as new: print(new, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout is not None
        held = Path(other.stdout.readline().strip())
        with run_folder.replaced_whole(tmp_path / "out"):
            pass
        left = {".other.0123abcd", ".out.by_hand", "out", held.name, "run"}
        assert {path.name for path in tmp_path.iterdir()} == left
        run_folder.remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.rglob(".*")} == {".out.by_hand", held.name, ".suite-lock"}
        other.kill()
        other.wait()
    with run_folder.replaced_whole(tmp_path / "out"):
        assert not held.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\nmore"), r"CUDA ran out of memory \(.*GiB\): lower x\.$"),
        (MemoryError(), r"machine ran out of memory .*: lower x\.$"),
        (FloatingPointError("Loss became infinite or NaN at iteration=7!"), r"iteration=7.*lower the learning rate"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), r"pid 7.*fewer workers.*--resume"),
        (RuntimeError("[gloo] Connection closed by peer"), r"Another process of the run died .*--resume"),
        (OSError(28, "No space left on device", "/x/y"), r"disk is full.*free some space"),
        (RuntimeError("PytorchStreamWriter failed writing file"), r"disk is full"),
        (RuntimeError("basic_ios::clear: iostream error"), r"disk is full .*with --resume"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), r"disk is full"),
        (PermissionError(13, "Permission denied", "/x/y"), r"/x/y may not be written or read: check its permissions"),
        (FileExistsError(17, "File exists", "/x/y"), r"/x/y cannot be used \(File exists\): give another path"),
    ],
)
def test_what_is_nobodys_bug_is_one_sentence_with_its_remedy(tmp_path: Path, error: Exception, sentence: str) -> None:
    worker = explained(report=tmp_path, memory="lower x")
    with pytest.raises(UserError, match=sentence) as caught, raise_reported(tmp_path), worker:
        raise error
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:3123",
        "[gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:9: Connection reset by peer",
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "NCCL error in: x.cpp:2251, remote process exited or there was a network error, NCCL version 2.21.5",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE)",
        "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29500).",
    ],
)
def test_all_ways_of_losing_a_peer_are_one_sentence_with_the_rank(text: str, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "3")
    sentence = str(describe(RuntimeError(text)))
    assert sentence.startswith("Rank 3 lost another process of the run")
    assert "--resume" in sentence
    assert describe(BrokenPipeError(32, "Broken pipe")) is None, "a reader that went away is no rank"
    monkeypatch.delenv("RANK")
    assert str(describe(RuntimeError(text))).startswith("Another process of the run died")


def test_only_the_kinds_asked_for_are_explained_and_a_bug_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower y"), explained(memory="lower x"), explained(memory="lower y"):
        raise MemoryError
    with pytest.raises(FloatingPointError), explained(memory="lower x"):
        raise FloatingPointError
    with pytest.raises(RuntimeError, match="shape mismatch"), explained(report=tmp_path):
        raise RuntimeError("shape mismatch")
    assert describe(RuntimeError("shape mismatch")) is None


def _end(_rank: int, output: Path, error: Exception | None) -> None:
    if error is None:
        os.kill(os.getpid(), signal.SIGKILL)
    with explained(report=output):
        raise error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (None, UserError, r"Worker 0 died \(SIGKILL\)"),
        (UsageError("This key is wrong."), UsageError, r"^This key is wrong\.$"),
        (ValueError("deep in the framework"), RuntimeError, "^ValueError: deep in the framework$"),
    ],
)
def test_what_happens_in_a_worker_reaches_the_user(error: Any, kind: Any, says: str, tmp_path: Path) -> None:
    # Forked, which spares each the imports of a spawned one.
    with pytest.raises(kind, match=says), raise_reported(tmp_path):
        torch.multiprocessing.start_processes(_end, args=(tmp_path, error), nprocs=1, start_method="fork")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Configs that get a key later


class Loss(Config):
    weight: float = 1.0


class Now(Config):
    lr: float
    scales: tuple[float, ...] = (0.1, 0.5)
    loss: Loss = Loss()


class LaterLoss(Loss):
    tau: float = added(1.0, gt=0)


class Later(Now):
    loss: LaterLoss = LaterLoss()
    sizes: tuple[int, ...] = added((1, 2))
    extra: LaterLoss = added(LaterLoss())


def test_a_key_that_is_added_with_a_default_changes_no_identity() -> None:
    before, after = identity_of(Now(lr=0.1)), identity_of(Later(lr=0.1))
    assert before == after == Now(lr=0.1).model_dump(mode="json")
    assert sha256_json(before) == sha256_json(after)
    assert identity_of(Later.model_validate(before)) == before
    changed = Later(lr=0.1, loss={"tau": 2.0}, sizes=(3,))
    assert identity_of(changed) == {**before, "loss": {"weight": 1.0, "tau": 2.0}, "sizes": [3]}
    with pytest.raises(ValueError, match="greater than 0"):
        LaterLoss(tau=0)
