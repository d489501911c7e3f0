"""What the benchmark programs write: where a figure comes from stands in every record, and a missed limit is told."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks import engine_overhead, knn
from benchmarks.__main__ import PROGRAMS
from benchmarks.side_by_side import Times, write
from benchmarks.summary import RESULTS
from twist.contracts import machine

SOURCES = Path(benchmarks.__file__).parent


def test_a_record_says_machine_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "git_commit", lambda: "5d1fe47+changes")
    path = tmp_path / "record.json"
    write(path, {"times": {"ours": Times(1.0, 0.5, 2.0, 3), "each": [Times(1.0, 1.0, 1.0, 1)]}, "n": 3})
    found = json.loads(path.read_text())
    assert found["times"]["ours"] == {"median_s": 1.0, "least_s": 0.5, "most_s": 2.0, "n": 3}
    assert found["times"]["each"] == [{"median_s": 1.0, "least_s": 1.0, "most_s": 1.0, "n": 1}]
    assert found["n"] == 3
    assert found["machine"].keys() == {"git_commit", "hardware", "software", "threads"}
    assert found["machine"]["git_commit"] == "5d1fe47+changes"
    assert found["machine"]["hardware"]["processor"]
    write(None, {"n": 3})  # nobody asked for a file


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_writes_its_record_by_the_function_that_adds_them(program: str) -> None:
    nodes = list(ast.walk(ast.parse((SOURCES / f"{program}.py").read_text())))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "benchmarks.side_by_side"]
    assert "write" in [alias.name for node in imports for alias in node.names]  # that it is called, the linter sees
    assert not [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "write_json"]


# --- k-NN -------------------------------------------------------------------------------------------------------------


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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = json.loads((RESULTS / "knn.json").read_text())
    _, asked = run_knn(monkeypatch)
    assert (record["bank"], record["queries"]) == (asked["bank"], asked["queries"])
    assert list(record["runs"]) == [f"{limit} MiB" for limit in asked["limits"]]
    assert {len(run["wall_s"]) for run in record["runs"].values()} == {asked["repeats"]}

    record = json.loads((RESULTS / "engine_overhead.json").read_text())
    repeats: list[int] = []
    monkeypatch.setattr(engine_overhead, "measure_all", lambda arguments: repeats.append(arguments.repeats) or {})
    monkeypatch.setattr(sys, "argv", ["engine_overhead", "--data", str(tmp_path)])
    engine_overhead.main()
    assert repeats == [record["mmseg"]["n"]] == [record["detectron2"]["n"]]


@pytest.mark.slow
def test_the_search_keeps_a_small_limit_in_a_fresh_process() -> None:
    runs = knn.figures(bank=20_000, queries=200, limits=[48, 96, None], repeats=1)
    assert knn.above_limit(runs) == []
    assert runs["48 MiB"]["peak_mb"] < runs["96 MiB"]["peak_mb"] < runs["at once"]["peak_mb"]
    assert runs["at once"]["peak_mb"] > 2 * 20_000 * knn.DIMENSION * 4 / 2**20  # read and normalised: it is measured
