"""What the benchmark programs write: where a figure comes from stands in every record, and a missed limit is told."""

import ast
import json
from pathlib import Path

import pytest

import benchmarks
from benchmarks import knn
from benchmarks.__main__ import PROGRAMS
from benchmarks.side_by_side import Times, write
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


@pytest.mark.slow
def test_the_search_keeps_a_small_limit_in_a_fresh_process() -> None:
    runs = knn.figures(bank=20_000, queries=200, limits=[48, 96, None], repeats=1)
    assert knn.above_limit(runs) == []
    assert runs["48 MiB"]["peak_mb"] < runs["96 MiB"]["peak_mb"] < runs["at once"]["peak_mb"]
    assert runs["at once"]["peak_mb"] > 2 * 20_000 * 2048 * 4 / 2**20  # read and normalised: it is measured
