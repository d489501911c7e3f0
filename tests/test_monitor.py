"""What a run reports: step vectors, rows, the collapse alarm, and a metrics file that survives kills."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from host_reads import HostReads
from PIL import Image

from twist.contracts.curves import Curves, means, read_rows
from twist.contracts.errors import UserError
from twist.pretrain import monitor as monitor_module
from twist.pretrain.monitor import CollapseAlarm, Monitor, Observed, condense, draw_curves, observe, rows_of

CLASSES = 8


def row_of(observed: Observed, *, classes: int = CLASSES) -> dict[str, Any]:
    return rows_of(condense(observed.numbers[None], classes=classes), observed.names, classes=classes)[0]


def note(monitor: Monitor, step: int, observed: Observed | None = None, *, wait_s: float = 0.0, bad: int = 0) -> None:
    observed = observed or observe(torch.randn(2, 4, CLASSES), {"total": torch.tensor(1.0)})
    row = {"step": step, "epoch": 0, "stage": "s", "lr": 0.1}
    monitor.note(row, observed, images=4, data_wait_s=wait_s, bad_images=bad)


def steps_in(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_a_step_is_described_by_its_global_views() -> None:
    logits = torch.full((3, 4, CLASSES), -50.0)
    for image, (first, second) in enumerate([(0, 0), (1, 1), (2, 3), (4, 4)]):
        logits[0, image, first] = logits[1, image, second] = 50.0
    logits[2] = 0  # a local view: not looked at
    row = row_of(observe(logits, {"total": torch.tensor(1.5), "nonfinite_steps": torch.tensor(2.0)}))
    assert (row["total"], row["nonfinite_steps"]) == (1.5, 2)
    assert (row["agreement"], row["classes_used"]) == (0.75, 5)
    assert row["row_entropy"] == pytest.approx(0, abs=1e-6)
    shares = [2 / 8, 2 / 8, 1 / 8, 1 / 8, 2 / 8]
    entropy = -sum(p * math.log(p) for p in shares)
    assert row["mean_entropy"] == pytest.approx(entropy, abs=1e-5)
    assert row["mean_entropy_share"] == pytest.approx(entropy / math.log(CLASSES), abs=1e-5)


def test_a_step_that_is_not_finite_is_null_and_json() -> None:
    row = row_of(observe(torch.full((2, 3, CLASSES), math.nan), {}))
    assert json.loads(json.dumps(row, allow_nan=False))["row_entropy"] is None


def predicted(p: torch.Tensor, step: int) -> dict[str, Any]:
    """The row of a batch whose two views predict `p` (B, K)."""
    return {"step": step, **row_of(observe(torch.stack([p, p]).log(), {}), classes=p.shape[1])}


@pytest.mark.parametrize("kind", ["constant", "uniform"])
def test_a_collapse_raises_the_alarm_once(kind: str) -> None:
    p = torch.full((16, CLASSES), 1e-7)
    p[:, 0] = 1
    collapsed = torch.full((16, CLASSES), 1 / CLASSES) if kind == "uniform" else p / p.sum(1, keepdim=True)
    alarm = CollapseAlarm(CLASSES, patience=5)
    skipped = {"step": 2, "row_entropy": None, "mean_entropy_share": None}  # ends no streak
    said = [alarm.look(skipped if step == 2 else predicted(collapsed, step)) for step in range(12)]
    assert [i for i, sentence in enumerate(said) if sentence] == [5]
    assert kind in str(said[5])


@pytest.mark.parametrize("classes", [16, 4096])
def test_a_fresh_or_a_trained_head_raises_none(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(64, classes, generator=generator).softmax(-1)  # the last norm gives unit variance
    trained = torch.eye(classes)[torch.randint(classes, (64,), generator=generator)].clamp(min=1e-9)
    alarm = CollapseAlarm(classes, patience=3)
    for step in range(6):
        assert alarm.look(predicted(fresh, step)) is None
        assert alarm.look(predicted(trained, step)) is None


def test_rows_are_written_once_and_in_order(tmp_path: Path) -> None:
    with Monitor(tmp_path, classes=CLASSES, steps=6, first_step=0) as monitor:
        for step in range(4):
            note(monitor, step, bad=step)
            if step % 2:
                monitor.flush()
        assert monitor.flush() is None  # nothing left
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "torn')
    with Monitor(tmp_path, classes=CLASSES, steps=6, first_step=3) as monitor:
        for step in range(3, 6):
            note(monitor, step)
        monitor.flush()
    assert steps_in(tmp_path) == list(range(6))
    assert read_rows(tmp_path / "metrics.jsonl")[2]["bad_images"] == 2
    assert list((tmp_path / "tensorboard").iterdir())


def test_passing_on_reads_what_was_sent_before(tmp_path: Path) -> None:
    """Rows come one call later, so that nothing waits for the device; the last ones when the run ends, also badly."""
    uniform, said = torch.zeros(2, 4, CLASSES), []
    with pytest.raises(UserError), Monitor(tmp_path, classes=CLASSES, steps=60, first_step=0) as monitor:
        for step in range(60):
            note(monitor, step, observe(uniform, {"nonfinite_streak": torch.tensor(float(step))}))
            if step % 10 == 9:
                before = steps_in(tmp_path)
                said.append(monitor.pass_on())
                assert len(before) == max(step - 19, 0)
                assert steps_in(tmp_path) == list(range(step - 9))
                assert monitor.nonfinite_streak == max(step - 10, 0)
        raise UserError("collapsed")
    assert steps_in(tmp_path) == list(range(60))
    # Twenty uniform steps are full at the second ten, which are looked at with the third call.
    assert [sentence is not None for sentence in said] == [False, False, True, False, False, False]
    assert "nonfinite_streak" not in read_rows(tmp_path / "metrics.jsonl")[0]


def test_flushing_reads_the_device_twice_whatever_the_number_of_steps_and_shows_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, reads = [100.0], HostReads()
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Monitor(tmp_path, classes=CLASSES, steps=50, first_step=0) as monitor, reads.heard():
        for step in range(50):
            note(monitor, step, wait_s=0.01)
        assert reads.found == []
        now[0] += 10.0
        monitor.flush()
    assert reads.found == ["tolist", "tolist"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: 50/50 steps")]
    assert "  data_wait_share 0.05" in line
    assert "  images_per_s 20 " in line


def test_an_evaluation_stands_once_whatever_was_resumed(tmp_path: Path) -> None:
    def evaluated(epochs: range) -> list[int]:
        with Monitor(tmp_path, classes=CLASSES, steps=9, first_step=0, first_epoch=epochs.start) as monitor:
            for epoch in epochs:
                assert not monitor.has_evaluation(epoch)
                monitor.note_evaluation({"knn_top1_percent": 1.0}, epoch=epoch)
                assert monitor.has_evaluation(epoch)
        return [row["epoch"] for row in read_rows(tmp_path / "online_eval.jsonl", "epoch")]

    assert evaluated(range(3)) == [0, 1, 2]
    with (tmp_path / "online_eval.jsonl").open("a") as file:
        file.write('{"epoch": 3, "torn')
    assert evaluated(range(1, 4)) == [0, 1, 2, 3]


# --- curves of any run ------------------------------------------------------------------------------------------------


def test_a_curve_continues_without_repeating_and_without_what_is_damaged(tmp_path: Path, capsys) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = Curves(path, start=1)
    for step in (10, 20, 30):
        curves.add(step, {"loss": 1 / step, "bad": math.nan})
    curves.close()
    lines = path.read_bytes().splitlines()
    for line in (b"\xff", b"17", b"{}", b'{"step": "9"}', b"[" * 100_000):
        lines.insert(1, line)
    path.write_bytes(b"\n".join([*lines, b'{"step": 40, "lo']))  # the end is what a kill leaves
    curves = Curves(path, start=21)
    curves.add(30, {"loss": 7.0})
    curves.close()
    assert read_rows(path) == [{"step": s, "loss": 1 / s, "bad": None} for s in (10, 20)] + [{"step": 30, "loss": 7.0}]
    assert f"{path}: 5 damaged lines are left out" in capsys.readouterr().err


def test_curves_are_drawn_whatever_the_run(tmp_path: Path) -> None:
    row = {"epoch": 0, "total": 1.0, "row_entropy": 1.0, "mean_entropy": 2.0, "agreement": 0.5, "classes_used": 5}
    stages = ["mutual_information"] * 1500 + ["self_label"] * 1001
    lines = [
        {**row, "step": step, "stage": stage, "lr": 0.1, "gradient_norm": 1.0} for step, stage in enumerate(stages)
    ]
    lines[3] |= dict.fromkeys(("total", "gradient_norm", "row_entropy", "mean_entropy"))  # a skipped step
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Image.open(draw_curves(tmp_path, classes=CLASSES)) as picture:
        assert picture.size == (1100, 560)
        assert len(picture.convert("RGB").getcolors(10**6)) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_means_of_curves_leave_out_what_is_no_number() -> None:
    values = [1.0, 3.0, np.nan, 5.0, np.nan, np.nan, 7.0]
    np.testing.assert_array_equal(means(values, step=2), [2.0, 5.0, np.nan, 7.0])
    line = means(np.array([*range(49), np.nan], dtype=float), window=2)
    np.testing.assert_array_equal(line[[0, 1, 48, 49]], [0.0, 0.5, 47.5, 48.0])
