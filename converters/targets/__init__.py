"""The targets, one file each: names, refusals, writing, settings, proof run and usage lines. The registry finds them.

A new target is a new file here with a `TARGET`, or `TARGETS[name] = Target(...)` from elsewhere.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts.files import atomic_path
from twist.contracts.shapes import tensors_of
from twist.contracts.weights import Backbone, check_written

if TYPE_CHECKING:
    from torch import Tensor, nn

# Of one image: res2 … res5 of a ResNet, or the tokens after every block of a ViT.
Stages = dict[str, "Tensor"]
# Written folder, header, image files → stages of each image, by the framework's own loader, reader and network.
ProofRun = Callable[[Path, Backbone, list[Path]], list[Stages]]


# Why a target that is no timm and no file of ours refuses a network that timm builds by name.
TIMM_ALONE = "only timm builds it; the frozen protocols (`twist transfer --list frozen`) run on it"


def own_names(backbone: Backbone) -> dict[str, str]:
    """The artefact's names as they are, in the order of the network's state dict."""
    return {name: name for name in tensors_of(backbone)}


@dataclass(frozen=True)
class Target:
    """One target; `framework` is called only where `package` is installed."""

    name: str  # as `--to` takes it
    title: str  # as messages call it
    weights: str  # name of the weights file
    package: str  # what has to be importable for the proof in the framework itself
    # Writes tensors (artefact names) to a path.
    write: Callable[[Path, Mapping[str, Tensor], Backbone], object]
    # The proof run and the package that does it, or the reason why the framework has no such network.
    framework: Callable[[Backbone], tuple[ProofRun, str] | str]
    # Python lines that load what lies in a folder.
    usage: Callable[[Path, Backbone], str]
    # Artefact name → name in the file, for every tensor that the target has a place for.
    names: Callable[[Backbone], dict[str, str]] = own_names
    # Why the target cannot hold such a network, or None.
    refuse: Callable[[Backbone], str | None] = lambda _: None
    # Name → text of the files with the settings that the weights imply, the first of which is the overlay.
    settings: Callable[[Backbone], dict[str, str]] = lambda _: {}
    # The same as `write` for `--pkl`.
    write_pickle: Callable[[Path, Mapping[str, Tensor], Backbone], None] | None = None
    keeps_padding: bool = False  # whether the target's network can pad as TensorFlow
    # Fields of a ViT's description (`resize`, `norm_eps`) that are always so in its network, whatever the source's are.
    changes: Callable[[Backbone], dict[str, Any]] = lambda _: {}
    fixed_size: bool = False  # whether its ViTs take only images of the position table's size
    # Outputs of our network that its outputs are compared with, where they are more than the stages.
    stages: Callable[[nn.Module, Tensor], Stages] | None = None
    # Our extra without which it cannot be proven, nor written; other targets are then read back into our network.
    extra: str | None = None
    library: str | None = None  # what model hubs call it: the folder then has a model card


def write_torch(path: Path, tensors: Mapping[str, Tensor], *, entry: str, extras: Mapping[str, Any]) -> None:
    """`{entry: tensors, **extras}` as a torch file that loads with `weights_only=True`, atomically, and read back.

    `extras` are strings, numbers and booleans. The bytes depend on the contents alone: torch writes no times, and
    names the archive after the file only when it is given a path, so it gets a stream.
    """
    import torch

    def alone(tensor: Tensor) -> Tensor:
        # torch.save writes the whole storage under a view: a slice of a stacked table would bring the table along.
        tensor = tensor.detach().contiguous()
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    plain = {name: alone(tensor) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            torch.save({entry: plain, **extras}, file)
            file.flush()
            os.fsync(file.fileno())
        check_written(path, plain, torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)[entry])


def pixel_text(backbone: Backbone, input_range: int | None = None) -> str:
    """`RGB from 0 to 1, mean 0.485, …, std 0.229, …`"""
    input_range = input_range or backbone.input_range
    mean, std = (", ".join(f"{value:g}" for value in values) for values in backbone.pixels(input_range))
    return f"{backbone.channel_order} from 0 to {input_range}, mean {mean}, std {std}"


def quoted(path: Path, prefix: str = "") -> str:
    """A path as a Python string literal with double quotes, for usage lines."""
    return '"' + f"{prefix}{path}".replace("\\", "\\\\").replace('"', '\\"') + '"'


TARGETS: dict[str, Target] = {}
for _file in pkgutil.iter_modules(__path__):
    _target: Target = importlib.import_module(f"{__name__}.{_file.name}").TARGET
    TARGETS[_target.name] = _target
