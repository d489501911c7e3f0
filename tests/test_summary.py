"""The README's table of speed comes from the files of the benchmark programs, and says what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import summary

MACHINE = {"hardware": {"processor": "P", "cores": 2, "gpu": None}, "software": {"torch": "2"}}
GPU = {"hardware": {"processor": "P", "cores": 16, "gpu": "G"}, "software": {"torch": "2"}}


def times(**medians: float) -> dict[str, dict[str, float]]:
    return {
        name.replace("_", " "): {"median_s": s, "least_s": 0.9 * s, "most_s": 1.1 * s, "n": 5}
        for name, s in medians.items()
    }


def rows(folder: Path, program: str) -> list[str]:
    return [line for line in summary.render(folder).splitlines() if line.endswith(f"| {program} |")]


def step(*, ours: float, compiled: bool, skipped: int = 0) -> dict[str, Any]:
    return {
        "ok": True,
        "times": times(naive=4.0, ours=ours, backbone_and_head=1.5, backbone=1.25),
        "speedup": 4.0 / ours,
        "share_of_bare_backbone": 1.25 / ours,
        "naive_steps_skipped": skipped,
        "our_steps_skipped": 0,
        "batch_size": 100,
        "compile": compiled,
    }


def run(*, rate: float, compiled: bool) -> dict[str, Any]:
    return {
        "ok": True,
        "times": times(photometric_part=0.1),
        "images_per_s": {"median": rate, "least": rate - 1, "most": rate + 1, "n": 5},
        "data_wait_share": {"median": 0.01, "least": 0.0, "most": 0.022, "n": 5},
        "workers": 14,
        "compile": compiled,
    }


def test_what_was_not_measured_is_said_and_what_was_names_its_machine(tmp_path: Path) -> None:
    assert summary.render(tmp_path).count(summary.NOT_MEASURED) == len(summary.FIGURES)
    assert "Measured on nothing yet." in summary.render(tmp_path)
    other = {"hardware": {"processor": "Q", "cores": 4, "gpu": None}, "software": {"torch": "2"}}
    overhead = {"overhead_percent": {"median": 1.0, "low": 0.0, "high": 2.0}, "n": 5}
    # The input pipeline's file names the machine in every case.
    case = {
        "images_per_s_core": {"pil": 10.0, "cpu": 30.0, "device": 85.0}, "rounds": 7,
        "spread": {"pil": [9.0, 11.0], "cpu": [28.0, 31.0], "device": [80.0, 90.0]},
    }  # fmt: skip
    for program, found in {
        "loss": {"machine": MACHINE, "times": times(pair_by_pair=9.0, closed_form=1.0), "speedup": 9.0},
        "engine_overhead": {"mmseg": overhead, "detectron2": overhead, **other},
        "data": {"14 views": {**case, **MACHINE}},
    }.items():
        (tmp_path / f"{program}.json").write_text(json.dumps(found))
    assert "| 9.0 × (0.9–1.1 s, n = 5 against 8.1–9.9 s, n = 5) | A | ≥ 8 × |" in rows(tmp_path, "loss")[0]
    assert "| 8.5 × (80–90 against 9–11 images/s a core, n = 7 each) | A | ≥ 8 × |" in rows(tmp_path, "data")[0]
    assert all("| B | ≤ 2 % |" in row for row in rows(tmp_path, "engine_overhead"))
    assert "Measured on A: P, 2 cores, torch 2; B: Q, 4 cores, torch 2." in summary.render(tmp_path)


def test_of_the_gpu_run_the_better_step_is_shown_and_named(tmp_path: Path) -> None:
    largest = {"bytes_an_image": 2**28, "largest_batch_run": 176, "largest_batch_on_paper": 201}
    parts = {
        "step_multi-crop": step(ours=2.0, compiled=False),
        "step_multi-crop_compiled": step(ours=1.6, compiled=True, skipped=3),
        "step_two-views": step(ours=2.0, compiled=False),
        "pipeline": run(rate=45.0, compiled=False),
        "pipeline_compiled": {"ok": False, "error": "no compiler"},
        "memory": {"ok": True, "plain": largest},
        "lars": {"ok": True, "times": times(tensor_by_tensor=4.0, ours=1.0), "speedup": 4.0},
    }
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": GPU, "tiny": False, "parts": parts}))
    two, fourteen, outside_two, outside_fourteen, bare_two, bare_fourteen, wait, memory, checkpointed, loss, lars = (
        row.split(" | ")[1] for row in rows(tmp_path, "gpu")
    )
    assert two == "2.0 × plain (1.8–2.2 s, n = 5 against 3.6–4.4 s, n = 5)"
    assert fourteen == (
        "2.5 × compiled (1.44–1.76 s, n = 5 against 3.6–4.4 s, n = 5); plain 2.0 ×; 3 steps were skipped"
    )
    assert outside_two == "plain 25.0 %"
    # The photometric part of two views was not measured: not in the figure, and the row says so. With 14 views it is:
    # 1 − 1.5/(2.0 + 0.1) and 1 − 1.5/(1.6 + 0.1).
    assert outside_fourteen == "plain 28.6 %, compiled 11.8 %"
    assert bare_two == "plain 62 % of 80 images/s"
    assert bare_fourteen == "plain 62 %, in a run 56 % of 80 images/s; compiled 78 % of 80 images/s"
    assert wait == "plain 1.0 % (0.0 %–2.2 %, n = 5 windows; 44–46 images/s, 14 workers)"
    assert memory == "256 MiB; 176 images ran (201 on paper)"
    assert (checkpointed, loss) == (summary.NOT_MEASURED, summary.NOT_MEASURED)
    assert lars.startswith("4.0 ×")
    assert "Measured on A: G, 16 cores, torch 2." in summary.render(tmp_path)


@pytest.mark.parametrize("asked", ["", summary.HEADLINES])
def test_a_stale_table_is_noticed_and_mended(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{summary.BEGIN.format(asked)}\n\nold\n\n{summary.END}\nafter\n")
    for arguments, status in ((["--check"], 1), (["--update"], 0), (["--check"], 0)):
        monkeypatch.setattr("sys.argv", ["summary", *arguments, str(page)])
        assert summary.main() == status
    assert "stale" in capsys.readouterr().err
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    with pytest.raises(ValueError, match="once"):
        summary.updated("no markers")
    assert ("`twist --help`" in page.read_text()) == (not asked)
    assert "step on one GPU" in page.read_text()
