"""`twist features`: dense features of one's own pictures, and their principal components as colours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from twist.cli import app
from twist.contracts.networks import build_backbone
from twist.transfer.features import features, principal_colours


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "r18.pth"
    torch.save(build_backbone("resnet18").state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, (width, height) in {"tall.png": (48, 96), "wide.png": (100, 60)}.items():
        pixels = np.full((height, width, 3), (200, 40, 40), np.uint8)
        pixels[: height // 2] = (30, 60, 220)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_maps_keep_the_proportions_of_their_pictures(weights: Path, images: Path) -> None:
    tall, wide = features(weights, sorted(images.iterdir()), size=96)
    assert (tall.shape, wide.shape) == ((512, 6, 3), (512, 4, 6))


def test_the_archive_has_what_python_gives_and_the_sheet_a_column_for_each_weights(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    def run(*arguments: object) -> None:
        result = CliRunner().invoke(app, ["features", *map(str, arguments), "--size", "96"], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    run(weights, images, "--output", tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as stored:
        for path, one in zip(sorted(images.iterdir()), features(weights, sorted(images.iterdir()), size=96)):
            np.testing.assert_array_equal(stored[str(path)], one.numpy())
    run(weights, weights, images, "--pca", "--output", tmp_path / "f.png")
    sheet = np.asarray(Image.open(tmp_path / "f.png"))
    assert sheet.shape[1] == 3 * 48 + 2 * 4
    np.testing.assert_array_equal(sheet[20:, 52:100], sheet[20:, 104:152])


def test_the_first_colour_is_the_direction_in_which_patches_differ_most() -> None:
    maps = [torch.zeros(5, 4, 4), torch.zeros(5, 2, 3)]
    maps[0][2, :, 2:] = 8.0  # halves along one feature: the first component
    maps[1][2], maps[1][4, 0, 0] = 4.0, 0.5
    left, other = principal_colours(maps)
    assert (left.shape, other.shape) == ((3, 4, 4), (3, 2, 3))
    assert (left[0, :, :2] == 0).all()
    assert (left[0, :, 2:] == 1).all()
    assert other[0].mean() == pytest.approx(0.5, abs=0.05)
