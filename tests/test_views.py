"""The draw of a view: the published numbers, the distribution of every parameter, purity, and the cut of a crop."""

import math
from dataclasses import replace

import numpy as np
import pil_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import photograph
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from twist.pretrain.config import ViewsConfig
from twist.pretrain.data.views import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    KINDS,
    NO_OPERATION,
    SATURATION,
    VIEW_STREAM,
    Philox,
    ViewSampler,
    crop_box,
    cut,
    plan_views,
    resolutions,
)

DRAWS = 6000
# The seed is fixed, so these tests never fail by chance; a wrong range or probability has a p-value of 0.
LEAST_P = 1e-3


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """(DRAWS, 14) records of the default plan for images of 500 × 375."""
    sampler = ViewSampler(plan_views(ViewsConfig()))
    draw = sampler.draw(7, epoch=3, indices=np.arange(DRAWS))
    return np.stack([draw.place(row, height=375, width=500) for row in range(DRAWS)])


def uniform(values: np.ndarray, low: float, high: float) -> bool:
    return stats.kstest(values, "uniform", args=(low, high - low)).pvalue > LEAST_P


def share(hits: np.ndarray, probability: float) -> bool:
    if probability in (0, 1):
        return bool((hits == bool(probability)).all())
    return stats.binomtest(int(hits.sum()), hits.size, probability).pvalue > LEAST_P


def test_numbers_of_each_kind_are_the_published_ones() -> None:
    # bytedance/TWIST, commit 796d36e: the saturation of the jitter by kind, blur and solarise by view, the rest alike.
    for kind, saturation, blur, solarise in (
        ("multicrop", 0.2, [1.0, 0.1, 0.5], [0, 0.2, 0]),
        ("barlow", 0.2, [1.0, 0.1], [0, 0.2]),
        ("moco", 0.4, [0.5, 0.5], [0, 0]),
    ):
        assert [p.blur_probability for p in KINDS[kind]] == blur
        assert [p.solarise_probability for p in KINDS[kind]] == solarise
        for p in KINDS[kind]:
            assert p.jitter == (0.4, 0.4, saturation, 0.1)
            assert (p.jitter_probability, p.grey_probability, p.flip_probability) == (0.8, 0.2, 0.5)
            assert p.sigma == (0.1, 2.0)


def test_plan_has_two_global_views_then_the_local_ones_and_a_harder_second_stage() -> None:
    views = plan_views(ViewsConfig())
    assert resolutions(views) == [(2, 224), (12, 96)]
    assert [view.scale for view in views[1:3]] == [(0.4, 1.0), (0.05, 0.4)]
    assert [view.scale for view in plan_views(ViewsConfig(), "self_label")[1:3]] == [(0.14, 1.0), (0.05, 0.14)]
    # A kind without local crops has a scale of its own.
    moco = ViewsConfig(kind="moco", local_count=0)
    assert (moco.global_scale, resolutions(plan_views(moco))) == ((0.2, 1.0), [(2, 224)])
    assert ViewsConfig(kind="moco", local_count=0, global_scale=(0.3, 1.0)).global_scale == (0.3, 1.0)


def test_blur_and_greyscale_can_be_changed_for_small_views_and_nothing_else_changes() -> None:
    plain = plan_views(ViewsConfig(local_count=1))
    changed = plan_views(ViewsConfig(local_count=1, blur_sigma=(0.1, 0.4), grey_probability=0.5))
    for before, after in zip(plain, changed, strict=True):
        assert after == replace(before, sigma=(0.1, 0.4), grey_probability=0.5)
    records = ViewSampler(changed).draw(0, epoch=0, indices=np.arange(500)).records
    assert records["sigma"][:, 0].min() >= 0.1
    assert 0.1 < records["sigma"].max() <= 0.4
    assert abs(records["grey"].mean() - 0.5) < 0.05
    with pytest.raises(ValueError, match="blur_sigma"):
        ViewsConfig(blur_sigma=(2.0, 0.1))


def boxes_of(view, height: int, width: int) -> np.ndarray:
    draw = ViewSampler((view,)).draw(1, epoch=0, indices=np.arange(2000))
    return np.stack([draw.place(row, height=height, width=width)["box"][0] for row in range(2000)])


def torchvisions(scale: tuple[float, float], height: int, width: int) -> np.ndarray:
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(2000)])


@pytest.mark.parametrize(("stage", "height", "width"), [("mutual_information", 375, 500), ("self_label", 500, 333)])
def test_boxes_are_distributed_as_torchvision_draws_them(stage: str, height: int, width: int) -> None:
    views = plan_views(ViewsConfig(), stage)  # type: ignore[arg-type]
    for view in (views[0], views[5]):
        theirs, ours = torchvisions(view.scale, height, width), boxes_of(view, height, width)
        for name, quantity in {
            "area": lambda box: box[:, 2] * box[:, 3],
            "aspect": lambda box: box[:, 3] / box[:, 2],
            "top": lambda box: box[:, 0] + 0.5 * box[:, 2],
            "left": lambda box: box[:, 1] + 0.5 * box[:, 3],
        }.items():
            assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > LEAST_P, (view, name)


def test_the_box_test_notices_a_wrong_scale() -> None:
    ours = boxes_of(replace(plan_views(ViewsConfig())[0], scale=(0.35, 1.0)), 375, 500)
    theirs = torchvisions((0.4, 1.0), 375, 500)
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue < LEAST_P


@pytest.mark.parametrize(("height", "width"), [(10, 200), (201, 11), (1, 1)])
def test_no_fitting_try_takes_torchvisions_central_crop(height: int, width: int) -> None:
    # A scale above 1 never fits: torchvision then takes its central crop too.
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [50.0, 60.0], [3 / 4, 4 / 3])
    assert crop_box([50.0] * 10, [1.0] * 10, [0.3, 0.3], height=height, width=width) == theirs


def test_flips_greys_blurs_and_solarisations_have_their_probabilities(drawn: np.ndarray) -> None:
    for view, numbers in enumerate(plan_views(ViewsConfig())):
        assert share(drawn["flip"][:, view], 0.5), view
        assert share(drawn["grey"][:, view], 0.2), view
        assert share(drawn["sigma"][:, view] > 0, numbers.blur_probability), view
        assert share(drawn["solarise"][:, view], numbers.solarise_probability), view
        assert share(drawn["order"][:, view, 0] != NO_OPERATION, 0.8), view


def test_blur_widths_and_jitter_factors_are_uniform_in_their_ranges(drawn: np.ndarray) -> None:
    sigma = drawn["sigma"][:, 0]
    assert uniform(sigma, 0.1, 2.0)
    for view in (0, 1, 9):
        factors = drawn["factors"][:, view]
        assert uniform(factors[:, BRIGHTNESS], 0.6, 1.4)
        assert uniform(factors[:, CONTRAST], 0.6, 1.4)
        assert uniform(factors[:, SATURATION], 0.8, 1.2)
        assert uniform(factors[:, HUE], -0.1, 0.1)
    moco = ViewSampler(plan_views(ViewsConfig(kind="moco", local_count=0)))
    assert uniform(moco.draw(0, epoch=0, indices=np.arange(DRAWS)).records["factors"][:, 0, SATURATION], 0.6, 1.4)


def test_all_24_orders_of_the_jitter_are_equally_likely(drawn: np.ndarray) -> None:
    orders = drawn["order"][:, 4]
    jittered = orders[orders[:, 0] != NO_OPERATION]
    assert (np.sort(jittered, axis=1) == np.arange(4)).all()
    names, counts = np.unique(jittered, axis=0, return_counts=True)
    assert len(names) == math.factorial(4)
    assert stats.chisquare(counts).pvalue > LEAST_P


def test_parameters_do_not_depend_on_each_other(drawn: np.ndarray) -> None:
    area = drawn["box"][..., 2] * drawn["box"][..., 3]
    columns = np.stack(
        [
            *(drawn["factors"][:, 0, k] for k in range(4)),
            drawn["sigma"][:, 0],
            drawn["flip"][:, 0],
            drawn["grey"][:, 0],
            area[:, 0],
            area[:, 1],  # another view
            drawn["sigma"][:, 0][np.r_[1:DRAWS, 0]],  # another image
        ]
    )
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / math.sqrt(DRAWS)


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 1000),
    index=st.integers(0, 2**63 - 1),
    others=st.lists(st.integers(0, 10**7), max_size=3),
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
)
@settings(max_examples=40, deadline=None)
def test_a_view_depends_on_seed_epoch_image_and_view_alone(
    seed: int, epoch: int, index: int, others: list[int], size: tuple[int, int]
) -> None:
    height, width = size
    full = ViewSampler(plan_views(ViewsConfig()))
    alone = full.draw(seed, epoch=epoch, indices=np.array([index])).place(0, height=height, width=width)
    full.draw(seed + 1, epoch=epoch, indices=np.array([1, 2]))
    together = full.draw(seed, epoch=epoch, indices=np.array([*others, index])).place(
        len(others), height=height, width=width
    )
    fewer = ViewSampler(plan_views(ViewsConfig(local_count=3))).draw(seed, epoch=epoch, indices=np.array([index]))
    assert alone.tobytes() == together.tobytes()
    assert alone[:5].tobytes() == fewer.place(0, height=height, width=width).tobytes()
    corner, extent = alone["box"][:, :2], alone["box"][:, 2:]
    assert (corner >= 0).all()
    assert (extent > 0).all()
    assert (corner + extent <= size).all()


def test_the_stream_is_numpys_philox() -> None:
    fresh = np.random.Generator(np.random.Philox(key=[5, VIEW_STREAM], counter=[0, 11, 7, 0]))
    assert (Philox().at(5, VIEW_STREAM, epoch=7, index=11).random(100) == fresh.random(100)).all()


def test_a_seed_means_the_same_views_in_every_version() -> None:
    draw = ViewSampler(plan_views(ViewsConfig(local_count=1))).draw(7, epoch=3, indices=np.array([5, 11]))
    first, second = (draw.place(row, height=375, width=500) for row in (0, 1))
    assert first["box"].tolist() == [[41, 72, 330, 383], [36, 42, 281, 317], [109, 167, 221, 242]]
    assert first["flip"].tolist() == [True, True, False]
    assert first["order"].tolist() == [[2, 3, 0, 1], [1, 2, 3, 0], [2, 3, 1, 0]]
    assert first["factors"][0].tolist() == pytest.approx([0.8822878, 0.66339546, 1.1131651, 0.048788443])
    assert first["sigma"].tolist() == pytest.approx([1.006911, 0, 1.5330656])
    assert second["box"].tolist() == [[84, 8, 280, 335], [2, 11, 284, 322], [98, 36, 169, 146]]
    assert second["grey"].tolist() == [True, False, False]
    assert second["order"][1].tolist() == [NO_OPERATION] * 4


@pytest.mark.parametrize(("box", "size"), [((10, 20, 90, 120), 64), ((0, 0, 120, 160), 96), ((30, 40, 25, 31), 48)])
def test_a_crop_is_pillows_to_two_levels(box: tuple[int, int, int, int], size: int) -> None:
    pixels = photograph(0, height=120, width=160)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    out = cut(image, box, out=torch.empty(size, size, 3, dtype=torch.uint8).permute(2, 0, 1))
    theirs = torch.from_numpy(np.array(pil_reference.crop(Image.fromarray(pixels), box, size))).permute(2, 0, 1)
    difference = (out.int() - theirs.int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.05
