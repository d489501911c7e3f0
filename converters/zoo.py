"""Published weights by name: the rows of `zoo.toml`, their download into the user's cache, and the proof of a row.

`zoo:NAME` stands for the file wherever weights are named; how it is read comes from the row, where the user does not
say it. Digests are often published in part, and downloads of gigabytes are cut: so a digest is compared by its
beginning, and a download goes on where it stopped.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import tempfile
import time
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field, model_validator

from twist.contracts.config import Config, validate
from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.files import cache_folder, sha256_file
from twist.contracts.progress import Progress
from twist.contracts.run_folder import try_lock
from twist.contracts.weights import weights_file
from twist.converters.sources import BY_NAME

PREFIX = "zoo:"
TIMEOUT_S = 60
MIB = 2**20
Text = Annotated[str, Field(min_length=1)]


class Weights(Config):
    """One released file; the keys are explained in `zoo.toml`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    method: Text
    layout: Text
    branch: str | None = None
    heads: int | None = Field(default=None, gt=0)
    architecture: Text
    epochs: int | None = Field(default=None, gt=0)
    images: Text
    url: str | None = Field(default=None, pattern=r"^https?://")
    page: str | None = Field(default=None, pattern=r"^https?://")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{8,64}$")
    md5: str | None = Field(default=None, pattern=r"^[0-9a-f]{6,32}$")
    size: str | None = None
    licence: Text
    expected: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(default={})
    source: Text
    verified: datetime.date | None = None

    @model_validator(mode="after")
    def _fits(self) -> Weights:
        if self.layout not in BY_NAME:
            raise ValueError(f"{self.name}: there is no layout {self.layout}")
        branches = [branch.name for branch in BY_NAME[self.layout].branches]
        if self.branch is not None and self.branch not in branches:
            raise ValueError(f"{self.name}: {self.layout} has no branch {self.branch}")
        if (self.url is None) == (self.page is None):
            raise ValueError(f"{self.name}: either url or page says where the file is")
        return self

    @property
    def file(self) -> Path:
        """Where the file lies in the user's cache: it is called as the weights are."""
        ending = "".join(PurePosixPath(self.url or "file.pth").suffixes[-2:])
        return cache_folder() / "zoo" / f"{self.name}{ending}"


@cache
def load_zoo() -> dict[str, Weights]:
    """Every row by its name; `UsageError` when the file does not follow its schema."""
    file = resources.files("twist.converters") / "zoo.toml"
    releases = tomllib.loads(file.read_text(encoding="utf-8"))["release"]
    rows = [release | row for release in releases for row in release.pop("weights")]
    return {row["name"]: validate(row, Weights, where="converters/zoo.toml") for row in rows}


def find(name: str) -> Weights:
    """The row of that name, with or without `zoo:` before it; `UsageError` where there is none."""
    name = name.removeprefix(PREFIX)
    if name not in load_zoo():
        near = did_you_mean(name, [known for known in load_zoo() if known[:3] == name[:3]])
        raise UsageError(f'There are no published weights "{name}".{near} `twist zoo` lists all.')
    return load_zoo()[name]


def select(words: Iterable[str]) -> list[Weights]:
    """The rows in which each of `words` is part of the name, method, architecture, images or licence."""
    rows, searched = load_zoo().values(), ("name", "method", "architecture", "images", "licence")
    text = {row.name: " ".join(getattr(row, key) for key in searched).lower() for row in rows}
    return [row for row in rows if all(word.lower() in text[row.name] for word in words)]


def located(weights: str | os.PathLike[str], **asked: Any) -> tuple[Path, dict[str, Any]]:
    """The file that `weights` names (`zoo:NAME`, fetched; a run's folder; a file), and how it is read.

    `asked` are some of a `Reading`, and epochs; what is left out or None there, the row of the zoo says.
    """
    if not str(weights).startswith(PREFIX):
        return weights_file(weights), asked
    row = find(str(weights))
    said = {key: getattr(row, key, None) for key in ("layout", "branch", "heads", "method", *asked)}
    return fetch(row), {**said, **{key: value for key, value in asked.items() if value is not None}}


def fetch(row: Weights) -> Path:
    """The file of `row`, downloaded into the user's cache unless it is there; a download that was cut goes on.

    Raises:
        UserError: only a browser can fetch it, the network does not answer, or the file is not the published one; the
            sentence says what to download and where to put it.
    """
    file = row.file
    if file.is_file():  # in a cache that may be shared, and read-only
        _check_digest(row, file)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    while (lock := try_lock(file.with_name(f".{file.name}.lock"))) is None:
        time.sleep(1)  # another process is fetching it
    with os.fdopen(lock):
        if file.is_file():
            return file
        if row.url is None:
            raise UserError(f"{row.name} can be fetched by a browser alone: open {row.page} and save it as {file}.")
        part = file.with_name(f".{file.name}.part")
        try:
            _download(row.url, part, title=f"fetch {row.name}")
            _check_digest(row, part)
        except UserError:
            part.unlink()
            raise
        except OSError as error:
            raise UserError(
                f"{row.name} cannot be fetched ({getattr(error, 'reason', None) or error}): try again later, or "
                f"download {row.url} elsewhere and save it as {file}."
            ) from None
        return part.rename(file)


def _download(url: str, part: Path, *, title: str) -> None:
    """Append to `part` what it lacks of the file at `url`; a connection that breaks is taken up while that helps.

    Proxies are those of the environment (`https_proxy`).
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    while True:
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "twist-suite"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with urlopen(Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
                if answer.headers.get_content_type() == "text/html":
                    raise OSError("a web page came instead of the file")
                begin = have if answer.status == 206 else 0  # other servers send the whole file again
                length = answer.headers.get("Content-Length")
                total = None if length is None else begin + int(length)
                size = None if total is None else -(-total // MIB)
                bar = Progress(title, total=size, unit="mebibyte", start=begin // MIB)
                with part.open("ab" if begin else "wb") as output, bar:
                    while block := answer.read(MIB):
                        output.write(block)
                        bar.advance(1)
            if total is None or (got := part.stat().st_size) == total:
                return
            raise OSError(f"the connection ended after {got} of {total} bytes")
        except HTTPError as error:
            if not (error.code == 416 and have):  # the part is no beginning of the file that is there now
                raise
            part.unlink()
        except (OSError, HTTPException) as error:
            if not part.exists() or part.stat().st_size <= have:
                raise OSError(getattr(error, "reason", None) or error) from None


def _check_digest(row: Weights, file: Path) -> None:
    """`UserError` where the digest that the authors publish, or the part of it, is another than the file's."""
    for kind, published in (("sha256", row.sha256), ("md5", row.md5)):
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, kind).hexdigest() if published else ""
        if published and not found.startswith(published):
            raise UserError(
                f"This is not the published file of {row.name}: its {kind} is {found}, and {published} was published. "
                f"Remove {row.file} if it is there, and fetch it again; if that does not help, the release has changed."
            )


def fetched_text(row: Weights) -> str:
    """What `twist fetch` prints: the file, its digest, and what vouches for it."""
    file = fetch(row)
    checked = "compared with the published digest" if row.sha256 or row.md5 else "the authors publish no digest"
    return f"{file}\nsha256 {sha256_file(file)} ({checked}); licence {row.licence}"


def zoo_text(rows: Iterable[Weights]) -> str:
    """A line for each row, in columns."""
    table = [("name", "network", "epochs", "the authors print", "licence", "fetched by", "verified")]
    for row in rows:
        expected = next((f"{key} {value:g}" for key, value in row.expected.items()), "-")
        by, verified = "browser" if row.page else "twist fetch", str(row.verified or "-")
        table.append((row.name, row.architecture, str(row.epochs or "-"), expected, row.licence, by, verified))
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return "\n".join([*lines, "", "A dash under `verified`: nobody has converted the real file here yet."])


def verify(name: str) -> str:
    """The row of `name` as it is to be committed, after the real file was fetched, read and converted with proof.

    Raises:
        UserError: the file is another network or of another length than the row says, or it cannot be converted.
    """
    from twist.converters.convert import conversion_text, convert
    from twist.converters.inspect import inspect

    row = find(name)
    named = Path(PREFIX + row.name)
    seen = inspect(named)
    if not seen.targets:
        raise UserError(f"{row.name} cannot be converted: {'; '.join(seen.problems)}")
    with tempfile.TemporaryDirectory() as folder:
        target = "timm" if "timm" in seen.targets else seen.targets[0]
        done = convert(named, to=target, output=Path(folder) / target)
        print(conversion_text(done).partition("\n" + folder)[0])
    header = done.backbone
    for key, found in (("architecture", header.display_name), ("epochs", header.epochs)):
        if found is not None and found != getattr(row, key):
            raise UserError(f"{row.name}: the file says {key} {found}, zoo.toml {getattr(row, key)}: correct the row.")
    size = f"{row.file.stat().st_size / MIB:.1f} MiB"
    return (
        f"Write this below {row.name} in converters/zoo.toml:\n\n"
        f'sha256 = "{seen.contents.sha256}"\nsize = "{size}"\nverified = {datetime.date.today()}'
    )
