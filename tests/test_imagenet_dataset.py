"""Which images a protocol sees, in which order, and what it says about a tree that is not right."""

from pathlib import Path

import numpy as np
import pytest
from imagenet_tree import write_tree

from twist.catalog.class_folders import draw_subset, list_lines, open_tree, read_split, read_subset
from twist.contracts.errors import UserError
from twist.transfer.engines.imagenet.images import labelled_subset
from twist.transfer.engines.imagenet.recipes import ClassifierRecipe, load_recipe


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


def small_recipe(*overrides: str) -> ClassifierRecipe:
    recipe = load_recipe(
        "semi-10pct", architecture="resnet18", overrides=("size=32", "resize=36", "machine.workers=0", *overrides)
    )
    assert isinstance(recipe, ClassifierRecipe)
    return recipe


def test_tree_is_found_directly_and_below_imagenet(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "imagenet").symlink_to(tree)
    for root in (tree, tmp_path):
        train, val = open_tree(root)
        assert (len(train), len(val), train.classes) == (18, 9, ("class_0", "class_1", "class_2"))
        assert train.path(0).name == "train_0_000.png"
        assert train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_digest_is_of_the_images_not_of_the_folder(tree: Path, tmp_path: Path) -> None:
    other = write_tree(tmp_path / "elsewhere")
    assert read_split(tree / "train").digest() == read_split(other / "train").digest()
    (other / "train" / "class_0" / "train_0_000.png").rename(other / "train" / "class_0" / "train_0_999.png")
    assert read_split(tree / "train").digest() != read_split(other / "train").digest()


def test_missing_tree_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"no ImageNet-like tree at .*train/<class>/ and val/<class>/"):
        open_tree(tmp_path)


def test_empty_class_and_unequal_classes_are_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    with pytest.raises(UserError, match="no class folder at"):
        read_split(root / "absent")
    with pytest.raises(UserError, match="holds no class folders"):
        read_split(root / "train" / "class_0")
    (root / "train" / "zebra").mkdir()
    with pytest.raises(UserError, match=r"train/zebra holds no images"):
        open_tree(root)
    (root / "train" / "class_0" / "train_0_000.png").rename(root / "train" / "zebra" / "a.png")
    with pytest.raises(UserError, match="1 only in train/, 0 only in val/; zebra is only in train/"):
        open_tree(root)
    (root / "train" / "zebra").rename(root / "val" / "zebra")
    with pytest.raises(UserError, match="zebra is only in val/"):
        open_tree(root)


def test_list_names_images_with_or_without_class_folder(tree: Path, tmp_path: Path) -> None:
    train = read_split(tree / "train")
    names = tmp_path / "1percent.txt"
    names.write_text("train_2_001.png\nclass_0/train_0_004.png\n\n")
    subset = read_subset(train, names)
    assert [subset.path(i).name for i in range(2)] == ["train_2_001.png", "train_0_004.png"]
    assert subset.labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("train_0_000.png\nn01440764_1.JPEG\nn01440764_2.JPEG\n", r"names 2 files that are not in .*n01440764_1\.JPEG"),
        ("train_0_000.png\ntrain_0_000.png\n", "names 1 files twice"),
        ("\n", "is empty"),
    ],
)
def test_wrong_list_is_refused(tree: Path, tmp_path: Path, lines: str, sentence: str) -> None:
    (tmp_path / "1percent.txt").write_text(lines)
    with pytest.raises(UserError, match=sentence):
        read_subset(read_split(tree / "train"), tmp_path / "1percent.txt")


def test_ambiguous_file_name_is_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    for label in (0, 1):
        folder = root / "train" / f"class_{label}"
        (folder / f"train_{label}_000.png").rename(folder / "same.png")
    (tmp_path / "1percent.txt").write_text("same.png\n")
    with pytest.raises(UserError, match=r"several classes hold a file same\.png"):
        read_subset(read_split(root / "train"), tmp_path / "1percent.txt")


def test_missing_list_says_how_to_get_one_and_the_seed_needs_none(tree: Path) -> None:
    train = read_split(tree / "train")
    with pytest.raises(
        UserError, match=r"There is no 10percent.txt in .*twist data prepare imagenet.*labels_from=seed"
    ):
        labelled_subset(train, small_recipe())
    assert len(labelled_subset(train, small_recipe("labels_from=seed"))) == 3


def test_drawn_subset_is_balanced_and_of_its_seed(tree: Path) -> None:
    train = read_split(tree / "train")
    half = draw_subset(train, 0.5, seed=0)
    assert np.bincount(half.labels).tolist() == [3, 3, 3]
    assert half.digest() == draw_subset(train, 0.5, seed=0).digest()
    assert half.digest() != draw_subset(train, 0.5, seed=1).digest()


def test_a_written_list_is_read_as_the_same_subset(tree: Path, tmp_path: Path) -> None:
    """By bare file names where they are unique, as SimCLR's lists; else with the class folder."""
    other = write_tree(tmp_path / "other")
    (other / "train" / "class_0" / "train_0_000.png").rename(other / "train" / "class_0" / "train_1_000.png")
    for root, first in ((tree, "train_0_"), (other, "class_0/train_")):
        train = read_split(root / "train")
        subset = draw_subset(train, 0.5, seed=0)
        lines = list_lines(train, subset)
        assert lines[0].startswith(first)
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        assert read_subset(train, tmp_path / "list.txt").digest() == subset.digest()


def test_a_smaller_share_of_a_seed_lies_within_a_larger_one(tree: Path) -> None:
    train = read_split(tree / "train")
    small, large = (set(draw_subset(train, share, seed=2).paths.tolist()) for share in (0.2, 0.6))
    assert small < large


def test_pictured_images_are_spread_over_the_classes(tree: Path) -> None:
    val = read_split(tree / "val")
    assert val.spread(3).paths.tolist() == [val.paths[0], val.paths[4], val.paths[8]]
    assert val.spread(3).labels.tolist() == [0, 1, 2]
    assert val.spread(50).digest() == val.digest()
