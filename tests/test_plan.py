"""A run's plan: schedules against the published arrays, step by step, and the precision on a device."""

import pytest
import torch
from golden import golden

from twist.contracts import machine
from twist.contracts.config import validate
from twist.contracts.errors import UsageError
from twist.pretrain.config import PretrainConfig
from twist.pretrain.plan import Plan, autocast, cosine, precision_on, warmup_epochs


def config(**sections) -> PretrainConfig:
    return validate({"data": {"root": "x"}, **sections}, PretrainConfig, where="test")


def plan_of(steps_per_epoch: int, *, run: dict, **sections) -> Plan:
    """With 256 images a step, so that learning rates are those of the config."""
    settings = config(run={"batch_size": 256, **run}, **sections)
    return Plan(settings, images=256 * steps_per_epoch, world_size=1, device=CPU)


@pytest.mark.parametrize("case", ["full", "short", "selflabel"])
def test_learning_rate_is_the_published_one(case: str) -> None:
    values = golden("schedules")
    epochs, first, warmup, self_label_warmup, steps_per_epoch, lr, self_label_lr = values[f"lr_{case}_args"].tolist()
    plan = plan_of(
        int(steps_per_epoch),
        run={"epochs": int(epochs), "mutual_information_epochs": int(first)},
        optim={"warmup_epochs": int(warmup), "lr": lr},
        self_label={"warmup_epochs": int(self_label_warmup), "lr": self_label_lr},
    )
    ours = [plan.learning_rate(step) for step in range(plan.steps)]
    assert len(ours) == len(values[f"lr_{case}"])
    assert ours == pytest.approx(values[f"lr_{case}"].tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("array", "start", "end"),
    [
        ("wd_0.06_0.12_ep300_it5", 0.06, 0.12),
        ("momentum_0.996_1.0_ep300_it5", 0.996, 1.0),
        ("quantile_0.5_0.6_ep50_it5", 0.5, 0.6),
    ],
)
def test_cosines_are_the_published_ones(array: str, start: float, end: float) -> None:
    expected = golden("schedules")[array].tolist()
    ours = [cosine(step, start=start, end=end, steps=len(expected)) for step in range(len(expected))]
    assert ours == pytest.approx(expected, abs=1e-12)


def test_each_quantity_runs_over_its_own_stage() -> None:
    plan = plan_of(
        10,
        run={"epochs": 30, "mutual_information_epochs": 20},
        optim={"weight_decay": 0.06, "weight_decay_end": 0.12},
        self_label={"warmup_epochs": 5},
    )
    assert plan.weight_decay(0) == 0.06
    assert plan.weight_decay(150) == pytest.approx(0.09)
    assert plan.teacher_momentum(0) == 0.996
    assert plan.teacher_momentum(100) == pytest.approx(0.998)
    assert plan.teacher_momentum(250) == 1.0  # it stands still in the second stage
    assert plan.quantile(200) == 0.5
    assert plan.quantile(250) == pytest.approx(0.55)
    assert plan_of(10, run={"epochs": 5}).weight_decay(40) == 1.5e-6


@pytest.mark.parametrize(("epochs", "expected"), [(51, 10), (50, 5), (20, 3), (4, 2), (1, 0)])
def test_warmup_follows_the_published_rule(epochs: int, expected: int) -> None:
    assert warmup_epochs(config(run={"epochs": epochs, "mutual_information_epochs": epochs})) == expected


def test_a_warmup_that_is_given_is_taken_and_a_run_without_another_word_is_one_stage() -> None:
    given = [config(run={"epochs": 100}, optim={"warmup_epochs": epochs}) for epochs in (0, 2)]
    assert [warmup_epochs(one) for one in given] == [0, 2]
    assert given[0].run.mutual_information_epochs == 100


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"run": {"epochs": 5}, "optim": {"warmup_epochs": 5}}, "pass optim.warmup_epochs=2"),
        ({"run": {"epochs": 8, "mutual_information_epochs": 5}}, "pass self_label.warmup_epochs=1"),
        ({"run": {"epochs": 5, "mutual_information_epochs": 6}}, "mutual_information_epochs = 6 .* lower it too"),
        (
            {"run": {"epochs": 5, "mutual_information_epochs": 5}, "optim": {"accumulate_steps": 2}},
            "statistics of the whole batch",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(sections: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        config(**sections)


# --- the precision on a device ----------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_bf16_is_a_matter_of_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"amx_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert machine.cpu_has_bf16() is expected


@pytest.mark.parametrize("expected", ["bf16", "fp32"])
def test_a_cpu_does_bf16_only_with_the_instructions(expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: expected == "bf16")
    assert [precision_on(CPU, asked) for asked in ("bf16", "fp16", "fp32")] == [expected, "fp32", "fp32"]
    assert [precision_on(CUDA, asked) for asked in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]
    with autocast(CPU, "bf16"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected == "bf16" else torch.float32)


@pytest.mark.parametrize(("steps", "is_said"), [(3, True), (50, False)])
def test_a_run_of_a_few_steps_is_said_to_be_too_short(steps: int, is_said: bool) -> None:
    lacks = plan_of(steps, run={"epochs": 2}, data={"root": "x", "workers": 0}).warnings()
    assert [f"{2 * steps} steps in all" in lack for lack in lacks] == [True] * is_said
