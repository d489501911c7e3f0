"""`--show-views`, a sheet one can look at; and the benchmark of the pipeline measures what it names."""

from pathlib import Path
from typing import Any

import numpy as np
import pil_reference
import pytest
from photographs import write_folder
from PIL import Image

from benchmarks import data as benchmark
from twist.contracts.errors import UserError
from twist.pretrain.config import DataConfig, PretrainConfig, RunConfig, ViewsConfig
from twist.pretrain.data import loader, photometric_cpu
from twist.pretrain.data.preview import COLOURS, contact_sheet
from twist.pretrain.data.source import Request, open_images


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    root = write_folder(tmp_path_factory.mktemp("images"), 5, height=60, width=80)
    (root / "broken.jpg").write_bytes(b"x")
    return PretrainConfig(
        data=DataConfig(root=str(root), bad_image_share=0.5),
        run=RunConfig(epochs=1),
        views=ViewsConfig(global_size=48, local_size=24, local_count=4),
    )


def test_each_mode_is_the_pipeline_that_it_is_called(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's functions do all of the PIL chain and nothing of ours; the photometric part is CPU mode's alone."""
    calls: dict[str, int] = {}

    def count(holder: Any, name: str) -> None:
        original = getattr(holder, name)
        calls[name] = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(holder, name, counted)

    monkeypatch.setattr(benchmark, "pil_reference", pil_reference)
    for holder, *names in (
        (pil_reference, "crop", "photometric", "normalise"), (loader, "cut"), (photometric_cpu, "apply_each"),
    ):  # fmt: skip
        for name in names:
            count(holder, name)
    images, views = 4, 6
    source, requests = open_images(config.data), [Request(0, "mutual_information", np.arange(images) + 1)]
    works = {name: benchmark.ours(source, requests, config.views, name) for name in ("cpu", "device")}
    works["pil"] = benchmark.pil(source, requests, config.views)
    expected = {
        "pil": dict.fromkeys(("crop", "photometric", "normalise"), images * views),
        "cpu": {"cut": images * views, "apply_each": images * 2},
        "device": {"cut": images * views},
    }
    for name, work in works.items():
        calls.update(dict.fromkeys(calls, 0))
        work()
        assert calls == dict.fromkeys(calls, 0) | expected[name], name


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
    (tmp_path / "broken.jpg").write_bytes(b"x")
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "broken.jpg").rename(alone / "broken.jpg")
    with pytest.raises(UserError, match="no readable one"):
        contact_sheet(config.model_copy(update={"data": DataConfig(root=str(alone))}), 1, tmp_path / "views.png")
