"""Fetching Debian packages as plain archives: no root, nothing installed, apt's own state untouched.

apt gets private folders for its lists and its cache and keeps checking signatures and digests with the system's keys;
`dpkg-deb -x` unpacks. Both are asked by exact package names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twist.contracts.errors import UserError
from twist.contracts.files import sha256_file

TIMEOUT_S = 900


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/twist-suite`, by default `~/.cache/twist-suite` (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "twist-suite"


def fetch(packages: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Download `packages` into `folder` and unpack them to `folder`/root; yields name, version and SHA-256 of each.

    Raises:
        UserError: apt or dpkg is missing, the machine's sources do not have a package, or the network does not answer.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(
                f"This data comes from Debian packages and needs {program}, which is not on this machine: copy "
                "~/.cache/twist-suite from a Debian or Ubuntu machine that has made it, or use --source shapes."
            )
    downloads, root = folder / "packages", folder / "root"
    for needed in (folder / "lists" / "partial", folder / "cache" / "archives" / "partial", downloads, root):
        needed.mkdir(parents=True, exist_ok=True)
    private = [
        *("-o", f"Dir::State::Lists={folder / 'lists'}"),
        *("-o", f"Dir::Cache={folder / 'cache'}"),
        *("-o", "Acquire::Languages=none"),
        # As root, apt would drop to a user who may not write here; as anyone else this changes nothing.
        *("-o", "APT::Sandbox::User=root"),
    ]
    _run(["apt-get", "--quiet", *private, "update"], downloads)
    for package in packages:
        _run(["apt-get", "--quiet", *private, "download", package], downloads)
        archive = next(downloads.glob(f"{package}_*.deb"), None)
        if archive is None:
            raise UserError(f"apt-get said it downloaded {package}, but there is no archive of it in {downloads}.")
        version = _run(["dpkg-deb", "--field", archive.name, "Version"], downloads).strip()
        _run(["dpkg-deb", "--extract", archive.name, str(root)], downloads)
        yield {"package": package, "version": version, "sha256": sha256_file(archive)}
        archive.unlink()


def _run(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not finish in {TIMEOUT_S} s: check the network and try again.") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        reason = errors[0] if errors else f"exit status {done.returncode}"
        raise UserError(
            f"{command[0]} {command[-1]} failed ({reason}): check the network and that Debian's main section is among "
            "this machine's apt sources, or use --source shapes."
        )
    return done.stdout
