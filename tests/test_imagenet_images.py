"""Which images a protocol sees, in which order, as which crops and features, whatever the number of processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_tree import write_tree
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from twist.catalog.class_folders import draw_subset, open_tree, read_split, read_subset
from twist.contracts.errors import UserError
from twist.contracts.images import read_image
from twist.contracts.weights import Backbone
from twist.measure.features import Extractor
from twist.transfer.engines.imagenet.engine import labelled_subset
from twist.transfer.engines.imagenet.recipes import ClassifierRecipe, load_recipe
from twist.transfer.engines.plain import Rank, decoded, epoch_batches, extract, ordered_batches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


def small_recipe(*overrides: str) -> ClassifierRecipe:
    overrides = ("size=32", "resize=36", "machine.workers=0", *overrides)
    recipe = load_recipe("semi-10pct", architecture="resnet18", overrides=overrides)
    assert isinstance(recipe, ClassifierRecipe)
    return recipe


def test_every_epoch_sees_each_image_once_on_any_number_of_ranks() -> None:
    order = {"batch_size": 8, "seed": 3, "epoch": 5}
    for world_size in (1, 2, 4):
        ranks = [epoch_batches(22, **order, rank=Rank(rank, world_size, CPU)) for rank in range(world_size)]
        totals = [np.concatenate([batches[step] for batches in ranks]) for step in range(3)]
        assert sorted(np.concatenate(totals[:2]).tolist() + sorted(set(totals[2].tolist()))) == list(range(22))
        # The last total batch of 6 is filled up to equal parts where it does not divide.
        assert [len(total) for total in totals] == [8, 8, 6 if world_size != 4 else 8]
        assert [set(total.tolist()) for total in totals] == [set(b.tolist()) for b in epoch_batches(22, **order)]
    assert not np.array_equal(epoch_batches(22, **order)[0], epoch_batches(22, **{**order, "epoch": 6})[0])


def test_groups_hold_the_same_images_on_any_number_of_ranks() -> None:
    order = {"batch_size": 8, "seed": 3, "epoch": 5, "groups": 4}
    for step in range(3):
        groups = epoch_batches(22, **order)[step].reshape(4, -1)
        for count in (2, 4):
            ranks = [epoch_batches(22, **order, rank=Rank(rank, count, CPU))[step] for rank in range(count)]
            found = [rank.reshape(4 // count, -1)[index].tolist() for index in range(4 // count) for rank in ranks]
            assert found == groups.tolist()


def test_ordered_batches_hold_every_image_once_in_order(tree: Path) -> None:
    val = read_split(tree / "val")
    for index in range(2):
        batches = ordered_batches(len(val), batch_size=2, rank=Rank(index, 2, CPU))
        found = list(decoded(val, small_recipe(), batches))
        assert torch.cat([labels for _, labels in found]).tolist() == val.labels[index::2].tolist()
        assert (found[0][0].shape, found[0][0].dtype) == ((2, 3, 32, 32), torch.uint8)


def test_crops_are_a_pure_function_of_seed_epoch_and_image(tree: Path) -> None:
    train = read_split(tree / "train")

    def pixels(seed: int, epoch: int, batch_size: int) -> dict[int, torch.Tensor]:
        batches = epoch_batches(len(train), batch_size=batch_size, seed=seed, epoch=epoch)
        images = torch.cat([images for images, _ in decoded(train, small_recipe(), batches, crops=(seed, epoch))])
        return dict(zip(np.concatenate(batches).tolist(), images, strict=True))

    state = torch.get_rng_state()
    first, again, other_batch = pixels(0, 1, 4), pixels(0, 1, 4), pixels(0, 1, 7)
    assert torch.equal(torch.get_rng_state(), state), "the crops must not draw from the process's own generator"
    assert all(torch.equal(first[i], again[i]) and torch.equal(first[i], other_batch[i]) for i in first)
    for other in (pixels(0, 2, 4), pixels(1, 1, 4)):
        assert not any(torch.equal(first[i], other[i]) for i in range(4))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_images_are_torchvisions_to_the_bit(interpolation: str, tree: Path) -> None:
    train = read_split(tree / "train")
    mode = InterpolationMode(interpolation)
    theirs = v2.Compose([v2.RandomResizedCrop(32, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()])
    recipe, every = small_recipe(f"interpolation={interpolation}"), np.arange(len(train))
    images, _ = next(decoded(train, recipe, [every], crops=(3, 2)))
    for image, index in zip(images, every, strict=True):
        seed = np.random.SeedSequence([3, 2, index]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            assert torch.equal(image, theirs(read_image(train.path(index))))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_change_neither_pixels_nor_the_sentence(workers: int, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    train, helped = read_split(root / "train"), small_recipe(f"machine.workers={workers}")
    batches = ordered_batches(len(train), batch_size=4)
    for crops in ((0, 0), (0, 1), None):
        passes = (decoded(train, recipe, batches, crops=crops) for recipe in (small_recipe(), helped))
        for ours, theirs in zip(*passes, strict=True):
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    (root / "train" / "class_1" / "train_1_001.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^Cannot read the image [^\n]*train_1_001\.png[^\n]*$"):
        list(decoded(train, helped, batches))


class Means(nn.Module):
    """A network whose features are the means of the channels."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_features_are_kept_by_transform_and_contents(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    extractor = Extractor(Means(), Backbone(architecture="resnet18", method="random"), CPU)

    def path(*overrides: str) -> Path:
        val = read_split(root / "val")
        file = extract(extractor, val, small_recipe(*overrides), folder=tmp_path / "features", title="t")
        assert file.labels.tolist() == val.labels.tolist()
        return file.path

    first = path()
    assert path("machine.feature_batch_size=2") == first
    others = [path("resize=40"), path("interpolation=bicubic")]
    image = root / "val" / "class_0" / "val_0_000.png"
    image.write_bytes((root / "val" / "class_1" / "val_1_000.png").read_bytes())
    assert len({first, path(), *others}) == 4


# ── Trees and lists of labels ──


def test_tree_is_found_directly_and_below_imagenet(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "imagenet").symlink_to(tree)
    for root in (tree, tmp_path):
        train, val = open_tree(root)
        assert (len(train), len(val), train.classes) == (18, 9, ("class_0", "class_1", "class_2"))
        assert train.path(0).name == "train_0_000.png"
        assert train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


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
    small, large = (set(draw_subset(train, share, seed=2).paths.tolist()) for share in (0.2, 0.6))
    assert small < large


def test_a_list_is_read_by_file_names_or_with_the_class_folder(tree: Path, tmp_path: Path) -> None:
    train = read_split(tree / "train")
    subset = draw_subset(train, 0.5, seed=0)
    for lines in (subset.lines(), [line.rpartition("/")[2] for line in subset.lines()]):
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        assert read_subset(train, tmp_path / "list.txt").digest() == subset.digest()
