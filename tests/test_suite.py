"""The suite: what it refuses, what it plans, and that it ends with every record whatever is killed in between."""

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_records import make_record
from tiny_cards import write_classes

from twist.catalog.card import find_card
from twist.catalog.card_data import open_card
from twist.contracts.config import find_config, read_toml, validate
from twist.contracts.errors import UsageError, UserError
from twist.contracts.machine import cores
from twist.contracts.record import RunRecord, find_records, read_record, write_record
from twist.transfer.protocols import PROTOCOLS
from twist.transfer.suite import launch
from twist.transfer.suite import run as suite_module
from twist.transfer.suite.config import (
    Job,
    SuiteConfig,
    Workload,
    describe_work,
    find_work,
    load_suite,
    makespan_s,
)
from twist.transfer.suite.run import run_suite, transfer_command

ROOT = Path(__file__).resolve().parent.parent
SIMPLE = """
protocols = ["sample-knn", "sample-linear"]
seeds = [0, 1]
[[weights]]
name = "random"
file = "random"
"""


def shell(script: str) -> list[str]:
    return [sys.executable, "-m", "shell_script", script]


class World:
    """A folder with a suite file and data, and `twist transfer` replaced by a shell script that copies a record."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.data = root, root / "data"
        self.results, self.output, self.file = root / "results", root / "runs", root / "suite.toml"
        self.data.mkdir()
        self.file.write_text(SIMPLE)
        # Job title → script run before the record is copied; `exit 1` there is a failed run.
        self.scripts: dict[str, str] = {}
        monkeypatch.setattr(suite_module, "transfer_command", self.command)
        monkeypatch.setattr(suite_module, "POLL_S", 0.02)
        # Runs start one by one, and find nothing imported: these need nothing.
        monkeypatch.setattr(launch, "cpu_runs_at_once", lambda: 1)
        monkeypatch.setattr(suite_module, "imported_by", lambda _: ())
        monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))

    def command(self, job: Job, weights: Path | str, *, output: Path, **_: Any) -> list[str]:
        assert weights == "random" or Path(weights).is_file()
        folder = job.folder(output)
        made = self.record(job)
        prepared = write_record(made, self.root / "prepared" / output.name / job.key)
        (prepared.parent / "picture.png").write_bytes(b"png")
        (prepared.parent / "curve.jsonl").write_text("{}\n")
        target = shlex.quote(str(folder / "record" / job.protocol))
        count = f"echo x >> {shlex.quote(str(self.root / 'starts' / job.key))}"
        copy = f"mkdir -p {target} && cp {shlex.quote(str(prepared.parent))}/* {target}"
        (self.root / "starts").mkdir(exist_ok=True)
        script = self.scripts.get(job.title, "")
        return shell(f"{count}\n{script}\necho gpus=$CUDA_VISIBLE_DEVICES\n{copy}")

    def record(self, job: Job) -> RunRecord:
        return make_record(
            job.weights.method or job.weights.name,
            job.protocol,
            seed=job.seed,
            metrics={PROTOCOLS[job.protocol].metrics[0]: 50.0},
            recipe={"overrides": list(job.overrides)},
            media=("picture.png",),
            curves="curve.jsonl",
            wall_s=1800.0,
            data=job.data,
        )

    def result(self, **others: Any) -> tuple[list[RunRecord], UserError | None]:
        where = {"results": self.results, "output": self.output, "data": self.data, "gpus": []}
        return run_suite(self.file, **{**where, **others})

    def run(self, **others: Any) -> list[RunRecord]:
        records, failure = self.result(**others)
        if failure is not None:
            raise failure
        return records

    def work(self) -> Workload:
        return find_work(load_suite(self.file, data=self.data), results=self.results)

    def described(self, **how: int) -> str:
        return describe_work(self.work(), load_suite(self.file, data=self.data), **how)

    def starts(self) -> int:
        """How many runs were started so far."""
        return sum(len(path.read_text().split()) for path in (self.root / "starts").glob("*"))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# ── Suite files ──


def test_shipped_suites_are_valid_but_for_the_files_they_ask_for(tmp_path: Path) -> None:
    suites = sorted((ROOT / "configs" / "suites").glob("*.toml"))
    assert {"paper.toml", "quick.toml", "study.toml"} <= {path.name for path in suites}
    for path in suites:
        try:
            load_suite(path, data=tmp_path)
        except UsageError as error:
            lines = str(error).splitlines()
            assert all("there is no file" in line for line in lines), lines
        assert path.read_text().startswith("# twist suite configs/suites/")
        assert find_config(Path(path.stem), "suites") == path
    text = "".join(
        (ROOT / "configs" / "suites" / name).read_text() for name in ("paper.toml", "frozen.toml", "vit.toml")
    )
    assert all(text.count(f'"{name}"') == 1 for name, row in PROTOCOLS.items() if row.scale == "full")


def test_all_errors_at_once_before_anything_starts(world: World) -> None:
    world.file.write_text(
        """
        protocols = ["sample-knm", "sample-knn", "sample-knn"]
        seeds = [0]
        overrides.sample-linear = ["lr=1"]
        [[weights]]
        name = "a"
        file = "absent.pth"
        [[weights]]
        name = "a"
        file = "random"
        """
    )
    with pytest.raises(UsageError) as caught:
        world.run(data=world.root / "nowhere", dry_run=True)
    said = str(caught.value)
    for part in (
        '"sample-knm". Did you mean "sample-knn"?', "no file absent.pth for the weights a", 'for "sample-linear"',
        "a is listed 2 times", "asked for twice, the first of them sample-knn · a · seed 0",
    ):  # fmt: skip
        assert part in said
    assert len(said.splitlines()) == 5
    world.file.write_text('protocol = ["sample-knn"]\nseeds = ["one"]\nweights = []\noverrides.sample-knn = ["lr"]\n')
    with pytest.raises(UsageError, match="unknown key protocol") as caught:
        world.run()
    assert all(part in str(caught.value) for part in ("seeds.0 = 'one'", "overrides.sample-knn.0 = 'lr'"))
    assert not world.output.exists()


def entries(*files: Path, more: str = "") -> str:
    return "".join(f'[[weights]]\nname = "{chr(97 + n)}"\nfile = "{file}"\n' for n, file in enumerate(files)) + more


@pytest.mark.parametrize(
    ("head", "runs"),
    [
        ("seeds_of.sample-knn = [2, 2]", "1 runs are asked for twice, the first of them sample-knn · a · seed 2"),
        ("grid.sample-linear = { lr = [0.1, 1, 1.0, 0.1] }", r"2 runs .* seed 0 \[lr=0.1\]"),
        (f"grid.sample-linear = {{ {', '.join(f'k{i} = {list(range(10))}' for i in range(9))} }}", "more than 20,000"),
        ("", r"4 runs are asked for twice.* sample-knn · b · seed 0 \(weights a and b"),
    ],
)
def test_runs_that_would_replace_each_other_are_refused(world: World, head: str, runs: str) -> None:
    """Of two runs with one key the second record would replace the first."""
    files = [world.root / "a.pth", *([] if head else [world.root / "copy.pth"])]
    for file in files:
        file.write_bytes(b"weights")
    plain = 'protocols = ["sample-knn", "sample-linear"]\nseeds = [0, 1]\n'
    world.file.write_text(f"{head}\n{plain}{entries(*files)}")
    with pytest.raises(UsageError, match=runs):
        world.run(dry_run=True)
    # Whatever makes another run of it makes it another entry.
    for other in ("seeds = [5]", 'method = "other"', 'overrides = ["k=5"]', 'branch = "momentum"', "epochs = 3"):
        world.file.write_text(plain + entries(files[0], files[-1], more=other))
        jobs = world.work().jobs
        assert len({job.key for job in jobs}) == len(jobs) >= 6


# ── Plan ──


def test_plan_says_what_is_done_and_how_long_the_rest_takes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for lengths, slots, expected in (([60, 20], 8, 60), ([60, 60, 60], 2, 120)):
        assert makespan_s(lengths, slots) == expected, "that of the fullest slot"
    for name, hours in (("sample-knn", None), ("sample-linear", 2.0)):
        monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(PROTOCOLS[name], hours=hours))
    text = world.described(slots=8, gpus_of_run=1)
    assert "4 runs: 0 done, 4 to run, 8 at a time, 1 GPU each; about 2.0 h for 2 of them; no time is known" in text
    write_record(make_record("twist", "sample-knn", wall_s=3 * 3600.0), world.results)
    assert "about 3.0 h for 4 of them." in world.described(slots=8, gpus_of_run=1)
    world.scripts["sample-knn · random · seed 1"] = "exit 2"
    with pytest.raises(UserError):
        world.run()
    assert [job.title for job in world.work().missing] == ["sample-knn · random · seed 1"]
    text = world.described(slots=1, gpus_of_run=0)
    assert "1/2" in text
    assert "2/2" in text
    assert "4 runs: 3 done, 1 to run, 1 at a time on the CPU" in text


def test_grids_seeds_and_overrides_make_jobs(world: World) -> None:
    world.file.write_text(
        """
        protocols = ["sample-knn", "sample-linear"]
        seeds = [0]
        seeds_of.sample-linear = [3, 4]
        overrides.sample-linear = ["epochs=5"]
        grid.sample-linear = { lr = [0.1, 1], "head.kind" = ["mlp"] }
        [[weights]]
        name = "random"
        file = "random"
        overrides = ["architecture=resnet18"]
        [[weights]]
        name = "other"
        file = "random"
        seeds = [7]
        """
    )
    jobs = world.work().jobs
    linear = [job for job in jobs if job.protocol == "sample-linear" and job.weights.name == "random"]
    assert [(job.seed, job.overrides) for job in linear[:2]] == [
        (3, ("epochs=5", "architecture=resnet18", "lr=0.1", 'head.kind="mlp"')),
        (3, ("epochs=5", "architecture=resnet18", "lr=1", 'head.kind="mlp"')),
    ]
    assert linear[0].title == 'sample-linear · random · seed 3 [lr=0.1, head.kind="mlp"]', (
        "what tells it from the others"
    )
    assert {job.seed for job in jobs if job.weights.name == "other"} == {7}
    assert len({job.key for job in jobs}) == len(jobs) == 5 + 3


def test_each_protocol_has_its_card_and_weights_run_under_the_protocols_they_name(world: World) -> None:
    nests, birds = write_classes(world.root / "nests"), write_classes(world.root / "birds", count=3)
    world.file.write_text(
        f"""
        protocols = ["sample-knn", "sample-linear"]
        seeds = [0]
        data = {{ sample-knn = "{nests}", sample-linear = "{birds.parent}" }}
        [[weights]]
        name = "random"
        file = "random"
        [[weights]]
        name = "other"
        file = "random"
        method = "other"
        protocols = ["sample-knn"]
        """
    )
    suite = load_suite(world.file, data=None)  # no --data: every protocol has its own
    jobs = find_work(suite, results=world.results).jobs
    assert [(job.protocol, job.weights.name) for job in jobs] == [
        ("sample-knn", "random"), ("sample-knn", "other"), ("sample-linear", "random"),
    ]  # fmt: skip
    assert jobs[0].data == open_card(find_card(nests), "classification").name
    assert jobs[0].data != jobs[2].data
    command = transfer_command(jobs[2], "random", gpus=0, output=world.output)
    assert command[:5] == [sys.executable, "-m", "twist", "transfer", "sample-linear"]
    typed = " ".join(command)
    for option in (f"--data {birds.parent}", "--weights random", "--seed 0", "--gpus 0", "--output", "--resume"):
        assert option in typed
    world.file.write_text(world.file.read_text().replace('protocols = ["sample-knn"]', 'protocols = ["knn"]'))
    with pytest.raises(UsageError, match=r'protocols of other are given for "knn"'):
        load_suite(world.file, data=None)


# ── Running ──


def test_every_job_gets_its_record_and_none_is_run_again(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.results / "benchmarks").mkdir(parents=True)
    (world.results / "benchmarks" / "lars.json").write_text('{"speedup": 4.0}')  # no record
    assert world.run(dry_run=True) == []
    assert "4 runs: 0 done, 4 to run" in capsys.readouterr().out
    assert not world.output.exists()
    first = world.run()
    assert [(record.protocol, record.seed) for record in first] == [
        (protocol, seed) for protocol in ("sample-knn", "sample-linear") for seed in (0, 1)
    ]
    assert len(list(find_records([world.results]))) == 4
    # What is done is known without the run folders, and wherever the data lie.
    shutil.rmtree(world.output)
    world.data = world.data.rename(world.root / "moved")
    assert world.run() == first
    assert world.starts() == 4
    # A record that is removed is made again.
    next(find_records([world.results])).unlink()
    world.run()
    assert world.starts() == 5


def describe(root: Path, *, seed: int) -> Path:
    """`root` with the sample.json of a sample of that seed; no run here reads an image."""
    root.mkdir(exist_ok=True)
    settings = {"format_version": 2, "source": "photos", "size": "small", "seed": seed, "classes": ["a"]}
    (root / "sample.json").write_text(json.dumps(settings))
    return root


def test_what_was_measured_on_other_data_is_never_shown_for_these(world: World) -> None:
    describe(world.data, seed=0)
    assert len(world.run()) == 4
    other = describe(world.root / "other", seed=7)
    with pytest.raises(UserError, match=r"results holds sample-knn .* other data .* seed 0, .* seed 7, .*--output"):
        world.run(data=other)
    # Nor where only the run folders know of it.
    with pytest.raises(UserError, match=r"sample-knn/random-seed0-\w+/record holds .* measured on other data"):
        world.run(data=other, results=world.root / "empty", dry_run=True)
    assert world.starts() == 4
    # The remedy is one, and records of both side by side are told apart.
    assert len(world.run(data=other, output=world.root / "runs-2", results=world.root / "results-2")) == 4
    assert world.starts() == 8


@pytest.mark.parametrize(
    ("suite_file", "folder", "data_seed"),
    [
        ("configs/suites/study.toml", "study", 1),
        ("configs/suites/study-longer.toml", "study-longer", 1),
        ("configs/suites/photos.toml", "photos", 0),
        ("benchmarks/fashion_mnist/suite.toml", "fashion-mnist", None),
        ("configs/suites/real.toml", "real", None),
        ("configs/suites/real-frozen.toml", "real-frozen", None),
    ],
)
def test_committed_records_are_those_of_their_suites(
    suite_file: str, folder: str, data_seed: int | None, tmp_path: Path
) -> None:
    """Random initialisations, whose keys need no file; the keys, and the data, are what they were."""
    values = read_toml(ROOT / suite_file)
    values["weights"] = [entry for entry in values["weights"] if entry["file"] == "random"]
    values["data"] = dict.fromkeys(values["protocols"], str(tmp_path))
    suite = validate(values, SuiteConfig, where=suite_file)
    if data_seed is not None:
        describe(tmp_path, seed=data_seed)
    work = find_work(suite, results=ROOT / "results" / folder)
    assert work.jobs
    assert work.missing == []
    if data_seed is not None:
        describe(tmp_path, seed=data_seed + 1)
        with pytest.raises(UserError, match="measured on other data"):
            find_work(suite, results=ROOT / "results" / folder)


def test_pictures_curves_and_the_key_of_the_job_come_with_the_record(world: World) -> None:
    world.run()
    paths = list(find_records([world.results]))
    for path in paths:
        record = read_record(path)
        assert record.curves is not None
        assert all((path.parent / name).is_file() for name in (*record.media, record.curves))
        assert record.notes == ()
    jobs = world.work().jobs
    assert {read_record(path).job for path in paths} == {job.key for job in jobs}
    # Earlier versions wrote the key into a sentence.
    for path in paths:
        record = read_record(path)
        note = f"Run by a suite as job {record.job}."
        write_record(record.model_copy(update={"job": None, "notes": ("another", note)}), world.results)
    assert world.work().missing == []


@pytest.mark.parametrize(
    ("script", "starts", "said"),
    [
        ("[ -e {flag} ] || {{ touch {flag}; echo Boom; exit 1; }}", 5, "trying once more: Boom"),
        ("exit 2", 4, "failed"),  # wrong usage
        ("exit 0", 5, "failed"),  # a run that leaves no record has failed whatever its status
    ],
)
def test_a_run_that_fails_is_tried_once_more_and_ends_alone(
    world: World, script: str, starts: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    title, crashes_once = "sample-knn · random · seed 0", "flag" in script
    world.scripts[title] = script.format(flag=world.root / "flag")
    records, failure = world.result()
    assert world.starts() == starts
    assert said in capsys.readouterr().err
    paths = list(find_records([world.results]))
    assert [record.run_name for record in records] == [read_record(path).run_name for path in paths]
    assert len(paths) == 3 + crashes_once
    if not crashes_once:
        assert str(failure).startswith(f"1 of 4 runs failed: {title} (")
        assert f"log-{starts - 3}.txt" in str(failure)


def test_a_full_disk_is_one_sentence_and_stops_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("twist.transfer.end.shutil.copyfile", full)
        with pytest.raises(UserError, match=r"cannot write under .* \(No space left on device\): make room"):
            world.run()
    assert len(world.run()) == 4


@pytest.mark.parametrize(
    ("visible", "gpus", "size", "sets"),
    [
        (None, [4, 6], 1, [["4"], ["6"]]),
        ("4,5", None, 1, [["4"], ["5"]]),
        ("7, GPU-aa,5", [1, 2], 1, [["GPU-aa"], ["5"]]),
        ("7,6,5,4", [0, 1, 2, 3], 2, [["7", "6"], ["5", "4"]]),
        ("4,5,-1,6", [2], 1, "shows 2 GPUs"),
        ("", [2], 1, "shows 0 GPUs"),
        ("", [0, 1], 4, "wants 4 GPUs a run and 2 are"),
    ],
)
def test_runs_share_the_gpus_that_the_caller_has(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: list[int] | None, size: int, sets: Any
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UsageError, match=sets) if isinstance(sets, str) else contextlib.nullcontext():
        assert launch.gpu_sets(gpus, size=size) == sets


def test_a_run_sees_its_own_gpus(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4")
    world.file.write_text("gpus_per_run = 2\n" + SIMPLE)
    world.run(gpus=[0, 1, 2, 3])
    assert {path.read_text().strip() for path in world.output.rglob("log-1.txt")} == {"gpus=7,6", "gpus=5,4"}


def test_runs_on_cpus_share_the_cores_and_are_forked_from_one_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "cpu_runs_at_once", lambda: 2)
    asks = "echo $(nproc) $PPID $(cut -d ' ' -f 4 /proc/$$/stat)"
    world.scripts |= {job.title: asks for job in world.work().jobs}
    world.run()
    said = [path.read_text().split()[:2] for path in world.output.rglob("log-1.txt")]
    assert len(said) == 4
    assert {int(cores) for cores, _ in said} <= {max(cores() // 2, 1), -(-cores() // 2)}
    assert len({parent for _, parent in said}) == 1
    assert str(os.getpid()) not in {parent for _, parent in said}


def test_features_go_when_no_run_wants_them_any_more(world: World) -> None:
    world.file.write_text(SIMPLE + '[[weights]]\nname = "other"\nfile = "random"\nseeds = [7]\n')
    shared = world.output / "shared"
    for job in world.work().jobs:
        finds = f"test ! -e {shared}/random/features || exit 1\n" if job.weights.name == "other" else ""
        world.scripts[job.title] = (
            f"{finds}mkdir -p {shared}/{job.weights.name}/features {shared}/{job.weights.name}/mmseg"
        )
    assert len(world.run()) == 6
    assert world.starts() == 6, "weights after weights"
    assert sorted(str(path.relative_to(shared)) for path in shared.glob("*/*")) == ["other/mmseg", "random/mmseg"]


def test_a_run_that_outlived_its_suite_is_waited_for(world: World) -> None:
    job = world.work().jobs[0]
    folder = job.folder(world.output)
    folder.mkdir(parents=True)
    lock = os.open(folder / ".suite-lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)

    def finish() -> None:
        # What the orphan does while the new suite looks on: its record, then its death.
        write_record(world.record(job).model_copy(update={"media": (), "curves": None}), folder / "record")
        os.close(lock)

    timer = threading.Timer(0.5, finish)
    timer.start()
    records = world.run()
    timer.join()
    assert len(records) == 4
    assert world.starts() == 3


def test_an_interrupted_suite_stops_its_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = world.root / "pids"
    world.scripts["sample-knn · random · seed 0"] = f"sleep 60 & echo $$ $! > {pids}; wait"

    def interrupt(_: float) -> None:
        while not pids.exists() or not pids.read_text().strip():
            time_sleep(0.01)
        raise KeyboardInterrupt

    time_sleep = time.sleep
    monkeypatch.setattr(suite_module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    monkeypatch.undo()
    until(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))


def until(ready: Callable[[], object]) -> None:
    for _ in range(500):
        if ready():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_suite_that_is_killed_leaves_a_run_that_keeps_its_lock(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from twist.transfer.suite.launch import LocalLauncher\n"
        f"folder, launcher = Path({str(tmp_path)!r}), LocalLauncher([])\n"
        f"launcher.start({shell('echo $$; sleep 60')!r}, log=folder / 'log', slot=0)\n"
        "time.sleep(60)"
    )
    log, environment = tmp_path / "log", {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment) as parent:
        until(lambda: log.exists() and log.read_text().endswith("\n"))
        child = int(log.read_text())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    launcher = launch.LocalLauncher([])
    assert launcher.claim(tmp_path) is None
    os.killpg(child, signal.SIGKILL)
    until(lambda: launcher.claim(tmp_path))


# ── Weights and SLURM ──


@pytest.mark.slow
def test_each_file_is_converted_once_with_what_the_suite_says(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    torch = pytest.importorskip("torch")
    from twist.contracts.weights import Backbone, read_header

    calls = []

    def load(
        checkpoint: Path, *, layout: str | None = None, branch: str | None = None, heads: int | None = None
    ) -> Any:
        assert heads is None
        calls.append((checkpoint.name, layout, branch))
        return {"conv1.weight": torch.zeros(2)}, Backbone(architecture="resnet18", method="unknown")

    read = type(sys)("twist.converters.read")
    read.load_artefact = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "twist.converters.read", read)
    checkpoint = world.root / "moco.pth"
    checkpoint.write_bytes(b"weights")
    entry = f'[[weights]]\nname = "moco"\nfile = "{checkpoint}"\nlayout = "moco"\nmethod = "moco-v2"\nepochs = 200\n'
    world.file.write_text(SIMPLE + entry)
    assert len(world.run()) == 8
    assert calls == [("moco.pth", "moco", None)]
    (artefact,) = (world.output / "weights").glob("*/moco.safetensors")
    header = read_header(artefact)
    assert (header.method, header.epochs, header.source_sha256 is not None) == ("moco-v2", 200, True)
    # A damaged artefact is made again, and said to be, when it is wanted again; a whole one is not.
    whole = artefact.read_bytes()
    for content, made in ((whole, 1), (whole[:-1] + b"!", 2)):
        shutil.rmtree(world.results)
        for run in world.output.glob("sample-*"):
            shutil.rmtree(run)
        artefact.write_bytes(content)
        world.run()
        assert (len(calls), artefact.read_bytes()) == (made, whole)
        assert ("moco.safetensors is not valid (size or SHA-256" in capsys.readouterr().err) == (made == 2)


def test_slurm_is_refused_where_there_is_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no SLURM here"):
        world.run(executor="slurm")


def test_a_dry_run_prints_each_jobs_script(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    (world.root / "bin").mkdir()
    (world.root / "bin" / "srun").touch(0o755)
    monkeypatch.setenv("PATH", str(world.root / "bin"), prepend=os.pathsep)
    options = "slurm = { partition = 'big', account = 'us', cpus = 4, timeout_min = 90, slurm_mem = '8GB' }"
    world.file.write_text(f"{options}\n{SIMPLE}")
    assert world.run(executor="slurm", dry_run=True) == []
    scripts = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert len(scripts) == 4
    for line in ("partition=big", "account=us", "cpus-per-task=4", "time=90", "mem=8GB", "gpus-per-node=1"):
        assert all(f"#SBATCH --{line}\n" in script for script in scripts), line
    names = {re.findall(r"--job-name=(\S+)", script)[0] for script in scripts}
    assert names == {job.folder(world.output).name for job in world.work().jobs}
    assert not world.output.exists()


class Cluster:
    """submitit and SLURM: jobs are processes of this machine that no suite owns, found by number by any of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: dict[str, subprocess.Popen[bytes]] = {}
        self.cancelled: list[str] = []
        submitit = pytest.importorskip("submitit")
        monkeypatch.setattr(launch, "slurm_executor", lambda _: self)
        monkeypatch.setattr(submitit, "SlurmJob", lambda *, job_id, **_: self.job(job_id))

    def update_parameters(self, **_: Any) -> None:
        pass

    def submit(self, command: launch.SlurmCommand) -> SimpleNamespace:
        number = str(101 + len(self.jobs))
        self.jobs[number] = subprocess.Popen(command.command)
        return self.job(number)

    def job(self, number: str) -> SimpleNamespace:
        process = self.jobs[number]

        def cancel() -> None:
            self.cancelled.append(number)
            process.kill()

        return SimpleNamespace(
            job_id=number,
            done=lambda: process.poll() is not None,
            exception=lambda: None,
            result=process.wait,
            cancel=cancel,
        )


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt(), UserError("no room")])
def test_slurm_jobs_outlive_their_suite(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stopped_by: BaseException
) -> None:
    cluster = Cluster(monkeypatch)
    go = world.root / "go"
    for protocol in ("sample-knn", "sample-linear"):
        world.scripts[f"{protocol} · random · seed 0"] = f"while [ ! -e {go} ]; do sleep 0.02; done"
    world.file.write_text(SIMPLE.replace("[0, 1]", "[0]"))

    def stop(_: float) -> None:
        raise stopped_by

    try:
        with monkeypatch.context() as patched:
            patched.setattr(suite_module.time, "sleep", stop)
            with pytest.raises(type(stopped_by)):
                world.run(executor="slurm")
        assert cluster.cancelled == []
        assert all(process.poll() is None for process in cluster.jobs.values())
        assert "SLURM jobs go on without the suite" in (said := capsys.readouterr().err)
        assert "`scancel 101 102`" in said
    finally:
        go.touch()
    # The next one waits for them, queues nothing, and takes their records.
    assert len(world.run(executor="slurm")) == 2
    assert list(cluster.jobs) == ["101", "102"]
    assert world.starts() == 2


def test_a_second_interruption_leaves_no_local_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two runs ignores TERM; Ctrl-C while it is waited for ends both."""
    launcher, running = launch.LocalLauncher([["0"], ["1"]]), []
    for slot in (0, 1):
        folder = tmp_path / str(slot)
        script = shell("trap '' TERM; echo ready; while :; do sleep 0.05; done")
        folder.mkdir()
        running.append(launcher.start(script, log=folder / "log", slot=slot))
        until(lambda folder=folder: (folder / "log").exists() and (folder / "log").read_text())
    processes = multiprocessing.active_children()
    join = BaseProcess.join

    def interrupted(process: BaseProcess, timeout: float | None = None) -> None:
        if timeout is not None:
            raise KeyboardInterrupt
        join(process)

    monkeypatch.setattr(BaseProcess, "join", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            suite_module.leave(running)
        monkeypatch.undo()
        for process in processes:
            process.join(10)
        assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
    finally:
        for process in processes:
            process.kill()


def test_a_run_that_is_starting_when_the_suite_is_told_to_end_is_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[None] = []

    def start(*_: Any, **__: Any) -> launch.Run:
        signal.raise_signal(signal.SIGINT)
        return launch.Run(lambda: None, lambda: left.append(None))

    monkeypatch.setattr(launch.LocalLauncher, "start", start)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert left == [None]


def test_a_preempted_slurm_job_queues_the_same_command(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    command = launch.SlurmCommand(["true"], tmp_path / "log")
    assert command.checkpoint().function is command
    assert command() == 0


# ── Ray ──


@pytest.mark.slow
def test_tasks_of_ray_on_this_machine(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at a time; one fails once, one always; Ctrl-C stops what runs, which had time to save."""
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
    monkeypatch.setattr(launch, "cpu_runs_at_once", lambda: 2)
    world.file.write_text("ray = { num_cpus = 1, max_retries = 0 }\n" + SIMPLE.replace("[0, 1]", "[0]"))
    knn, linear, flag = "sample-knn · random · seed 0", "sample-linear · random · seed 0", world.root / "flag"
    saved, began = world.root / "saved", world.root / "began"
    world.scripts[linear] = "echo out of memory; exit 3"
    world.scripts[knn] = f"trap 'touch {saved}; exit 1' TERM; touch {began}; while :; do sleep 0.05; done"

    def stop(_: float) -> None:
        if began.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(suite_module.time, "sleep", stop)
        with pytest.raises(KeyboardInterrupt):
            world.run(executor="ray")
    assert saved.exists()
    ray.shutdown()  # as the end of the process does
    capsys.readouterr()
    world.scripts[knn] = f"[ -e {flag} ] || {{ touch {flag}; exit 1; }}"
    records, failure = world.result(executor="ray")
    assert [record.protocol for record in records] == ["sample-knn"]
    assert "out of memory" in str(failure)
    assert f"failed   {knn}, trying once more" in capsys.readouterr().err
    ray.shutdown()


# ── What a person sees ──


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_runs_and_keeps_what_happened(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.file.write_text('grid.sample-knn = { "views.size" = [32] }\n' + SIMPLE.replace("[0, 1]", "[0]"))
    knn, flag = "sample-knn · random · seed 0 [views.size=32]", world.root / "flag"
    world.scripts[knn] = f"echo k-NN: 3/10 images; sleep 0.3; [ -e {flag} ] || {{ touch {flag}; exit 1; }}"
    world.scripts["sample-linear · random · seed 0"] = "echo out of memory; exit 2"
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(sys, "stderr", Terminal())
    world.result()
    sent = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", sent)]
    table = [line for line in lines if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 110
    # A run with the last line of its log, and what an override has in square brackets is no markup.
    assert any(knn in line and "k-NN: 3/10 images" in line for line in table)
    assert any("(second try)" in line for line in table)
    said = [line for line in lines if line.startswith("[")]
    assert f"[0/2] failed   {knn}, trying once more: k-NN: 3/10 images" in said
    assert any(line.endswith("failed   sample-linear · random · seed 0: out of memory") for line in said)
    assert said[-1].startswith("[2/2] ")
