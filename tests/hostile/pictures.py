"""Pictures that are none, or far larger than their file, wherever a reader takes pictures; other binary files."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from cases import NO_FILES, Case, Content, cut, flipped
from PIL import Image

CLASS = "tree/imagenet/train/ring"


def png(
    width: int, height: int, *, bits: int = 8, colour: int = 2, data: bytes | None = None, **chunks: bytes
) -> bytes:
    """A PNG of one grey value; rows that are not there, or lie, where `data` says so."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 3)
    if data is None:
        packer, row = zlib.compressobj(9), bytes(1 + (width * channels * bits + 7) // 8)
        data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    parts += [chunk(name.encode(), value) for name, value in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def encoded(form: str, size: tuple[int, int] = (40, 34), **options: object) -> bytes:
    buffer = io.BytesIO()
    mode = "CMYK" if options.pop("cmyk", False) else "RGB"
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def sized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header says another size than its rows have."""
    data = bytearray(encoded("JPEG"))
    place = data.find(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def sized_webp(width: int, height: int) -> bytes:
    data = bytearray(encoded("WEBP"))
    place = data.find(b"\x9d\x01\x2a") + 3
    data[place : place + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def gif(width: int, height: int, *, frames: int = 1) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    palette = b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + palette + frame * frames + b"\x3b"


def unreadable_name(path: Path) -> None:
    """The picture under names that no terminal takes."""
    for name in (b"\xff\xfe.jpg", b"a\nb.jpg", b"\x1b[2J\x1b]0;owned\x07.jpg", b"-rf.jpg", b"\xed\xa0\x80.jpg"):
        Path(os.fsdecode(os.path.join(os.fsencode(path.parent), name))).write_bytes(b"evil")
    path.write_bytes(b"evil")


def variants() -> Iterator[tuple[str, Content]]:
    yield "empty", b""
    yield "text", b"evil"
    yield "a web page", b"<!DOCTYPE html><html></html>"
    yield "drawn", b'<svg xmlns="http://www.w3.org/2000/svg" width="100000" height="100000"></svg>'
    yield "a zip", b"PK\x03\x04" + bytes(1000)
    yield "noise", os.urandom(10_000)
    yield "20,000 pixels a side", png(20_000, 20_000)
    yield "30,000 pixels a side", png(30_000, 30_000)
    yield "20,000 pixels a side, 16 bits with alpha", png(20_000, 20_000, bits=16, colour=6)
    yield "a billion columns", png(2**30, 1, data=zlib.compress(bytes(100)))
    yield "2^31 - 1 a side", png(2**31 - 1, 2**31 - 1, data=zlib.compress(bytes(100)))
    yield "no columns", png(0, 10, data=zlib.compress(bytes(100)))
    yield "no rows", png(10, 0, data=zlib.compress(bytes(100)))
    yield "-1 columns", png(2**32 - 1, 10, data=zlib.compress(bytes(100)))
    yield "16 bits", png(40, 34, bits=16)
    yield "bits of 7", png(40, 34, bits=7)
    yield "an unknown colour", png(40, 34, colour=5)
    yield "no palette", png(40, 34, colour=3)
    yield "a short palette", png(40, 34, colour=3, PLTE=b"\1\2\3\4")
    yield "a long comment", png(40, 34, zTXt=b"a\0\0" + zlib.compress(bytes(200 * 2**20)))
    yield "a large profile", png(40, 34, iCCP=b"a\0\0" + zlib.compress(bytes(200 * 2**20)))
    yield "an evil orientation", png(40, 34, eXIf=b"MM\0\x2a" + b"\xff" * 40)
    yield "rows that end", png(40, 34, data=zlib.compress(bytes(100)))
    yield "rows without end", png(4, 4, data=zlib.compress(bytes(200 * 2**20)))
    yield "rows that are no stream", png(40, 34, data=b"evil")
    yield "no end", png(40, 34)[:-12]
    yield "a wrong CRC", png(40, 34)[:-16] + b"\0\0\0\0" + png(40, 34)[-12:]
    for width, height in ((65_535, 65_535), (65_500, 40_000), (0, 34), (40, 0), (65_535, 1)):
        yield f"a JPEG of {width} × {height}", sized_jpeg(width, height)
    yield "a progressive JPEG with 2,000 scans", _scans(2000)
    yield "a JPEG of four inks", encoded("JPEG", cmyk=True)
    yield "a WebP of 16,383 a side", sized_webp(16_383, 16_383)
    yield "a WebP of nothing", sized_webp(0, 0)
    yield "a GIF of 65,535 a side", gif(65_535, 65_535)
    yield "a GIF of nothing", gif(0, 0)
    yield "a GIF of 100,000 frames", gif(2, 2, frames=100_000)
    yield "a TIFF", encoded("TIFF")
    yield "a bitmap", encoded("BMP")
    yield "an icon", encoded("ICO", (32, 32))
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        for name, data in (*cut(encoded(form), 0.1, 0.6, 0.95), *flipped(encoded(form), 3)):
            yield f"{form}, {name}", data
    yield "unreadable names", unreadable_name
    yield from NO_FILES.items()


def _scans(count: int) -> bytes:
    data = encoded("JPEG", (2000, 2000), progressive=True)
    place = data.rfind(b"\xff\xda")
    return data[:place] + data[place:-2] * count + data[-2:]


def class_folders() -> Iterator[Case]:
    """One picture of a class is hostile: the check of class folders, and a run on them."""
    run = ("transfer", "sample-knn", "--weights", "random", "--data", "tree", "--output", "out")
    for name, content in variants():
        for ending in (".jpg",) if callable(content) else (".png",):
            file = f"{CLASS}/a{ending}"
            named = (f"a{ending}", "ring", ".jpg")
            check = ("data", "check", "folders", "tree/imagenet")
            yield Case(f"check: {name}", file, content, check, tree="sample", named=named)
            yield Case(f"run: {name}", file, content, run, tree="sample", named=named)


def pretraining_pictures() -> Iterator[Case]:
    """A folder of a few sound pictures and a hostile one: views of them all, and the list of one."""
    sound = tuple((f"images/b{i}.png", encoded("PNG")) for i in range(3))
    for name, content in variants():
        ending = ".jpg" if callable(content) else ".png"
        show = ("pretrain", "tree/tiny.toml", "data.root=images", "--show-views", "4", "--output", "out")
        yield Case(f"views: {name}", f"images/a{ending}", content, show, tree="pretraining", others=sound,
                   named=(f"a{ending}", ".jpg", "images"))  # fmt: skip
    for name, content in {
        "a device": "/dev/zero\n",
        "a FIFO": "fifo\n",
        "itself": "x.txt\n",
        "NUL": "a\0b.jpg\n",
        "above": "../../../etc/passwd\n",
        "a folder": "images\n",
        "a name of a megabyte": "x" * 2**20 + "\n",
        "a name of bytes": b"\xff\xfe.jpg\n",
    }.items():
        listed = ("pretrain", "tree/tiny.toml", "data.root=x.txt", "data.format=list", "--show-views", "1")
        others = (("fifo", NO_FILES["fifo"]), *sound)
        yield Case(f"list: {name}", "x.txt", content, (*listed, "--output", "out"), tree="pretraining", others=others,
                   named=("x.txt", "fifo", "/dev/zero", "passwd", "images", ".jpg"))  # fmt: skip
    for name, content in NO_FILES.items():
        listed = ("pretrain", "tree/tiny.toml", "data.root=x.txt", "data.format=list", "--show-views", "1")
        yield Case(f"list: {name}", "x.txt", content, (*listed, "--output", "out"), tree="pretraining")


def data_sets() -> Iterator[Case]:
    """Pictures and label maps where COCO, VOC and Cityscapes have theirs."""
    places = {
        "coco": "tree/coco/val2017/000000500007.jpg",
        "voc": "tree/VOC2012/JPEGImages/600002.jpg",
        "voc maps": "tree/VOC2012/SegmentationClass/600002.png",
        "cityscapes": "tree/cityscapes/leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png",
        "cityscapes maps": "tree/cityscapes/gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png",
    }
    grey = {"30,000 pixels a side, grey": png(30_000, 30_000, colour=0), "20,000 pixels a side": png(20_000, 20_000)}
    chosen = {**grey, "2^31 - 1 a side": png(2**31 - 1, 2**31 - 1, data=b""), "empty": b"", "text": b"evil", **NO_FILES}
    chosen |= {"a JPEG of 65,535 a side": sized_jpeg(65_535, 65_535), "no columns": png(0, 1, data=b"")}
    for dataset, file in places.items():
        command = ("data", "check", dataset.split()[0], "tree")
        for kind, content in chosen.items():
            stem = file.rpartition("/")[2].partition(".")[0]
            yield Case(f"{dataset}: {kind}", file, content, command, tree="sample", named=(stem, file.split("/")[-2]))


def label_files() -> Iterator[Case]:
    """SBD's .mat files, from which VOC's augmented maps are made."""
    import numpy as np
    from scipy.io import savemat

    def mat(labels: object, **options: object) -> bytes:
        buffer = io.BytesIO()
        savemat(buffer, {"GTcls": {"Segmentation": labels}}, **options)  # type: ignore[arg-type]
        return buffer.getvalue()

    good = mat(np.zeros((34, 40), np.uint8))
    # Only its zeros weigh nothing: a map of 40,000 pixels a side.
    large = mat(np.zeros((40_000, 40_000), np.uint8), do_compression=True)
    for name, content in {
        "40,000 pixels a side": large,
        "text": mat("evil"),
        "objects": mat(np.array([[{"a": 1}]], dtype=object)),
        "classes of 200": mat(np.full((34, 40), 200, np.uint8)),
        "not a number": mat(np.full((34, 40), np.nan)),
        "-1": mat(np.full((34, 40), -1, np.int64)),
        "three sides": mat(np.zeros((2, 2, 2), np.uint8)),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(1000),
        "version 4": struct.pack("<iiiii", 0, 2**30, 2**30, 0, 2) + b"a\0",
        **dict(cut(good, 0.3, 0.9)),
        **dict(flipped(good, 10)),
        **NO_FILES,
    }.items():
        command = ("data", "prepare", "voc", "tree", "sbd=tree/sbd", "expected=25")
        yield Case(name, "tree/sbd/cls/2020_000001.mat", content, command, tree="sbd", named=("2020_000001", "sbd"))


def resource_files() -> Iterator[Case]:
    """Qt's resource files, which the photographs of the sample come from."""
    entry, count = struct.Struct(">IHIIQ"), 60
    # Every folder has the two that follow as its children, which overlap: the walk doubles with each of them.
    tree = b"".join(entry.pack(0, 2, 2, index + 1, 0) for index in range(count)) + entry.pack(0, 0, 0, 0, 0) * 2
    names = struct.pack(">HI", 1, 0) + "a".encode("utf-16-be")

    def rcc(tree: bytes, data: bytes = b"", *, version: int = 2) -> bytes:
        head = struct.pack(">4sIIII", b"qres", version, 20, 20 + len(tree), 20 + len(tree) + len(data))
        return head + tree + data + names

    bomb = zlib.compress(bytes(60 * 2**20))
    for name, content in {
        "folders that overlap": rcc(tree, bytes(4)),
        "10^5 children": rcc(entry.pack(0, 2, 100_000, 1, 0) * 100),
        "children of 2^32": rcc(entry.pack(0, 2, 2**32 - 1, 1, 0)),
        "a folder in itself": rcc(entry.pack(0, 2, 1, 0, 0)),
        "an empty file": b"",
        "version 9": rcc(b"", version=9),
        "a bomb": rcc(
            entry.pack(0, 2, 40, 1, 0) + entry.pack(0, 1, 0, 0, 0) * 40,
            struct.pack(">I", len(bomb) + 4) + bytes(4) + bomb,
        ),
    }.items():
        yield Case(name, "x.rcc", content, ("x.rcc",), entry="pictures:read_resource", named=("x.rcc",))


def read_resource() -> None:
    """Read the Qt resource file that the command line names; nothing where the rooms have no such reader any more."""
    import sys

    try:
        from twist.catalog.sample.photos import read_rcc
    except ImportError:
        return
    from twist.contracts.errors import UserError

    try:
        for _ in read_rcc(Path(sys.argv[1]), lambda _: True):
            pass
    except UserError as error:
        sys.exit(f"twist: {error}")
