"""What kills, full disks, torn files and flipped bits do to work that is resumed: a table of trials and losses.

    python -m benchmarks.faults [--kills 200] [--flips 1000] [--seconds 540] [--only WORK …] [--seed 0] [--output FILE]

Each trial does its work undisturbed up to the fault, then starts it again as a user would, and compares what comes out
with what the undisturbed work gave: metrics, rows, tensors. After a kill or a full disk it must be equal; a damaged
file may also be refused with a sentence. LOST is everything else that is seen (a crash, a refusal after a kill, a
message that nobody foresaw), SILENTLY DIFFERENT is exit status 0 with another result.

The networks are tiny or small and the runs are forked from processes that have everything imported, so a trial takes
about a second. Nothing here knows how the states are written, only where they lie.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.side_by_side import heading, write
from tests.forked import Command, Ended, Server

TINY = "tests.tiny_run:tiny_networks"
FORKED_JOBS = "benchmarks.faults:forked_jobs"
# What a run writes lies below `disk`, which can be a small one; `tmp` is where temporary files go.
DISK, RUN, TEMPORARY = "disk", "disk/run", "disk/tmp"
Result = dict[str, Any]
Verdict = Literal["refused", "recovered", "LOST", "SILENTLY DIFFERENT"]
PATIENCE_S = 60.0


@dataclass(frozen=True)
class State:
    """Files that work goes on from: at which stage of it, below which pattern, and their share of all flipped bits.

    `ignored` are parts of the result that are what the file itself says and nothing is computed from.
    """

    stage: str
    pattern: str
    share: float
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """Something long that is interrupted. A stage is a moment in it: when the folder holds so many files of patterns.

    `kills` is its share of all kills, whose clock starts when the file `begun` is there. Work that is `exact` gives the
    same result however often it was interrupted; of other work (the frameworks draw their samples anew after a resume)
    only the result of one stage is known.
    """

    name: str
    command: tuple[str, ...]
    again: tuple[str, ...]
    result: Callable[[Path], Result]
    kills: float
    prepare: tuple[str, ...] = ()
    stages: Mapping[str, dict[str, int]] = field(default_factory=dict)
    states: tuple[State, ...] = ()
    setup: str | None = None
    ranks: int = 1
    begun: str | None = None
    exact: bool = True
    full_disks: bool = False


# --- what is done -----------------------------------------------------------------------------------------------------

QUICK_DETECTION = (
    "iterations=4", "SOLVER.IMS_PER_BATCH=2", "SOLVER.CHECKPOINT_PERIOD=2", "INPUT.MIN_SIZE_TRAIN=[64]",
    "INPUT.MAX_SIZE_TRAIN=128", "INPUT.MIN_SIZE_TEST=64", "INPUT.MAX_SIZE_TEST=128", "MODEL.RPN.POST_NMS_TOPK_TRAIN=50",
    "MODEL.RPN.POST_NMS_TOPK_TEST=10", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=8", "TEST.PRECISE_BN.NUM_ITER=1",
    "DATALOADER.NUM_WORKERS=0",
)  # fmt: skip
QUICK_SEGMENTATION = ("iterations=4", "default_hooks.checkpoint.interval=2")


def transfer(
    protocol: str, *overrides: str, weights: str = "network.safetensors", data: str = "tree"
) -> tuple[str, ...]:
    return ("transfer", protocol, *overrides, "--weights", weights, "--data", data, "--output", RUN)


def works() -> tuple[Work, ...]:
    pretrain = ("pretrain", "tiny.toml", "--output", RUN)
    linear = transfer("sample-linear", "epochs=30", "machine.evaluate_every_epochs=10")
    neighbours = transfer("sample-knn", "machine.keep_features=true")
    convert = ("convert", "network.safetensors", "--to", "torchvision", "--output", RUN)
    suite = ("suite", "suite.toml", "--data", "tree", "--output", RUN, "--results", f"{DISK}/results")
    detection = transfer("sample-coco-mrcnn-fpn", *QUICK_DETECTION, weights="random", data="sample")
    segmentation = transfer("sample-voc-fcn-d8", *QUICK_SEGMENTATION, weights="random", data="sample")
    half = "in the middle"
    return (
        Work(
            "pretraining", pretrain, (*pretrain, "--resume"), of_pretraining, 90, prepare=("images",), setup=TINY,
            stages={half: {f"{RUN}/checkpoints/step_*.json": 3}}, full_disks=True,
            states=(
                State(half, f"{RUN}/checkpoints/step_*.pt", 220),
                State(half, f"{RUN}/checkpoints/step_*.json", 260),
                State(half, f"{RUN}/config.json", 60),
                State(half, f"{RUN}/metrics.jsonl", 40, ignored=("rows",)),
            ),
        ),
        Work(
            "pretraining, two ranks", pretrain, (*pretrain, "--resume"), of_pretraining, 16, prepare=("images",),
            setup=TINY, ranks=2,
            begun=f"{RUN}/config.json",  # before the ranks have met, it is torchrun that ends the others
        ),
        Work(
            "linear", linear, (*linear, "--resume"), of_run, 40, prepare=("tree", "weights"), full_disks=True,
            stages={half: {f"{RUN}/checkpoint.pth": 1}},
            states=(
                State(half, f"{RUN}/checkpoint.pth", 160),
                State(half, f"{RUN}/run.json", 80),
                State(half, f"{RUN}/recipe.json", 10),
                State(half, f"{RUN}/metrics.jsonl", 10),
            ),
        ),
        Work(
            "k-NN", neighbours, (*neighbours, "--resume"), of_run, 10, prepare=("tree", "weights"),
            stages={half: {f"{RUN}/features/*.f32": 2}}, states=(State(half, f"{RUN}/features/*.f32", 50),),
        ),
        Work(
            "conversion", convert, convert, of_conversion, 24, prepare=("weights",), full_disks=True,
            stages={"done": {}}, states=(State("done", f"{RUN}/*", 20),),
        ),
        Work(
            "suite", suite, suite, of_suite, 10, prepare=("tree", "weights", "suite"), setup=FORKED_JOBS,
            stages={"converted": {f"{RUN}/weights/*/*.safetensors": 1}, half: {f"{RUN}/*/*/record/*/*.json": 1},
                    "done": {}},
            states=(
                State("converted", f"{RUN}/weights/*/*.safetensors", 20),
                State(half, f"{RUN}/*/*/record/*/*.json", 20),
                State("done", f"{DISK}/results/*/*.json", 30),
            ),
        ),
        Work(
            "Detectron2", detection, (*detection, "--resume"), of_run, 5, prepare=("sample",), exact=False,
            stages={half: {f"{RUN}/model_*.pth": 1, f"{RUN}/last_checkpoint": 1}},
            states=(State(half, f"{RUN}/model_*.pth", 6), State(half, f"{RUN}/last_checkpoint", 4)),
        ),
        Work(
            "MMSegmentation", segmentation, (*segmentation, "--resume"), of_run, 5, prepare=("sample",), exact=False,
            stages={half: {f"{RUN}/iter_*.pth": 1, f"{RUN}/last_checkpoint": 1}},
            states=(State(half, f"{RUN}/iter_*.pth", 6), State(half, f"{RUN}/last_checkpoint", 4)),
        ),
    )  # fmt: skip


FRAMEWORKS = {"Detectron2": "detectron2", "MMSegmentation": "mmseg"}


def of_pretraining(folder: Path) -> Result:
    """The backbone's bytes, which hold its header too, and the rows of the curves without what a machine's speed is."""
    run = folder / RUN
    lines = (run / "metrics.jsonl").read_text().splitlines()
    times = ("images_per_s", "data_wait_share")
    rows = [{key: value for key, value in json.loads(line).items() if key not in times} for line in lines]
    return {"backbone": digest(run / "backbone.safetensors"), "rows": rows}


# What differs between two equal runs: when and how long, and that one was continued.
OF_THE_TIME = ("created", "wall_s", "notes", "images_per_s", "git_commit")


def of_run(folder: Path) -> Result:
    return _records(folder / RUN / "results")


def of_suite(folder: Path) -> Result:
    return _records(folder / DISK / "results")


def _records(folder: Path) -> Result:
    """Every record and the rows of its curves."""
    found: Result = {}
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text())
        found[path.name] = {key: value for key, value in record.items() if key not in OF_THE_TIME}
        if record["curves"]:
            rows = [json.loads(line) for line in (path.parent / record["curves"]).read_text().splitlines()]
            found[f"curves of {path.name}"] = [
                {key: value for key, value in row.items() if key not in OF_THE_TIME and "time" not in key}
                for row in rows
            ]
    if not found:
        raise FileNotFoundError(f"there is no record below {folder}")
    return found


def of_conversion(folder: Path) -> Result:
    return {path.name: digest(path) for path in sorted((folder / RUN).iterdir())}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def forked_jobs() -> Iterator[None]:
    """The runs of a suite are forked from it and not started anew, which is seconds of imports less for each."""
    original = subprocess.Popen

    def start(command: Any, **options: Any) -> Any:
        if isinstance(command, list) and command[1:3] == ["-m", "twist"]:
            return _ForkedJob(command[3:], **options)
        return original(command, **options)

    subprocess.Popen = start  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        subprocess.Popen = original  # type: ignore[misc]


class _ForkedJob:
    """What the suite asks of `subprocess.Popen`. The child inherits every open file, the lock on its folder too."""

    def __init__(self, arguments: Sequence[str], *, stdout: Any, env: Mapping[str, str], **_: Any) -> None:
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                os.environ.update(env)
                sys.argv = ["twist", *arguments]
                from twist.cli import main

                main()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout: float = 600.0) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("twist", timeout)
            time.sleep(0.01)
        return status


# --- trials -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One fault and its seed; `state` for damaged files."""

    work: Work
    fault: str
    number: int
    state: State | None = None

    @property
    def row(self) -> tuple[str, str]:
        where = "" if self.state is None else f" of {self.state.pattern.removeprefix(RUN + '/')}"
        return self.work.name, self.fault + where


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: the verdict, what exactly was done, why it is a bad one, and files left behind."""

    trial: Trial
    verdict: Verdict
    done: str
    reason: str = ""
    left: tuple[str, ...] = ()


@dataclass
class Known:
    """What is known of undisturbed work: how long it takes, its result, its hidden and temporary files."""

    seconds: float
    result: Result
    left: frozenset[str]
    bytes: int
    accepted: dict[str, list[Result]] = field(default_factory=dict)  # by stage


class Lab:
    """One server, and a folder in which trials are made; the prepared inputs and stages are shared by all labs."""

    def __init__(self, server: Server, folder: Path, shared: Path, known: dict[str, Known], *, seed: int) -> None:
        self._server, self._folder, self._shared, self._known, self._seed = server, folder, shared, known, seed

    def fresh(self, work: Work) -> Path:
        """An empty folder with the work's inputs."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        for name in work.prepare:
            shutil.copytree(self._shared / name, folder, dirs_exist_ok=True, copy_function=_linked)
        (folder / TEMPORARY).mkdir(parents=True)
        return folder

    def start(self, work: Work, folder: Path, command: tuple[str, ...], **fault: Any) -> list[Ended]:
        environment = {"TMPDIR": str(folder / TEMPORARY)}
        if work.ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        return self._server.run(
            Command(
                command,
                str(folder),
                seconds=PATIENCE_S,
                setup=work.setup,
                ranks=work.ranks,
                environment=environment,
                **fault,
            )
        )

    def learn(self, work: Work) -> None:
        """Do the work undisturbed, and stop it at each of its stages."""
        folder = self.fresh(work)
        ended = self.start(work, folder, work.command)
        if any(one.status != 0 for one in ended):
            raise SystemExit(f"{work.name} does not even work undisturbed: {ended[0].said}")
        size = sum(path.stat().st_size for path in (folder / DISK).rglob("*") if path.is_file())
        known = Known(max(one.seconds for one in ended), work.result(folder), frozenset(_hidden(folder)), size)
        self._known[work.name] = known
        for stage, when in work.stages.items():
            known.accepted[stage] = [known.result]
            stopped = folder if not when else self._stopped(work, when)
            shutil.move(stopped, self._stage(work, stage))
        shutil.rmtree(folder, ignore_errors=True)
        if not work.exact:
            for stage in work.stages:
                resumed = self._copy(work, stage)
                self.start(work, resumed, work.again)
                known.accepted[stage].append(work.result(resumed))
                shutil.rmtree(resumed)

    def _stopped(self, work: Work, when: dict[str, int]) -> Path:
        for _ in range(5):
            folder = self.fresh(work)
            ended = self.start(work, folder, work.command, kill_when=when)
            _wait_for_jobs(folder)
            if ended[0].status == -signal.SIGKILL:
                return folder
            shutil.rmtree(folder)
        raise SystemExit(f"{work.name} was never killed where it should be ({when}).")

    def _stage(self, work: Work, stage: str) -> Path:
        return self._shared / "stages" / work.name / stage

    def _copy(self, work: Work, stage: str) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        shutil.copytree(self._stage(work, stage), folder, dirs_exist_ok=True, symlinks=True)
        return folder

    def run(self, trial: Trial) -> Outcome | None:
        """None where the fault could not be had: the work was done before the kill, a disk may not be mounted."""
        # By its own seed: the same trial whatever was tried before, and in whatever order.
        chance = random.Random(f"{self._seed} {trial.row} {trial.number}")
        kind = trial.fault
        if kind in ("killed", "told to end"):
            return self._killed(trial, chance, signal.SIGKILL if kind == "killed" else signal.SIGTERM)
        if kind == "full disk":
            return self._full(trial, chance)
        return self._damaged(trial, chance)

    def _killed(self, trial: Trial, chance: random.Random, number: int) -> Outcome | None:
        work, known = trial.work, self._known[trial.work.name]
        first = 1.0
        for _ in range(4):
            folder = self.fresh(work)
            try:
                moments = []
                for start, command in enumerate((work.command, work.again)):
                    if start and chance.random() > 0.3:  # some are killed again on their way back
                        break
                    moment, rank = chance.uniform(0.02, first) * known.seconds, chance.randrange(work.ranks)
                    fault: dict[str, Any] = {"kill_after_s": moment, "kill_rank": rank, "kill_signal": number}
                    fault |= {} if work.begun is None or start else {"kill_when": {work.begun: 1}}
                    ended = self.start(work, folder, command, **fault)
                    if not start and number == signal.SIGKILL and ended[rank].status != -signal.SIGKILL:
                        break  # it was done before
                    moments.append((f"rank {rank} " if work.ranks > 1 else "") + f"after {moment:.3f} s")
                    for index, one in enumerate(ended):
                        bad = "" if index == rank and number == signal.SIGKILL else _unforeseen(one)
                        if bad:
                            return Outcome(trial, "LOST", f"{trial.fault} {', '.join(moments)}", f"then said: {bad}")
                if moments:
                    done = f"{trial.fault} {', '.join(moments)}"
                    return self._again(trial, folder, [known.result], done=done, must=True, exact=work.exact)
                first /= 2
            finally:
                _wait_for_jobs(folder)
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def _full(self, trial: Trial, chance: random.Random) -> Outcome | None:
        work, known = trial.work, self._known[trial.work.name]
        folder = self.fresh(work)
        disk, size = folder / DISK, int(known.bytes * chance.uniform(0.05, 0.95))
        if not _mounted(disk, size):
            shutil.rmtree(folder)
            return None
        try:
            (folder / TEMPORARY).mkdir()
            done = f"a disk of {size // 1024} KiB"
            ended = self.start(work, folder, work.command)
            if ended[0].status not in (0, 1) or (bad := _unforeseen(ended[0])):
                return Outcome(trial, "LOST", done, bad or f"exit status {ended[0].status}")
            if ended[0].status == 1 and "disk is full" not in ended[0].said:
                return Outcome(trial, "LOST", done, f"does not say that the disk is full: {_last(ended[0])}")
            subprocess.run(["mount", "-o", f"remount,size={known.bytes * 4 + 2**24}", str(disk)], check=True)
            return self._again(trial, folder, [known.result], done=done, must=True)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)
            shutil.rmtree(folder, ignore_errors=True)

    def _damaged(self, trial: Trial, chance: random.Random) -> Outcome:
        work, state = trial.work, trial.state
        assert state is not None
        folder = self._copy(work, state.stage)
        try:
            found = folder.glob(state.pattern)
            paths = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
            # Mostly the newest, which is what is gone on from; the others are what it falls back to.
            path = paths[-1] if chance.random() < 0.8 else chance.choice(paths)
            how = _damage(path, trial.fault, chance)
            done = f"{path.relative_to(folder)}: {how}"
            accepted = self._known[work.name].accepted[state.stage]
            return self._again(trial, folder, accepted, done=done, ignored=state.ignored)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _again(
        self,
        trial: Trial,
        folder: Path,
        accepted: Sequence[Result],
        *,
        done: str,
        must: bool = False,
        exact: bool = True,
        ignored: tuple[str, ...] = (),
    ) -> Outcome:
        """Start the work again, and judge it; `must` is for faults after which a refusal is a loss, too."""
        work = trial.work
        ended = self.start(work, folder, work.again)
        for one in ended:
            if bad := _unforeseen(one):
                return Outcome(trial, "LOST", done, bad)
        if any(one.status for one in ended):
            said = _last(ended[0])
            return Outcome(trial, "LOST", done, f"refused: {said}") if must else Outcome(trial, "refused", done, said)
        try:
            found = work.result(folder)
        except (OSError, ValueError, LookupError) as error:
            return Outcome(trial, "LOST", done, f"exit status 0, and no result: {error}")
        left = tuple(sorted(_hidden(folder) - self._known[work.name].left))
        if not exact or any(not _differing(found, one, ignored) for one in accepted):
            return Outcome(trial, "recovered", done, left=left)
        return Outcome(trial, "SILENTLY DIFFERENT", done, _differing(found, accepted[0], ignored))


def _damage(path: Path, fault: str, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    path.unlink()
    if fault == "a bit":
        place, bit = chance.randrange(len(data)), chance.randrange(8)
        data[place] ^= 1 << bit
        how = f"bit {bit} of byte {place} of {len(data)}"
    else:
        place = chance.choice((0, chance.randrange(len(data)), len(data) - 1))
        if chance.random() < 0.5:
            del data[place:]
            how = f"cut after {place} bytes"
        else:  # what a disk gives back for what it never wrote
            data[place:] = bytes(len(data) - place)
            how = f"zeros after {place} bytes"
    path.write_bytes(data)
    return how


def _unforeseen(ended: Ended) -> str:
    """Why an end is no sentence, empty for one that is."""
    if ended.out_of_time:
        return f"did not end in {PATIENCE_S:.0f} s"
    if ended.status < 0 and ended.status != -signal.SIGTERM:
        return f"ended by signal {-ended.status}"
    for words in ("Traceback (most recent call last)", "did not foresee", "memory ran out"):
        if words in ended.said:
            return _last(ended)
    return ""


def _last(ended: Ended) -> str:
    lines = [line for line in ended.said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("twist:")), lines[-1] if lines else "nothing said")


def _differing(found: Result, expected: Result, ignored: tuple[str, ...]) -> str:
    """The parts of two results that are not equal, by name; empty when all are."""
    names = sorted((found.keys() | expected.keys()).difference(ignored))
    names = [name for name in names if found.get(name) != expected.get(name)]
    parts = []
    for name in names:
        one, other = found.get(name), expected.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            inner = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
            parts += [f"{key} {other.get(key)!r} → {one.get(key)!r}"[:100] for key in inner]
        else:
            parts.append(name)
    return ", ".join(parts)


def _hidden(folder: Path) -> set[str]:
    """Files that begin with a dot, and whatever lies where temporary files go."""
    disk, temporary = folder / DISK, folder / TEMPORARY
    found = {str(path.relative_to(disk)) for path in disk.rglob(".*")}
    return found | {f"tmp/{path.name}" for path in temporary.glob("*")}


def _linked(source: str, target: str) -> None:
    os.link(source, target)  # inputs are only read


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _mounted(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _wait_for_jobs(folder: Path) -> None:
    """Until no run of a killed suite works in `folder` any more."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        at_work = False
        for process in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                at_work |= process.resolve() == folder.resolve()
        if not at_work:
            return
        time.sleep(0.05)


# --- all of them ------------------------------------------------------------------------------------------------------


def prepare(server: Server, shared: Path) -> None:
    """The inputs, each in a folder of its own: pictures and a config, an ImageNet-like tree, weights, sample, suite."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from tests.hostile.trees import toml
    from tests.imagenet_tree import write_tree
    from tests.tiny_run import make_images, tiny_config

    def twist(folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (ended,) = server.run(Command(arguments, str(folder)))
        if ended.status != 0:
            raise SystemExit(ended.said)

    make_images(shared / "images" / "pictures")
    config = tiny_config(
        Path("pictures"),
        model={"teacher": True, "bunch_size": 0, "hidden_dim": 16, "classes": 12},
        optim={"name": "adamw", "lr": 0.1, "clip_norm": 3.0},
        run={"epochs": 4, "mutual_information_epochs": 2},
    )
    (shared / "images" / "tiny.toml").write_text(toml(config))
    write_tree(shared / "tree" / "tree")
    twist(shared / "sample", "data", "sample", "sample", "--size", "tiny")
    random_run = ("transfer", "sample-knn", "--weights", "random", "--data", "../tree/tree", "--output", "run")
    twist(shared / "weights", *random_run)
    (shared / "weights" / "run" / "weights" / "random.safetensors").rename(shared / "weights" / "network.safetensors")
    shutil.rmtree(shared / "weights" / "run")
    (shared / "suite").mkdir()
    (shared / "suite" / "suite.toml").write_text(
        'protocols = ["sample-knn"]\nseeds = [0]\n'
        '[[weights]]\nname = "a"\nfile = "network.safetensors"\nmethod = "twist"\n'
    )


def _in_memory() -> Path | None:
    """A file system in memory with room for the trials, where a write that waits for the disk waits for nothing."""
    folder = Path("/dev/shm")
    with contextlib.suppress(OSError):
        return folder if shutil.disk_usage(folder).free > 6 * 2**30 else None
    return None


def planned(chosen: Sequence[Work], *, kills: int, flips: int) -> list[Trial]:
    """Every trial, mixed so that what is cut short by time has some of each."""
    all_kills = sum(work.kills for work in chosen) or 1
    states = [(work, state) for work in chosen for state in work.states]
    all_flips = sum(state.share for _, state in states) or 1
    trials = []
    for work in chosen:
        count = round(kills * work.kills / all_kills)
        told = count // 5  # SIGTERM, as schedulers and containers send it
        trials += [Trial(work, "killed", number) for number in range(count - told)]
        trials += [Trial(work, "told to end", number) for number in range(told)]
        trials += [Trial(work, "full disk", number) for number in range(6)] if work.full_disks and kills else []
    for work, state in states:
        count = round(flips * state.share / all_flips)
        trials += [Trial(work, "a bit", number, state) for number in range(count)]
        trials += [Trial(work, "torn", number, state) for number in range(-(-count // 8))]
    random.Random(0).shuffle(trials)
    return trials


def carried_out(
    chosen: Sequence[Work], trials: Sequence[Trial], *, seconds: float, processes: int, seed: int, folder: Path | None
) -> list[Outcome]:
    """The outcomes of those trials that were begun within `seconds`."""
    frameworks = any(work.name in FRAMEWORKS for work in chosen)
    outcomes: list[Outcome] = []
    known: dict[str, Known] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="faults-", dir=folder) as temporary, contextlib.ExitStack() as stack:
        shared = Path(temporary) / "shared"
        servers = [stack.enter_context(Server(frameworks=frameworks)) for _ in range(processes)]
        prepare(servers[0], shared)
        labs = []
        for number, server in enumerate(servers):
            (own := Path(temporary) / str(number)).mkdir()
            labs.append(Lab(server, own, shared, known, seed=seed))
        _in_parallel(labs, chosen, lambda lab, work: lab.learn(work))
        for work in chosen:
            print(f"  {work.name}: {known[work.name].seconds:.2f} s undisturbed", flush=True)

        def carry_out(lab: Lab, trial: Trial) -> None:
            if time.monotonic() < end and (outcome := lab.run(trial)) is not None:
                outcomes.append(outcome)
                if outcome.verdict in ("LOST", "SILENTLY DIFFERENT"):
                    print(f"  {outcome.verdict}: {trial.work.name}, {outcome.done}: {outcome.reason[:200]}", flush=True)
                if len(outcomes) % 100 == 0:
                    print(f"  {len(outcomes)} of {len(trials)} trials", flush=True)

        try:
            _in_parallel(labs, trials, carry_out)
        except RuntimeError as error:  # a server was ended from outside: what was found counts
            print(f"  not all trials: {error}", flush=True)
    return outcomes


def _in_parallel(labs: Sequence[Lab], items: Sequence[Any], do: Callable[[Lab, Any], None]) -> None:
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    errors: list[BaseException] = []

    def work(lab: Lab) -> None:
        while not errors:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                do(lab, item)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(lab,)) for lab in labs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row a work and fault, and all of them under it."""
    verdicts: tuple[Verdict, ...] = ("refused", "recovered", "LOST", "SILENTLY DIFFERENT")
    heads = ("work", "fault", "trials", "refused with a sentence", "recovered, equal", "files left", *verdicts[2:])
    rows: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        for row in (outcome.trial.row, ("all", "")):
            counts = rows.setdefault(row, Counter())
            counts.update({"trials": 1, outcome.verdict: 1, "left": int(bool(outcome.left))})
    order = [work.name for work in works()]
    ordered = sorted((row for row in rows if row[0] != "all"), key=lambda row: (order.index(row[0]), row[1]))
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in (*ordered, *([("all", "")] if rows else [])):
        counts = rows[row]
        numbers = [counts["trials"], counts["refused"], counts["recovered"], counts["left"]]
        numbers += [counts["LOST"], counts["SILENTLY DIFFERENT"]]
        lines.append(
            "| " + " | ".join((*(f"`{part}`" if "*" in part else part for part in row), *map(str, numbers))) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    names = [work.name for work in works()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=1000, help="flipped bits; an eighth as many files are torn")
    parser.add_argument("--seconds", type=float, default=540.0, help="no trial is begun after so long")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="WORK", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where trials are made; default: in memory, else a temporary folder"
    )
    parser.add_argument("--output", type=Path, help="the table and every loss as JSON")
    arguments = parser.parse_args()
    chosen = [work for work in works() if work.name in arguments.only]
    trials = planned(chosen, kills=arguments.kills, flips=arguments.flips)
    print(heading(f"{len(trials)} faults"), flush=True)
    began = time.monotonic()
    outcomes = carried_out(
        chosen,
        trials,
        seconds=arguments.seconds,
        processes=arguments.processes,
        seed=arguments.seed,
        folder=arguments.folder or _in_memory(),
    )
    print(f"\n{table(outcomes)}\n\n{len(outcomes)} of {len(trials)} trials in {time.monotonic() - began:.0f} s")
    bad = [outcome for outcome in outcomes if outcome.verdict in ("LOST", "SILENTLY DIFFERENT")]
    for (row, verdict, reason), count in Counter((o.trial.row, o.verdict, o.reason[:120]) for o in bad).most_common():
        first = next(o for o in bad if (o.trial.row, o.verdict, o.reason[:120]) == (row, verdict, reason))
        print(f"{count} × {verdict}: {row[0]}, {row[1]}; as after {first.done}: {reason}")
    write(
        arguments.output,
        {
            "trials": len(outcomes),
            "seconds": time.monotonic() - began,
            "rows": [dict(zip(("work", "fault"), row)) | count for row, count in _counted(outcomes)],
            "losses": [
                {
                    "work": o.trial.row[0],
                    "fault": o.trial.row[1],
                    "done": o.done,
                    "verdict": o.verdict,
                    "reason": o.reason,
                }
                for o in bad
            ],
        },
    )
    sys.exit(1 if bad else 0)


def _counted(outcomes: Sequence[Outcome]) -> list[tuple[tuple[str, str], dict[str, int]]]:
    rows: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.trial.row, Counter())[outcome.verdict] += 1
    return [(row, dict(counts)) for row, counts in rows.items()]


if __name__ == "__main__":
    main()
