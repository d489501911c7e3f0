"""What the benchmark programs write: a missed limit is told, and records are what a plain call measures."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import knn
from benchmarks.summary import RESULTS


def run_knn(monkeypatch: pytest.MonkeyPatch, *arguments: str, **peaks_mb: float) -> tuple[int, dict[str, Any]]:
    """Exit status of the program with made-up peaks by limit, and what it asked to measure."""
    asked: dict[str, Any] = {}

    def figures(**settings: Any) -> knn.Runs:
        asked.update(settings)
        return {
            f"{limit} MiB": {"wall_s": [1.0], "peak_mb": peaks_mb.get(f"mb{limit}", 1.0), "limit_mb": limit}
            for limit in settings["limits"]
        }

    monkeypatch.setattr(knn, "figures", figures)
    monkeypatch.setattr(sys, "argv", ["knn", *arguments])
    return knn.main(), asked


def test_a_search_above_its_limit_fails_the_program_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_knn(monkeypatch, mb128=128.0, mb512=409.0)[0] == 0
    assert capsys.readouterr().err == ""
    assert run_knn(monkeypatch, mb128=128.5, mb512=409.0)[0] == 1
    assert capsys.readouterr().err == "ABOVE ITS LIMIT: a search in 128 MiB took 128.5 MiB.\n"
    # One search over everything has none.
    assert knn.above_limit({"at once": {"wall_s": [1.0], "peak_mb": 1e6, "limit_mb": None}}) == []


def test_the_committed_records_are_what_the_programs_measure_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = json.loads((RESULTS / "knn.json").read_text())
    _, asked = run_knn(monkeypatch)
    assert (record["bank"], record["queries"]) == (asked["bank"], asked["queries"])
    assert list(record["runs"]) == [f"{limit} MiB" for limit in asked["limits"]]
    assert {len(run["wall_s"]) for run in record["runs"].values()} == {asked["repeats"]}


@pytest.mark.slow
def test_the_search_keeps_a_small_limit_in_a_fresh_process() -> None:
    runs = knn.figures(bank=20_000, queries=200, limits=[48, 96, None], repeats=1)
    assert knn.above_limit(runs) == []
    assert runs["48 MiB"]["peak_mb"] < runs["96 MiB"]["peak_mb"] < runs["at once"]["peak_mb"]
    assert runs["at once"]["peak_mb"] > 2 * 20_000 * knn.DIMENSION * 4 / 2**20  # read and normalised: it is measured
