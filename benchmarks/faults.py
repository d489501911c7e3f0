"""What kills, full disks, torn files and flipped bits do to work that is resumed: a table of trials and losses.

    python -m benchmarks.faults [--kills 200] [--flips 1000] [--minutes 9] [--only WORK …] [--output FILE.json]

Each trial does its work undisturbed up to the fault, then starts it again as a user would, and compares what comes out
with what the undisturbed work gave: metrics, rows, tensors. After a kill or a full disk it must be equal; a damaged
file may also be refused with a sentence. LOST is everything else that is seen (a crash, a refusal after a kill, a
message that nobody foresaw), SILENTLY DIFFERENT is exit status 0 with another result.

No trial is begun after `--minutes`; the same command again goes on with the trials that FILE.jsonl does not have yet.
At its end FILE.json has the table, which `python -m benchmarks.summary` quotes. The networks are tiny or small and the
runs are forked from processes that have everything imported. Nothing here knows how the states are written, only where.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.side_by_side import heading, write
from benchmarks.summary import RESULTS
from tests.forked import Command, Ended, Server
from twist.catalog.sample.make import make_sample
from twist.contracts.files import sha256_file
from twist.contracts.machine import code_sha256
from twist.contracts.networks import build_backbone
from twist.contracts.weights import Backbone, write_backbone

TINY = "tests.tiny_run:tiny_networks"
# What a run writes lies below `disk`, which can be a small one; `tmp` is where temporary files go.
DISK, RUN, TEMPORARY = "disk", "disk/run", "disk/tmp"
Result = dict[str, Any]
Verdict = Literal["refused", "recovered", "LOST", "SILENTLY DIFFERENT"]
BAD: tuple[Verdict, ...] = ("LOST", "SILENTLY DIFFERENT")
PATIENCE_S = 120.0
ROOMS = ("contracts", "measure", "catalog", "pretrain", "converters", "transfer", "twist")


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
    linear = transfer("sample-linear", "epochs=9", "machine.evaluate_every_epochs=3")
    neighbours = transfer("sample-knn", "machine.keep_features=true")
    convert = ("convert", "network.safetensors", "--to", "torchvision", "--output", RUN)
    suite = ("suite", "suite.toml", "--data", "tree", "--output", RUN, "--results", f"{DISK}/results")
    detection = transfer("sample-coco-mrcnn-fpn", *QUICK_DETECTION, weights="random", data="sample")
    segmentation = transfer("sample-voc-fcn-d8", *QUICK_SEGMENTATION, weights="random", data="sample")
    half = "in the middle"
    return (
        Work(
            "pretraining", pretrain, (*pretrain, "--resume"), of_pretraining, 100, prepare=("images",), setup=TINY,
            stages={half: {f"{RUN}/checkpoints/step_00000016.json": 1}}, full_disks=True,
            states=(
                State(half, f"{RUN}/checkpoints/step_*.pt", 240), State(half, f"{RUN}/checkpoints/step_*.json", 300),
                State(half, f"{RUN}/config.json", 60), State(half, f"{RUN}/metrics.jsonl", 40, ignored=("rows",)),
            ),
        ),
        Work(
            "pretraining, two ranks", pretrain, (*pretrain, "--resume"), of_pretraining, 20, prepare=("images",),
            setup=TINY, ranks=2,
            begun=f"{RUN}/config.json",  # before the ranks have met, it is torchrun that ends the others
        ),
        Work(
            "linear", linear, (*linear, "--resume"), of_records, 40, prepare=("tree", "weights"), full_disks=True,
            stages={half: {f"{RUN}/checkpoint.pth": 1}},
            states=(
                State(half, f"{RUN}/checkpoint.pth", 160), State(half, f"{RUN}/run.json", 80),
                State(half, f"{RUN}/recipe.json", 10), State(half, f"{RUN}/metrics.jsonl", 10, ignored=("curves",)),
            ),
        ),
        Work(
            "k-NN", neighbours, (*neighbours, "--resume"), of_records, 10, prepare=("tree", "weights"),
            stages={half: {f"{RUN}/features/*.f32": 2}}, states=(State(half, f"{RUN}/features/*.f32", 30),),
        ),
        Work(
            "conversion", convert, convert, of_conversion, 24, prepare=("weights",), full_disks=True,
            stages={"done": {}}, states=(State("done", f"{RUN}/*", 20),),
        ),
        Work(
            "suite", suite, suite, functools.partial(of_records, place=f"{DISK}/results"), 4,
            prepare=("tree", "weights", "suite"),
            stages={"converted": {f"{RUN}/weights/*/*.safetensors": 1}, half: {f"{RUN}/*/*/record/*/*.json": 1},
                    "done": {}},
            states=(
                State("converted", f"{RUN}/weights/*/*.safetensors", 3), State(half, f"{RUN}/*/*/record/*/*.json", 3),
                State("done", f"{DISK}/results/*/*.json", 14),
            ),
        ),
        Work(
            "Detectron2", detection, (*detection, "--resume"), of_records, 3, prepare=("sample",), exact=False,
            stages={half: {f"{RUN}/model_*.pth": 1, f"{RUN}/last_checkpoint": 1}},
            states=(State(half, f"{RUN}/model_*.pth", 4), State(half, f"{RUN}/last_checkpoint", 2)),
        ),
        Work(
            "MMSegmentation", segmentation, (*segmentation, "--resume"), of_records, 3, prepare=("sample",),
            exact=False, stages={half: {f"{RUN}/iter_*.pth": 1, f"{RUN}/last_checkpoint": 1}},
            states=(State(half, f"{RUN}/iter_*.pth", 4), State(half, f"{RUN}/last_checkpoint", 2)),
        ),
    )  # fmt: skip


def of_pretraining(folder: Path) -> Result:
    """The backbone's bytes, which hold its header too, and the rows of the curves without what a machine's speed is."""
    run = folder / RUN
    lines = (run / "metrics.jsonl").read_text().splitlines()
    times = ("images_per_s", "data_wait_share")
    rows = [{key: value for key, value in json.loads(line).items() if key not in times} for line in lines]
    return {"backbone": sha256_file(run / "backbone.safetensors"), "rows": rows}


# What differs between two equal runs: when and how long, and that one was continued.
OF_THE_TIME = ("created", "wall_s", "notes", "images_per_s", "git_commit", "record_sha256")


def of_records(folder: Path, place: str = RUN + "/results") -> Result:
    """Every record and the rows of its curves."""
    found: Result = {}
    for path in sorted(folder.glob(f"{place}/*/*.json")):
        record = json.loads(path.read_text())
        found[path.name] = {key: value for key, value in record.items() if key not in OF_THE_TIME}
        lines = (path.parent / record["curves"]).read_text().splitlines() if record["curves"] else []
        rows = [json.loads(line).items() for line in lines]
        found["curves"] = [{k: v for k, v in row if k not in OF_THE_TIME and "time" not in k} for row in rows]
    if not found:
        raise FileNotFoundError(f"there is no record below {place}")
    return found


def of_conversion(folder: Path) -> Result:
    return {path.name: sha256_file(path) for path in sorted((folder / RUN).iterdir())}


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
    """What came of a trial: the verdict, what was done, why it is a bad one, how many files were left behind."""

    trial: Trial
    verdict: Verdict
    done: str
    reason: str = ""
    left: int = 0

    def line(self) -> dict[str, Any]:
        where = dict(zip(("work", "fault"), self.trial.row)) | {"number": self.trial.number}
        return where | {"verdict": self.verdict, "done": self.done, "reason": self.reason, "left": self.left}


@dataclass
class Known:
    """What is known of undisturbed work: how long it takes, its result, its hidden and temporary files."""

    seconds: float
    result: Result
    left: frozenset[str]
    bytes: int
    accepted: dict[str, list[Result]] = field(default_factory=dict)  # by stage


class Lab:
    """A server, and a folder in which trials are made, with the inputs and the stages that they begin from."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder, self._shared, self._known = server, folder, folder / "shared", dict[str, Known]()
        prepare(self._shared)

    def fresh(self, work: Work) -> Path:
        """An empty folder with the work's inputs."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        for name in work.prepare:
            shutil.copytree(self._shared / name, folder, dirs_exist_ok=True, copy_function=os.link)
        (folder / TEMPORARY).mkdir(parents=True)
        return folder

    def start(self, work: Work, folder: Path, command: tuple[str, ...], **fault: Any) -> list[Ended]:
        environment = {"TMPDIR": str(folder / TEMPORARY)}
        if work.ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        how = {"seconds": PATIENCE_S, "setup": work.setup, "ranks": work.ranks, "environment": environment}
        return self._server.run(Command(command, str(folder), **how, **fault))

    def learn(self, work: Work) -> float:
        """Do the work undisturbed, and stop it at each of its stages; the seconds that it took."""
        folder = self.fresh(work)
        ended = self.start(work, folder, work.command)
        if any(one.status != 0 for one in ended):
            raise SystemExit(f"{work.name} does not even work undisturbed: {ended[0].said}")
        size = sum(path.stat().st_size for path in (folder / DISK).rglob("*") if path.is_file())
        known = Known(max(one.seconds for one in ended), work.result(folder), frozenset(_hidden(folder)), size)
        self._known[work.name] = known
        for stage, when in work.stages.items():
            shutil.move(self._stopped(work, when) if when else folder, self._shared / "stages" / work.name / stage)
            known.accepted[stage] = [known.result]
            if not work.exact:
                resumed = self._copy(work, stage)
                self.start(work, resumed, work.again)
                known.accepted[stage].append(work.result(resumed))
                shutil.rmtree(resumed)
        shutil.rmtree(folder, ignore_errors=True)
        return known.seconds

    def _stopped(self, work: Work, when: dict[str, int]) -> Path:
        folder = self.fresh(work)
        ended = self.start(work, folder, work.command, kill_when=when)
        _wait_for_jobs(folder)
        if ended[0].status != -signal.SIGKILL:
            raise SystemExit(f"{work.name} was not killed where it should be ({when}): {_last(ended[0])}")
        return folder

    def _copy(self, work: Work, stage: str) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        shutil.copytree(self._shared / "stages" / work.name / stage, folder, dirs_exist_ok=True, symlinks=True)
        return folder

    def run(self, trial: Trial) -> Outcome | None:
        """None where the fault could not be had: the work was done before the kill, a disk may not be mounted."""
        # By its own seed: the same trial whatever was tried before, and in whatever order.
        chance = random.Random(f"{trial.row} {trial.number}")
        numbers = {"killed": signal.SIGKILL, "told to end": signal.SIGTERM}
        if trial.fault in numbers:  # earlier, where the machine has become faster and the work was done before
            tries = (self._killed(trial, chance, numbers[trial.fault], share) for share in (0.8, 0.4, 0.2, 0.1))
            return next((outcome for outcome in tries if outcome is not None), None)
        return self._full(trial, chance) if trial.fault == "full disk" else self._damaged(trial, chance)

    def _killed(self, trial: Trial, chance: random.Random, number: int, share: float) -> Outcome | None:
        work, known, moments = trial.work, self._known[trial.work.name], list[str]()
        folder = self.fresh(work)
        try:
            for start, command in enumerate((work.command, work.again)):
                if start and chance.random() > 0.3:  # some are killed again on their way back
                    break
                moment, rank = chance.uniform(0.02, share) * known.seconds, chance.randrange(work.ranks)
                when = {} if work.begun is None or start else {work.begun: 1}
                fault = {"kill_after_s": moment, "kill_rank": rank, "kill_signal": number, "kill_when": when}
                ended = self.start(work, folder, command, **fault)
                status = ended[rank].status
                if not start and (status == 0 or (number == signal.SIGKILL and status != -number)):
                    return None
                moments.append(f"rank {rank} after {moment:.3f} s")
                others = [one for index, one in enumerate(ended) if index != rank or number != signal.SIGKILL]
                for bad in filter(None, map(_unforeseen, others)):
                    return Outcome(trial, "LOST", f"{trial.fault} {', '.join(moments)}", f"then said: {bad}")
            done = f"{trial.fault} {', '.join(moments)}"
            return self._again(trial, folder, [known.result], done)
        finally:
            _wait_for_jobs(folder)
            shutil.rmtree(folder, ignore_errors=True)

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
            return self._again(trial, folder, [known.result], done)
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
            done = f"{path.relative_to(folder)}: {_damage(path, trial.fault, chance)}"
            return self._again(trial, folder, self._known[work.name].accepted[state.stage], done)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _again(self, trial: Trial, folder: Path, accepted: Sequence[Result], done: str) -> Outcome:
        """Start the work again, and judge it; where no file was damaged, a refusal is a loss, too."""
        work, state = trial.work, trial.state
        ended = self.start(work, folder, work.again)
        for bad in filter(None, map(_unforeseen, ended)):
            return Outcome(trial, "LOST", done, bad)
        if any(one.status for one in ended):
            return Outcome(trial, "LOST" if state is None else "refused", done, f"refused: {_last(ended[0])}")
        try:
            found = work.result(folder)
        except (OSError, ValueError, LookupError) as error:
            return Outcome(trial, "LOST", done, f"exit status 0, and no result: {error}")
        differing = [_differing(found, one, state.ignored if state else ()) for one in accepted]
        if all(differing) and (work.exact or state):
            return Outcome(trial, "SILENTLY DIFFERENT", done, differing[0])
        return Outcome(trial, "recovered", done, left=len(_hidden(folder) - self._known[work.name].left))


def _damage(path: Path, fault: str, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    path.unlink()  # it may be a link to what all trials share
    if fault == "a bit":
        data[place] ^= 1 << bit
    elif bit < 4:
        del data[(place := chance.choice((0, place, len(data) - 1))) :]
    else:  # what a disk gives back for what it never wrote
        data[place:] = bytes(len(data) - place)
    path.write_bytes(data)
    return f"{fault}: byte {place}, bit {bit}, {len(data)} bytes now"


def _unforeseen(ended: Ended) -> str:
    """Why an end is no sentence, empty for one that is."""
    if ended.out_of_time:
        return f"did not end in {PATIENCE_S:.0f} s"
    if ended.status < 0 and ended.status != -signal.SIGTERM:
        return f"ended by signal {-ended.status}"
    for words in ("Traceback (most recent call last)", "unexpected error", "memory ran out"):
        if words in ended.said:
            return _last(ended)
    return ""


def _last(ended: Ended) -> str:
    lines = [line for line in ended.said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("twist:")), lines[-1] if lines else "nothing said")


def _differing(found: Result, expected: Result, ignored: tuple[str, ...]) -> str:
    """The parts of two results that are not equal, by name; empty when all are."""
    names = sorted((found.keys() | expected.keys()).difference(ignored))
    parts = []
    for name in (name for name in names if found.get(name) != expected.get(name)):
        one, other = found.get(name), expected.get(name)
        inner = sorted(one.keys() | other.keys()) if isinstance(one, dict) and isinstance(other, dict) else ()
        differing = [
            f"{key} {other.get(key)!r} → {one.get(key)!r}"[:100] for key in inner if one.get(key) != other.get(key)
        ]
        parts += differing or [name]
    return ", ".join(parts)


def _hidden(folder: Path) -> set[str]:
    """Files that begin with a dot, and whatever lies where temporary files go."""
    disk, temporary = folder / DISK, folder / TEMPORARY
    found = {str(path.relative_to(disk)) for path in disk.rglob(".*")}
    return found | {f"tmp/{path.name}" for path in temporary.glob("*")}


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
    while time.monotonic() < end and any(map(functools.partial(_is_in, folder), Path("/proc").glob("[0-9]*/cwd"))):
        time.sleep(0.05)


def _is_in(folder: Path, process: Path) -> bool:
    with contextlib.suppress(OSError):
        return process.resolve() == folder.resolve()
    return False


# --- all of them ------------------------------------------------------------------------------------------------------


def prepare(shared: Path) -> None:
    """The inputs, each in a folder of its own: pictures and a config, an ImageNet-like tree, weights, sample, suite."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from tests.imagenet_tree import write_tree
    from tests.tiny_run import make_images, tiny_config, toml

    make_images(shared / "images" / "pictures")
    config = tiny_config(
        Path("pictures"),
        model={"teacher": True, "bunch_size": 0, "hidden_dim": 16, "classes": 12},
        optim={"name": "adamw", "lr": 0.1, "clip_norm": 3.0},
        run={"epochs": 4, "mutual_information_epochs": 2},
    )
    (shared / "images" / "tiny.toml").write_text(toml(config))
    write_tree(shared / "tree" / "tree")
    make_sample(shared / "sample" / "sample", size="tiny", progress=False)
    torch.manual_seed(0)
    header = Backbone(architecture="resnet18", method="twist")
    write_backbone(shared / "weights" / "network.safetensors", build_backbone("resnet18").state_dict(), header)
    weights = '[[weights]]\nname = "a"\nfile = "network.safetensors"\n'
    (shared / "suite").mkdir()
    (shared / "suite" / "suite.toml").write_text(f'protocols = ["sample-knn"]\nseeds = [0]\n{weights}')


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


def carry_out(chosen: Sequence[Work], trials: Sequence[Trial], *, seconds: float, log: Path, folder: Path) -> None:
    """Carry out those `trials` that are begun within `seconds`; a line of `log` is the outcome of one."""
    frameworks = not all(work.exact for work in chosen)
    with tempfile.TemporaryDirectory(prefix="faults-", dir=folder) as place, Server(frameworks=frameworks) as server:
        lab = Lab(server, Path(place))
        for work in chosen:
            print(f"  {work.name}: {lab.learn(work):.2f} s undisturbed", flush=True)
        end = time.monotonic() + seconds
        for trial in trials:
            if time.monotonic() > end:
                return
            if (outcome := lab.run(trial)) is not None:
                with log.open("a") as file:
                    file.write(json.dumps(outcome.line()) + "\n")
                if outcome.verdict in BAD:
                    print(f"  {outcome.verdict}: {outcome.trial.row[0]}, {outcome.done}: {outcome.reason}", flush=True)


COLUMNS = ("trials", "refused", "recovered", "left", *BAD)


def table(outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a work and fault, and the sum of all under them."""
    counted: dict[tuple[str, str], Counter[str]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: (outcome["work"], outcome["fault"])):
        found = {"trials": 1, outcome["verdict"]: 1, "left": int(outcome["left"] > 0)}
        counted.setdefault((outcome["work"], outcome["fault"]), Counter()).update(found)
    counted["all", "every fault"] = sum(counted.values(), Counter())
    return [{"work": w, "fault": f, **{name: counts[name] for name in COLUMNS}} for (w, f), counts in counted.items()]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ["work", "fault", "trials", "refused with a sentence", "recovered, equal", "files left", *BAD]
    cells = [[row["work"], f"`{row['fault']}`", *(str(row[name]) for name in COLUMNS)] for row in rows]
    lines = [heads, ["---"] * 2 + ["---:"] * len(COLUMNS), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    names = [work.name for work in works()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--flips", type=int, default=1005, help="flipped bits, by rounding a few less; an eighth as many torn files"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="no trial is begun after so long")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WORK", help=", ".join(names))
    parser.add_argument("--folder", type=Path, default="/dev/shm", help="where trials are made; default: in memory")
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.json", help="the table and every loss as JSON")
    given = parser.parse_args()
    chosen = [work for work in works() if work.name in given.only]
    trials = planned(chosen, kills=given.kills, flips=given.flips)
    log, code = given.output.with_suffix(".jsonl"), code_sha256(*ROOMS)
    earlier = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not earlier:
        log.write_text(json.dumps({"code": code}) + "\n")
    elif earlier[0] != {"code": code}:
        raise SystemExit(f"{log} is of other code: remove it to begin anew.")
    done = {(outcome["work"], outcome["fault"], outcome["number"]) for outcome in earlier[1:]}
    left = [trial for trial in trials if (*trial.row, trial.number) not in done]
    print(heading(f"{len(trials)} faults, {len(left)} of them to come"), flush=True)
    if left:
        begun = [work for work in chosen if any(trial.work == work for trial in left)]
        carry_out(begun, left, seconds=60 * given.minutes, log=log, folder=given.folder)
    outcomes = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    bad = [outcome for outcome in outcomes if outcome["verdict"] in BAD]
    rows = table(outcomes)
    print(f"\n{markdown(rows)}\n\n{len(outcomes)} of {len(trials)} trials")
    write(given.output, {"rows": rows, "losses": bad, "code": code})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
