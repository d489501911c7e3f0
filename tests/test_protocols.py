"""THE table: complete, consistent with configs and metric vocabulary, importable without torch; the linear rule."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twist.contracts.errors import UsageError
from twist.contracts.metrics import METRICS
from twist.contracts.published import find_neighbours
from twist.transfer.engines import all_engines
from twist.transfer.protocols import PROTOCOLS, find_protocol, list_protocols
from twist.transfer.recipe import Schedule, choose_rule, leaves_protocol, linear_rule, render_plan, stretch

ROOT = Path(__file__).resolve().parent.parent
COCO = Schedule(16, 0.02, 90000, 1000, (60000, 80000))


@pytest.mark.parametrize("row", PROTOCOLS.values(), ids=lambda row: row.name)
def test_a_row_is_consistent(row) -> None:
    assert set(row.metrics) <= METRICS.keys()
    assert row.data
    assert (row.gpus == 0) == (row.scale == "sample")
    assert row.tolerance > 0
    if row.config.endswith((".yaml", ".py")):  # a framework's own
        text = (ROOT / "configs" / row.engine / row.config).read_text()
        assert f"# twist transfer {row.name} " in text.splitlines()[0], "a config opens with its command"
        assert "expected" in text or "no verified published" in text or "none is published" in text or "twin of" in text


def test_the_list_shows_every_row_with_data_hardware_and_published_neighbours() -> None:
    for name, row in PROTOCOLS.items():
        block = list_protocols([name])
        assert row.recipe in block
        assert f"data       {row.data[0]}" in block
        own = [published for published in find_neighbours(name) if published.protocol == name]
        assert all(published.source in block for published in own)
        assert max(map(len, block.splitlines())) < 160
    assert [line.split()[0] for line in list_protocols().splitlines()[:-2]] == list(PROTOCOLS)


@pytest.mark.parametrize(
    ("words", "found", "others"),
    [
        (["dense"], "voc07-corloc coco-vitdet-b-100ep sample-ade20k-fcn-d8", "linear fewshot knn voc07-svm"),
        (["frozen"], "linear sample-knn ade20k-knn-seg coco-mrcnn-fpn-frozen-12ep", "semi-1pct voc12aug-fcn-d8-20k"),
        (["vit"], "coco-vitdet-b-100ep knn ade20k-upernet-vit-160k", "coco-mrcnn-fpn-1x cityscapes-fcn-d8-40k"),
        (["resnet", "ade20k", "full"], "ade20k-fcn-d8-80k ade20k-knn-seg", "ade20k-upernet-vit-160k sample-voc-svm"),
        (["detection", "vit"], "voc07-corloc sample-coco-vitdet", "coco-mrcnn-fpn-1x voc12aug-linear-seg"),
    ],
)  # fmt: skip
def test_words_choose_rows_a_line_each(words: list[str], found: str, others: str) -> None:
    lines = list_protocols(words).splitlines()
    names = [line.split()[0] for line in lines]
    assert set(found.split()) <= set(names)
    assert not set(others.split()) & set(names)
    assert max(map(len, lines)) < 160


def test_a_name_shows_its_row_whole_and_a_wrong_word_the_near_match() -> None:
    assert list_protocols(["knn"]).count("   [") == 1
    assert "published" in list_protocols(["coco-mrcnn-fpn-1x"])
    with pytest.raises(UsageError, match=r'"frozn".* "frozen"'):
        list_protocols(["frozn"])
    assert "at once" in list_protocols(["imagenet", "coco"])


def test_the_table_needs_no_torch() -> None:
    modules = ", ".join(f"twist.transfer.{name}" for name in ("protocols", "request"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_linear_rule_in_numbers() -> None:
    assert linear_rule(COCO, processes=1, reference=8) == Schedule(2, 0.0025, 720000, 8000, (480000, 640000))
    assert linear_rule(COCO, processes=16, reference=8) == Schedule(32, 0.04, 45000, 500, (30000, 40000))
    assert linear_rule(COCO, processes=8, reference=8) == COCO
    assert linear_rule(COCO, processes=3, reference=8) == Schedule(6, 0.0075, 240000, 2667, (160000, 213333))
    assert linear_rule(COCO, processes=29, reference=16) == Schedule(29, 0.03625, 49655, 552, (33103, 44138))
    assert linear_rule(Schedule(100, 1.0, 100, 0), processes=29, reference=100).images_per_step == 29
    with pytest.raises(UsageError, match="do not divide"):
        linear_rule(Schedule(15, 0.02, 10, 0), processes=1, reference=8)


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 64), st.integers(1000, 200000), st.floats(1e-4, 10))
def test_linear_rule_keeps_images_seen_and_lr_an_image(processes, reference, images, iterations, lr) -> None:
    schedule = Schedule(images * reference, lr, iterations, 100, (iterations // 2,))
    scaled = linear_rule(schedule, processes=processes, reference=reference)
    assert scaled.images_seen == pytest.approx(schedule.images_seen, rel=0.02)
    assert scaled.learning_rate / scaled.images_per_step == pytest.approx(lr / schedule.images_per_step)
    assert scaled.images_per_step == images * processes


def test_stretch_keeps_the_form_and_drops_what_falls_together() -> None:
    assert stretch(COCO, 900) == Schedule(16, 0.02, 900, 10, (600, 800))
    assert stretch(COCO, 1000) == Schedule(16, 0.02, 1000, 11, (667, 889))
    assert stretch(COCO, 550).warmup_iterations == 6
    assert stretch(COCO, 2).steps == (1,)
    assert stretch(COCO, 1).steps == ()


@pytest.mark.parametrize(
    ("planned", "said"),
    [
        (Schedule(16, 5.0, 90000, 0, (60000, 80000)), []),
        (Schedule(32, 0.02, 45000, 500, (30000, 40000)), []),
        (Schedule(16, 0.02, 90800, 1000, (60000, 80000)), []),
        (Schedule(16, 0.02, 91000, 1000, (60000, 80000)), ["sees 1,456,000 images, and the protocol 1,440,000"]),
        (Schedule(16, 0.02, 89000, 1000, (60000, 80000)), ["sees 1,424,000 images, and the protocol 1,440,000"]),
        (
            Schedule(16, 0.02, 90000, 1000, (60000, 81000)),
            ["the rate drops at 67%, 90% of the run, and in the protocol at 67%, 89%"],
        ),
        (Schedule(16, 0.02, 90000, 1000), ["the rate drops at never of the run, and in the protocol at 67%, 89%"]),
    ],
)
def test_images_seen_and_the_drops_of_the_rate_make_the_protocol(planned: Schedule, said: list[str]) -> None:
    assert leaves_protocol(COCO, planned) == said


def test_the_paper_suite_keeps_every_recipe() -> None:
    """Eight GPUs a run; MMSegmentation's recipes are stated for fewer, and the linear rule would make them others."""
    suite = tomllib.loads((ROOT / "configs" / "suites" / "paper.toml").read_text())
    for name in suite["protocols"]:
        row = find_protocol(name)
        # Only the frameworks' engines, which have a target of conversion, have a linear rule.
        if all_engines()[row.engine].target is not None and row.gpus != suite["gpus_per_run"]:
            assert "keep_batch=true" in suite["overrides"][name], name


def test_the_rule_is_named() -> None:
    assert choose_rule(processes=8, reference=8, keep_batch=False) == "as published"
    assert choose_rule(processes=2, reference=8, keep_batch=False) == "linear rule"
    assert choose_rule(processes=1, reference=8, keep_batch=False) == "linear rule"
    assert choose_rule(processes=2, reference=8, keep_batch=True) == "batch kept"
    assert choose_rule(processes=1, reference=0, keep_batch=False) == "as published"
    assert choose_rule(processes=2, reference=0, keep_batch=False) == "batch kept"

    def plan(planned: Schedule, *, rule: str = "as published", gpus: int = 8, reference: int = 8, changed=()) -> str:
        given = {"rule": rule, "processes": gpus or 1, "gpus": gpus, "reference": reference}
        return render_plan(COCO, planned, changed=changed, **given)

    assert "stated for 8 GPUs → as published\n" in plan(COCO)
    assert "on the CPU → as in the recipe\n" in plan(COCO, gpus=0, reference=0)
    assert "→ changed from the recipe\n" in plan(stretch(COCO, 10))
    text = plan(COCO, changed=("changed: A 1 → 2",))
    assert "→ changed from the recipe\n" in text
    assert text.endswith("\n  changed: A 1 → 2")
    text = plan(linear_rule(COCO, processes=2, reference=8), rule="linear rule", gpus=2)
    for part in ("images a step 4 (2 a process), lr 0.005, 360000", "(recipe: images a step 16", "batch norm takes"):
        assert part in text
