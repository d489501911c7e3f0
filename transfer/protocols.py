"""The table of protocols, read from `protocols.toml`: which engine, config, data and metrics, under which name."""

import tomllib
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from twist.contracts.errors import UsageError, UserError, did_you_mean
from twist.contracts.metrics import METRICS
from twist.contracts.progress import duration
from twist.contracts.published import find_neighbours, protocol_title
from twist.contracts.record import RunRecord, Task
from twist.contracts.weights import Architecture
from twist.transfer.engines import Engine, all_engines


@dataclass(frozen=True)
class Protocol:
    """One row. `engine` is a folder of `transfer/engines/`; `data` are rows of `catalog/data_sets.toml`; `gpus` the
    recipe's count (0: a CPU will do); `tolerance` the spread from run to run, in percent points of the metrics; `hours`
    wall time where we measured it."""

    name: str
    engine: str
    task: Task
    config: str
    data: tuple[str, ...]
    metrics: tuple[str, ...]
    gpus: int
    recipe: str
    tolerance: float
    scale: Literal["full", "sample"] = "full"
    networks: tuple[Literal["resnet", "vit"], ...] = ("resnet", "vit")
    # What `--weights random` initialises.
    network: Architecture = "resnet50"
    hours: float | None = None
    # The list of images that have labels, which is then a part of the data.
    subset: str | None = None

    @property
    def engine_row(self) -> Engine:
        return all_engines()[self.engine]


_USUAL: dict[tuple[str, str], Architecture] = {
    ("resnet", "full"): "resnet50", ("resnet", "sample"): "resnet18",
    ("vit", "full"): "vit_base_patch16", ("vit", "sample"): "vit_tiny_patch16",
}  # fmt: skip


def _read() -> dict[str, Protocol]:
    tables: dict[str, Any] = tomllib.loads((resources.files("twist.transfer") / "protocols.toml").read_text("utf-8"))
    evaluations = tables.pop("evaluations")
    rows = {}
    for name, row in tables.items():
        measured = {"hours": row.pop("wall_s") / 3600} if "wall_s" in row else {}
        row.setdefault("network", _USUAL[row.get("networks", ["resnet"])[0], row.get("scale", "full")])
        rows[name] = Protocol(name=name, **evaluations[row.pop("evaluation")], **row, **measured)
    return rows


PROTOCOLS = _read()


def find_protocol(name: str) -> Protocol:
    """The row called `name`; `UsageError` with the near match when there is none."""
    if name not in PROTOCOLS:
        raise UsageError(f'There is no protocol "{name}".{did_you_mean(name, PROTOCOLS)} See `twist transfer --list`.')
    return PROTOCOLS[name]


def check_protocol(path: Path, record: RunRecord) -> None:
    """Raise `UserError` for a record, read from `path`, whose task or metrics are not its protocol's."""
    row = PROTOCOLS.get(record.protocol)
    if row is None:  # another version's: its records are shown, in columns of their own
        return
    if record.task != row.task:
        raise UserError(f"{path}: {record.protocol} is {row.task}, and the record says {record.task}; run it again.")
    if foreign := sorted(record.metrics.keys() - set(row.metrics)):
        raise UserError(
            f"{path}: {record.protocol} does not measure {foreign[0]} (it measures {', '.join(row.metrics)}); run it "
            "again."
        )


def list_protocols(words: Sequence[str] = ()) -> str:
    """The table as `twist transfer --list` prints it: a line for each row; with the name of a row its whole block."""
    rows = select_protocols(words)
    if [row.name for row in rows] == list(words):
        return _block(rows[0])
    kinds = {"resnet": "ResNet", "vit": "ViT"}
    lines = [
        f"{row.name:30} {'/'.join(map(kinds.__getitem__, row.networks)):11} {_hardware(row):7} {row.recipe}"
        for row in rows
    ]
    if not words:
        lines += ["", "--list NAME shows one whole, with the numbers published for it; --list dense vit chooses."]
    return "\n".join(lines) or f"No protocol is {' and '.join(words)} at once."


def select_protocols(words: Sequence[str]) -> list[Protocol]:
    """The row of a name, else those that have all `words` (`words_of`); `UsageError` for a word that no row has."""
    if len(words) == 1 and words[0] in PROTOCOLS:
        return [PROTOCOLS[words[0]]]
    known = set().union(*map(words_of, PROTOCOLS.values()))
    for word in words:
        if word not in known:
            near = did_you_mean(word, {*known, *PROTOCOLS})
            raise UsageError(f'No protocol has the word "{word}".{near} There are {", ".join(sorted(known))}.')
    return [row for row in PROTOCOLS.values() if words_of(row) >= set(words)]


def words_of(row: Protocol) -> set[str]:
    """What `--list WORD` finds a row by: engine, data, networks, scale, what is measured, and `frozen` backbones."""
    full = PROTOCOLS.get(row.recipe.removesuffix(" at sample size"), row)
    found = {row.engine, row.scale, *row.networks, *row.data, *row.task.split("-")}
    found |= {"detection"} if row.task == "instance-segmentation" else set()
    found |= {"dense"} if not found & {"classification", "clustering"} else set()
    return found | ({"frozen"} if "frozen" in full.recipe else set())


def _hardware(row: Protocol) -> str:
    return f"{row.gpus} GPUs" if row.gpus > 1 else "1 GPU" if row.gpus else "CPU"


def _block(row: Protocol) -> str:
    hours = "hours not measured" if row.hours is None else duration(3600 * row.hours)
    lines = [
        f"{row.name}   [{row.engine}, {row.task}]",
        f"  recipe     {row.recipe}",
        f"  data       {', '.join(row.data)}",
        f"  hardware   {_hardware(row)}, {hours}",
        f"  metrics    {', '.join(METRICS[name].label for name in row.metrics)}",
    ]
    # What was published under the protocol, and under foreign ones for the methods that have nothing under it.
    rows = find_neighbours(row.name)
    own = {(one.method, one.architecture) for one in rows if one.protocol == row.name}
    rows = [one for one in rows if one.protocol == row.name or (one.method, one.architecture) not in own]
    for (source, protocol, metrics), printed in groupby(
        rows, key=lambda one: (one.source, one.protocol, [*one.metrics])
    ):
        about = source if protocol == row.name else f"{source}; {protocol_title(protocol)}"
        lines.append(f"  published  {about}\n{'':36}{' / '.join(METRICS[name].label for name in metrics)}")
        for one in printed:
            network = "" if one.architecture == "resnet50" else one.architecture
            weights = filter(None, [one.method, network, f"{one.epochs} ep" if one.epochs else "", one.variant])
            lines.append(
                f"{'':13}{' '.join(weights):22} {' / '.join(f'{value:.1f}' for value in one.metrics.values())}"
            )
    return "\n".join(lines)
