"""The worked example of `docs/extending.md`, section "A new data set", followed to the letter."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_requests import ROOT, EngineUser, weights_maker
from PIL import Image

from twist.catalog.check import check, has_errors, identify_data, render, require_data
from twist.catalog.data_sets import DATA_SETS, DataSet
from twist.contracts.errors import UserError
from twist.transfer import protocols

TEXT = (ROOT / "docs" / "extending.md").read_text().partition("## A new data set")[2].partition("\n## ")[0]


ROW, PROTOCOL = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL))
(CONFIG,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def meadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with the example's images, and the example's row in the table."""
    values = ROW["sets"]["meadow"]
    monkeypatch.setitem(DATA_SETS, "meadow", DataSet.model_validate({"name": "meadow", **values}))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "meadow" / kind / split).mkdir(parents=True)
        for name in ("a", "b", "c"):
            picture = Image.fromarray(rng.integers(0, 255, (72, 96, 3), dtype=np.uint8))
            picture.save(tmp_path / f"meadow/images/{split}/{name}.jpg")
            mask = np.repeat(np.repeat(rng.choice([0, 1, 2, 255], (9, 12)), 8, 0), 8, 1)
            Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"meadow/masks/{split}/{name}.png")
    return tmp_path


def test_a_new_row_is_checked_required_and_identified(meadow: Path) -> None:
    found = check("meadow", meadow, progress=False)
    assert not has_errors(found), render(found)
    assert re.search("grass [0-9.]+ %, .* in 3 masks", render(found))
    assert require_data(("meadow",), meadow, task="segmentation", scale="full") is None
    before = identify_data(("meadow",), meadow)
    assert (before or "").startswith("meadow ")
    mask = meadow / "meadow/masks/val/b.png"
    Image.fromarray(np.full((72, 96), 3, np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"b\.png holds the value 3: classes are 0 to 2.*data check meadow"):
        require_data(("meadow",), meadow, task="segmentation", scale="full")
    mask.unlink()
    assert "lacks 1 of the 3 *.png of val, b the first" in render(check("meadow", meadow, progress=False))
    (meadow / "meadow/images/val/b.jpg").unlink()
    assert identify_data(("meadow",), meadow) not in (None, before)


@pytest.mark.slow
def test_a_new_row_is_trained_on(meadow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = PROTOCOL["meadow-fcn-d8"]
    config = tmp_path / values["config"]
    config.write_text(CONFIG.replace("./voc12aug", f"{ROOT}/configs/mmseg/voc12aug"))
    row = protocols.find_protocol("voc12aug-fcn-d8-20k")  # of the same evaluation
    assert (row.engine, row.task) == (values["engine"], values["evaluation"])
    row = replace(row, name="meadow-fcn-d8", config=str(config), data=tuple(values["data"]), gpus=values["gpus"])
    monkeypatch.setitem(protocols.PROTOCOLS, row.name, row)
    user = EngineUser("mmseg", meadow, weights_maker(tmp_path, "mmseg"), tmp_path / "run")
    quick = ["iterations=2", "train_dataloader.batch_size=2", "model.data_preprocessor.size=[65, 65]"]
    quick += [f"model.{head}_head.channels=16" for head in ("decode", "auxiliary")]
    quick += [f"{loader}_dataloader.num_workers=0" for loader in ("train", "val")]
    quick += [f"train_dataloader.dataset.pipeline.{part}" for part in ("2.scale=[128, 80]", "3.crop_size=[65, 65]")]
    resolved = user.resolve(row.name, *quick)
    assert resolved.config.model.decode_head.num_classes == 3
    assert resolved.config.val_dataloader.dataset.data_prefix.img_path == "images/val"
    result = user.run(row.name, *quick)
    assert list(result.metrics) == list(row.metrics)
    assert [len(result.curves.read_text().splitlines())] == [2]
