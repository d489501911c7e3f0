"""What a hostile file is here: its bytes (or what makes it), the command that reads it, and what must not happen.

No file is kept: each is made from a few lines when it is read. A case lies in a folder of its own, which may begin as a
copy of a prepared tree (`tree`): a sample, a pretraining run, a run of a protocol.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Edit:
    """What becomes of the sound file that lies there."""

    of: Callable[[bytes], str]


# What a file holds, or what makes it at its path: a FIFO, a link, a folder.
Content = bytes | str | Callable[[Path], object] | Edit
NEVER_RUN = "ran.txt"  # appears in the folder of a case whose file had code run
TINY = "tiny_run:tiny_networks"  # a pretraining of milliseconds
TOUCH = f"touch {NEVER_RUN}"


@dataclass(frozen=True)
class Case:
    """One file and the command that reads it, in a folder of its own.

    `file` is where it lies; an error must name it, or one of `named`. With `refused` success is a fault too: the file
    says what cannot be true. `check` looks at what was written and printed, and says what is wrong with it. `entry` and
    `setup` are those of `forked.Command`.
    """

    name: str
    file: str
    content: Content
    command: tuple[str, ...]
    tree: str | None = None
    entry: str = "twist.cli:main"
    setup: str | None = None
    named: tuple[str, ...] = ()
    refused: bool = False
    others: tuple[tuple[str, Content], ...] = ()
    check: Callable[[Path, str], str | None] | None = None

    def write(self, folder: Path) -> None:
        for name, content in ((self.file, self.content), *self.others):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Edit):
                content = content.of(path.read_bytes())
            if path.exists() or path.is_symlink():
                path.unlink()  # trees are linked, not copied
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, str):
                path.write_text(content, encoding="utf-8", errors="surrogatepass")
            else:
                content(path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros_behind_a_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.symlink_to("not-there")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


# What is no regular file, for every reader: opened, the first waits for ever and the second never ends.
NO_FILES: Mapping[str, Content] = {
    "fifo": fifo,
    "zeros behind a link": zeros_behind_a_link,
    "folder": folder,
    "link to nothing": link_to_nothing,
    "link to itself": link_to_itself,
}


def cut(data: bytes, *shares: float) -> Iterator[tuple[str, bytes]]:
    """`data` up to each of `shares` of its length."""
    for share in shares:
        yield f"cut at {share:.0%}", data[: int(len(data) * share)]


def flipped(data: bytes, count: int, *, seed: int = 0, within: slice = slice(None)) -> Iterator[tuple[str, bytes]]:
    """`data` with one bit changed, `count` times, somewhere `within`."""
    generator = random.Random(seed)
    places = range(len(data))[within]
    for _ in range(count):
        place, bit = generator.choice(places), generator.randrange(8)
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(changed)


def broken_text(good: str) -> Iterator[tuple[str, Content]]:
    """What can be wrong with the encoding of any text file."""
    data = good.encode()
    yield "empty", b""
    yield "one NUL", b"\0"
    yield "NULs", bytes(100_000)
    yield "no UTF-8", b"\xff\xfe\xfd" + data
    yield "UTF-16", good.encode("utf-16")
    yield "Latin-1 in the middle", data[: len(data) // 2] + b"\xe9\xe8" + data[len(data) // 2 :]
    yield from cut(data, 0.5, 0.98)
    yield from NO_FILES.items()


def broken_json(good: str) -> Iterator[tuple[str, Content]]:
    """The same for JSON, with what is JSON and no reader expects."""
    yield from broken_text(good)
    yield "byte order mark", b"\xef\xbb\xbf" + good.encode()
    yield "100,000 lists", "[" * 100_000
    yield "100,000 lists, closed", "[" * 100_000 + "]" * 100_000
    yield "100,000 tables", '{"a":' * 100_000 + "1" + "}" * 100_000
    yield "900 tables", '{"a":' * 900 + "1" + "}" * 900
    yield "list", "[]"
    yield "list of lists", "[[1, 2], [3]]"
    yield "null", "null"
    yield "text", '"text"'
    yield "number", "17"
    yield "not a number", "NaN"
    yield "5,000 digits", "9" * 5000
    yield "empty table", "{}"
    yield "lone surrogate", '{"\\ud800": "\\udfff"}'
    yield "escape sequences", '{"\\u001b[2J\\u001b]0;title\\u0007": "\\u001b[31m"}'
    yield "64 MiB of one text", '{"a": "' + "x" * 2**26 + '"}'
