"""The training loop: the published schedule, exact continuation, and the same result on one process or two."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_tree import second_says_no, write_tree
from torch import Tensor, nn

from contracts.errors import UsageError, UserError
from contracts.networks import build_backbone
from contracts.weights import Backbone
from transfer.imagenet import training
from transfer.imagenet.dataset import epoch_batches, open_tree
from transfer.imagenet.finetune import train_finetune
from transfer.imagenet.linear import train_linear
from transfer.imagenet.processes import Rank, run_ranks
from transfer.imagenet.recipes import ClassifierRecipe, LinearRecipe, load_recipe
from transfer.imagenet.training import CHECKPOINT, CURVES, Source, new_classifier, train_classifier

ALONE = Rank(0, 1, torch.device("cpu"))
GENERATOR = torch.Generator().manual_seed(0)
ROWS, LABELS = torch.randn(40, 6, generator=GENERATOR), torch.randint(0, 3, (40,), generator=GENERATOR)


def recipe_with(*overrides: str) -> LinearRecipe:
    recipe = load_recipe("sample-linear", architecture="resnet18", overrides=("batch_size=16", "epochs=4", *overrides))
    assert isinstance(recipe, LinearRecipe)
    return recipe


def source() -> Source:
    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in epoch_batches(40, batch_size=16, seed=0, epoch=number):
            yield ROWS[chosen], LABELS[chosen]

    return Source(epoch=epoch, validation=lambda: [(ROWS, LABELS)], steps_per_epoch=3)


def fit(
    output: Path, recipe: ClassifierRecipe, *, resume: bool = False, identity: dict[str, Any] | None = None
) -> tuple[nn.Linear, list[dict[str, Any]]]:
    model = new_classifier(6, 3, seed=1)
    history = train_classifier(
        model,
        {"classifier": (recipe.lr_classifier, model.parameters())},
        source(),
        recipe,
        rank=ALONE,
        title="t",
        output=output,
        identity=identity or {"recipe": "a", "seed": 1, "weights": "w"},
        resume=resume,
    )
    return model, history


def test_rate_follows_a_cosine_that_steps_once_an_epoch(tmp_path: Path) -> None:
    _, history = fit(tmp_path, recipe_with())
    expected = [0.2 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [row["lr_classifier"] for row in history] == pytest.approx(expected, abs=1e-12)
    assert [row["step"] for row in history] == [3, 6, 9, 12]


def test_steps_are_sgd_with_momentum_on_the_mean_cross_entropy(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, recipe_with("weight_decay=0.01"))
    expected = new_classifier(6, 3, seed=1)
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    for epoch in range(4):
        rate = 0.2 * 0.5 * (1 + math.cos(math.pi * epoch / 4))
        for chosen in epoch_batches(40, batch_size=16, seed=0, epoch=epoch):
            scores = expected(ROWS[chosen])
            loss = -(scores.log_softmax(1)[torch.arange(len(chosen)), LABELS[chosen]]).mean()
            gradients = torch.autograd.grad(loss, list(expected.parameters()))
            with torch.no_grad():
                for parameter, gradient, v in zip(expected.parameters(), gradients, velocity, strict=True):
                    v.mul_(0.9).add_(gradient + 0.01 * parameter)
                    parameter -= rate * v
    assert torch.allclose(model.weight, expected.weight, atol=1e-6)
    assert torch.allclose(model.bias, expected.bias, atol=1e-6)


def test_classifier_starts_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    first = new_classifier(300, 50, seed=3)
    torch.manual_seed(6)
    assert torch.equal(first.weight, new_classifier(300, 50, seed=3).weight)
    assert not torch.equal(first.weight, new_classifier(300, 50, seed=4).weight)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not first.bias.any()


@pytest.mark.parametrize("stop_after", [1, 3])
def test_continued_run_is_bit_equal(tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, history = fit(tmp_path / "straight", recipe_with())
    save, saved = training._save, 0

    def save_then_die(*arguments: Any) -> None:
        nonlocal saved
        save(*arguments)
        saved += 1
        if saved == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", recipe_with())
    monkeypatch.setattr(training, "_save", save)
    continued, whole = fit(tmp_path / "cut", recipe_with(), resume=True)
    assert torch.equal(straight.weight, continued.weight)
    assert torch.equal(straight.bias, continued.bias)
    timeless = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in rows] for rows in (history, whole)]
    assert timeless[0] == timeless[1]
    lines = [json.loads(line) for line in (tmp_path / "cut" / CURVES).read_text().splitlines()]
    assert lines == whole


def test_another_run_is_not_continued_and_an_existing_one_not_overwritten(tmp_path: Path) -> None:
    fit(tmp_path, recipe_with())
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match=r"holds a run: go on with --resume, or choose another --output"):
        fit(tmp_path, recipe_with())
    with pytest.raises(UserError, match=r"holds a run with another recipe and another weights"):
        fit(tmp_path, recipe_with(), resume=True, identity={"recipe": "b", "seed": 1, "weights": "x"})
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_finished_run_is_only_read(tmp_path: Path) -> None:
    _, history = fit(tmp_path, recipe_with())
    _, again = fit(tmp_path, recipe_with(), resume=True)
    assert again == history


def test_divergence_names_the_rate_and_leaves_the_last_good_epoch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the training diverged; lower lr_classifier"):
        fit(tmp_path, recipe_with("lr_classifier=1e38"))
    assert not (tmp_path / CHECKPOINT).exists()


def test_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--gpus 9999: this machine shows \d+ GPUs"):
        run_ranks(second_says_no, (), processes=9999, device="cuda")


def _train_all(rank: Rank, root: Path, output: Path) -> dict[str, Any]:
    """A linear probe with and without crops and a fine-tuning, each two epochs, in every rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    header = Backbone(architecture="resnet18", method="random")
    tensors = dict(build_backbone("resnet18").state_dict())
    train, val = open_tree(root)
    sizes = ("size=32", "resize=36", "epochs=2", "batch_size=8", "machine.workers=0", "machine.feature_batch_size=4")
    done = {}
    for name, work, overrides in (
        ("fixed", train_linear, ("augment=false",)),
        ("crops", train_linear, ("augment=true",)),
        ("finetune", train_finetune, ("labels=all",)),
    ):
        recipe = load_recipe(
            "semi-10pct" if name == "finetune" else "linear", architecture="resnet18", overrides=(*sizes, *overrides)
        )
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        arguments = (header, tensors, train, val, recipe, 0, folder, {"name": name}, False)
        done[name] = work(rank, *arguments)["history"]  # type: ignore[operator]
    return done


@pytest.mark.slow
def test_sentence_of_any_process_arrives_alone() -> None:
    with pytest.raises(UserError, match=r"^the second of two says no$"):
        run_ranks(second_says_no, (), processes=2, device="cpu")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    # 24 images in batches of 8: every batch divides, so the mean over ranks is the mean over the batch.
    root = write_tree(tmp_path / "tree", train=8)
    one = run_ranks(_train_all, (root, tmp_path / "one"), processes=1, device="cpu")
    two = run_ranks(_train_all, (root, tmp_path / "two"), processes=2, device="cpu")
    for name in ("fixed", "crops"):
        for alone, together in zip(one[name], two[name], strict=True):
            assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4), name
            assert together["top1_percent"] == pytest.approx(alone["top1_percent"], abs=100 / 9 + 1e-6)
        first, second = (
            torch.load(tmp_path / folder / name / CHECKPOINT, weights_only=True)["model"]["weight"]
            for folder in ("one", "two")
        )
        assert torch.allclose(first, second, rtol=1e-3, atol=1e-5), name
        assert first.std() > 0.011, "a classifier that did not move proves nothing"
    # Batch norm sees 4 images a process here and 8 there: the same run, not the same numbers.
    assert [row["step"] for row in two["finetune"]] == [row["step"] for row in one["finetune"]] == [3, 6]
    assert all(math.isfinite(row["loss"]) for row in two["finetune"])
