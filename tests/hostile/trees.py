"""The trees that some hostile files lie in: a sample, runs of it, SBD beside VOC. Each is made once and copied."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from forked import Command, Server
from PIL import Image
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
        """Run `twist`, to its end or until it is killed; `options` are those of `Command`."""
        (ended,) = self._server.run(Command(arguments, str(folder), seconds=120, **options))
        assert ended.status == (-signal.SIGKILL if "kill_when" in options else 0), ended.said


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


def _linear(trees: Trees, folder: Path) -> None:
    """A run that was killed when it had its first checkpoint."""
    trees.copy("sample", folder / "data")
    run = transfer("sample-linear", "epochs=4", data="data", output="run")
    trees.twist(*run, folder=folder, kill_when={"run/checkpoint.pth": 1})
    assert not (folder / "run" / "results").exists(), "it was not killed in time"


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


def _weights(trees: Trees, folder: Path) -> None:
    trees.copy("knn", folder / "x")
    os.link(folder / "x" / "run" / "weights" / "random.safetensors", folder / "weights.safetensors")
    shutil.rmtree(folder / "x")


def _sbd(_: Trees, folder: Path) -> None:
    """VOC's and SBD's folders with one image that only SBD has labels of, and 24 that VOC has."""
    voc, sbd = folder / "VOC2012", folder / "sbd"
    names = [f"2010_{i:06d}" for i in range(24)]
    lists = voc / "ImageSets" / "Segmentation"
    for place in (lists, voc / "SegmentationClass", voc / "JPEGImages", sbd / "cls"):
        place.mkdir(parents=True)
    for file, listed in {
        lists / "train.txt": names, lists / "val.txt": ["2011_000001"],
        sbd / "train.txt": ["2020_000001"], sbd / "val.txt": names[:1],
    }.items():  # fmt: skip
        file.write_text("\n".join(listed) + "\n")
    for name in names:
        Image.fromarray(np.zeros((34, 40), np.uint8)).save(voc / "SegmentationClass" / f"{name}.png")
    (voc / "JPEGImages" / "2020_000001.jpg").touch()


MAKERS: dict[str, Callable[[Trees, Path], object]] = {
    "sample": _sample,
    "knn": _knn,
    "linear": _linear,
    "pretraining": _pretraining,
    "unpainted": _unpainted,
    "weights": _weights,
    "sbd": _sbd,
    "card": lambda _, folder: write_yolo(folder),
}
