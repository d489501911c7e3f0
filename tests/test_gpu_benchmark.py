"""`benchmarks/gpu.py` runs on a machine that nobody has tried it on: its whole path, what it needs, what it keeps."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_memory, summary
from benchmarks.naive_step import NaiveStep
from benchmarks.side_by_side import Times

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_parts_run_and_fill_their_rows_of_the_table(tmp_path: Path) -> None:
    """Without those that compile, which take a minute on a CPU."""
    # As a file and from another folder, as it is documented: nothing of the suite is installed there.
    parts = [name for name in gpu.PARTS if "compiled" not in name and name not in ("lars", "step_two-views")]
    command = [sys.executable, str(Path(gpu.__file__)), "--device", "cpu", "--tiny", "--only", *parts]
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert list(found["parts"]) == sorted(parts)  # written with sorted keys
    assert all(part["ok"] for part in found["parts"].values())
    # The table takes nothing from a tiny run; as a whole one's, this file fills its rows but those of memory, which a
    # CPU does not measure, of LARS, and of the parts that are left out here.
    rows = {}
    for tiny in (True, False):
        (tmp_path / "gpu.json").write_text(json.dumps({**found, "tiny": tiny}))
        rows[tiny] = [line for line in summary.render(tmp_path).splitlines() if line.endswith("| gpu |")]
    assert all(summary.NOT_MEASURED in row for row in rows[True])
    missing = [row for row in rows[False] if summary.NOT_MEASURED in row]
    assert all(re.search("two views|memory|checkpointing|LARS", row) for row in missing), missing
    assert len(missing) < len(rows[False]) - 3


# --- keeping what was found -------------------------------------------------------------------------------------------


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., bool]:
    def fails(_: torch.device, __: bool) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    times = {"times": {"a": Times(1.0, 0.5, 2.0, 3)}}
    monkeypatch.setattr(gpu, "PARTS", {"one": lambda *_: times, "two": lambda *_: {"value": 2}, "fails": fails})
    usual = {"tiny": True, "budget_s": 100.0, "path": tmp_path / "gpu.json", "keep": False}
    return lambda *names, **options: gpu.take(names, CPU, **{**usual, **options})


def test_parts_are_kept_one_by_one_for_one_machine(take: Callable[..., bool], tmp_path: Path) -> None:
    def parts() -> dict[str, Any]:
        return json.loads((tmp_path / "gpu.json").read_text())["parts"]

    assert not take("fails", "one"), "a part that fails costs the others nothing"
    assert "no such kernel" in parts()["fails"]["error"]
    assert [parts()[name]["ok"] for name in ("fails", "one")] == [False, True]
    assert parts()["one"]["times"]["a"] == {"median_s": 1.0, "least_s": 0.5, "most_s": 2.0, "n": 3}
    assert take("one"), "a whole run begins anew"
    assert take("two", keep=True)
    assert sorted(parts()) == ["one", "two"]
    # When time is over the rest is skipped, and older figures stay.
    assert take("one")
    assert not take("one", "two", keep=True, budget_s=-1.0)
    assert parts()["one"]["ok"]
    assert parts()["two"] == {"ok": False, "skipped": "the -1 s of --budget-s were over"}
    other = json.loads((tmp_path / "gpu.json").read_text())
    other["machine"]["hardware"]["processor"] = "another"
    (tmp_path / "gpu.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="other hardware"):
        take("two", keep=True)
    assert json.loads((tmp_path / "gpu.json").read_text()) == other


# --- the largest batch ------------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.mark.parametrize(("usable_gib", "largest"), [(80, 168), (60, 128), (10, None)])
def test_the_largest_batch_is_one_that_ran(usable_gib: int, largest: int | None) -> None:
    """A card of 80 GiB of which fewer may be usable; 4 GiB are fixed and an image takes 0.375 GiB."""
    asked = []

    def peak(batch: int) -> int:
        asked.append(batch)
        bytes_ = 4 * GIB + batch * 3 * GIB // 8
        if batch > 64 and bytes_ > usable_gib * GIB:
            raise torch.OutOfMemoryError
        return bytes_

    found = gpu_memory.largest_batch(peak, small=32, large=64, card_bytes=80 * GIB)
    assert (found["bytes_an_image"], found["fixed_bytes"]) == (3 * GIB / 8, 4 * GIB)
    assert found["largest_batch_on_paper"] == 192
    assert found["largest_batch_run"] == largest
    assert asked == [32, 64, *map(int, found["tried"])]
    assert all(batch % gpu_memory.MULTIPLE == 0 for batch in asked)


# --- the naive step ---------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """(V·B, 4) → (V, B, 3), V = 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, views: list[torch.Tensor]) -> torch.Tensor:
        return self.linear(torch.cat(views)).view(3, -1, 3)


def test_the_naive_step_leaves_out_what_overflows_in_any_parameter_and_goes_on() -> None:
    model = Logits()
    naive = NaiveStep(model, device=CPU, lr=0.5)
    naive.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    naive._scale = 2.0**8
    views = [torch.randn(6, 4, generator=torch.Generator().manual_seed(1))]
    # The weight alone overflows, not the bias, which is the last parameter.
    hook = model.linear.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    before = [p.detach().clone() for p in model.parameters()]
    logged = naive(views)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert (naive.skipped, logged["loss_scale"]) == (1, 2.0**7)
    hook.remove()
    logged = naive(views)
    assert naive.skipped == 1
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(logged) == 15
    assert logged["loss"] == pytest.approx(logged["consistency"] + logged["sharpness"] - logged["diversity"], abs=1e-6)
