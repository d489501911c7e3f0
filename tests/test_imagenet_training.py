"""The training loop: the published schedule, exact continuation, and the same result on one process or two."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imagenet_tree import ask, no_room, second_is_killed, second_says_no, write_tree
from torch import Tensor, nn

from twist.catalog.class_folders import LabelledImages
from twist.contracts import states
from twist.contracts.curves import CURVES
from twist.contracts.errors import UserError
from twist.contracts.networks import build_backbone
from twist.contracts.weights import Backbone
from twist.transfer.engines.imagenet import training
from twist.transfer.engines.imagenet.engine import Setup, resolve
from twist.transfer.engines.imagenet.recipes import load_recipe
from twist.transfer.engines.imagenet.training import (
    CHECKPOINT,
    LOG,
    Classifiers,
    Trainer,
    new_classifier,
    run_ranks,
    train_finetune,
    train_linear,
)
from twist.transfer.engines.plain import ALONE, Rank, epoch_batches, extract
from twist.transfer.request import Request, Weights

GENERATOR = torch.Generator().manual_seed(0)
ROWS, LABELS = torch.randn(40, 6, generator=GENERATOR), torch.randint(0, 3, (40,), generator=GENERATOR)
IMAGES = LabelledImages(Path("x"), ("a", "b", "c"), np.zeros(40, "S1"), LABELS.numpy())
RESNET = Backbone(architecture="resnet18", method="random")
RATES = [0.2 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)


def test_quick_epochs_are_saved_every_few_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr(Trainer, "_save", lambda _, history: saved.append(len(history)))
    for interval, expected in ((0.0, [1, 2, 3, 4]), (60.0, [4])):
        monkeypatch.setattr(training, "SAVE_EVERY_S", interval)
        fit(tmp_path / str(interval))
        assert saved == expected
        saved.clear()


def rows(batches: Sequence[np.ndarray], _epoch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    return ((ROWS[chosen], LABELS[chosen]) for chosen in batches)


def made_setup(request: Request, weights: Weights, config: Any, recipe: dict[str, Any], **more: Any) -> Setup:
    images = {"train": IMAGES, "labelled": IMAGES, "val": IMAGES}
    return Setup(config, recipe, plan="", reduced=False, request=request, weights=weights, **images, **more)


def fit(
    output: Path,
    *overrides: str,
    resume: bool = False,
    eval_only: bool = False,
    recipe: str = "a",
    weights: float = 0.0,
) -> tuple[nn.Linear, dict[str, Any]]:
    overrides = ("batch_size=16", "epochs=4", *overrides)
    config = load_recipe("sample-linear", architecture="resnet18", overrides=overrides)
    start = {"seed": 1, "output": output, "resume": resume, "eval_only": eval_only}
    asked = ask("sample-linear", RESNET, output, tensors={"w": torch.tensor(weights)}, **start)
    setup = made_setup(*asked, config, {"name": recipe})
    model = new_classifier(6, 3, seed=1)
    return model, Trainer(model, [model], rows, rows, rank=ALONE, setup=setup).run()


def stop_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> pytest.MonkeyPatch:
    """The next training is interrupted when it has saved so many epochs."""
    save, saved = Trainer._save, 0

    def save_then_stop(self: Trainer, history: list[dict[str, Any]]) -> None:
        nonlocal saved
        save(self, history)
        saved += 1
        if saved == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", save_then_stop)
    return monkeypatch


def test_steps_are_sgd_with_momentum_on_the_mean_cross_entropy_and_a_cosine_by_epoch(tmp_path: Path) -> None:
    model, done = fit(tmp_path, "weight_decay=0.01")
    expected = new_classifier(6, 3, seed=1)
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    for epoch, rate in enumerate(RATES):
        for chosen in epoch_batches(40, batch_size=16, seed=1, epoch=epoch):
            scores = expected(ROWS[chosen])
            loss = -(scores.log_softmax(1)[torch.arange(len(chosen)), LABELS[chosen]]).mean()
            gradients = torch.autograd.grad(loss, list(expected.parameters()))
            with torch.no_grad():
                for parameter, gradient, v in zip(expected.parameters(), gradients, velocity, strict=True):
                    v.mul_(0.9).add_(gradient + 0.01 * parameter)
                    parameter -= rate * v
    assert torch.allclose(model.weight, expected.weight, atol=1e-6)
    assert torch.allclose(model.bias, expected.bias, atol=1e-6)
    assert [row["lr_classifier"] for row in done["history"]] == pytest.approx(RATES, abs=1e-12)
    assert [row["step"] for row in done["history"]] == [3, 6, 9, 12]


def test_a_grid_is_its_rates_one_by_one_and_the_best_on_held_out_images_counts(tmp_path: Path) -> None:
    """A grid gives each classifier what a run of its rate alone gives; one has diverged and is never chosen."""
    held = LabelledImages(Path("x"), ("a", "b", "c"), np.zeros(8, "S1"), LABELS[:8].numpy())
    factors, overrides = (1.0, 0.5, 0.1), ("batch_size=16", "epochs=4")

    def train(name: str, *more: str, grid: bool = False) -> tuple[list[nn.Linear], dict[str, Any]]:
        output = tmp_path / name
        config = load_recipe("sample-linear", architecture="resnet18", overrides=(*overrides, *more))
        asked = ask("sample-linear", RESNET, output, tensors={"w": torch.tensor(0.0)}, seed=1, output=output)
        setup = made_setup(*asked, config, {}, held=held)
        parts = [new_classifier(6, 3, seed=1) for _ in config.rates]
        model = Classifiers(parts) if grid else parts[0]
        parts[1].weight.data.fill_(math.nan) if grid else None
        return parts, Trainer(model, parts, rows, rows, rows if grid else None, rank=ALONE, setup=setup).run()

    parts, done = train("grid", f"rate_factors={list(factors)}", grid=True)
    alone = {factor: train(f"alone{factor}", f"lr_classifier={0.2 * factor}") for factor in (1.0, 0.1)}
    for part, factor in ((parts[0], 1.0), (parts[2], 0.1)):
        assert torch.allclose(part.weight, alone[factor][0][0].weight, atol=1e-6)
    assert done["held"][1] == 0
    assert done["chosen"] == max(range(3), key=done["held"].__getitem__) != 1
    assert done["metrics"] == pytest.approx(alone[factors[done["chosen"]]][1]["metrics"])
    assert {"lr_classifier_0.2", "lr_classifier_0.02"} < done["history"][0].keys()


def test_classifier_starts_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    first = new_classifier(300, 50, seed=3)
    torch.manual_seed(6)
    assert torch.equal(first.weight, new_classifier(300, 50, seed=3).weight)
    assert not torch.equal(first.weight, new_classifier(300, 50, seed=4).weight)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not first.bias.any()


def test_continued_run_is_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, done = fit(tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        fit(tmp_path / "cut")
    # Event files are read in the order of their names: second, process, and a counter that sorts 10 before 9. Another
    # start is another second in real life.
    time.sleep(1.1)
    continued, again = fit(tmp_path / "cut", resume=True)
    history, whole = done["history"], again["history"]
    assert torch.equal(straight.weight, continued.weight)
    assert torch.equal(straight.bias, continued.bias)
    timeless = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in rows] for rows in (history, whole)]
    assert timeless[0] == timeless[1]
    lines = [json.loads(line) for line in (tmp_path / "cut" / CURVES).read_text().splitlines()]
    assert lines == whole
    assert again["metrics"] == done["metrics"] == {name: whole[-1][name] for name in ("top1_percent", "top5_percent")}
    # TensorBoard shows each epoch once too, whatever was written twice.
    assert scalars(tmp_path / "cut", "loss") == [(row["step"], pytest.approx(row["loss"])) for row in whole]
    log = (tmp_path / "cut" / LOG).read_text()
    assert [f"epoch {number}: loss " in log for number in range(1, 5)] == [True] * 4


def scalars(output: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_another_run_is_not_continued_and_a_finished_one_only_read(tmp_path: Path) -> None:
    _, done = fit(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match=r"holds this run: pass --resume"):
        fit(tmp_path)
    with pytest.raises(UserError, match=r"holds another run: recipe was .* \(and 1 more\)"):
        fit(tmp_path, resume=True, recipe="b", weights=1.0)
    assert fit(tmp_path, resume=True)[1] == done
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_evaluation_measures_what_is_stored_and_trains_nothing(tmp_path: Path) -> None:
    trained, done = fit(tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    # Other weights than those of the history, so that a number read back would show.
    state["model"]["weight"] = -state["model"]["weight"]
    states.save(tmp_path / CHECKPOINT, lambda path: torch.save(state, path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    model, measured = fit(tmp_path, eval_only=True)
    assert torch.equal(model.weight, -trained.weight)
    scores = ROWS @ model.weight.T + model.bias
    expected = 100.0 * (scores.argmax(1) == LABELS).double().mean().item()
    assert measured["metrics"]["top1_percent"] == pytest.approx(expected)
    assert measured["metrics"] != done["metrics"]
    assert measured["predicted"] == scores[np.linspace(0, 39, 24, dtype=int)].argmax(1).tolist()
    assert measured["history"] == done["history"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("damaged", ["cut state", "manifest", "state and its manifest gone"])
def test_a_damaged_state_is_said_and_the_one_before_it_continued(
    damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    straight, done = fit(tmp_path / "straight")
    cut, state = tmp_path / "cut", tmp_path / "cut" / CHECKPOINT
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        fit(cut)
    path = states.manifest_of(state) if damaged == "manifest" else state
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data[:-50] if damaged == "cut state" else data)
    if damaged == "state and its manifest gone":
        states.manifest_of(path).unlink()
    continued, again = fit(cut, resume=True)
    said = capsys.readouterr().err
    assert said.count("is not valid") == 1
    assert str(state) in said
    assert "checkpoint_before.pth" in said
    assert torch.equal(straight.weight, continued.weight)
    assert again["metrics"] == done["metrics"]


def test_when_no_state_is_whole_nothing_is_continued(tmp_path: Path) -> None:
    fit(tmp_path)
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"--output.*good copy"):
        fit(tmp_path, resume=True)


def test_divergence_names_the_rate_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diverged in epoch 0: lower lr_classifier"):
        fit(tmp_path, "lr_classifier=1e38")
    assert not (tmp_path / CHECKPOINT).exists()


def test_each_group_has_statistics_of_its_own_and_the_first_ones_are_kept() -> None:
    norm, alone = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for one in (norm, alone):
        nn.init.uniform_(one.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + torch.arange(6.0).view(6, 1, 1, 1)
    network = nn.Sequential(norm)
    training.normalise_in_groups(network, 3)
    found, (first, *rest) = network(x), x.split(2)
    expected = torch.cat(
        [alone(first), *(nn.functional.batch_norm(y, None, None, alone.weight, alone.bias, True) for y in rest)]
    )
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(norm.state_dict().values(), alone.state_dict().values(), strict=True))
    assert torch.equal(network.eval()(x), alone.eval()(x))


# --- processes --------------------------------------------------------------------------------------------------------


def test_memory_is_guarded_from_the_first_tensor_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^CUDA ran out of memory \(no room\): free the device of other processes"):
        run_ranks(no_room, processes=1, device="cpu", output=tmp_path)
    assert list(tmp_path.iterdir()) == [], "what a process left for its parent is gone"


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_sentence_and_that_of_any_process_arrives(tmp_path: Path) -> None:
    # Which of the two a parent meets first is the machine's affair.
    died = r"^(Worker 1 died \(SIGKILL\)|Another process of the run died)[^\n]*--resume continues from it\.$"
    for work, said in ((second_is_killed, died), (second_says_no, "^the second of two says no$")):
        with pytest.raises(UserError, match=said):
            run_ranks(work, processes=2, device="cpu", output=tmp_path)


def _train_all(rank: Rank, root: Path, output: Path) -> dict[str, Any]:
    """A linear probe on crops and a fine-tuning, each two epochs, in every rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = dict(build_backbone("resnet18").state_dict())
    sizes = ("size=32", "resize=36", "epochs=2", "batch_size=8", "machine.workers=0", "machine.feature_batch_size=4")
    own = {
        "linear": ("augment=true",),
        "finetune-100pct": ("batch_norm_images=4", "lr_backbone=1e-6", "lr_classifier=0.05"),
    }
    done = {}
    for protocol, overrides in own.items():
        (output / protocol).mkdir(parents=True, exist_ok=True)
        setup = resolve(*ask(protocol, RESNET, root, *sizes, *overrides, tensors=tensors, output=output / protocol))
        if protocol == "linear":
            extractor, folder = setup.extractor(rank.device), output / f"features{rank.index}"
            val = extract(extractor, setup.val, setup.config, folder=folder, title="val")
            done[protocol] = train_linear(rank, setup, val, None, None)["history"]
        else:
            done[protocol] = train_finetune(rank, setup)["history"]
    return done


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    # 24 images in batches of 8: every batch divides, so the mean over ranks is the mean over the batch. Batch norm sees
    # groups of 4 however many ranks share them.
    root = write_tree(tmp_path / "tree", train=8)
    one, two = (
        run_ranks(_train_all, root, tmp_path / str(processes), processes=processes, device="cpu", output=tmp_path)
        for processes in (1, 2)
    )
    for name, atol in (("linear", 1e-5), ("finetune-100pct", 1e-3)):
        for alone, together in zip(one[name], two[name], strict=True):
            assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4), name
            assert together["top1_percent"] == pytest.approx(alone["top1_percent"], abs=100 / 9 + 1e-6)
        first, second = (
            torch.load(tmp_path / folder / name / CHECKPOINT, weights_only=True)["model"] for folder in ("1", "2")
        )
        for key in ("1.weight", "0.bn1.running_mean") if name != "linear" else ("weight",):
            assert torch.allclose(first[key], second[key], rtol=1e-3, atol=atol), (name, key)
            assert first[key].std() > 0.0105, "what did not move proves nothing"
