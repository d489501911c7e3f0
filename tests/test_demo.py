"""The whole mission in one run through both frameworks: `twist demo --fast`, as a user starts it."""

import importlib
import inspect
import json
import os
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twist import demo
from twist.cli import app
from twist.contracts import machine
from twist.contracts.record import find_records, read_record
from twist.contracts.weights import read_header
from twist.demo import CONFIG, PROTOCOLS

# Where each command of the demo does its work.
WORKERS = (
    ("twist.catalog.sample.make", "make_sample"),
    ("twist.pretrain.data.preview", "contact_sheet"),
    ("twist.pretrain.train", "pretrain"),
    ("twist.converters.convert", "convert"),
    ("twist.transfer.run", "transfer"),
    ("twist.comparing", "compare"),
)


def run_demo(output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "twist", "demo", "--fast", "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(("fast", "here"), [(True, "repository"), (False, "elsewhere")])
def test_what_the_demo_prints_is_what_it_does(
    fast: bool, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every printed line, pasted into a shell in the same folder, makes the call that the demo made, value by value."""
    pytest.importorskip("torch")
    calls: list[tuple[str, dict[str, Any]]] = []
    for module, name in WORKERS:
        replace_by_recorder(monkeypatch, module, name, calls)
    monkeypatch.setattr(demo, "_print_results", lambda *_, **__: None)
    monkeypatch.setattr("twist.converters.convert.conversion_text", lambda _: "")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path if here == "elsewhere" else CONFIG.parent.parent.parent)
    # A name that a shell would take apart, and that TOML would cut at its comment.
    output = tmp_path / 'my "demo" # 1' if here == "repository" else Path("demo")

    demo.run_demo(output, twist=partial(app, standalone_mode=False), fast=fast)
    made, lines = list(calls), capsys.readouterr().err.splitlines()
    commands = [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ ")]
    assert len(commands) == len(made) == 18

    calls.clear()
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "twist"
        app(arguments, standalone_mode=False)
    assert calls == made

    by_name = {name: values for name, values in made if name != "transfer"}
    assert by_name["make_sample"]["size"] == ("tiny" if fast else "small")
    assert by_name["contact_sheet"]["path"] == output / "views.png"
    for name in ("contact_sheet", "pretrain"):
        config = by_name[name]["config"]
        assert Path(config.data.root) == output / "sample" / "unlabelled"
        assert config.run.epochs == (2 if fast else 20)
    shorter = [values["options"]["overrides"] for name, values in made if name == "transfer"]
    assert sum(list(one) == ["iterations=8"] for one in shorter) == (6 if fast else 0)
    config_file = shlex.split(commands[1])[2]
    assert Path(config_file).is_file()
    assert Path(config_file).is_absolute() is (here == "elsewhere")


def replace_by_recorder(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    signature = inspect.signature(getattr(importlib.import_module(module), name))

    def record(*positional: Any, **named: Any) -> Any:
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        calls.append((name, bound.arguments))
        return SimpleNamespace(summary=lambda: "")

    monkeypatch.setattr(f"{module}.{name}", record)


@pytest.mark.parametrize(("bf16", "minutes"), [(True, 10), (False, 14)])
def test_the_estimate_follows_the_processor(
    bf16: bool, minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: bf16)
    steps = demo.plan_steps(tmp_path, fast=False)
    assert round(sum(step.expected_s for step in steps) / 60) == minutes


def test_a_slow_step_is_never_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody sees a bar, a line comes each `every_s` (half a minute in the program), whatever the step does."""
    steps = [demo.Step("slow", ("data",), 0.2), demo.Step("other", ("data",), 60.0)]
    display = demo.Display(steps, scale=1.0, every_s=0.05)
    with display.step(steps[0], "1/2"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert sum("left in all" in line for line in lines) >= 4
    assert "done in" in lines[-1]
    assert demo.Display(steps, scale=1.0).every_s <= 60


def test_what_an_earlier_demo_did_says_nothing_of_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [demo.Step("done before", ("data",), 100.0), demo.Step("other", ("data",), 90.0)]
    display = demo.Display(steps, scale=1.0)
    for step in steps:
        with display.step(step, "1/2"):
            pass
    assert "other   (about 1 min 30 s left)" in capsys.readouterr().err


@pytest.mark.readme
def test_demo_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    done = run_demo(output)
    assert done.returncode == 0, done.stderr

    header = read_header(output / "pretrain" / "backbone.safetensors")
    assert (header.method, header.architecture) == ("twist", "resnet18")
    assert (output / "pretrain" / "curves.png").is_file()
    for target in ("detectron2", "mmseg"):
        proof = json.loads((output / f"weights-{target}" / "report.json").read_text())["proof"]
        assert proof["kind"] == "framework", target
        assert 0 <= proof["max_difference"] < 1e-5, target

    records = [read_record(path) for path in find_records([output / "results"])]
    assert {(r.protocol, r.method) for r in records} == {(p, m) for p in PROTOCOLS for m in ("twist", "random")}
    for protocol in PROTOCOLS:
        # The same recipe for both, or they could not stand in one column.
        assert len({r.recipe_hash for r in records if r.protocol == protocol}) == 1, protocol
    assert all(r.scale == "sample" for r in records)
    assert {r.weights.sha256 for r in records if r.method == "random"} == {None}

    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 8
    assert "https://" not in page.split("<body")[0]
    assert "box AP50" in done.stdout
    assert "To do it for real" in done.stdout

    # A second start would repeat nothing of these; sample and pretraining are whole or go on by themselves.
    assert all(
        step.done() for step in demo.plan_steps(output, fast=True) if step.arguments[0] in ("convert", "transfer")
    )
