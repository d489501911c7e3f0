"""`--bench-data` and `--show-views`: figures that mean what they are called, and a sheet one can look at."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pil_reference
import pytest
from photographs import write_folder
from PIL import Image

from twist.contracts.errors import UserError
from twist.pretrain.config import DataConfig, PretrainConfig, RunConfig, ViewsConfig
from twist.pretrain.data import photometric_cpu, view_maker
from twist.pretrain.data.preview import COLOURS, bench, contact_sheet, modes, render
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


def test_the_measurement_has_both_modes_and_cores(config: PretrainConfig) -> None:
    result = bench(config, images=4)
    assert json.loads(json.dumps(result)) == result
    rates = result["images_per_s_core"]
    assert rates.keys() == {"cpu", "device"}
    assert result["images"] == 6
    for name, rate in rates.items():
        low, high = result["spread"][name]
        assert low <= rate <= high
    for wanted, cores in result["cores_for_gpu"].items():
        assert all(cores[name] - 1 < int(wanted) / rates[name] <= cores[name] for name in rates)
    text = render(result)
    for word in ("cpu", "device", "2 × 48² + 4 × 24²", "A GPU that takes 1000 images/s"):
        assert word in text


def counted(monkeypatch: pytest.MonkeyPatch, holder: Any, *names: str) -> dict[str, list[Any]]:
    """The results of every call of these functions from now on."""
    results: dict[str, list[Any]] = {name: [] for name in names}

    def spy(name: str) -> None:
        original = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *a, **k: results[name].append(original(*a, **k)) or results[name][-1])

    for name in names:
        spy(name)
    return results


def test_each_mode_is_the_pipeline_that_it_is_called(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's functions do all of the PIL chain and nothing of ours; the photometric part is CPU mode's alone."""
    from benchmarks import data as benchmark

    monkeypatch.setattr(benchmark, "pil_reference", pil_reference)
    chain = counted(monkeypatch, pil_reference, "decode", "crop", "photometric", "normalise")
    ours = counted(monkeypatch, view_maker, "picture", "cut") | counted(monkeypatch, photometric_cpu, "apply_each")
    images, views = 4, 6
    source = open_images(config.data)
    requests = [Request(0, "mutual_information", np.arange(images) + 1)]
    of_pil = {"decode": images, **dict.fromkeys(("crop", "photometric", "normalise"), images * views)}
    of_ours = {"picture": images, "cut": images * views, "apply_each": 0}
    expected = {"pil": of_pil, "cpu": of_ours | {"apply_each": images * 2}, "device": of_ours}
    works = {"pil": benchmark.pil(source, requests, config.views), **modes(source, requests, config.views)}
    for name, work in works.items():
        work()
        calls = {called: len(results) for called, results in (chain | ours).items()}
        assert calls == dict.fromkeys(calls, 0) | expected[name], name
        for results in (chain | ours).values():
            results.clear()


def test_a_measurement_without_images_is_the_users_error(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"x")
    broken = config.model_copy(update={"data": DataConfig(root=str(tmp_path))})
    with pytest.raises(UserError, match="no readable one"):
        bench(broken)


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


def test_a_sheet_of_more_images_than_there_are_is_the_users_error(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ask for 1 to 6, not 7"):
        contact_sheet(config, 7, tmp_path / "views.png")
    with pytest.raises(UserError, match=r"ends in \.png"):
        contact_sheet(config, 1, tmp_path / "views.jpg")
