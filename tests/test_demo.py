"""The whole mission in one run through both frameworks: `twist demo --fast`, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.record import find_records, read_record
from contracts.weights import read_header
from twist.demo import PROTOCOLS


def run_demo(output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "twist", "demo", "--fast", "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_demo_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    done = run_demo(output)
    assert done.returncode == 0, done.stderr

    header = read_header(output / "pretrain" / "backbone.safetensors")
    assert (header.method, header.architecture) == ("twist", "resnet18")
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

    # A second start repeats nothing: it ends at once, with the same records.
    before = {path: path.stat().st_mtime_ns for path in find_records([output / "results"])}
    again = run_demo(output)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in find_records([output / "results"])} == before
