"""What an engine is asked to do: one protocol, one set of weights already converted, one data root, one run folder.

Beside the framework's own keys a run takes a few `key=value` controls that belong to no framework; they are read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from twist.contracts.config import Config, parse_override, validate
from twist.contracts.weights import Architecture, Backbone
from twist.transfer.protocols import Protocol


class Controls(Config):
    """Ours, not the framework's: `architecture=resnet18`, `keep_batch=true`, `nodes=2 node_rank=0 master=host:port`."""

    # Of the network that `--weights random` initialises; given weights say their own.
    architecture: Architecture | None = None
    width: Literal[1, 2, 4] | None = None
    # With another number of GPUs than the recipe's: keep its batch, lr and iterations (needs the memory) instead of
    # scaling them by the linear rule.
    keep_batch: bool = False
    # A shorter or longer run: milestones and warm-up move in proportion, so the schedule keeps its form.
    iterations: int | None = Field(default=None, gt=0)
    # Several machines, each with `--gpus`; the same command on every one with its own node_rank.
    nodes: int = Field(default=1, gt=0)
    node_rank: int = Field(default=0, ge=0)
    master: str | None = None

    @model_validator(mode="after")
    def _cluster(self) -> Controls:
        if self.nodes > 1 and not self.master:
            raise ValueError("several nodes need master=HOST:PORT, the address of the node with node_rank 0")
        if self.node_rank >= self.nodes:
            raise ValueError(f"node_rank {self.node_rank} is not below nodes {self.nodes}")
        return self


@dataclass(frozen=True)
class Request:
    """`weights` and `overlay` are the converter's; `gpus` is a node's, 0 means one process on the CPU."""

    protocol: Protocol
    data: Path
    output: Path
    weights: Path
    overlay: Path
    backbone: Backbone
    method: str
    seed: int = 0
    gpus: int = 0
    overrides: tuple[str, ...] = ()
    controls: Controls = field(default_factory=Controls)
    resume: bool = False
    eval_only: bool = False

    @property
    def processes(self) -> int:
        """Processes of the whole run, over all nodes."""
        return max(self.gpus, 1) * self.controls.nodes


def split_overrides(overrides: Sequence[str]) -> tuple[Controls, tuple[str, ...]]:
    """Our controls, and what remains for the engine's own config, in order."""
    ours: dict[str, Any] = {}
    theirs = []
    for override in overrides:
        keys, value = parse_override(override)
        if len(keys) == 1 and keys[0] in Controls.model_fields:
            ours[keys[0]] = value
        else:
            theirs.append(override)
    return validate(ours, Controls, where="overrides"), tuple(theirs)
