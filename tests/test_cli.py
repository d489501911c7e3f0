"""The command line: it answers without torch, and a user's mistake is one sentence with an exit status."""

import contextlib
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from imagenet_tree import write_tree
from tiny_run import make_images

from twist import cli, doctor
from twist.contracts import errors
from twist.contracts.networks import build_backbone
from twist.contracts.run_folder import try_lock
from twist.contracts.weights import Backbone, write_backbone

ROOT = Path(__file__).resolve().parent.parent
SMOKE = str(ROOT / "configs" / "pretrain" / "smoke.toml")


def twist(*arguments: str | Path) -> SimpleNamespace:
    """`twist` in this process, which spares each call the seconds in which torch is imported."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["twist", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return SimpleNamespace(returncode=ended.value.code, stdout=out.getvalue(), stderr=err.getvalue())


def test_help_names_every_stage_and_imports_no_torch() -> None:
    code = "import sys; from twist.cli import app; app(['-h'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("pretrain", "inspect", "convert", "transfer", "data", "suite", "compare", "doctor", "demo"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["nonsense"], 2, "No such command"),
        (["pretrain", "smoke", "--output", ""], 2, '--output is empty (""): give a value'),
        (["transfer", "sample-knn", "--weights", "random", "--results="], 2, "--results is empty"),
        (["compare", ""], 2, "One of the arguments is empty"),
        (["pretrain"], 2, "Missing argument"),
        (["pretrain", "absent.toml"], 2, "There is no config at absent.toml"),
        (["convert"], 2, "Say what to convert and for whom"),
        (["pretrain", "smokey"], 2, 'Did you mean "smoke"?'),
        (["pretrain", "smoke", "run.seed=-1"], 2, "run.seed = -1 does not fit"),
        (["pretrain", "configs.toml"], 2, "configs.toml cannot be read (it is a folder): name the config file"),
        (["pretrain", SMOKE, "data.root=images", "--output", "file"], 1, "file cannot be used (File exists)"),
        (["transfer", "knn", "--weights", "random", "--seed", "-3"], 2, "--seed"),
        (["compare", "--picture", "views.png"], 2, "--picture views.png: write a caption and a file"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str], status: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "images")
    for folder in ("configs.toml", "smoke"):  # a folder of that name does not hide our config `smoke`
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    done = twist(*arguments)
    assert (tmp_path / "file").read_text() == "mine"
    assert done.returncode == status
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_data_sets_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    suite = tmp_path / "suite.toml"
    suite.write_text('protocols = ["sample-knn"]\n[[weights]]\nname = "random"\nfile = "random"\n')
    commands = (["data", "check", "coco"], ["data", "prepare", "voc", "sbd=x/y"], ["suite", suite, "--dry-run"])
    assert all("set DETECTRON2_DATASETS" in twist(*command).stderr for command in commands)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    check, prepare, plan = (twist(*command) for command in commands)
    assert f"{tmp_path / 'coco'}" in check.stdout
    assert "x/y" in prepare.stderr or "Pascal VOC comes from" in prepare.stderr, "past the root"
    assert "3 runs: 0 done, 3 to run" in plan.stdout


def test_commands_answer_in_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("torch", "absent", "make install", broken=True)])
    for arguments, status, first in (
        (["doctor"], 1, {"name": "torch", "found": "absent", "remedy": "make install", "broken": True}),
        (["transfer", "--list", "knn"], 0, {"name": "knn", "data": ["imagenet"], "gpus": 1}),
        (["data", "check", "coco", tmp_path], 1, {"severity": "error", "message": "is missing"}),
    ):
        done = twist(*arguments, "--json")
        row = json.loads(done.stdout)[0]
        assert (done.returncode, {key: row[key] for key in first}) == (status, first)
    assert {row["name"] for row in json.loads(twist("transfer", "--list", "vit", "full", "--json").stdout)} > {"knn"}


def test_quiet_shows_no_progress_and_no_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TWIST_QUIET", "")  # what `-q` sets is taken back
    assert "100%" in (loud := twist("data", "check", "coco", tmp_path).stderr) or "file" in loud
    quiet = twist("-q", "data", "check", "coco", tmp_path)
    assert (quiet.stderr, "is missing" in quiet.stdout) == ("", True)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWIST_DEBUG", "")  # what `--debug` sets is taken back
    plain = twist("pretrain", "absent.toml")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("twist: There is no config at absent.toml")
    with pytest.raises(errors.UsageError, match="no config at absent"):
        twist("--debug", "pretrain", "absent.toml")


@pytest.mark.slow  # imports both frameworks
def test_doctor_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = doctor.examine()
    assert not any(check.broken for check in whole), doctor.render(whole)
    assert "ray" in {check.name for check in whole}
    there = importlib.util.find_spec
    absent = ("timm", "detectron2", "datasets")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in absent else there(name))
    monkeypatch.setattr(doctor, "_fault", lambda module: "ImportError: x" if module == "scipy" else "")
    said = {check.name: check for check in doctor.examine()}
    assert {name for name, check in said.items() if check.broken} == {"convert", "pretrain", "transfer", "compare"}
    assert (said["pretrain"].remedy, said["hub"].remedy) == ("make install", "make install")
    assert "scipy: ImportError: x" in said["compare"].found
    # Installed, there is no make, and an extra that was not asked for is not broken.
    monkeypatch.setattr(doctor, "CLONE", None)
    said = {check.name: check for check in doctor.examine()}
    assert {name for name, check in said.items() if check.broken} == {"transfer", "compare"}, (
        "what is there, but broken"
    )
    assert said["convert"].remedy == 'pip install "twist-suite[convert]"'
    assert said["Detectron2"].remedy == f'pip install "{ROOT / "third_party" / "detectron2"}"'


def test_a_missing_package_is_a_sentence_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name in ("timm", "detectron2") else real(name))
    commands = {"inspect absent.pth": "convert", "transfer sample-knn --weights absent.pth": "transfer"}
    for command, extra in commands.items():
        done, remedy = twist(*command.split()), f'pip install "twist-suite[{extra}]"'
        assert (done.returncode, done.stderr) == (1, f"twist: timm is not installed: {remedy}\n")
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "detectron2" else real(name))
    done = twist("transfer", "sample-voc-frcnn-fpn", "--weights", "absent.pth")
    folder = ROOT / "third_party" / "detectron2"
    assert (done.returncode, done.stderr) == (1, f'twist: detectron2 is not installed: pip install "{folder}"\n')
    # A package that only a part of a command needs.
    lacking = errors.missing_package(ModuleNotFoundError("No module named 'mmseg'", name="mmseg.apis"))
    assert str(lacking) == 'mmseg is not installed: pip install "twist-suite[transfer]"'
    assert errors.missing_package(ModuleNotFoundError("no such thing", name="nonsense")) is None
    assert errors.missing_package(ImportError("cannot import name")) is None


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with a tree of images, a network, a suite and room for temporary files."""
    (tmp_path / "disk").mkdir()
    write_tree(tmp_path / "tree")
    network = build_backbone("resnet50").state_dict()
    write_backbone(tmp_path / "network.safetensors", network, Backbone(architecture="resnet50", method="twist"))
    (tmp_path / "suite.toml").write_text('protocols = ["sample-knn"]\n[[weights]]\nname = "random"\nfile = "random"\n')
    return tmp_path


def started(command: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """`command` in `folder`, whose folder `disk` is for temporary files."""
    environment = {**os.environ, "TMPDIR": str(folder / "disk"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "twist", *command.split()]
    return subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow  # processes that import torch
@pytest.mark.parametrize(
    ("command", "begun"),
    [
        ("convert network.safetensors --to timm --output out", ".out.*"),
        ("suite suite.toml --data tree --output out", "out/*/*/log-1.txt"),
    ],
)
def test_sigterm_leaves_nothing_behind_and_ends_a_suites_runs(command: str, begun: str, inputs: Path) -> None:
    with started(command, inputs) as process:
        while process.poll() is None and not list(inputs.glob(begun)):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as `timeout` does
        _, said = process.communicate()
    assert process.returncode == 143, said
    assert "Stopped." in said
    assert "Traceback" not in said
    assert not [path for path in inputs.rglob(".*") if path.name != ".suite-lock"]
    assert not [path for path in (inputs / "disk").iterdir() if not path.name.startswith("torchinductor")]
    for lock in inputs.rglob(".suite-lock"):
        before = time.monotonic()
        while (descriptor := try_lock(lock, inherited=True)) is None:  # data workers of a killed run may still end
            assert time.monotonic() < before + 20, "a run of the suite is still there"
        os.close(descriptor)


@pytest.mark.slow  # processes that import torch
@pytest.mark.parametrize(
    ("command", "kib"),
    [
        ("convert network.safetensors --to timm --output disk/out", 60_000),
        ("pretrain smoke data.root=tree/train run.batch_size=8 --output disk/run", 40),
        ("transfer sample-knn --weights random --data tree --output disk/run", 60),
    ],
)
def test_a_full_disk_is_one_sentence(command: str, kib: int, inputs: Path) -> None:
    disk, size = inputs / "disk", kib * 1024
    mount = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    limit = None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        with started(command, inputs, preexec_fn=limit) as process:
            _, said = process.communicate()
        assert not list(disk.rglob(".*"))
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    assert process.returncode == 1, said
    assert re.search(r"twist: The disk is full \(.*free some space .* with --resume\)", said), said
    assert "Traceback" not in said
