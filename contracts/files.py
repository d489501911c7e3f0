"""Writes that are whole or absent, reads of files that anybody may have written, digests, and the user's cache.

A file is looked at before it is opened, for a FIFO or a device never ends, and its size before it is read. JSON is
parsed by pydantic's parser, which bounds the depth (200) and the digits of a number (4,300).
"""

import codecs
import contextlib
import hashlib
import itertools
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic_core import from_json

from twist.contracts.errors import UserError

# Bytes of a text that people or programs write; annotations, curves and lists of images may have more.
MOST_TEXT: Final = 256 * 2**20
MOST_DATA: Final = 4 * 2**30
MOST_LEVELS, MOST_ALIASES = 64, 20


def read_bytes(path: str | os.PathLike[str], *, remedy: str = "check the path", most: int = MOST_TEXT) -> bytes:
    """All bytes of a regular file; `UserError`, which ends with `remedy`, where it is absent, no such, closed to us, or
    of more than `most` bytes."""
    with _named(path, remedy):
        return _regular(Path(path), most).read_bytes()


def require_regular(path: str | os.PathLike[str], *, remedy: str = "check the path") -> Path:
    """`path`, when it is a regular file; `UserError` as `read_bytes`."""
    with _named(path, remedy):
        return _regular(Path(path))


def _regular(path: Path, most: int | None = None) -> Path:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, f"it is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no regular file'}")
    if most is not None and status.st_size > most:
        raise OSError(0, f"it has {status.st_size >> 20:,} MiB, more than {most >> 20:,}")
    return path


@contextlib.contextmanager
def _named(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """What keeps a file from being read, as one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError is of a NUL in the path, or a character that no path has
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): {remedy}.") from None


def read_text(
    path: str | os.PathLike[str], *, remedy: str = "check the path", most: int = MOST_TEXT, errors: str = "strict"
) -> str:
    """The text of a regular file in UTF-8, its lines ended by a line feed; `UserError` as `read_bytes`."""
    data = read_bytes(path, remedy=remedy, most=most).removeprefix(codecs.BOM_UTF8)
    if (place := data.find(b"\0")) >= 0:
        raise UserError(f"{path} is no text (a NUL at byte {place}): {remedy}.")
    try:
        return data.decode(errors=errors).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (from byte {error.start} on): {remedy}.") from None


def read_yaml(path: str | os.PathLike[str], *, remedy: str = "check it") -> str:
    """The text of a YAML file that its parser can read: aliases of aliases multiply, and each level is a call."""
    text = read_text(path, remedy=remedy)
    depth = max(itertools.accumulate(1 if mark in "[{" else -1 for mark in re.findall(r"[][{}]", text)), default=0)
    if depth > MOST_LEVELS or len(re.findall(r"(?<![\w*])\*\w", text)) > MOST_ALIASES:
        raise UserError(f"{path} has more than {MOST_LEVELS} levels or {MOST_ALIASES} aliases: write it plainly.")
    return text


def read_json(
    path: str | os.PathLike[str], *, remedy: str = "check the path", most: int = MOST_TEXT, kind: type = dict
) -> Any:
    """The JSON value in a regular file, of type `kind`; `UserError` as `read_bytes`, and where it is no such value."""
    return parse_json(read_bytes(path, remedy=remedy, most=most), where=path, remedy=remedy, kind=kind)


def parse_json(data: bytes | str, *, where: object = "it", remedy: str = "check it", kind: type = dict) -> Any:
    """The JSON value of type `kind` that `data`, from `where`, is; `UserError` where it is none."""
    try:
        value = from_json(data.removeprefix(codecs.BOM_UTF8) if isinstance(data, bytes) else data)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): {remedy}.") from None
    if not isinstance(value, kind):
        raise UserError(f"{where} holds no JSON {'object' if kind is dict else 'list'}: {remedy}.")
    return value


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it becomes `target`, on any error it is removed."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes 0600; a result is as readable as any file the user makes. The umask is read by setting it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `target` as UTF-8, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(text.encode())


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically; NaN is refused, JSON has none."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces): equal values, equal digests."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/twist-suite`, by default `~/.cache/twist-suite` (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "twist-suite"
