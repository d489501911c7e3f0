"""The tables of a README, kept current between markers that hold the very arguments they are made with."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from twist.compare.comparison import Choice, Reader, compare
from twist.compare.render import render_all
from twist.contracts import files
from twist.contracts.errors import UsageError, UserError
from twist.contracts.record import RESULTS, read_records

_OPEN = re.compile(r"^<!-- twist compare\b(?P<arguments>.*?)-->\s*$")
_CLOSE = re.compile(r"^<!-- end -->\s*$")


def markdown_from_arguments(arguments: Sequence[str], *, root: Path, read: Reader = read_records) -> str:
    """The Markdown table of `twist compare ARGUMENTS`, record paths taken relative to `root`.

    Raises:
        UsageError: an unknown argument.
        UserError: a path without records, or records that may not meet.
    """
    parser = _Parser(prog="twist compare", add_help=False)
    parser.add_argument("records", nargs="*")
    parser.add_argument("--baseline")
    parser.add_argument("--published", action=argparse.BooleanOptionalAction)
    parser.add_argument("--published-only", action="store_true")
    parser.add_argument("--same-methods", action="store_true")
    parser.add_argument("--allow-mixed", action="store_true")
    parser.add_argument("--metric", action="append", default=[])
    chosen = parser.parse_args(list(arguments))
    choice = Choice(
        baseline=chosen.baseline,
        allow_mixed=chosen.allow_mixed,
        published=chosen.published,
        published_only=chosen.published_only,
        same_methods=chosen.same_methods,
        metrics=tuple(chosen.metric),
    )
    names = chosen.records or ([] if chosen.published_only else [RESULTS])
    return render_all(compare([root / name for name in names], choice, read=read), "markdown", root=root)


def check_markers(readme: Path, *, read: Reader = read_records) -> list[str]:
    """The opening markers of `readme` whose tables are stale: made again, they would read otherwise. Empty: current.

    A table lies between `<!-- twist compare ARGUMENTS -->` and `<!-- end -->`, each on a line of its own; the marker
    holds the very arguments that the table is made with, paths relative to the README's folder.

    Raises:
        UserError: the file is absent or a marker has no end.
    """
    return [block.marker for block in _marked(readme, read) if block.current != block.wanted]


def update_markers(readme: Path, *, read: Reader = read_records) -> list[str]:
    """Rewrite the stale tables of `readme` in place, atomically; the opening markers of those rewritten."""
    blocks = _marked(readme, read)
    stale = [block for block in blocks if block.current != block.wanted]
    if stale:
        lines = readme.read_text(encoding="utf-8").splitlines(keepends=True)
        for block in reversed(stale):
            lines[block.start : block.end] = [block.wanted]
        files.write_text(readme, "".join(lines))
    return [block.marker for block in stale]


def find_markers(readme: Path) -> list[str]:
    """The opening markers of `readme`, in order; the errors are those of `check_markers`."""
    return [place.marker for place in _places(_lines(readme), readme)]


@dataclass(frozen=True)
class _Place:
    """A marker and the lines between it and its end."""

    marker: str
    arguments: str
    start: int
    end: int


@dataclass(frozen=True)
class _Marked:
    marker: str
    start: int
    end: int
    current: str
    wanted: str


def _marked(readme: Path, read: Reader) -> list[_Marked]:
    lines = _lines(readme)
    blocks = []
    for place in _places(lines, readme):
        made = markdown_from_arguments(shlex.split(place.arguments), root=readme.parent, read=read)
        current = "".join(lines[place.start : place.end])
        blocks.append(_Marked(place.marker, place.start, place.end, current, f"\n{made}\n"))
    return blocks


def _lines(readme: Path) -> list[str]:
    try:
        return readme.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"There is no file at {readme}: --check and --update take a Markdown file.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"Cannot read {readme} ({reason}): --check and --update take a Markdown file.") from None


def _places(lines: Sequence[str], readme: Path) -> list[_Place]:
    places = []
    opened: tuple[int, str, str] | None = None
    fenced = False
    for number, line in enumerate(lines):
        # A marker inside a code fence is an example of one.
        fenced ^= line.startswith("```")
        if fenced:
            continue
        match = _OPEN.match(line)
        if match and opened:
            raise UserError(f"{readme}, line {opened[0] + 1}: the marker has no <!-- end --> before the next one.")
        if match:
            opened = (number, line.strip(), match["arguments"])
        elif _CLOSE.match(line) and opened:
            places.append(_Place(opened[1], opened[2], opened[0] + 1, number))
            opened = None
    if opened:
        raise UserError(f"{readme}, line {opened[0] + 1}: the marker has no <!-- end --> line; add it.")
    return places


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"twist compare in a marker: {message}.")
