"""What `--bench-data` and `--show-views` give: figures that mean what they are called, and a sheet one can look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photographs import write_folder
from PIL import Image

from twist.contracts.errors import UserError
from twist.pretrain.config import DataConfig, PretrainConfig, RunConfig, ViewsConfig
from twist.pretrain.data import photometric_cpu, pil_reference, view_maker
from twist.pretrain.data.bench_data import bench, modes, render, shares_of_ours
from twist.pretrain.data.contact_sheet import contact_sheet
from twist.pretrain.data.source import open_images


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


def counted(monkeypatch: pytest.MonkeyPatch, holder: Any, *names: str) -> dict[str, list[Any]]:
    """The results of every call of these functions from now on."""
    results: dict[str, list[Any]] = {name: [] for name in names}

    def spy(name: str) -> None:
        original = getattr(holder, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            results[name].append(original(*args, **kwargs))
            return results[name][-1]

        monkeypatch.setattr(holder, name, called)

    for name in names:
        spy(name)
    return results


def test_each_mode_is_the_pipeline_that_it_is_called(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's functions do all of the PIL chain and nothing of ours; the photometric part is CPU mode's alone."""
    chain = counted(monkeypatch, pil_reference, "decode", "crop", "photometric", "normalise")
    ours = counted(monkeypatch, view_maker, "picture", "cut") | counted(monkeypatch, photometric_cpu, "apply_each")
    images, views = 4, 6
    source = open_images(config.data)
    of_pil = {"decode": images, **dict.fromkeys(("crop", "photometric", "normalise"), images * views)}
    of_ours = {"picture": images, "cut": images * views, "apply_each": 0}
    expected = {"pil": of_pil, "cpu": of_ours | {"apply_each": images * 2}, "device": of_ours}
    works = modes(source, np.arange(images) + 1, config.views)
    assert works.keys() == expected.keys()
    for name, work in works.items():
        work()
        calls = {called: len(results) for called, results in (chain | ours).items()}
        assert calls == dict.fromkeys(calls, 0) | expected[name], name
        for results in (chain | ours).values():
            results.clear()


def test_shares_are_of_the_decode_that_the_modes_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large photographs, of which the draws let some be decoded at a half and some at more or less."""
    root = write_folder(tmp_path, 4, height=700, width=900)
    source = open_images(DataConfig(root=str(root)))
    views, chosen = ViewsConfig(global_size=112, local_size=48, local_count=4), np.arange(4)
    found = counted(monkeypatch, view_maker, "divisor", "decode_reduced")
    modes(source, chosen, views)["device"]()
    divisors, shapes = list(found["divisor"]), [image.shape for image in found["decode_reduced"]]
    assert len(set(divisors)) > 1, "all images alike would not tell"
    assert len(shapes) == sum(reduction > 1 for reduction in divisors) > 0
    for results in found.values():
        results.clear()
    shares = shares_of_ours(source, chosen, views)
    assert found["divisor"] == divisors
    assert [image.shape for image in found["decode_reduced"]] == shapes
    assert all(sum(share.values()) == pytest.approx(1) for share in shares.values())


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
