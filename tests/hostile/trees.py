"""The trees that some hostile files lie in: a sample, and runs of it. Each is made once and copied."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Command, Server
from texts import transfer
from tiny_cards import write_yolo
from tiny_run import tiny_config, toml

LARGE = 2**20  # linked, not copied: nothing writes into large files


class Trees:
    """Prepared folders by name, each made once, when the first case asks for a copy."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder

    def copy(self, name: str, target: Path) -> None:
        source = self._folder / name
        if not source.exists():
            source.mkdir(parents=True)
            MAKERS[name](self, source)
        shutil.copytree(source, target, symlinks=True, copy_function=_linked, dirs_exist_ok=True)

    def twist(self, *arguments: str, folder: Path, **options: Any) -> None:
        """Run `twist` to its end; `options` are those of `Command`."""
        (ended,) = self._server.run(Command(arguments, str(folder), seconds=120, **options))
        assert ended.status == 0, ended.said


def _linked(source: str, target: str) -> None:
    # Of a sample every file is only read.
    if os.path.getsize(source) > LARGE or source.endswith((".png", ".jpg", ".xml", ".txt")):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _sample(trees: Trees, folder: Path) -> None:
    trees.twist("data", "sample", ".", "--size", "tiny", folder=folder)


def _knn(trees: Trees, folder: Path) -> None:
    trees.copy("sample", folder / "data")
    trees.twist(*transfer("sample-knn", data="data", output="run"), folder=folder)


def _pretraining(trees: Trees, folder: Path) -> None:
    trees.copy("sample", folder / "data")
    (folder / "tiny.toml").write_text(toml(tiny_config(Path("tree/data/unlabelled"))))
    (folder / "tree").symlink_to(".")  # as the cases see it, from the folder above
    trees.twist("pretrain", "tiny.toml", "--output", "run", folder=folder, setup="tiny_run:tiny_networks")
    (folder / "tree").unlink()


def _unpainted(trees: Trees, folder: Path) -> None:
    trees.copy("sample", folder)
    for painted in folder.glob("cityscapes/gtFine/train/aachen/aachen_000001_*_labelTrainIds.png"):
        painted.unlink()


MAKERS: dict[str, Callable[[Trees, Path], object]] = {
    "sample": _sample,
    "knn": _knn,
    "pretraining": _pretraining,
    "unpainted": _unpainted,
    "card": lambda _, folder: write_yolo(folder),
}
