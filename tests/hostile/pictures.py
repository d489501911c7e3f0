"""Pictures that are none, or far larger than their file, wherever a reader takes pictures."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from functools import cache, partial
from itertools import starmap
from pathlib import Path
from typing import Any

from cases import ESCAPES, NO_FILES, Case, Content, damaged
from PIL import Image
from texts import transfer


def zeros(size: int) -> bytes:
    """`size` zeros as zlib packs them, of one packed block again and again: they need not be packed each time."""
    block, rest = (zlib.compressobj(9, zlib.DEFLATED, -15) for _ in range(2))
    packed = block.compress(bytes(2**20)) + block.flush(zlib.Z_FULL_FLUSH)
    end = rest.compress(bytes(size % 2**20)) + rest.flush()
    return b"\x78\xda" + packed * (size // 2**20) + end + struct.pack(">HH", size % 65521, 1)


def png(
    width: int, height: int, data: bytes | None = None, *, bits: int = 8, colour: int = 2, **chunks: bytes
) -> bytes:
    """A PNG of one grey value; rows that are not there, or lie, where `data` says so."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 3)
    data = zeros(height * (1 + (width * channels * bits + 7) // 8)) if data is None else data
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0), **chunks, "IDAT": data, "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(value)) + name.encode() + value + struct.pack(">I", zlib.crc32(name.encode() + value))
        for name, value in parts.items()
    )


def encoded(form: str, side: int = 32, *, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def resized(form: str, mark: bytes, skipped: int, sides: bytes) -> bytes:
    """A picture whose header says another size than its rows have."""
    data = bytearray(encoded(form))
    place = data.find(mark) + skipped
    data[place : place + 4] = sides
    return bytes(data)


def jpeg(width: int, height: int) -> bytes:
    return resized("JPEG", b"\xff\xc0", 5, struct.pack(">HH", height, width))


def gif(side: int, *, frames: int = 1) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00"
    palette = b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + palette + frame * frames + b"\x3b"


def scans(count: int) -> bytes:
    data = encoded("JPEG", 2000, progressive=True)
    place = data.rfind(b"\xff\xda")
    return data[:place] + data[place:-2] * count + data[-2:]


def unreadable_name(path: Path, _: bytes) -> None:
    """The picture under names that no terminal takes."""
    for name in (b"\xff\xfe.jpg", b"a\nb.jpg", ESCAPES.encode() + b".jpg", b"-rf.jpg", b"\xed\xa0\x80.jpg", b"a.jpg"):
        Path(os.fsdecode(os.path.join(os.fsencode(path.parent), name))).write_bytes(b"evil")


@cache
def variants() -> dict[str, Content]:
    short, large = zeros(100), zeros(200 * 2**20)
    small = partial(png, 40, 34)
    return {
        "empty": b"",
        "a web page": b"<!DOCTYPE html><html></html>",
        "drawn": b'<svg xmlns="http://www.w3.org/2000/svg" width="100000" height="100000"></svg>',
        "a zip": b"PK\x03\x04" + bytes(1000),
        "noise": os.urandom(10_000),
        "20,000 pixels a side": png(20_000, 20_000),
        "20,000 pixels a side, 16 bits with alpha": png(20_000, 20_000, bits=16, colour=6),
        **{f"a PNG of {w} × {h}": png(w, h, short)
           for w, h in ((2**30, 1), (2**31 - 1, 2**31 - 1), (0, 10), (10, 0), (2**32 - 1, 10))},
        **{f"a JPEG of {w} × {h}": jpeg(w, h)
           for w, h in ((65_535, 65_535), (65_500, 40_000), (0, 34), (40, 0), (65_535, 1))},
        **{f"a WebP of {side} a side": resized("WEBP", b"\x9d\x01\x2a", 3, struct.pack("<HH", side, side))
           for side in (0, 16_383)},
        **{f"a GIF of {side} a side": gif(side) for side in (0, 65_535)},
        "16 bits": small(bits=16),
        "bits of 7": small(bits=7),
        "an unknown colour": small(colour=5),
        "no palette": small(colour=3),
        "a short palette": small(colour=3, PLTE=b"\1\2\3\4"),
        "a long comment": small(zTXt=b"a\0\0" + large),
        "a large profile": small(iCCP=b"a\0\0" + large),
        "an evil orientation": small(eXIf=b"MM\0\x2a" + b"\xff" * 40),
        "rows that end": small(short),
        "rows without end": png(4, 4, large),
        "rows that are no stream": small(b"evil"),
        "no end": small()[:-12],
        "a wrong CRC": small()[:-16] + bytes(4) + small()[-12:],
        "a progressive JPEG with 2,000 scans": scans(2000),
        "a JPEG of four inks": encoded("JPEG", mode="CMYK"),
        "a GIF of 100,000 frames": gif(2, frames=100_000),
        **{f"a sound {form}": encoded(form) for form in ("TIFF", "BMP", "ICO")},
        **{f"{form}, {name}": data for form in ("JPEG", "PNG", "WEBP", "GIF")
           for name, data in damaged(encoded(form), 3, 0.1, 0.6, 0.95).items()},
        "unreadable names": unreadable_name,
        **NO_FILES,
    }  # fmt: skip


def class_folders() -> Iterator[Case]:
    """One picture of a class is hostile: the check of class folders, and a run on them."""
    for command in (("data", "check", "folders", "tree/imagenet"), transfer("sample-knn")):
        for name, content in variants().items():
            file = f"tree/imagenet/train/ring/a.{'jpg' if callable(content) else 'png'}"
            yield Case(name, content, file, command, tree="sample", named=("ring", ".jpg"))


def pretraining_pictures() -> Iterator[Case]:
    """A folder of a few sound pictures and a hostile one: views of them all, and the list of one."""
    sound = tuple((f"images/b{i}.png", encoded("PNG")) for i in range(3))
    show = partial(Case, tree="pretraining", named=("fifo", "/dev/zero", "passwd", "images", ".jpg"))
    views = ("pretrain", "tree/tiny.toml", "data.root=images", "--show-views", "4", "--output", "out")
    for name, content in variants().items():
        yield show(name, content, f"images/a.{'jpg' if callable(content) else 'png'}", views, others=sound)
    lines = ("/dev/zero", "fifo", "x.txt", "a\0b.jpg", "../../../etc/passwd", "images", "x" * 2**20, "\udcff\udcfe.jpg")
    lists: dict[str, Content] = {f"a list of {line[:9]!r}": line + "\n" for line in lines}
    others = (("fifo", NO_FILES["fifo"]), *sound)
    listed = (*views[:2], "data.root=x.txt", "data.format=list", "--show-views", "1", "--output", "out")
    yield from starmap(partial(show, file="x.txt", command=listed, others=others), (lists | NO_FILES).items())


def data_sets() -> Iterator[Case]:
    """Pictures and label maps where COCO, VOC and Cityscapes have theirs."""
    chosen: dict[str, Content] = {
        "30,000 pixels a side, grey": png(30_000, 30_000, colour=0), "20,000 pixels a side": png(20_000, 20_000),
        "2^31 - 1 a side": png(2**31 - 1, 2**31 - 1, b""), "a JPEG of 65,535 a side": jpeg(65_535, 65_535),
        "no columns": png(0, 1, b""), "empty": b"", "text": b"evil", **NO_FILES,
    }  # fmt: skip
    street = "aachen/aachen_000001_000019"
    for file in (
        "coco/val2017/000000500007.jpg", "VOC2012/JPEGImages/600002.jpg", "VOC2012/SegmentationClass/600002.png",
        f"cityscapes/leftImg8bit/train/{street}_leftImg8bit.png",
        f"cityscapes/gtFine/train/{street}_gtFine_labelTrainIds.png",
    ):  # fmt: skip
        command = ("data", "check", file.partition("/")[0].lower().removesuffix("2012"), "tree")
        named = (Path(file).stem, *Path(file).parts[1:-1])  # where one is no file, the folder that lacks it is named
        case = partial(Case, file=f"tree/{file}", command=command, tree="sample", named=named)
        yield from starmap(case, chosen.items())
