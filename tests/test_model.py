"""Backbone, head and teacher as one network: shapes, what each pass sees, and what its options may not change."""

import argparse
import functools
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config
from torch import nn

from twist.contracts.config import validate
from twist.contracts.errors import UsageError, UserError
from twist.pretrain.config import PretrainConfig
from twist.pretrain.model import Twist, build_model, update_teacher, warm_start

CPU = torch.device("cpu")


def config(**model) -> PretrainConfig:
    run = {"epochs": 1, "mutual_information_epochs": 1}
    return tiny_config(Path("x"), views={"global_size": 32, "local_size": 16}, model=model, run=run)


def views(images: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2 * images, 3, 32, 32, generator=generator),
        torch.randn(2 * images, 3, 16, 16, generator=generator),
    ]


def student_of(**model) -> Twist:
    return build_model(config(**model), device=CPU)[0]


def test_logits_are_view_major_and_normalised_over_all_views_together() -> None:
    student = student_of()
    logits = student(views())
    assert logits.shape == (4, 4, 12)
    flat = logits.flatten(0, 1)
    assert flat.mean(0).abs().max() < 1e-5
    assert (flat.var(0, correction=0) - 1).abs().max() < 1e-3
    # One view alone is not normalised: its statistics are not those of all views.
    assert logits[0].mean(0).abs().max() > 1e-3


def test_views_keep_their_places() -> None:
    student = student_of().eval()
    large, small = views()
    logits = student([large, small])
    features = student.backbone(large[4:8])  # the second global view
    assert torch.allclose(logits[1], student.head(features), atol=1e-5)
    features = student.backbone(small[:4])  # the first local one
    assert torch.allclose(logits[2], student.head(features), atol=1e-5)


def test_the_last_norm_has_no_parameters_and_eval_uses_running_statistics() -> None:
    student = student_of()
    assert list(student.head.norm.parameters()) == []
    student(views())
    student.eval()
    alone = student([views()[0][[0, 4]]])
    together = student([views()[0]])
    assert torch.allclose(alone[:, 0], together[:, 0], atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "vit_small_patch16"])
def test_the_head_of_a_vit_starts_small(backbone: str) -> None:
    student = student_of(backbone=backbone, hidden_dim=512)
    layers = [layer for layer in student.head.modules() if isinstance(layer, nn.Linear)]
    stds = [layer.weight.std().item() for layer in layers]
    if backbone.startswith("vit"):
        assert stds == pytest.approx([0.02] * 3, rel=0.1)
        assert not any(layer.bias.any() for layer in layers)
        assert student([torch.randn(8, 3, 32, 32), torch.randn(8, 3, 16, 16)]).shape == (4, 4, 12)
    else:
        assert stds[1] == pytest.approx(512**-0.5 / 3**0.5, rel=0.1)  # torch's own
        assert all(layer.bias.any() for layer in layers)


def test_the_teacher_follows_parameters_and_not_buffers() -> None:
    student, teacher = build_model(config(teacher=True), device=CPU)
    assert teacher is not None
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), teacher.state_dict().values()))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.training
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    student(views())  # moves the student's running statistics
    update_teacher(teacher, student, momentum=0.9)
    for old, new in zip(before, teacher.parameters()):
        assert torch.allclose(new, old + 0.1, atol=1e-6)
    assert teacher.backbone.bn1.num_batches_tracked == 0
    assert torch.equal(teacher.backbone.bn1.running_mean, torch.zeros(64))


Passed = tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]


def passed(settings: PretrainConfig) -> Passed:
    """Logits, gradients and state of a pass forwards and backwards."""
    student, _ = build_model(settings, device=CPU)
    logits = student(views())
    (logits.softmax(-1) * torch.arange(12)).sum().backward()
    return logits.detach(), [p.grad for p in student.parameters()], student.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "checkpointing", "compiled"),
    [("resnet18", True, False), ("vit_small_patch16", True, False), ("resnet18", False, True)],
)
def test_checkpointing_and_compiling_change_nothing_but_memory_and_speed(
    backbone: str, checkpointing: bool, compiled: bool, monkeypatch
) -> None:
    """Compiled: traced, differentiated and partitioned as on a GPU; only making code, minutes on a CPU, is left out."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
    settings = config(backbone=backbone, activation_checkpointing=checkpointing)
    run = settings.run.model_copy(update={"compile": compiled})
    plain, gradients, state = passed(config(backbone=backbone))
    again, gradients_again, state_again = passed(settings.model_copy(update={"run": run}))
    near, same = (1e-5, functools.partial(torch.allclose, atol=1e-6)) if compiled else (1e-6, torch.equal)
    assert torch.allclose(plain, again, atol=near)
    assert all(torch.allclose(a, b, atol=10 * near) for a, b in zip(gradients, gradients_again))
    assert state.keys() == state_again.keys()
    for name in state:  # the second forward of a checkpointed block may not move the running statistics again
        assert same(state[name], state_again[name]), name


def test_compiling_is_asked_for_static_shapes_and_keeps_the_names(monkeypatch) -> None:
    # What it computes is checked where it is meant to run (benchmarks/gpu.py): compiling takes minutes on a CPU.
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append((type(self).__name__, options)))
    settings = config(teacher=True)
    compiled = settings.model_copy(update={"run": settings.run.model_copy(update={"compile": True})})
    plain, again = (build_model(one, device=CPU)[0].state_dict() for one in (settings, compiled))
    assert plain.keys() == again.keys()
    assert asked == [("ResNet", {"dynamic": False})] * 2


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ({"activation_checkpointing": True}, {"run": {"compile": True}}, "keep one of them"),
        ({"backbone": "vit_small_patch16"}, {"views": {"local_size": 20}}, "multiples of 16"),
    ],
)
def test_what_does_not_go_together_is_refused(model: dict, changes: dict, said: str) -> None:
    values = config(**model).model_dump()
    for section, table in changes.items():
        values[section] |= table
    with pytest.raises(UsageError, match=said):
        validate(values, PretrainConfig, where="test")


# --- warm start -------------------------------------------------------------------------------------------------------

THEIR_NAMES = {
    "head.hidden.0": "projection_heads.projection_head.0",
    "head.hidden.1": "projection_heads.projection_head.1",
    "head.hidden.3": "projection_heads.projection_head.4",
    "head.hidden.4": "projection_heads.projection_head.5",
    "head.output": "projection_heads.last_linear",
    "head.norm": "projection_heads.norm",
}
EARLY_NAMES = {"head.output": "projection_heads.cls_heads.0.0", "head.norm": "projection_heads.cls_heads.0.1"}


def published(network: Twist, *, early: bool = False) -> dict[str, torch.Tensor]:
    """The network's tensors under the names of the published code."""
    theirs = {**THEIR_NAMES, **(EARLY_NAMES if early else {})}
    named = {}
    for name, tensor in network.state_dict().items():
        prefix = next((p for p in theirs if name.startswith(p + ".")), None)
        named[name if prefix is None else theirs[prefix] + name.removeprefix(prefix)] = tensor.clone()
    return named


def checkpoint_at(path: Path, student: Twist, teacher: Twist | None = None, **options) -> Path:
    values = {"model": published(student, **options), "optimizer": {}, "epoch": 849, "args": argparse.Namespace(lr=0.5)}
    if teacher is not None:
        values["teacher"] = published(teacher, **options)
    torch.save(values, path)
    return path


def perturbed(*networks: Twist | None) -> None:
    for network in filter(None, networks):
        network(views())
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))


@pytest.mark.slow
def test_a_published_checkpoint_fills_student_and_teacher(tmp_path: Path) -> None:
    source, target = (build_model(config(teacher=True), device=CPU) for _ in range(2))
    for early in (False, True):
        perturbed(*source)
        warm_start(checkpoint_at(tmp_path / "full.pth", *source, early=early), *target)
        for theirs, ours in zip(source, target):
            assert theirs is not None
            assert ours is not None
            for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values()):
                assert torch.equal(a, b), name


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    student, _ = build_model(config(), device=CPU)
    path = checkpoint_at(tmp_path / "full.pth", student)
    wider, teacher = build_model(config(classes=24, teacher=True), device=CPU)
    with pytest.raises(UserError, match=r"4 of another shape \(first: head.output.weight is \(12, 16\), not"):
        warm_start(path, wider, None)
    with pytest.raises(UserError, match=r"has no `teacher`.*model.teacher = false"):
        warm_start(path, student, teacher)
    with pytest.raises(UserError, match=r"absent\.pth cannot be read"):
        warm_start(tmp_path / "absent.pth", student, None)
    torch.save({"model": {"module.unknown.weight": torch.ones(1)}}, path)
    with pytest.raises(UserError, match=r"1 of 1 tensors have no single place.*unknown\.weight"):
        warm_start(path, student, None)
    torch.save({"model": student.state_dict(), "other": Path("x")}, path)
    with pytest.raises(UserError, match="cannot be read safely") as caught:
        warm_start(path, student, None)
    assert "weights_only" not in str(caught.value), "no advice to read it unsafely"
