"""What a run is asked to do (`Request`), what its engine makes of that (`Resolved`), and what comes out (`Result`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from twist.catalog.card_data import CardData
from twist.contracts.config import Config, parse_override, validate
from twist.contracts.trackers import Logger
from twist.contracts.weights import Backbone, NetworkName
from twist.converters.sources import Place
from twist.transfer.protocols import Protocol

if TYPE_CHECKING:
    from torch import Tensor

# In the run folder: the random initialisation that the run starts from.
RANDOM_FILE = Path("weights") / "random.safetensors"


class Controls(Config):
    """Ours, not the framework's: `architecture=resnet18`, `keep_batch=true`, `nodes=2 node_rank=0 master=host:port`."""

    # Of the network that `--weights random` initialises; a checkpoint has its own.
    architecture: NetworkName | None = None
    width: Literal[1, 2, 4] | None = None
    # On another number of GPUs than the recipe's: keep its batch, lr and iterations (needs the memory) instead of
    # scaling them by the linear rule.
    keep_batch: bool = False
    # A shorter or longer run: milestones and warm-up move in proportion, so the schedule keeps its form.
    iterations: int | None = Field(default=None, gt=0)
    # The same in passes over a data card's training images (the ImageNet engine's recipes have a key of that name).
    epochs: float | None = Field(default=None, gt=0)
    # Of a data card: what its paths are relative to.
    root: str | None = None
    # An experiment tracker, which gets the run's curves.
    logger: Logger | None = None
    # A folder for what runs of the same weights can share: conversions, frozen features. It is kept.
    shared: str | None = None
    # Several machines, each with `--gpus`; the same command on every one with its own node_rank.
    nodes: int = Field(default=1, gt=0)
    node_rank: int = Field(default=0, ge=0)
    master: str | None = None

    @model_validator(mode="after")
    def _cluster(self) -> Controls:
        if self.nodes > 1 and not self.master:
            raise ValueError("several nodes need master=HOST:PORT, the address of the node with node_rank 0")
        if self.iterations and self.epochs:
            raise ValueError("iterations and epochs say the same: keep one of them")
        if self.node_rank >= self.nodes:
            raise ValueError(f"node_rank {self.node_rank} is not below nodes {self.nodes}")
        return self


@dataclass(frozen=True)
class Request:
    """A run as it is asked for; `gpus` is a node's, 0 means one process on the CPU.

    `checkpoint` is None for random weights, whose header `random` is; `name` and `method` are the record's, None to
    take what the weights say; `epochs` are those of a file that says none. `own` are the data of a card, whose file
    `data` then is. `data_name` says which data these are, wherever they lie, and `sample` what sample.
    """

    protocol: Protocol
    data: Path
    output: Path
    checkpoint: Path | None = None
    name: str = "random"
    sha256: str | None = None
    reading: Place = field(default_factory=Place)  # how the checkpoint is read, as `twist convert` takes it
    epochs: int | None = None
    random: Backbone | None = None
    method: str | None = None
    seed: int = 0
    gpus: int = 0
    overrides: tuple[str, ...] = ()
    controls: Controls = field(default_factory=Controls)
    resume: bool = False
    eval_only: bool = False
    own: CardData | None = None
    data_name: str | None = None
    sample: dict[str, Any] | None = None
    results: Path = Path("results")

    @property
    def leads(self) -> bool:
        """On several machines the first one writes the folder's `run.json`; the others work in it, or in their own."""
        return self.controls.node_rank == 0

    @property
    def processes(self) -> int:
        """Processes of the whole run, over all nodes."""
        return max(self.gpus, 1) * self.controls.nodes


@dataclass(frozen=True)
class Weights:
    """The weights of a run as its engine takes them: converted to `file` and `overlay`, or as `tensors`."""

    header: Backbone
    file: Path | None = None
    overlay: Path | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """What will run. `recipe` is JSON-able and holds what decides the number but no weights, path or seed; what is
    `reduced` is not the protocol's own, and published numbers are no peers of it."""

    config: Any
    recipe: dict[str, Any]
    plan: str
    reduced: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One finished training and evaluation: metrics by the names of `contracts.metrics`, the recipe to record, small
    PNGs, a `metrics.jsonl`, sentences that belong beside the number, and the SHA-256 of the backbone's tensors as every
    process held them before its first step."""

    metrics: dict[str, float]
    recipe: dict[str, Any]
    media: list[Path] = field(default_factory=list)
    curves: Path | None = None
    notes: list[str] = field(default_factory=list)
    loaded: str | None = None


def split_overrides(overrides: Sequence[str], *, in_epochs: bool = False) -> tuple[Controls, tuple[str, ...]]:
    """Our controls, and what remains for the engine's own config, to which `epochs` belongs where it is `in_epochs`."""
    ours: dict[str, Any] = {}
    theirs = []
    for override in overrides:
        keys, value = parse_override(override)
        if len(keys) == 1 and keys[0] in Controls.model_fields and not (in_epochs and keys[0] == "epochs"):
            ours[keys[0]] = value
        else:
            theirs.append(override)
    return validate(ours, Controls, where="overrides"), tuple(theirs)
