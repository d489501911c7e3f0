"""The photos source without a network: Qt resource files built here, a stand-in for apt, and made-up stamps."""

import io
import itertools
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from twist.catalog.sample import photos, scene, writers
from twist.catalog.sample.make import make_sample
from twist.catalog.sample.photos import read_rcc
from twist.contracts.errors import UserError


def resource_file(files: dict[str, tuple[bytes, int]]) -> bytes:
    """A version-2 `.rcc`: one folder `images` below the root; each file's content and flags (1: zlib)."""
    names, name_offsets = b"", {}
    for name in ("images", *files):
        name_offsets[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, data_offsets = b"", {}
    for name, (content, flags) in files.items():
        data_offsets[name] = len(data)
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if flags & 1 else content
        data += struct.pack(">I", len(stored)) + stored
    entry = struct.Struct(">IHIIQ")
    tree = entry.pack(0, 2, 1, 1, 0) + entry.pack(name_offsets["images"], 2, len(files), 2, 0)
    for name, (_, flags) in files.items():
        tree += entry.pack(name_offsets[name], flags, 0, data_offsets[name], 0)
    header = struct.pack(">4sIIII", b"qres", 2, 20, 20 + len(tree), 20 + len(tree) + len(data))
    return header + tree + data + names


def test_qt_resources_are_read_plain_and_compressed(tmp_path: Path) -> None:
    file = tmp_path / "pictures.rcc"
    file.write_bytes(resource_file({"größe.webp": (b"plain", 0), "b.webp": (b"z" * 1000, 1), "c.svg": (b"no", 0)}))
    found = dict(read_rcc(file, lambda name: name.suffix == ".webp"))
    assert {str(name): content for name, content in found.items()} == {
        "images/größe.webp": b"plain",
        "images/b.webp": b"z" * 1000,
    }


@pytest.mark.parametrize("cut", [3, 19, 40, 70, 120])
def test_a_torn_resource_file_is_one_sentence(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "torn.rcc"
    file.write_bytes(resource_file({"a.webp": (b"z" * 500, 1)})[:cut])
    with pytest.raises(UserError, match=r"torn\.rcc"):
        list(read_rcc(file, lambda _: True))


def test_a_resource_tree_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "endless.rcc"
    blob = bytearray(resource_file({"a.webp": (b"x", 0)}))
    # The folder's first child becomes the folder itself.
    struct.pack_into(">I", blob, 20 + 22 + 10, 1)
    file.write_bytes(bytes(blob))
    with pytest.raises(UserError, match="no end"):
        list(read_rcc(file, lambda _: True))
    # Folders that share their children: 2 to the 60th entries, were they all visited.
    flags = [*([2] * 60), 0, 0]
    tree = b"".join(struct.pack(">IHIIQ", 0, flag, 2, index + 1, 0) for index, flag in enumerate(flags))
    file.write_bytes(struct.pack(">4sIIII", b"qres", 2, 20, 20, 20 + len(tree)) + tree + struct.pack(">HI", 0, 0))
    with pytest.raises(UserError, match="no end"):
        list(read_rcc(file, lambda _: False))


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Programs of these names, `_` for `-`, found before the machine's own."""
    folder.mkdir()
    for name, script in scripts.items():
        program = folder / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_packages_are_fetched_privately_by_exact_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        tmp_path / "bin",
        monkeypatch,
        apt_get=f'echo "$@" >> {tmp_path}/calls; for last; do :; done\n'
        '[ "$last" = update ] || echo data > "${last}_1.0_all.deb"',
        dpkg_deb='case $1 in --field) echo 1.0;; --extract) mkdir -p "$3/usr" && cp "$2" "$3/usr/";; *) exit 2;; esac',
    )
    got = list(photos.fetch(("one-package", "another"), tmp_path / "fetched"))
    assert [(item["package"], item["version"]) for item in got] == [("one-package", "1.0"), ("another", "1.0")]
    # sha256 of "data\n"
    assert got[0]["sha256"] == "6667b2d1aab6a00caa5aee5af8ad9f1465e567abf1c209d15727d57b3e8f6e5f"
    unpacked = [path.name for path in (tmp_path / "fetched" / "root" / "usr").iterdir()]
    assert sorted(unpacked) == ["another_1.0_all.deb", "one-package_1.0_all.deb"]
    for call in (tmp_path / "calls").read_text().splitlines():
        assert f"Dir::State::Lists={tmp_path}/fetched/lists" in call
        assert f"Dir::Cache={tmp_path}/fetched/cache" in call
        assert "install" not in call


def test_an_unknown_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = 'case "$*" in *update) ;; *) echo "E: Unable to locate package x" >&2; exit 100;; esac'
    stand_in(tmp_path / "bin", monkeypatch, apt_get=lacking, dpkg_deb="exit 0")
    with pytest.raises(UserError, match=r"Unable to locate package x.*--source shapes"):
        list(photos.fetch(("x",), tmp_path / "fetched"))


def test_without_apt_one_sentence_and_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="needs apt-get, which is not on this machine: copy"):
        make_sample(tmp_path / "root", source="photos", size="tiny", progress=False)
    assert not (tmp_path / "root").exists()
    assert list((tmp_path / "cache" / "twist-suite").iterdir()) == []


def package_tree(root: Path) -> None:
    """What the packages unpack to, in miniature: coloured discs for stamps, noise for photographs."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-32:32, -32:32]
    alpha = (255 * (np.hypot(x, y) < 28)).astype(np.uint8)[..., None]
    folders = [folder for group in photos.TAKEN["stamps"].values() for folder in group]
    for folder in folders:
        place = root / "usr/share/tuxpaint/stamps" / folder
        for name in (*(f"{Path(folder).name}{i}" for i in range(8)), "cartoon/drawn", "tux-plush", "lobster"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            rgb = np.full((64, 64, 3), rng.integers(0, 255, 3), dtype=np.uint8)
            Image.fromarray(np.concatenate([rgb, alpha], 2)).save(place / f"{name}.png")
    wallpapers = root / "usr/share/backgrounds/mate/nature"
    wallpapers.mkdir(parents=True)
    for name in ("Aqua", "Dune"):
        Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(wallpapers / f"{name}.jpg")
    pictures = {}
    for index in range(8):
        buffer = io.BytesIO()
        channels = 3 if index < 7 else 4  # maps and buttons have alpha
        picture = Image.fromarray(rng.integers(0, 255, (320, 320, channels), dtype=np.uint8))
        picture.save(buffer, "WEBP", quality=50)
        pictures[f"monument{index}.webp"] = (buffer.getvalue(), 0)
    (root / photos.RCC_FOLDER).mkdir(parents=True)
    (root / photos.RCC_FOLDER / "explore_monuments.rcc").write_bytes(resource_file(pictures))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    def unpack(packages: tuple[str, ...], folder: Path) -> list[dict[str, str]]:
        package_tree(folder / "root")
        return [{"package": name, "version": "1", "sha256": "0" * 64} for name in packages]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "fetch", unpack)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        writers.open_source.cache_clear()
        yield photos.prepare_photos(progress=False)
    writers.open_source.cache_clear()


def test_drawings_and_strangers_are_left_out_and_backgrounds_are_disjoint(prepared: Path) -> None:
    provenance = json.loads((prepared / "provenance.json").read_text())
    assert sorted(provenance["stamps"]) == sorted([*photos.CLASSES, "distractor"])
    for name in itertools.chain(*provenance["stamps"].values()):
        assert "cartoon" not in name
        assert "tux" not in name
        assert "lobster" not in name
    train, val = provenance["backgrounds"]["train"], provenance["backgrounds"]["val"]
    assert len(val) >= 2
    assert not set(train) & set(val)
    assert len(train + val) == 9  # 7 monuments, 2 wallpapers
    assert [path.name for path in prepared.parent.iterdir()] == [prepared.name]  # packages are removed again


def test_cut_outs_keep_their_outline_and_size(prepared: Path) -> None:
    source = photos.Photos(prepared)
    for size in (24, 40, 90):
        cutout = source.cutout(np.random.default_rng(size), 0, size, (0.0, -1.0))
        assert max(cutout.alpha.shape) == size
        assert abs((cutout.alpha > 0.5).sum() / (np.pi * (size / 2) ** 2) - 1) < 0.2  # a disc
    drawn = scene.compose(np.random.default_rng(0), source, [scene.Placement(1, 30, (24, 24))], 48, 48, "val")
    assert drawn.instances[0].visible_share == 1


def test_a_sample_of_photos_says_where_its_pictures_come_from(prepared: Path, tmp_path: Path) -> None:
    sample = make_sample(tmp_path / "root", source="photos", size="tiny", progress=False)
    assert tuple(sample.info["classes"]) == photos.CLASSES
    assert [item["package"] for item in sample.info["packages"]] == photos.TAKEN["packages"]
    assert all(len(item["sha256"]) == 64 for item in sample.info["packages"])
    assert "disjoint" in sample.info["split"]
    assert prepared.exists()


def test_too_few_stamps_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "fetch", lambda *_: [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="only 0 photographic stamps of bird"):
        photos.prepare_photos(progress=False)
    assert list((tmp_path / "cache" / "twist-suite").iterdir()) == []
