"""`--show-views`, a sheet one can look at."""

from pathlib import Path

import numpy as np
import pytest
from photographs import write_folder
from PIL import Image

from twist.contracts.errors import UserError
from twist.pretrain.config import DataConfig, PretrainConfig, RunConfig, ViewsConfig
from twist.pretrain.data.preview import COLOURS, contact_sheet


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    root = write_folder(tmp_path_factory.mktemp("images"), 5, height=60, width=80)
    (root / "broken.jpg").write_bytes(b"x")
    return PretrainConfig(
        data=DataConfig(root=str(root), bad_image_share=0.5),
        run=RunConfig(epochs=1),
        views=ViewsConfig(global_size=48, local_size=24, local_count=4),
    )


def test_the_contact_sheet_shows_each_view_after_its_image(config: PretrainConfig, tmp_path: Path) -> None:
    path = contact_sheet(config, 3, tmp_path / "views.png")
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    height, width = pixels.shape[:2]
    assert width > 7 * 96, "the image and six views, the small ones enlarged"
    assert height > 3 * 96
    for row in np.array_split(pixels, 3):
        assert (row == 255).all(axis=2).mean() > 0.05
        assert row.std() > 20
        for colour in COLOURS:  # frames of the views, outlines of the crops
            assert (row == colour).all(axis=2).sum() > 100
    assert contact_sheet(config, 3, tmp_path / "again.png").read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="ask for 1 to 6, not 7"):
        contact_sheet(config, 7, tmp_path / "views.png")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "broken.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="no readable one"):
        contact_sheet(config.model_copy(update={"data": DataConfig(root=str(alone))}), 1, tmp_path / "views.png")
