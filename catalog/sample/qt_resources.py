"""Reading Qt's binary resource files (`.rcc`): a tree of named files in one blob, big-endian throughout.

Source of the layout: Qt's own writer and reader (qtbase `src/tools/rcc/rcc.cpp`, `src/corelib/io/qresource.cpp`).
Header: magic, version, offsets of tree, data and names. A tree entry is 22 bytes (version 2 on): offset of the name,
flags, then for a folder its number of children and the first one's index, for a file its locale and data offset, then a
time. Input is not trusted: every offset is checked, sizes are bounded.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from twist.contracts.errors import UserError

MAGIC = b"qres"
ENTRY = struct.Struct(">IHIIQ")  # name offset, flags, two numbers, time: 22 bytes
COMPRESSED_ZLIB, FOLDER, COMPRESSED_ZSTD = 1, 2, 4
MAX_FILE_BYTES = 64 * 2**20
MAX_ENTRIES = 100_000


def read_rcc(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name (with folders, `/` between) and content of every file in `path` whose name is `wanted`.

    Raises:
        UserError: not a resource file, damaged, or compressed in a way that is not zlib.
    """
    blob = path.read_bytes()
    try:
        yield from _walk(blob, wanted)
    except (struct.error, IndexError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged or no Qt resource file ({error}): remove it, it is fetched again."
        ) from None
    except _NotReadable as error:
        raise UserError(f"{path}: {error}.") from None


class _NotReadable(Exception):
    pass


def _walk(blob: bytes, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    magic, version, tree, data, names = struct.unpack_from(">4sIIII", blob)
    if magic != MAGIC or version < 2:
        raise _NotReadable("no Qt resource file of version 2 or later")
    pending = [(0, "")]
    while pending:
        index, prefix = pending.pop()
        name_offset, flags, first, second, _time = ENTRY.unpack_from(blob, tree + index * ENTRY.size)
        # The root has no name.
        name = prefix if index == 0 else f"{prefix}/{_name(blob, names + name_offset)}".lstrip("/")
        if flags & FOLDER:
            # Qt writes a folder before what it holds; an entry that points back would make a walk without end.
            if second <= index or first > MAX_ENTRIES:
                raise _NotReadable("its tree has no end")
            pending += [(second + child, name) for child in reversed(range(first))]
        elif wanted(name):
            yield name, _content(blob, data + second, flags)


def _name(blob: bytes, offset: int) -> str:
    (length,) = struct.unpack_from(">H", blob, offset)
    return blob[offset + 6 : offset + 6 + 2 * length].decode("utf-16-be")  # 4 bytes of hash between


def _content(blob: bytes, offset: int, flags: int) -> bytes:
    (length,) = struct.unpack_from(">I", blob, offset)
    content = blob[offset + 4 : offset + 4 + length]
    if len(content) != length:
        raise _NotReadable("the file ends too early")
    if flags & COMPRESSED_ZSTD:
        raise _NotReadable("compressed with zstd, which this reader does not know")
    if flags & COMPRESSED_ZLIB:
        # Four bytes of uncompressed length come before the zlib stream.
        content = zlib.decompressobj().decompress(content[4:], MAX_FILE_BYTES)
    return content
