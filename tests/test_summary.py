"""The README's table of speed comes from the files of the benchmark programs, and says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import summary


def test_what_was_not_measured_is_said_and_what_was_is_read(tmp_path: Path) -> None:
    assert summary.render(tmp_path).count(summary.NOT_MEASURED) == len(summary.FIGURES)
    times = {
        "pair by pair": {"median_s": 9.0, "least_s": 8.0, "most_s": 10.0, "n": 5},
        "closed form": {"median_s": 1.0, "least_s": 0.9, "most_s": 1.1, "n": 5},
    }
    machine = {"hardware": {"processor": "P", "cores": 2, "gpu": None}, "software": {"torch": "2"}}
    (tmp_path / "loss.json").write_text(json.dumps({"machine": machine, "times": times, "speedup": 9.0}))
    table = summary.render(tmp_path)
    assert "| 9.0 × (0.9–1.1 s, n = 5 against 8–10 s, n = 5) | ≥ 8 × | loss |" in table
    assert "Measured on: P, 2 cores, torch 2." in table


def test_a_failed_part_of_the_gpu_run_counts_as_not_measured(tmp_path: Path) -> None:
    parts = {f"step_{name}": {"ok": False, "error": "no memory"} for name in ("two-views", "multi-crop")}
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": parts}))
    assert summary.render(tmp_path).count(summary.NOT_MEASURED) == len(summary.FIGURES)


def test_a_stale_table_is_noticed_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{summary.BEGIN}\n\nold\n\n{summary.END}\nafter\n")
    for arguments, status in ((["--check"], 1), (["--update"], 0), (["--check"], 0)):
        monkeypatch.setattr("sys.argv", ["summary", *arguments, str(page)])
        assert summary.main() == status
    assert "stale" in capsys.readouterr().err
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    with pytest.raises(ValueError, match="once"):
        summary.updated("no markers", "table")
