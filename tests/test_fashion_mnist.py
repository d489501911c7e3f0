"""The Fashion-MNIST tree: from idx files to an ImageNet-like folder that the protocols read, once and whole."""

import gzip
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from twist.catalog.class_folders import open_tree
from twist.contracts.errors import UserError
from twist.contracts.images import read_image

PATH = Path(__file__).parent.parent / "benchmarks" / "fashion_mnist" / "prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fashion_mnist_prepare", PATH)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    # The real files' form at a hundredth of their size.
    module.SPLITS = {"train": ("train", 600), "val": ("t10k", 100)}
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 600), ("t10k", 100)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return folder


def test_tree_holds_every_image_padded_and_its_label(prepare: ModuleType, source: Path, tmp_path: Path) -> None:
    about = prepare.write_tree(source, tmp_path / "root", package={"version": "1"})
    assert about["counts"] == {"train": 600, "val": 100}
    train, val = open_tree(tmp_path / "root")
    assert (len(train), len(val)) == (600, 100)
    assert set(train.classes) == set(prepare.CLASSES)
    pixels = read_image(tmp_path / "root" / "imagenet" / "train" / "trouser" / "train_00021.png")
    assert pixels.shape == (3, 32, 32)
    expected = prepare.read_idx(source / "train-images-idx3-ubyte.gz")[21]
    assert all(np.array_equal(channel[2:-2, 2:-2], expected) for channel in pixels.numpy())
    assert pixels.sum() == 3 * int(expected.sum()), "the border is black"


def test_damaged_package_leaves_nothing_behind(prepare: ModuleType, source: Path, tmp_path: Path) -> None:
    file = source / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        prepare.write_tree(source, tmp_path / "root", package={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package"]
