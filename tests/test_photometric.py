"""The photometric part against Pillow, operation by operation and as a whole, and its two forms against each other.

The bounds are in levels of 255 and the ones that `pretrain/data/photometric.py` states.
"""

import numpy as np
import pil_reference as pil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import photograph
from PIL import Image
from torch import Tensor

from twist.contracts.weights import IMAGENET_MEAN, IMAGENET_STD
from twist.pretrain.config import ViewsConfig
from twist.pretrain.data import photometric as fast
from twist.pretrain.data import photometric_cpu as on_cpu
from twist.pretrain.data.views import BRIGHTNESS, CONTRAST, HUE, NO_OPERATION, SATURATION, VIEW, ViewSampler, plan_views

SIDE = 96
NOISE, PHOTOGRAPH = 0, 1
EDGE = 6


def picture(kind: int) -> Image.Image:
    if kind == NOISE:
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    return Image.fromarray(photograph(5, height=SIDE, width=SIDE))


def levels(image: Image.Image) -> Tensor:
    """(1, 3, P) float32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].flatten(2).float()


def one(value: float) -> Tensor:
    return torch.full((1, 1, 1), value)


def difference(ours: Tensor, theirs: Image.Image) -> Tensor:
    return (ours.reshape(1, 3, -1) - levels(theirs)).abs()


def blurred(image: Image.Image, kernel: Tensor) -> Tensor:
    return fast.blur(levels(image).unflatten(2, image.size[::-1]), kernel)


def inside(apart: Tensor) -> Tensor:
    return apart.view(3, SIDE, SIDE)[:, EDGE:-EDGE, EDGE:-EDGE]


@pytest.mark.parametrize("kind", [NOISE, PHOTOGRAPH])
@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_brightness_contrast_and_saturation_are_pillows(kind: int, factor: float) -> None:
    image = picture(kind)
    for operation, shares in ((BRIGHTNESS, (0.0, 0.0)), (CONTRAST, (0.0, 1 - factor)), (SATURATION, (1 - factor, 0.0))):
        ours = fast.mix(levels(image), one(factor), one(shares[0]), one(shares[1]))
        assert difference(ours, pil.jitter(image, operation, factor)).max() <= 1.5, operation
    if (kind, factor) == (PHOTOGRAPH, 0.6):  # the bound tells one from the other
        assert difference(ours, pil.jitter(image, CONTRAST, factor)).max() > 10


@pytest.mark.parametrize("factor", [-0.1, 0.0, 0.05])
def test_hue_is_pillows_to_its_whole_levels(factor: float) -> None:
    for kind, mean, most in ((NOISE, 2, 18), (PHOTOGRAPH, 0.5, 6)):
        image = picture(kind)
        apart = difference(fast.shift_hue(levels(image), 6 * factor), pil.jitter(image, HUE, factor))
        assert apart.mean() <= mean
        assert apart.max() <= most


@given(rgb=st.tuples(*[st.integers(0, 255)] * 3), shift=st.floats(-1, 1, allow_nan=False, width=32))
@settings(max_examples=200, deadline=None)
def test_hue_equals_the_textbook_conversion(rgb: tuple[int, int, int], shift: float) -> None:
    import colorsys

    hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in rgb))
    theirs = colorsys.hsv_to_rgb((hue + shift / 6) % 1, saturation, value)
    ours = fast.shift_hue(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1), shift).flatten() / 255
    assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-6)


def test_greyscale_is_pillows() -> None:
    image = picture(NOISE)
    assert difference(fast.luma(levels(image)).expand(-1, 3, -1), pil.grey(image)).max() <= 0.6


@pytest.mark.parametrize("kind", [NOISE, PHOTOGRAPH])
@pytest.mark.parametrize("sigma", [0.1, 0.9, 1.42, 2.0])
def test_blur_is_pillows_inside_and_near_it_at_the_edge(kind: int, sigma: float) -> None:
    image = picture(kind)
    kernel = torch.from_numpy(fast.blur_kernels(np.array([sigma]))).float()
    apart = difference(blurred(image, kernel), pil.blur(image, sigma))
    assert inside(apart).max() <= 3
    assert apart.max() <= 30
    assert apart.mean() <= 1.2


def test_the_blur_bound_tells_a_true_gaussian_and_a_wrong_sigma() -> None:
    image = picture(NOISE)
    offset = torch.arange(-6, 7)
    gaussian = torch.softmax(-(offset**2) / (2 * 0.9**2), 0)[None]
    wider = torch.from_numpy(fast.blur_kernels(np.array([1.0]))).float()
    for kernel in (gaussian, wider):
        apart = difference(blurred(image, kernel), pil.blur(image, 0.9))
        assert inside(apart).max() > 3


@given(sigma=st.lists(st.floats(0, 4, allow_nan=False), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_blur_kernels_have_sum_one_and_the_asked_variance(sigma: list[float]) -> None:
    kernels = fast.blur_kernels(np.array(sigma))
    offset = np.arange(kernels.shape[1]) - kernels.shape[1] // 2
    assert np.allclose(kernels.sum(1), 1)
    assert np.allclose(kernels @ offset, 0, atol=1e-9)
    assert np.allclose(kernels @ offset**2, np.square(sigma), atol=1e-9)


@given(seed=st.integers(0, 2**32 - 1), side=st.sampled_from([8, 24, 75]), sigma=st.sampled_from([2.0, 3.4]))
@settings(max_examples=40, deadline=None)
def test_any_draw_is_the_same_on_a_cpu(seed: int, side: int, sigma: float) -> None:
    """Whatever is drawn, on whatever pixels: white noise has the sharpest edges and the widest range. A wide blur has
    more taps than are summed at once."""
    generator = np.random.default_rng(seed)
    pixels = torch.from_numpy(generator.integers(0, 256, (4, side, side, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    plan = plan_views(ViewsConfig(global_size=side, blur_sigma=(0.1, sigma)))
    views = ViewSampler(plan).draw(seed, epoch=0, indices=np.arange(1)).records[0, :4]
    at_once = fast.apply(pixels, fast.prepare(views))
    ours = torch.empty_like(at_once)
    on_cpu.apply_each(pixels, views, ours)
    # A level on the edge of the solarisation is inverted on one way only.
    assert ((at_once - ours).abs() > 2e-5).float().mean() < 1e-3


def test_solarise_is_pillows_on_every_level() -> None:
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))
    assert difference(fast.solarise(levels(image)), pil.solarise(image)).max() == 0


def test_normalise_is_torchvisions_and_denormalise_its_inverse() -> None:
    image = picture(PHOTOGRAPH)
    untouched = np.zeros(1, dtype=VIEW)
    untouched["order"] = NO_OPERATION
    pixels = levels(image).view(1, 3, SIDE, SIDE)
    ours = fast.apply(pixels.to(torch.uint8), fast.prepare(untouched))
    assert torch.allclose(ours[0], pil.normalise(image), atol=1e-6)
    assert torch.equal(fast.denormalise(ours).float(), pixels)


def drawn(images: int = 12) -> np.ndarray:
    """Records of many views of one size, with every operation among them."""
    sampler = ViewSampler(plan_views(ViewsConfig(global_size=SIDE)))
    records = sampler.draw(3, epoch=0, indices=np.arange(images)).records[:, :4].reshape(-1)
    assert records["flip"].any()
    assert records["grey"].any()
    assert records["solarise"].any()
    return records


def crops(count: int, side: int = SIDE) -> Tensor:
    pixels = np.stack([photograph(seed, height=side, width=side) for seed in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_the_compiled_numbers_are_the_others() -> None:
    """They stand there twice: what is compiled is kept until its own file changes."""
    assert on_cpu._OPERATIONS == (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    assert np.array_equal(np.array(on_cpu._LUMA), np.array(fast.LUMA, np.float32))
    assert (on_cpu._WHITE, on_cpu._SOLARISE_FROM) == (fast.WHITE, fast.SOLARISE_FROM)
    assert (tuple(on_cpu._MEAN), tuple(on_cpu._STD)) == (IMAGENET_MEAN, IMAGENET_STD)


def test_a_view_is_the_same_in_any_company() -> None:
    views = drawn()
    pictures = crops(len(views))
    together, alone = torch.empty(len(views), 3, SIDE, SIDE), torch.empty(1, 3, SIDE, SIDE)
    on_cpu.apply_each(pictures, views, together)
    for row in (0, 5, 11):
        one_row = slice(row, row + 1)
        on_cpu.apply_each(pictures[one_row], views[one_row], alone)
        assert torch.equal(alone[0], together[row])


def test_the_whole_chain_is_pillows() -> None:
    views = drawn()
    pictures = crops(len(views))
    ours = fast.denormalise(fast.apply(pictures, fast.prepare(views))).float()
    theirs = torch.cat(
        [levels(pil.photometric(Image.fromarray(p.permute(1, 2, 0).numpy()), v)) for p, v in zip(pictures, views)]
    )
    apart = (ours.flatten(2) - theirs).abs().mean(dim=(1, 2))
    solarised = torch.from_numpy(views["solarise"])
    assert apart[~solarised].max() <= 2
    # Solarise tears apart what was one level apart around 128.
    assert apart[solarised].max() <= 6


@pytest.mark.parametrize("field", ["order", "turned", "flip", "grey", "sigma", "solarise"])
def test_the_chain_test_notices_what_is_left_out(field: str) -> None:
    views = drawn()
    pictures = crops(len(views))
    wrong = views.copy()
    if field == "turned":  # the order of the jitter matters
        wrong["order"] = views["order"][:, ::-1]
    else:
        wrong[field] = NO_OPERATION if field == "order" else np.zeros((), VIEW[field])
    right = fast.denormalise(fast.apply(pictures, fast.prepare(views))).float()
    left_out = fast.denormalise(fast.apply(pictures, fast.prepare(wrong))).float()
    assert (right - left_out).abs().mean(dim=(1, 2, 3)).max() > (1 if field == "turned" else 6)
