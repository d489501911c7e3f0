"""What a hostile file is here: its content, the command that reads it, and what must not happen.

No file is kept: each is made from a few lines when it is read. A case lies in a folder of its own, which may begin as a
copy of a prepared tree (`tree`): a sample, a pretraining run, a run of a protocol.
"""

import copy
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a file holds, or what makes it at its path, given the bytes that were there.
Content = bytes | str | Callable[[Path, bytes], object]
NEVER_RUN = "ran.txt"  # appears in the folder of a case whose file had code run
TINY = "tiny_run:tiny_networks"  # a pretraining of milliseconds
TOUCH = f"touch {NEVER_RUN}"
ESCAPES = "\x1b[2J\x1b]0;owned\x07"
DEEP: dict[str, Any] = {}
for _ in range(900):
    DEEP = {"a": DEEP}


@dataclass(frozen=True)
class Case:
    """One file and the command that reads it, in a folder of its own.

    `file` is where it lies; an error must name it, or one of `named`. With `refused` success is a fault too: the file
    says what cannot be true. `setup` is that of `forked.Command`.
    """

    name: str
    content: Content
    file: str
    command: tuple[str, ...]
    tree: str | None = None
    setup: str | None = None
    named: tuple[str, ...] = ()
    refused: bool = False
    others: tuple[tuple[str, Content], ...] = ()

    def write(self, folder: Path) -> None:
        for name, content in ((self.file, self.content), *self.others):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.is_file() else b""
            path.unlink(missing_ok=True)  # trees are linked, not copied
            if callable(content):
                content(path, before)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


# What is no regular file, for every reader: opened, the first waits for ever and the second never ends.
NO_FILES: Mapping[str, Content] = {
    "fifo": lambda path, _: os.mkfifo(path),
    "zeros behind a link": lambda path, _: path.symlink_to("/dev/zero"),
    "folder": lambda path, _: path.mkdir(),
    "link to nothing": lambda path, _: path.symlink_to("not-there"),
    "link to itself": lambda path, _: path.symlink_to(path.name),
}


def damaged(data: bytes, bits: int, *shares: float, seed: int = 0, within: int | None = None) -> dict[str, bytes]:
    """`data` up to each of `shares` of its length, and with one bit changed, `bits` times, among its first `within`."""
    found = {f"cut at {share:.1%}": data[: int(len(data) * share)] for share in shares}
    generator = random.Random(seed)
    for _ in range(bits):
        place, bit = generator.randrange(within or len(data)), generator.randrange(8)
        found[f"bit {bit} of byte {place}"] = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    return found


def broken_text(good: str) -> dict[str, Content]:
    """What can be wrong with any text file."""
    data = good.encode()
    half = len(data) // 2
    return {
        "empty": b"",
        "NULs": bytes(100_000),
        "no UTF-8": b"\xff\xfe\xfd" + data,
        "UTF-16": good.encode("utf-16"),
        "byte order mark": b"\xef\xbb\xbf" + data,
        "Latin-1 in the middle": data[:half] + b"\xe9\xe8" + data[half:],
        **damaged(data, 0, 0.5, 0.98),
        **NO_FILES,
    }


def broken_json(good: str) -> dict[str, Content]:
    """The same for JSON, with what is JSON and no reader expects."""
    return {
        **broken_text(good),
        "100,000 lists": "[" * 100_000,
        "100,000 lists, closed": "[" * 100_000 + "]" * 100_000,
        "100,000 tables": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "900 tables": json.dumps(DEEP),
        "list of lists": "[[1, 2], [3]]",
        **{text: text for text in ("[]", "null", '"text"', "17", "NaN", "{}")},
        "5,000 digits": "9" * 5000,
        "lone surrogate": '{"\\ud800": "\\udfff"}',
        "escape sequences": json.dumps({ESCAPES: "\x1b[31m"}),
        "64 MiB of one text": '{"a": "' + "x" * 2**26 + '"}',
    }


STRANGE: Mapping[str, Any] = {
    "null": None, "a text": "evil", "-1": -1, "true": True, "1.5": 1.5, "10^400": 10**400, "not a number": float("nan"),
    "lists": [[1], {}], "a table": {}, "900 tables": DEEP, "escape sequences": ESCAPES, "a lone surrogate": "\ud800",
    "NUL": "a\0b", "a megabyte": "x" * 2**20, "a path above": "../../../../../etc/passwd", "a device": "/dev/zero",
}  # fmt: skip


def changed(values: Any, changes: Mapping[str, Any]) -> str:
    """`values` as JSON with `changes`; `weights.0.name` is a field inside. Infinity and NaN are written as such."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        place = values
        *outer, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        for part in outer:
            place = place[part]
        place[last] = value
    return json.dumps(values)


def edits(*fields: str | dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes by name: everything strange in each field of `fields`, and the changes that stand there themselves."""
    for field in fields:
        if isinstance(field, dict):
            yield repr(field)[:70], field
        else:
            yield from ((f"{field}: {name}", {field: value}) for name, value in STRANGE.items())


def edited(values: Any, *fields: str | dict[str, Any]) -> dict[str, Content]:
    """`values` as JSON with each of the `edits`."""
    return {name: changed(values, changes) for name, changes in edits(*fields)}
