"""What the tests of both framework engines start from: written weights, as the converter makes them, and requests."""

import functools
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from twist.contracts.errors import UsageError
from twist.contracts.images import read_image
from twist.contracts.networks import build_backbone
from twist.contracts.record import RunRecord, read_record
from twist.contracts.trackers import Tracker
from twist.contracts.weights import Backbone, is_vit, stem_of
from twist.converters.targets import TARGETS
from twist.transfer.engines import all_engines
from twist.transfer.predict import Picture
from twist.transfer.protocols import find_protocol
from twist.transfer.request import Request, Resolved, Result, Weights, split_overrides

ROOT = Path(__file__).resolve().parent.parent
Written = tuple[Path, Path, Backbone]


# Two steps on small images, few proposals; models, losses, heads, pipelines and evaluators are the protocol's.
QUICK_OF = {
    "detectron2": (
        "iterations=2",
        "SOLVER.IMS_PER_BATCH=2",
        "INPUT.MIN_SIZE_TRAIN=[64]",
        "INPUT.MAX_SIZE_TRAIN=128",
        "INPUT.MIN_SIZE_TEST=64",
        "INPUT.MAX_SIZE_TEST=128",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN=50",
        "MODEL.RPN.POST_NMS_TOPK_TEST=10",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=8",
        "TEST.PRECISE_BN.NUM_ITER=1",
        "DATALOADER.NUM_WORKERS=0",
    ),
    "mmseg": (
        "iterations=2",
        "train_dataloader.batch_size=2",
        "train_dataloader.num_workers=0",
        "val_dataloader.num_workers=0",
        "train_dataloader.dataset.pipeline.2.scale=[128, 80]",
        "train_dataloader.dataset.pipeline.3.crop_size=[65, 65]",
        "model.data_preprocessor.size=[65, 65]",
        "val_dataloader.dataset.pipeline.1.scale=[128, 80]",
        "model.decode_head.channels=16",
    ),
}


def weights_maker(folder: Path, target: str) -> Callable[[str], Written]:
    """architecture → (weights, overlay, header) of a seeded random network, converted to `target` once."""

    @functools.cache
    def make(architecture: str) -> Written:
        torch.manual_seed(3)
        form = {"stem": stem_of(architecture), "image_size": 224} if is_vit(architecture) else {}
        header = Backbone(architecture=architecture, method="twist", **form)  # type: ignore[arg-type]
        writer = TARGETS[target]
        ((name, text),) = writer.settings(header).items()
        file, overlay = folder / f"{architecture}.pth", folder / f"{architecture}-{name}"
        writer.write(file, build_backbone(architecture).state_dict(), header)
        overlay.write_text(text)
        return file, overlay, header

    return make


class EngineUser:
    """Requests of an engine as `twist transfer` would make them, in the folder `output`."""

    def __init__(self, name: str, tree: Path, weights: Callable[[str], Written], output: Path) -> None:
        torch.set_num_threads(1)
        self.engine: Any = importlib.import_module(all_engines()[name].module)
        self._tree, self._weights, self.output = tree, weights, output

    def ask(
        self, protocol: str, *overrides: str, architecture: str = "resnet18", method: str = "twist", **more: Any
    ) -> tuple[Request, Weights]:
        controls, rest = split_overrides(overrides)
        self.output.mkdir(exist_ok=True)
        file, overlay, header = self._weights(architecture)
        row = find_protocol(protocol)
        request = Request(row, self._tree, self.output, file, method=method, overrides=rest, controls=controls, **more)
        return request, Weights(header, file, overlay)

    def resolve(self, protocol: str, *overrides: str, **more: Any) -> Resolved:
        return self.engine.resolve(*self.ask(protocol, *overrides, **more))

    def run(self, protocol: str, *overrides: str, **more: Any) -> Result:
        asked = self.ask(protocol, *overrides, **more)
        return self.engine.run(*asked, self.engine.resolve(*asked))

    def predict(self, pictures: list[Path], output: Path) -> dict[str, Any]:
        given = (Picture(path.stem, path, read_image(path)) for path in pictures)
        return self.engine.predict(self.output, given, output)


def track(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    """What an experiment tracker is given of the loss: its name, the step and the value."""
    seen: list[tuple[str, int, float]] = []

    def opened(logger: str, _folder: Path) -> Tracker:
        return Tracker(lambda values, step: seen.append((logger, step, values["loss"])), lambda: None)

    monkeypatch.setattr("twist.contracts.curves.open_tracker", opened)
    return seen


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[int(part) if part.isdigit() else part]
    return config


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def other_value(value: Any) -> str:
    """An override's text for another value of the same type."""
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, (int, float)):
        return json.dumps(value + 1)
    if isinstance(value, (list, tuple)):
        return "[]" if value else "[1]"
    return json.dumps("another")


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config that an override can name, with its value."""
    inside = isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree)
    if not isinstance(tree, dict) and not inside:
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(value, f"{path}.{key}".lstrip("."))


@dataclass
class Sweep:
    """Keys of a config by what became of an override of each alone, with another value.

    Refused; the recipe stayed the same; the record is not `reduced`; no note names the key.
    """

    refused: set[str] = field(default_factory=set)
    same_recipe: set[str] = field(default_factory=set)
    not_reduced: set[str] = field(default_factory=set)
    unnamed: set[str] = field(default_factory=set)


def sweep(tree: dict[str, Any], resolve: Callable[[str], Any], named: set[str]) -> Sweep:
    """Override the leaves of `tree` alone that are `named`, and every fourth of the others.

    `resolve` makes an engine's `Resolved` of an override's text.
    """
    found = Sweep()
    plain = resolve("").recipe
    others = [key for key, _ in leaves(tree) if key not in named]
    tried = named | {*others[::4]}
    for key, value in leaves(tree):
        if key not in tried:
            continue
        try:
            resolved = resolve(f"{key}={other_value(value)}")
        except UsageError:
            found.refused.add(key)
            continue
        if resolved.recipe == plain:
            found.same_recipe.add(key)
        if not resolved.reduced:
            found.not_reduced.add(key)
        if not any(f" {key} " in note or f" {key}." in note for note in resolved.notes):
            found.unnamed.add(key)
    return found


def committed(protocol: str, folder: str) -> RunRecord:
    """One of the records of `results/<folder>` under `protocol`."""
    return read_record(min((ROOT / "results" / folder / protocol).glob("*.json")))


def sample_root(record: RunRecord, root: Path) -> Path:
    """A folder that says of itself that it is the sample of `record`; the images are not needed to resolve."""
    classes = [f"class {number}" for number in range(10)]
    root.mkdir()
    (root / "sample.json").write_text(json.dumps({**record.recipe["sample"], "classes": classes}))
    return root


def own_part(record: RunRecord) -> dict[str, Any]:
    """The engine's part of the recipe of `record`: what the run itself added is of the data and the network."""
    return {key: value for key, value in record.recipe.items() if key not in ("architecture", "data", "sample")}
