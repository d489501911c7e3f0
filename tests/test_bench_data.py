"""What `--bench-data` and `--show-views` give: the figures' names and meaning, and a sheet one can look at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from photographs import write_folder
from PIL import Image

from contracts.errors import UserError
from pretrain.bench_data import bench, render
from pretrain.config import DataConfig, PretrainConfig, RunConfig, ViewsConfig
from pretrain.contact_sheet import contact_sheet


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    root = write_folder(tmp_path_factory.mktemp("images"), 5, height=60, width=80)
    (root / "broken.jpg").write_bytes(b"x")
    return PretrainConfig(
        data=DataConfig(root=str(root), bad_image_share=0.5),
        run=RunConfig(epochs=1),
        views=ViewsConfig(global_size=48, local_size=24, local_count=4),
    )


def test_the_measurement_has_all_modes_shares_and_cores(config: PretrainConfig) -> None:
    result = bench(config, images=4)
    assert json.loads(json.dumps(result)) == result
    rates = result["images_per_s_core"]
    assert set(rates) == {"pil", "cpu", "device"}
    assert result["images"] == 4
    for name, share in result["shares"].items():
        assert sum(share.values()) == pytest.approx(1)
        assert ("photometric" in share) == (name != "device")
        low, high = result["spread"][name]
        assert low <= rates[name] <= high
    assert result["speedup"]["cpu"] == pytest.approx(rates["cpu"] / rates["pil"])
    for rate, cores in result["cores_for_gpu"].items():
        assert all(cores[name] - 1 < int(rate) / rates[name] <= cores[name] for name in rates)
    text = render(result)
    for word in ("PIL chain", "cpu", "device", "2 × 48² + 4 × 24²", "A GPU that takes 1000 images/s"):
        assert word in text


def test_a_measurement_without_images_is_the_users_error(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"x")
    broken = config.model_copy(update={"data": DataConfig(root=str(tmp_path))})
    with pytest.raises(UserError, match="None of the 1 images can be read"):
        bench(broken)


def test_the_contact_sheet_shows_each_view_beside_its_image(config: PretrainConfig, tmp_path: Path) -> None:
    path = contact_sheet(config, 3, tmp_path / "views.png")
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    height, width = pixels.shape[:2]
    assert width > 4 * 96 + 2 * 48, "small views are shown twice as large, so that labels fit"
    assert height >= 3 * (96 + 16)
    # Paper, ink and pictures in each of the three rows.
    for row in np.array_split(pixels, 3):
        assert (row == 255).all(axis=2).mean() > 0.1
        assert row.std() > 20
    assert contact_sheet(config, 3, tmp_path / "again.png").read_bytes() == path.read_bytes()


def test_a_sheet_of_more_images_than_there_are_is_the_users_error(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ask for 1 to 6, not 7"):
        contact_sheet(config, 7, tmp_path / "views.png")
    with pytest.raises(UserError, match=r"ends in \.png"):
        contact_sheet(config, 1, tmp_path / "views.jpg")
