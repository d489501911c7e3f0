"""The loader: the same pixels whatever workers, ranks and resume; sources; images that cannot be read."""

import hashlib
import io
import itertools
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pil_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import jpeg, photograph, write_folder
from PIL import Image

from twist.contracts.errors import UsageError, UserError
from twist.contracts.images import MAX_PIXELS, UnreadableImage, decode
from twist.pretrain.config import DataConfig, PretrainConfig, RunConfig, ViewsConfig
from twist.pretrain.data import loader as loader_module
from twist.pretrain.data import source
from twist.pretrain.data.loader import BUFFERS, Batch, ViewLoader, ViewMaker, decode_reduced, divisor, upright_size
from twist.pretrain.data.photometric import denormalise
from twist.pretrain.data.source import ImageFiles, Images, ImageStream, RankShare, Request, image_number, open_images
from twist.pretrain.data.views import ViewSampler, plan_views

VIEWS = ViewsConfig(global_size=32, local_size=16, local_count=3)
IMAGES = 24
_EXPECTED: dict[int, dict[int, bytes]] = {}  # by epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), IMAGES, height=48, width=64, classes=3)


@pytest.fixture(scope="module")
def images(root: Path) -> Images:
    return open_images(DataConfig(root=str(root)))


def loader(images: Images, *, rank: int = 0, world_size: int = 1, **changes: Any) -> ViewLoader:
    """`changes` are of the config's sections data and run."""
    values = {"batch_size": 4, "seed": 3, "bad_image_share": 0.5, "workers": 0, **changes}
    run = {name: values.pop(name) for name in ("batch_size", "seed")}
    config = PretrainConfig(data=DataConfig(root="x", **values), run=RunConfig(epochs=1, **run), views=VIEWS)
    return ViewLoader(images, config, rank=rank, world_size=world_size)


def pixels(batches: Iterator[Batch]) -> dict[int, bytes]:
    """The bytes of all views of each image, by image number."""
    found: dict[int, bytes] = {}
    for batch in batches:
        size = len(batch.indices)
        for place, index in enumerate(batch.indices.tolist()):
            found[index] = b"".join(group[place::size].numpy().tobytes() for group in batch.views)
    return found


def test_views_are_the_published_chains(images: Images) -> None:
    batch = next(loader(images).epoch(2))
    views = plan_views(VIEWS)
    draw = ViewSampler(views).draw(3, epoch=2, indices=batch.indices.numpy())
    apart = []
    for place, index in enumerate(batch.indices.tolist()):
        image = pil_reference.decode(images.encoded(index))
        records = draw.place(place, height=48, width=64)
        theirs = pil_reference.views_of(image, records, [view.size for view in views])
        ours = [*batch.views[0][place::4], *batch.views[1][place::4]]
        for mine, pillows, record in zip(ours, theirs, records):
            if not record["solarise"]:
                apart.append((denormalise(mine).float() - denormalise(pillows).float()).abs().mean().item())
    assert len(apart) >= 16
    assert max(apart) < 4
    assert np.mean(apart) < 1.5


@given(
    epoch=st.integers(0, 3),
    world_size=st.sampled_from([1, 2, 4]),
    batch_size=st.sampled_from([1, 2, 3, 6]),
    pipeline=st.sampled_from(["device", "cpu"]),
)
@settings(max_examples=8, deadline=None)
def test_pixels_do_not_depend_on_ranks_or_batch(
    images: Images, epoch: int, world_size: int, batch_size: int, pipeline: str
) -> None:
    """The other pipeline gives the same bits, too."""
    if epoch not in _EXPECTED:
        _EXPECTED[epoch] = pixels(loader(images, batch_size=1).epoch(epoch))
    seen: dict[int, bytes] = {}
    for rank in range(world_size):
        one = loader(images, batch_size=batch_size, world_size=world_size, rank=rank, pipeline=pipeline)
        found = pixels(one.epoch(epoch))
        assert not seen.keys() & found.keys()
        seen |= found
    assert len(seen) == IMAGES // (world_size * batch_size) * world_size * batch_size
    assert all(_EXPECTED[epoch][index] == value for index, value in seen.items())


def test_epoch_stage_and_seed_change_the_pixels(images: Images) -> None:
    base = pixels(loader(images).epoch(0))
    assert base == pixels(loader(images).epoch(0))
    other_stage = loader(images).epoch(0, stage="self_label")
    for other in (loader(images).epoch(1), other_stage, loader(images, seed=4).epoch(0)):
        assert not any(found == base[index] for index, found in pixels(other).items())


@given(images_=st.integers(1, 300), seed=st.integers(0, 99), epoch=st.integers(0, 9), world=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_batches_cut_the_permutation(images_: int, seed: int, epoch: int, world: int) -> None:
    images = ImageFiles(Path(), [str(number) for number in range(images_)])
    order = source.permutation(images_, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(images_))
    shares = [RankShare(seed, 3, rank, world) for rank in range(world)]
    ranks = [[one.indices for one in images.requests(share, epoch=epoch, stage="self_label")] for share in shares]
    together = [np.concatenate(parts) for parts in zip(*ranks)]
    assert len(together) == source.steps(images_, shares[0])
    assert np.array_equal(np.concatenate([[], *together]), order[: len(together) * 3 * world])


# Workers


@pytest.mark.slow
def test_workers_change_nothing_and_live_through_epochs(images: Images) -> None:
    many, none = loader(images, workers=2), loader(images)
    pids = []
    for epoch, stage, start in ((0, "mutual_information", 0), (1, "mutual_information", 8), (1, "self_label", 0)):
        a = list(many.epoch(epoch, stage=stage, start_sample=start))  # type: ignore[arg-type]
        b = list(none.epoch(epoch, stage=stage, start_sample=start))  # type: ignore[arg-type]
        assert len(a) == len(b) == (IMAGES - start) // 4
        assert all(torch.equal(x.indices, y.indices) for x, y in zip(a, b))
        assert all(torch.equal(u, v) for x, y in zip(a, b) for u, v in zip(x.views, y.views))
        pids.append([worker.pid for worker in many._loader._iterator._workers])
    assert pids[0] == pids[1] == pids[2]
    many.close()


@pytest.mark.slow
def test_recycled_memory_is_not_written_to_before_it_was_copied(images: Images) -> None:
    """As with pinned memory, which needs a GPU: the batch is copied when it comes, which may be late."""

    def seen(buffers: int) -> dict[int, bytes]:
        many = loader(images, workers=2, batch_size=2, pipeline="cpu")
        many._loader.dataset._buffers = itertools.cycle([{} for _ in range(buffers)])  # type: ignore[attr-defined]
        found = pixels(late(many.epoch(0)))
        found |= {-index: bytes_ for index, bytes_ in pixels(late(many.epoch(1))).items()}
        many.close()
        return found

    def late(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            time.sleep(0.02)
            yield batch

    none = loader(images, batch_size=2, pipeline="cpu")
    right = pixels(none.epoch(0)) | {-index: bytes_ for index, bytes_ in pixels(none.epoch(1)).items()}
    assert seen(BUFFERS) == right
    assert seen(1) != right, "fewer are not enough, and this test would notice"


@pytest.mark.slow
def test_an_epoch_left_early_does_not_leak_into_the_next_and_a_dead_worker_is_one_sentence(images: Images) -> None:
    many = loader(images, workers=2, batch_size=2)
    next(many.epoch(0))
    assert pixels(many.epoch(1)) == pixels(loader(images, batch_size=2).epoch(1))
    batches = many.epoch(2)
    next(batches)
    for worker in many._loader._iterator._workers:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"A data worker died.*lower data.workers"):
        list(batches)


@pytest.mark.slow
def test_the_schedulers_signals_do_not_end_workers(images: Images) -> None:
    many = loader(images, workers=1, batch_size=1)
    batches = many.epoch(0)
    next(batches)
    worker = many._loader._iterator._workers[0]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
    assert len(list(batches)) == IMAGES - 1
    many.close()
    worker.join(10)
    assert not worker.is_alive()


# Images that cannot be read


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the folder with an empty, a truncated and a textual image, and a link to nowhere."""
    names = []
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):
        data = path.read_bytes()
        if number in (2, 9, 15):
            names.append(path.name)
            data = {2: b"", 9: data[: len(data) // 2], 15: b"no image at all"}[number]
        (tmp_path / path.name).write_bytes(data)
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    return tmp_path, [*names, "dangling.jpg"]


def test_bad_images_are_named_once_counted_and_replaced(
    damaged: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, names = damaged
    images = open_images(DataConfig(root=str(folder)))
    one = loader(images, batch_size=5)
    first = list(one.epoch(0))
    second = list(one.epoch(1))
    printed = capfd.readouterr().err
    assert first[-1].bad_images == len(names) == second[-1].bad_images
    assert [printed.count(name) for name in names] == [1] * len(names), printed
    assert "avif" not in printed.lower(), "what torchvision advises is for its callers"
    shown = {images.name(i) for b in first + second for i in b.indices.tolist()}
    assert not any(name in path for name in names for path in shown)
    assert all(torch.isfinite(views).all() for b in first for views in b.views)


def test_the_replacement_is_the_same_on_any_ranks(damaged: tuple[Path, list[str]]) -> None:
    images = open_images(DataConfig(root=str(damaged[0])))
    alone = list(loader(images, batch_size=5).epoch(4))
    ranks = [list(loader(images, batch_size=1, world_size=5, rank=rank).epoch(4)) for rank in range(5)]
    for step, batch in enumerate(alone):
        for place, rank in enumerate(ranks):
            assert rank[step].indices[0] == batch.indices[place]
            assert torch.equal(rank[step].views[0], batch.views[0][place::5])


def test_too_many_bad_images_stop_the_run(damaged: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(DataConfig(root=str(damaged[0])))
    assert list(loader(images, batch_size=5, bad_image_share=0.01).epoch(0))  # a few never stop a run
    monkeypatch.setattr(loader_module, "FEW_BAD", 2)
    with pytest.raises(UserError, match=r"data.bad_image_share = 0.01 allows \(1 on a rank\)"):
        list(loader(images, batch_size=5, bad_image_share=0.01).epoch(0))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_damaged_file_is_decoded_or_unreadable_and_nothing_else(data: st.DataObject) -> None:
    file = bytearray(jpeg(1, height=24, width=32))
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut_at = data.draw(st.integers(0, len(file)))
    maker = ViewMaker(_OneFile(bytes(file[:cut_at])), VIEWS, seed=0, pipeline="device")
    made = maker[Request(0, "mutual_information", np.array([0]))]
    assert made.failure is None or "Cannot read the image file 0: " in made.failure


class _OneFile:
    max_pixels = MAX_PIXELS

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return f"file {index}"

    def encoded(self, _: int) -> bytes:
        return self._data


# Sources


def test_a_folder_is_read_at_any_depth_in_order(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/z.png", "a/deep/er/y.jpeg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images = open_images(DataConfig(root=str(tmp_path)))
    found = [os.path.relpath(images.name(i), tmp_path) for i in range(len(images))]
    assert found == ["a/deep/er/y.jpeg", "a/z.png", "b.JPG"]


def test_a_fingerprint_is_of_names_and_sizes_wherever_they_lie(tmp_path: Path) -> None:
    for root, order in (("here", "ab"), ("there", "ba")):
        for name in order:
            (tmp_path / root / name).mkdir(parents=True)
            (tmp_path / root / name / "1.jpg").write_bytes(name.encode() * 9)
            (tmp_path / root / f"{name}.txt").write_text("no image")
    here, there = (open_images(DataConfig(root=str(tmp_path / root))).fingerprint() for root in ("here", "there"))
    # Known answer: size, space, name, a line each, sorted.
    assert here == there == hashlib.sha256(b"9 a/1.jpg\n9 b/1.jpg\n").hexdigest()
    (tmp_path / "list.txt").write_text("here/b/1.jpg\nhere/a/1.jpg\n\n")
    images = open_images(DataConfig(root=str(tmp_path / "list.txt"), format="list"))
    assert [images.name(index) for index in (0, 1)] == [str(tmp_path / f"here/{name}/1.jpg") for name in "ba"]
    listed = images.fingerprint()
    assert listed == hashlib.sha256(b"9 here/a/1.jpg\n9 here/b/1.jpg\n").hexdigest()
    (tmp_path / "here" / "c.jpg").symlink_to("nowhere.jpg")  # has no size, and is counted
    dangling = hashlib.sha256(b"-1 c.jpg\n9 a/1.jpg\n9 b/1.jpg\n").hexdigest()
    assert open_images(DataConfig(root=str(tmp_path / "here"))).fingerprint() == dangling
    (tmp_path / "there" / "b" / "1.jpg").write_bytes(b"longer than it")
    assert open_images(DataConfig(root=str(tmp_path / "there"))).fingerprint() != here


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_a_missing_or_empty_source_is_the_users_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"data\.root"):
        open_images(DataConfig(root=str(tmp_path / "absent"), format=kind))  # type: ignore[arg-type]
    empty = tmp_path / "empty"
    empty.mkdir() if kind == "folder" else empty.write_text("\n")
    with pytest.raises(UserError, match="no images"):
        open_images(DataConfig(root=str(empty), format=kind))  # type: ignore[arg-type]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1))
def test_names_come_back(names: list[str]) -> None:
    names.append(os.fsdecode(b"caf\xe9.jpg"))  # no valid UTF-8
    packed = ImageFiles(Path("folder"), names)
    assert [packed.name(i) for i in range(len(packed))] == [os.path.join("folder", name) for name in names]


def decoded(images: Images, index: int) -> torch.Tensor:
    return decode(images.encoded(index), name=images.name(index))


def test_exif_orientation_greyscale_and_other_formats(tmp_path: Path) -> None:
    upright = Image.fromarray(photograph(3, height=40, width=60))
    turned = Image.Exif()
    turned[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "1.jpg", exif=turned, quality=95)
    upright.convert("L").save(tmp_path / "2.jpg")
    upright.convert("RGBA").save(tmp_path / "3.png")
    upright.save(tmp_path / "4.gif", save_all=True, append_images=[upright.rotate(180)])
    upright.save(tmp_path / "5.webp")
    Image.fromarray(np.full((40, 60), 60000, dtype=np.uint16)).save(tmp_path / "6.png")
    images = open_images(DataConfig(root=str(tmp_path)))
    for index in range(6):
        pixels_ = decoded(images, index)
        assert (pixels_.dtype, tuple(pixels_.shape)) == (torch.uint8, (3, 40, 60)), images.name(index)
    theirs = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    for index in (0, 2, 4):
        assert (decoded(images, index).float() - theirs.float()).abs().mean() < 12, images.name(index)
    assert (decoded(images, 5) == 60000 >> 8).all()


# Large images


def test_a_large_jpeg_is_decoded_smaller_when_all_crops_allow_it() -> None:
    data, exif = jpeg(2, height=450, width=600), Image.Exif()
    assert upright_size(jpeg(0, height=48, width=64)) is None, "so few bytes are looked at once"
    assert upright_size(b"\xff\xd8\xff" + bytes(len(data))) is None
    exif[0x0112], turned = 8, io.BytesIO()
    Image.open(io.BytesIO(data)).save(turned, "JPEG", exif=exif, quality=95)
    assert upright_size(turned.getvalue()) == (600, 450)
    views = ViewsConfig(global_size=24, local_size=12, local_count=2)
    maker = ViewMaker(_OneFile(data), views, seed=0, pipeline="device")
    made = maker[Request(0, "mutual_information", np.array([0]))]
    records = ViewSampler(plan_views(views)).draw(0, epoch=0, indices=np.array([0])).place(0, height=450, width=600)
    sizes = np.array([view.size for view in plan_views(views)])
    assert divisor(records["box"], sizes) >= 2
    sides = [*made.groups[0], *made.groups[1]]
    for crop, record, size in zip(sides, records, sizes):
        theirs = torch.from_numpy(np.array(pil_reference.crop(pil_reference.decode(data), record["box"], int(size))))
        apart = (crop.float() - theirs.permute(2, 0, 1).float()).abs()
        # Two decoded pixels for each of the view's: the picture moves by less than a quarter of a pixel.
        assert apart.mean() < 4
    assert decode_reduced(data, 2).shape == (3, 225, 300)  # type: ignore[union-attr]
    cut = ViewMaker(_OneFile(data[: len(data) // 2]), VIEWS, seed=0, pipeline="device")
    assert "truncated" in str(cut[Request(0, "mutual_information", np.array([0]))].failure)


# Hugging Face datasets


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("parquet")
    files = [jpeg(number, height=40, width=52) for number in range(9)] + [b"broken"]
    table = datasets.Dataset.from_dict(
        {"picture": [{"bytes": data, "path": None} for data in files], "kind": [n % 2 for n in range(10)]},
        features=datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}),
    )
    table.to_parquet(folder / "train.parquet")
    return folder, files


def hub_config(folder: Path, **changes: object) -> DataConfig:
    options = {"data_files": str(folder / "train.parquet"), "cache_dir": str(folder / "cache")}
    return DataConfig(
        root="parquet",
        format="datasets",
        dataset_options={**options, **changes},  # type: ignore[arg-type]
        image_column="picture",
    )


@pytest.mark.slow
def test_parquet_gives_the_same_views_as_files(parquet: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    folder, files = parquet
    hub = open_images(hub_config(folder))
    for number, data in enumerate(files):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    plain = open_images(DataConfig(root=str(tmp_path)))
    assert len(hub) == 10
    with pytest.raises(UnreadableImage, match="row 9 of parquet"):
        decoded(hub, 9)
    assert pixels(loader(hub, batch_size=5).epoch(0)) == pixels(loader(plain, batch_size=5).epoch(0))
    many = loader(hub, batch_size=5, workers=2)
    assert pixels(many.epoch(1)) == pixels(loader(plain, batch_size=5).epoch(1))
    many.close()


def test_wrong_dataset_options_are_the_users_error(parquet: tuple[Path, list[bytes]]) -> None:
    folder, _ = parquet
    with pytest.raises(UsageError, match=r"no column photo \(it has picture, kind\)"):
        open_images(hub_config(folder).model_copy(update={"image_column": "photo"}))
    with pytest.raises(UserError, match=r"cannot open parquet.*data\.dataset_options"):
        open_images(hub_config(folder, data_files=str(folder / "absent.parquet")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "form"), [(".parquet", "folder"), (".tar", "pattern"), (".tar", "file"), (".parquet", "streamed")]
)
def test_shards_are_seen_for_what_they_are(
    ending: str, form: str, parquet: tuple[Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place, files = tmp_path / "shards", parquet[1][:9]
    place.mkdir()
    if ending == ".parquet":
        shutil.copy(parquet[0] / "train.parquet", place / "a.parquet")
    else:
        with tarfile.open(place / "a.tar", "w") as tar:
            for number, data in enumerate(files):
                entry = tarfile.TarInfo(f"{number}.jpg")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    root = {"folder": place, "pattern": place / f"*{ending}", "file": place / f"a{ending}", "streamed": place}[form]
    settings: dict[str, Any] = {}
    if form == "streamed":
        settings = {"dataset_options": {"streaming": True}, "stream_images": 9, "stream_shuffle_buffer": 1}
    images = open_images(DataConfig(root=str(root), **settings))
    if isinstance(images, ImageStream):
        assert set(itertools.islice(images._encoded(RankShare(0, 1), 0), 9)) <= {*files, b"broken"}
    else:
        assert [images.encoded(index) for index in range(9)] == files


def test_what_no_reader_takes_names_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.lmdb").mkdir()
    (tmp_path / "train.lmdb" / "data.mdb").touch()
    with pytest.raises(UsageError, match=r"is an LMDB.*folder that it was made from"):
        open_images(DataConfig(root=str(tmp_path / "train.lmdb")))
    with pytest.raises(UsageError, match=r"end it with a pattern, as s3://bucket/train/\*\.tar"):
        open_images(DataConfig(root="s3://bucket/train/"))
    # ImageNet's archives beside the folders that they were unpacked into
    (tmp_path / "n01.tar").touch()
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01" / "a.jpg").write_bytes(jpeg(0))
    assert len(open_images(DataConfig(root=str(tmp_path)))) == 1
    asked: list[tuple[str, dict[str, Any]]] = []
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda root, **options: asked.append((root, options)) or {})
    for root in ("hf://datasets/owner/pictures", "hf://datasets/owner/pictures/data/*.parquet", "s3://bucket/*.tar"):
        with pytest.raises(UsageError, match="several splits"):
            open_images(DataConfig(root=root))
    assert asked == [
        ("owner/pictures", {"split": "train"}),
        ("parquet", {"split": "train", "data_files": "hf://datasets/owner/pictures/data/*.parquet"}),
        ("webdataset", {"split": "train", "data_files": "s3://bucket/*.tar"}),
    ]


# Streams


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Four Parquet shards of six images each."""
    datasets = pytest.importorskip("datasets")
    # The library sleeps five seconds at each stream's end (apache/arrow#45214); the tests end many.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
    folder = tmp_path_factory.mktemp("shards")
    files = [jpeg(number, height=40, width=52) for number in range(24)]
    for shard in range(4):
        rows = [{"bytes": data, "path": None} for data in files[6 * shard : 6 * shard + 6]]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(folder / f"{shard}.parquet")
    return folder, files


def stream(folder: Path, **changes: object) -> ImageStream:
    settings = {"stream_images": 24, "stream_shuffle_buffer": 4, **changes}
    options = {"data_files": str(folder / "*.parquet"), "streaming": True}
    opened = open_images(DataConfig(root="parquet", format="datasets", dataset_options=options, **settings))  # type: ignore[arg-type]
    assert isinstance(opened, ImageStream)
    return opened


@pytest.mark.slow
def test_a_stream_shows_every_image_once_in_an_order_of_the_epoch_also_after_a_resume_and_with_workers(
    shards: tuple[Path, list[bytes]],
) -> None:
    folder, files = shards
    numbers = {image_number(data) for data in files}
    one, many = loader(stream(folder)), loader(stream(folder), workers=2)
    epochs = {epoch: list(one.epoch(epoch)) for epoch in (0, 1)}
    orders = [[index for batch in batches for index in batch.indices.tolist()] for batches in epochs.values()]
    assert all(len(order) == 24 and set(order) == numbers for order in orders)
    assert orders[0] != orders[1]
    resumed = loader(stream(folder)).epoch(1, start_sample=8)
    for found, expected in ((list(resumed), epochs[1][2:]), (list(many.epoch(1)), epochs[1])):
        assert [b.indices.tolist() for b in found] == [b.indices.tolist() for b in expected]
        assert all(torch.equal(u, v) for a, b in zip(found, expected) for u, v in zip(a.views, b.views))
    many.close()


@pytest.mark.slow
def test_ranks_of_a_stream_read_different_shards_and_start_anew_when_short(shards: tuple[Path, list[bytes]]) -> None:
    folder, _ = shards
    seen = []
    for rank in range(2):
        batches = list(loader(stream(folder), batch_size=3, world_size=2, rank=rank).epoch(0))
        assert len(batches) == 4
        seen.append({index for batch in batches for index in batch.indices.tolist()})
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 24
    assert len(list(loader(stream(folder, stream_images=40)).epoch(0))) == 10
    with pytest.raises(UserError, match=r"set data\.stream_images"):
        stream(folder, stream_images=None)
