"""The objective against the published implementation's numbers, alone and on gloo ranks, value and gradient."""

import pytest
import torch
import torch.distributed as dist
from gloo import run_on_ranks
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twist.pretrain import distributed
from twist.pretrain.config import LossConfig
from twist.pretrain.loss import LossTerms, identity, teacher_loss, twist_loss

LOSSES = ["loss_two_views_1rank", "loss_two_views_2ranks", "loss_multicrop_2ranks", "loss_multicrop_3ranks_tau"]
TERMS = LossTerms._fields


def weights_of(values: dict[str, Tensor]) -> LossConfig:
    return LossConfig(**{name: float(values[name]) for name in LossConfig.model_fields})


def pair_by_pair(logits: Tensor, *, lam1=0.0, lam2=1.0, tau=1.0, eps=1e-5) -> Tensor:
    """The paper's formula as it is written: every pair by itself."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * ((p + eps).log() - (q + eps).log())).sum(-1).mean()

    def row(s: Tensor) -> Tensor:
        return -(s * (s + eps).log()).sum(-1).mean()

    totals = []
    for i in (0, 1):
        for j in range(i + 1, len(logits)):
            p, q = logits[i].softmax(-1), logits[j].softmax(-1)
            s, t = (logits[i] / tau).softmax(-1), (logits[j] / tau).softmax(-1)
            consistency = (kl(p, q) + kl(q, p)) / 2
            sharpness = (row(s) + row(t)) / 2
            diversity = (row(s.mean(0)) + row(t.mean(0))) / 2
            totals.append(consistency + (1 + lam1) * sharpness - lam2 * diversity)
    return torch.stack(totals).mean()


@pytest.mark.parametrize("name", LOSSES)
def test_one_process_gives_the_published_values_and_gradients(name: str) -> None:
    values = golden(name)
    logits = values["logits"].requires_grad_()
    terms = twist_loss(logits, weights_of(values))
    for term in TERMS:
        assert getattr(terms, term).item() == pytest.approx(values[term].item(), abs=1e-12), term
    terms.total.backward()
    assert (logits.grad - values["grad"]).abs().max() < 1e-12


def on_rank(rank: int, world_size: int, names: list[str]) -> dict[str, dict[str, Tensor]]:
    return {
        f"{name} {variant.__name__}": one_golden(rank, world_size, name, variant)
        for name in names
        for variant in (distributed.mean_over_ranks, divide_then_sum_in_place)
    }


def one_golden(rank: int, world_size: int, name: str, mean_over_ranks) -> dict[str, Tensor]:
    values = golden(name)
    rows = values["logits"].shape[1] // world_size
    mine = values["logits"][:, rank * rows : (rank + 1) * rows].clone().requires_grad_()
    terms = twist_loss(mine, weights_of(values), mean_over_ranks=mean_over_ranks)
    terms.total.backward()
    # DDP averages parameter gradients: the objective's gradient on these rows is what flowed here over W.
    return {"terms": torch.stack([term.detach() for term in terms]), "gradient": mine.grad / world_size}


def divide_then_sum_in_place(x: Tensor) -> Tensor:
    """The trap: the value is the mean, the gradient is 1/W of it (the in-place sum is invisible to autograd)."""
    share = x / dist.get_world_size()
    dist.all_reduce(share.data)
    return share


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_published_values_and_gradients(world_size: int) -> None:
    names = [name for name in LOSSES if golden(name)["logits"].shape[1] % world_size == 0]
    assert names
    ranks = run_on_ranks(world_size, on_rank, world_size, names)
    for name in names:
        values = golden(name)
        expected = torch.stack([values[term] for term in TERMS])
        for rank in ranks:
            assert (rank[f"{name} mean_over_ranks"]["terms"] - expected).abs().max() < 1e-12
        gradient = torch.cat([rank[f"{name} mean_over_ranks"]["gradient"] for rank in ranks], dim=1)
        assert (gradient - values["grad"]).abs().max() < 1e-12
        # The negative control: its value is right, and only the gradient tells.
        assert (ranks[0][f"{name} divide_then_sum_in_place"]["terms"] - expected).abs().max() < 1e-12
        wrong = torch.cat([rank[f"{name} divide_then_sum_in_place"]["gradient"] for rank in ranks], dim=1)
        assert (wrong - values["grad"]).abs().max() > 1e-3
        assert (wrong * world_size - values["grad"]).abs().max() < 1e-12


def test_teacher_gives_the_published_values_and_gradients() -> None:
    values = golden("teacher_loss")
    student, teacher = values["student"].requires_grad_(), values["teacher"].requires_grad_()
    terms = teacher_loss(student, teacher, weights_of(values))
    expected = [values[term].item() for term in TERMS]
    assert [term.item() for term in terms] == pytest.approx(expected, abs=1e-12)
    terms.total.backward()
    assert (student.grad - values["grad"]).abs().max() < 1e-12
    assert teacher.grad is None


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("given", [{}, {"lam1": -0.6, "lam2": 1.5, "tau": 0.5}])
def test_a_teacher_meets_every_other_view_at_one_temperature(views: int, given: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(n, 5, 6, generator=generator, dtype=torch.float64) for n in (views, 2))
    terms = teacher_loss(student, teacher, LossConfig(**given))
    tau, eps = given.get("tau", 1.0), 1e-5
    s, t = (student / tau).softmax(-1), (teacher / tau).softmax(-1)
    log_s, log_t = (s + eps).log(), (t + eps).log()
    pairs = [(i, j) for i in (0, 1) for j in range(views) if j != i]
    consistency = torch.stack([(t[i] * (log_t[i] - log_s[j])).sum(-1).mean() for i, j in pairs]).mean()
    sharpness = -(s * log_s).sum(-1).mean()
    diversity = -(s.mean(1) * (s.mean(1) + eps).log()).sum(-1).mean()
    total = consistency + (1 + given.get("lam1", 0.0)) * sharpness - given.get("lam2", 1.0) * diversity
    expected = [float(term) for term in (consistency, sharpness, diversity, total)]
    assert [float(term) for term in terms] == pytest.approx(expected, abs=1e-12)


def test_one_collective_for_everything() -> None:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return identity(x)

    twist_loss(torch.randn(14, 3, 8), mean_over_ranks=counted)
    teacher_loss(torch.randn(14, 3, 8), torch.randn(2, 3, 8), mean_over_ranks=counted)
    assert calls == [(2 + 14 * 8,), (2 + 14 * 8,)]


@settings(max_examples=40, deadline=None)
@given(
    views=st.integers(2, 6),
    rows=st.integers(1, 5),
    classes=st.integers(2, 9),
    tau=st.sampled_from([1.0, 0.5, 2.0]),
    lam1=st.floats(-0.9, 1),
    lam2=st.floats(0, 2),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_closed_form_is_the_mean_over_pairs(views, rows, classes, tau, lam1, lam2, scale, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(views, rows, classes, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total = twist_loss(ours, LossConfig(lam1=lam1, lam2=lam2, tau=tau)).total
    expected = pair_by_pair(theirs, lam1=lam1, lam2=lam2, tau=tau)
    assert total.item() == pytest.approx(expected.item(), abs=1e-11)
    total.backward()
    expected.backward()
    assert (ours.grad - theirs.grad).abs().max() < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_raised_to_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 4, 8).to(dtype).requires_grad_()
    terms = twist_loss(logits)
    assert all(term.dtype == torch.float32 for term in terms)
    assert terms.total.item() == twist_loss(logits.float()).total.item()
    terms.total.backward()
    assert logits.grad.dtype == dtype
    assert teacher_loss(logits, logits[:2]).total.dtype == torch.float32


def test_wrong_shapes_are_refused() -> None:
    for views in (torch.randn(1, 4, 8), torch.randn(4, 8)):
        with pytest.raises(ValueError, match="views"):
            twist_loss(views)
    with pytest.raises(ValueError, match="teacher_loss takes ≥ 2 student"):
        teacher_loss(torch.randn(3, 2, 4), torch.randn(3, 2, 4))
