"""The second stage's loss against the published implementation's numbers, and at its edges."""

import math

import pytest
import torch
from golden import golden

from twist.pretrain.loss import self_label_loss


@pytest.mark.parametrize("quantile", [0.5, 0.6])
def test_published_values_and_gradients(quantile: float) -> None:
    values = golden("self_label")
    logits = values["logits"].requires_grad_()
    loss, threshold = self_label_loss(logits, quantile=quantile)
    assert loss.item() == pytest.approx(values[f"loss_q{quantile}"].item(), abs=1e-12)
    assert threshold.item() == pytest.approx(values[f"threshold_q{quantile}"].item(), abs=1e-12)
    loss.backward()
    assert (logits.grad - values[f"grad_q{quantile}"]).abs().max() < 1e-12


def test_a_teacher_chooses_the_images_and_the_labels() -> None:
    student, teacher = torch.randn(3, 6, 5), torch.zeros(2, 6, 5)
    teacher[0, :3, 2] = 9.0  # three confident images, of class 2, by their first view
    loss, _ = self_label_loss(student, quantile=0.5, teacher=teacher)
    learners = torch.stack([student[1, :3], student[2, :3]])  # the other global view and the local one
    expected = torch.nn.functional.cross_entropy(learners.flatten(0, 1), torch.full((6,), 2))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_no_gradient_through_the_view_that_labels() -> None:
    logits = torch.randn(2, 6, 5)
    logits[0] *= 5  # the first view is the more confident one
    logits.requires_grad_()
    self_label_loss(logits, quantile=0.5)[0].backward()
    weak = logits.detach().softmax(-1).amax(-1).argmax(0)
    for image, view in enumerate(weak):
        assert not logits.grad[view, image].any()


def test_what_is_above_the_threshold_is_the_whole_loss_and_nothing_is_a_zero_with_gradient() -> None:
    logits = torch.zeros(3, 4, 5)
    logits[0, 2, 1] = 9.0  # the one image above the threshold; its label is 1, its other views know nothing
    assert self_label_loss(logits, quantile=0.25)[0].item() == pytest.approx(math.log(5), abs=1e-6)
    equal = torch.zeros(3, 4, 5, requires_grad=True)
    loss, _ = self_label_loss(equal, quantile=0.5)
    assert loss.item() == 0
    loss.backward()
    assert equal.grad is not None
    assert not equal.grad.any()


def test_quantile_zero_keeps_every_image() -> None:
    logits = torch.randn(2, 6, 5)
    loss, threshold = self_label_loss(logits, quantile=0.0)
    p = logits.softmax(-1).amax(-1)
    weak, label = p.argmax(0), logits.softmax(-1)[p.argmax(0), torch.arange(6)].argmax(-1)
    assert threshold.item() == 0
    expected = torch.nn.functional.cross_entropy(logits[1 - weak, torch.arange(6)], label)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.99, 1.0])
def test_about_the_share_quantile_is_kept(quantile: float) -> None:
    logits = torch.randn(2, 100, 7, generator=torch.Generator().manual_seed(0))
    _, threshold = self_label_loss(logits, quantile=quantile)
    best = logits.softmax(-1).amax(-1).amax(0)
    assert (best > threshold).sum() == min(int(quantile * 100), 99)
