"""What a run says: step vectors, rows, the collapse alarm, and a metrics file that survives kills."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_reads import HostReads
from PIL import Image

from twist.contracts.errors import UserError
from twist.pretrain import monitor as monitor_module
from twist.pretrain.curves_picture import draw_curves, pooled, smoothed
from twist.pretrain.monitor import (
    DEVICE_VALUES,
    CollapseAlarm,
    Monitor,
    StepNote,
    condense,
    keep_rows_before,
    observe,
    rows_of,
)

CLASSES = 8


def summarise(steps: torch.Tensor, *, classes: int) -> list[dict]:
    return rows_of(condense(steps, classes=classes), classes=classes)


def test_a_step_is_described_by_its_global_views() -> None:
    logits = torch.full((3, 4, CLASSES), -50.0)
    for image, (first, second) in enumerate([(0, 0), (1, 1), (2, 3), (4, 4)]):
        logits[0, image, first] = logits[1, image, second] = 50.0
    logits[2] = 0  # a local view: not looked at
    seen = observe(logits, {"total": torch.tensor(1.5), "nonfinite_steps": torch.tensor(2.0)})
    (row,) = summarise(seen[None], classes=CLASSES)
    assert row["total"] == 1.5
    assert row["nonfinite_steps"] == 2
    assert row["agreement"] == 0.75
    assert row["classes_used"] == 5
    assert row["row_entropy"] == pytest.approx(0, abs=1e-6)
    shares = [2 / 8, 2 / 8, 1 / 8, 1 / 8, 2 / 8]
    entropy = -sum(p * math.log(p) for p in shares)
    assert row["mean_entropy"] == pytest.approx(entropy, abs=1e-5)
    assert row["mean_entropy_share"] == pytest.approx(entropy / math.log(CLASSES), abs=1e-5)
    assert row["consistency"] is None  # this stage has none


def test_a_step_that_is_not_finite_is_null_and_json() -> None:
    (row,) = summarise(observe(torch.full((2, 3, CLASSES), math.nan), {})[None], classes=CLASSES)
    assert json.loads(json.dumps(row, allow_nan=False))["row_entropy"] is None


def row_of(p: torch.Tensor, step: int) -> dict:
    """The row of a batch whose two views predict `p` (B, K)."""
    seen = observe(torch.stack([p, p]).log(), {})
    return {"step": step, **summarise(seen[None], classes=p.shape[1])[0]}


@pytest.mark.parametrize(("kind", "word"), [("constant", "constant"), ("uniform", "uniform")])
def test_a_collapse_raises_the_alarm_once(kind: str, word: str) -> None:
    p = torch.full((16, CLASSES), 1e-7)
    p[:, 0] = 1
    collapsed = torch.full((16, CLASSES), 1 / CLASSES) if kind == "uniform" else p / p.sum(1, keepdim=True)
    alarm = CollapseAlarm(CLASSES, patience=5)
    said = [alarm.look(row_of(collapsed, step)) for step in range(12)]
    assert [i for i, sentence in enumerate(said) if sentence] == [4]
    assert word in said[4]
    assert "since step 0" in said[4]


@pytest.mark.parametrize("classes", [16, 512, 4096])
def test_a_fresh_or_a_trained_head_raises_none(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(64, classes, generator=generator).softmax(-1)  # the last norm gives unit variance
    trained = torch.eye(classes)[torch.randint(classes, (64,), generator=generator)].clamp(min=1e-9)
    alarm = CollapseAlarm(classes, patience=3)
    for step in range(6):
        assert alarm.look(row_of(fresh, step)) is None
        assert alarm.look(row_of(trained, step)) is None


def test_skipped_steps_do_not_end_a_streak() -> None:
    alarm = CollapseAlarm(CLASSES, patience=2)
    uniform = torch.full((4, CLASSES), 1 / CLASSES)
    nothing = {"step": 1, "row_entropy": None, "mean_entropy_share": None}
    assert [alarm.look(r) is None for r in (row_of(uniform, 0), nothing, row_of(uniform, 2))] == [True, True, False]


def test_rows_are_written_once_and_in_order(tmp_path: Path) -> None:
    seen = observe(torch.randn(2, 4, CLASSES), {"total": torch.tensor(1.0)})
    with Monitor(tmp_path, classes=CLASSES, steps=6, first_step=0) as monitor:
        for step in range(4):
            monitor.note(StepNote(step, 0, "mutual_information", 0.1, 4, 0.0, step), seen)
            if step % 2:
                monitor.flush()
        assert monitor.flush() is None  # nothing left
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "torn')
    with Monitor(tmp_path, classes=CLASSES, steps=6, first_step=3) as monitor:
        for step in range(3, 6):
            monitor.note(StepNote(step, 0, "self_label", 0.1, 4, 0.0, 0), seen)
        monitor.flush()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[2]["bad_images"] == 2
    assert "consistency" in rows[0]
    assert "self_label_threshold" not in rows[0]
    assert "consistency" not in rows[4]
    assert list((tmp_path / "tensorboard").iterdir())


def test_passing_on_reads_what_was_sent_before(tmp_path: Path) -> None:
    """Rows come one call later, so that nobody waits for the device; the last ones when the run ends, also badly."""

    def written() -> list[int]:
        path = tmp_path / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    uniform = torch.zeros(2, 4, CLASSES)
    said = []
    with pytest.raises(UserError), Monitor(tmp_path, classes=CLASSES, steps=60, first_step=0) as monitor:
        for step in range(60):
            seen = observe(uniform, {"nonfinite_streak": torch.tensor(float(step))})
            monitor.note(StepNote(step, 0, "mutual_information", 0.1, 4, 0.0, 0), seen)
            if step % 10 == 9:
                before = written()
                said.append(monitor.pass_on())
                assert len(before) == max(step - 19, 0)
                assert written() == list(range(step - 9))
                assert monitor.nonfinite_streak == max(step - 10, 0)
        raise UserError("collapsed")
    assert written() == list(range(60))
    # Twenty uniform steps are full at the second ten, which are looked at with the third call.
    assert [sentence is not None for sentence in said] == [False, False, True, False, False, False]
    assert "nonfinite_streak" not in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])


def test_flushing_reads_the_device_twice_whatever_the_number_of_steps(tmp_path: Path) -> None:
    reads = HostReads()
    with Monitor(tmp_path, classes=CLASSES, steps=50, first_step=0) as monitor, reads.heard():
        for step in range(50):
            seen = observe(torch.randn(2, 4, CLASSES), {"total": torch.tensor(1.0)})
            monitor.note(StepNote(step, 0, "mutual_information", 0.1, 4, 0.0, 0), seen)
        assert reads.found == []
        monitor.flush()
    assert reads.found == ["tolist", "tolist"]


def test_the_progress_line_shows_how_much_of_the_time_was_spent_waiting_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Monitor(tmp_path, classes=CLASSES, steps=2, first_step=0) as monitor:
        for step, data_wait_s in enumerate((0.2, 0.3)):
            seen = observe(torch.randn(2, 4, CLASSES), {"total": torch.tensor(1.0)})
            monitor.note(StepNote(step, 0, "mutual_information", 0.1, 4, data_wait_s, 0), seen)
        now[0] += 10.0
        monitor.flush()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: 2/2 steps")]
    assert "  data_wait_share 0.05" in line
    assert "  images_per_s 0.8 " in line


def test_every_value_has_a_place() -> None:
    assert len(observe(torch.randn(2, 3, CLASSES), {})) == len(DEVICE_VALUES) + 2 * CLASSES


def test_rows_from_the_resumed_step_on_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    keep_rows_before(path, step=3)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)))
    keep_rows_before(path, step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_an_evaluation_stands_once_whatever_was_resumed(tmp_path: Path) -> None:
    def evaluated(epochs: range) -> list[int]:
        with Monitor(tmp_path, classes=CLASSES, steps=9, first_step=0, first_epoch=epochs.start) as monitor:
            for epoch in epochs:
                assert not monitor.has_evaluation(epoch)
                monitor.note_evaluation({"knn_top1_percent": 1.0}, epoch=epoch)
                assert monitor.has_evaluation(epoch)
        return [json.loads(line)["epoch"] for line in (tmp_path / "online_eval.jsonl").read_text().splitlines()]

    assert evaluated(range(3)) == [0, 1, 2]
    with (tmp_path / "online_eval.jsonl").open("a") as file:
        file.write('{"epoch": 3, "torn')
    assert evaluated(range(1, 4)) == [0, 1, 2, 3]


# --- the picture ------------------------------------------------------------------------------------------------------


def test_curves_are_drawn_whatever_the_run(tmp_path: Path) -> None:
    row = {"epoch": 0, "total": 1.0, "row_entropy": 1.0, "mean_entropy": 2.0, "agreement": 0.5, "classes_used": 5}
    skipped = {"total": None, "gradient_norm": None, "row_entropy": None, "mean_entropy": None}
    stages = ["mutual_information"] * 1500 + ["self_label"] * 1001
    lines = [
        {**row, "step": step, "stage": stage, "lr": 0.1, "gradient_norm": 1.0} for step, stage in enumerate(stages)
    ]
    lines[3] |= skipped
    for count in (2501, 1):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
        with Image.open(draw_curves(tmp_path, classes=CLASSES)) as picture:
            assert picture.size == (1100, 560)
            assert len(picture.convert("RGB").getcolors(10**6)) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_means_of_curves_leave_out_what_is_no_number() -> None:
    values = [1.0, 3.0, np.nan, 5.0, np.nan, np.nan, 7.0]
    assert_equal = np.testing.assert_array_equal
    assert_equal(pooled(values, 2), [2.0, 5.0, np.nan, 7.0])
    line = smoothed(np.array([*range(49), np.nan], dtype=float))  # two at a time
    assert_equal(line[[0, 1, 48, 49]], [0.0, 0.5, 47.5, 48.0])
