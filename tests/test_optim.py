"""LARS against the published steps, its edge cases, its independence of memory layout, and the parameter groups."""

import pytest
import torch
from golden import golden
from torch import nn

from twist.contracts.networks import build_backbone
from twist.pretrain.config import OptimConfig
from twist.pretrain.optim import LARS, build_optimizer, parameter_groups, set_rates

NAMES = ("conv.weight", "fc.weight", "bn.weight", "fc.bias")


def test_six_steps_are_the_published_ones() -> None:
    values = golden("lars")
    weights = {name: nn.Parameter(values[f"init/{name}"]) for name in NAMES}
    optimizer = LARS(
        [
            {"params": [weights["conv.weight"], weights["fc.weight"]], "weight_decay": 1.5e-6},
            {"params": [weights["bn.weight"], weights["fc.bias"]], "weight_decay": 0.0, "lars_exclude": True},
        ],
        lr=0.0,
        momentum=0.9,
    )
    for step, lr in enumerate(values["lrs"].tolist()):
        for name, weight in weights.items():
            weight.grad = values[f"grad{step}/{name}"]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for name, weight in weights.items():
            assert (weight.detach() - values[f"step{step}/{name}"]).abs().max() < 1e-12, (step, name)


@pytest.mark.parametrize("zero", ["weight", "gradient", "both"])
def test_a_zero_norm_has_rate_one(zero: str) -> None:
    weight = nn.Parameter(torch.zeros(3, 2) if zero != "gradient" else torch.ones(3, 2))
    weight.grad = torch.zeros(3, 2) if zero != "weight" else torch.full((3, 2), 2.0)
    before, gradient = weight.detach().clone(), weight.grad.clone()
    LARS([weight], lr=0.1, weight_decay=0.5, eta=0.001).step()
    assert torch.allclose(weight, before - 0.1 * (gradient + 0.5 * before), atol=1e-7)


def test_small_norms_have_a_rate_of_their_own() -> None:
    weight = nn.Parameter(torch.tensor([[0.003, 0.004]]))
    weight.grad = torch.tensor([[0.06, 0.08]])
    LARS([weight], lr=2.0, weight_decay=10.0, eta=0.03).step()
    # ‖w‖ = 0.005, ‖g‖ = 0.1: rate = 2 · 0.03 · 0.005 / (0.1 + 10 · 0.005) = 0.002, on g + 10 w = (0.09, 0.12).
    assert weight.tolist()[0] == pytest.approx([0.003 - 0.00018, 0.004 - 0.00024], rel=1e-6)


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    used, unused, alone = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    used.grad = torch.ones(2, 2)
    LARS([{"params": [used, unused]}, {"params": [alone]}], lr=0.1, weight_decay=0.5).step()
    assert [bool((p == 1).all()) for p in (used, unused, alone)] == [False, True, True]


def test_memory_layout_does_not_matter() -> None:
    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (8, 4, 1, 1), (8, 8, 3, 3)]
    plain = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    last = [nn.Parameter(p.detach().clone(memory_format=torch.channels_last)) for p in plain]
    one, other = LARS(plain, lr=0.5, weight_decay=1e-3), LARS(last, lr=0.5, weight_decay=1e-3)
    for _ in range(3):
        for p, q in zip(plain, last):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()  # contiguous: another layout than its parameter's
        one.step()
        other.step()
    for p, q in zip(plain, last):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_a_raised_flag_changes_nothing(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = build_optimizer(OptimConfig(name=name), model)
    set_rates(optimizer, lr=0.1, weight_decay=1e-4)
    for flag, gradient in ((0.0, 1.0), (1.0, float("nan")), (1.0, float("inf"))):
        before = [p.detach().clone() for p in model.parameters()], str(optimizer.state_dict()["state"])
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(flag), None
        optimizer.step()
        same = all(torch.equal(p, q) for p, q in zip(before[0], model.parameters()))
        assert same == (flag == 1)
        if flag:
            assert str(optimizer.state_dict()["state"]) == before[1]


@pytest.mark.parametrize("architecture", ["resnet18", "vit_small_patch16"])
def test_groups_hold_every_parameter_once(architecture: str) -> None:
    model = build_backbone(architecture)
    decayed, excluded = parameter_groups(model, weight_decay=1e-4)
    ids = [id(p) for group in (decayed, excluded) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    named = {id(p): name for name, p in model.named_parameters()}
    names = {named[id(p)] for p in excluded["params"]}
    assert all(p.dim() > 1 for p in decayed["params"])
    assert not any(named[id(p)].endswith(".bias") for p in decayed["params"])
    assert {"pos_embed", "cls_token"} <= names or architecture == "resnet18"
    assert (excluded["weight_decay"], excluded["lars_exclude"]) == (0.0, True)
    assert (decayed["weight_decay"], decayed["lars_exclude"]) == (1e-4, False)


def test_the_configured_optimiser_has_the_configured_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    lars = build_optimizer(OptimConfig(name="lars", momentum=0.8, eta=0.02, weight_decay=0.3), model)
    assert type(lars) is LARS
    assert [[tuple(p.shape) for p in group["params"]] for group in lars.param_groups] == [[(3, 4)], [(3,), (3,), (3,)]]
    assert [(group["momentum"], group["eta"]) for group in lars.param_groups] == [(0.8, 0.02)] * 2
    assert [group["weight_decay"] for group in lars.param_groups] == [0.3, 0.0]
    set_rates(lars, lr=0.25, weight_decay=0.03)
    assert [(g["lr"], g["weight_decay"]) for g in lars.param_groups] == [(0.25, 0.03), (0.25, 0.0)]
    assert type(build_optimizer(OptimConfig(name="adamw"), model)) is torch.optim.AdamW
