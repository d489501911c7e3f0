"""`twist inspect`: what a checkpoint holds, said without running anything from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twist.contracts.errors import UsageError, UserError
from twist.contracts.weights import weights_file
from twist.converters import detect, read
from twist.converters.containers import Contents, read_contents
from twist.converters.targets.registry import TARGETS


@dataclass(frozen=True)
class Inspection:
    """The answer. Fields that the file does not tell are None; `problems` are sentences."""

    file: str
    size_bytes: int
    sha256: str
    container: str
    entries: dict[str, int]  # top-level entry → tensors in it ("" is the file's own level)
    layout: str | None = None
    method: str | None = None
    architecture: str | None = None
    branch: str | None = None
    branches: tuple[str, ...] = ()
    image_size: int | None = None
    epochs: int | None = None
    epoch_entry: int | None = None
    dtype: str | None = None
    backbone_tensors: int = 0
    backbone_parameters: int = 0
    channel_order: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_range: int | None = None
    padding: str | None = None
    stride_in: str | None = None
    dropped: tuple[str, ...] = ()
    used: tuple[str, ...] = ()  # first parts of the names that the backbone has in the file
    notes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(checkpoint: Path, *, layout: str | None = None) -> Inspection:
    """Look into `checkpoint`, as the source layout of that name when one is given.

    Raises:
        UsageError: there is no layout of that name.
        UserError: it is no checkpoint at all, is damaged, or asks for code to be run. What merely cannot be converted
            is among the problems.
    """
    checkpoint = weights_file(checkpoint)
    contents = read_contents(checkpoint)
    seen: dict[str, Any] = {
        "file": str(checkpoint),
        "size_bytes": checkpoint.stat().st_size,
        "sha256": contents.sha256,
        "container": contents.container,
        "entries": _entries(contents),
        "epoch_entry": _epoch(contents),
    }
    try:
        source = read.account(contents, layout=layout, allow_nan=True)
    except UsageError:
        raise
    except UserError as error:
        return Inspection(**seen, problems=(str(error),))
    problems = []
    try:
        read.check_values(source.tensors, str(checkpoint), allow_nan=False)
    except UserError as error:
        problems.append(str(error))
    backbone = source.backbone
    for target in TARGETS.values():
        reason = target.refuse(backbone)
        if reason:
            problems.append(f"not for {target.title}: {reason}")
    return Inspection(
        **seen,
        layout=backbone.source_layout,
        method=backbone.method,
        architecture=backbone.display_name,
        branch=backbone.source_branch,
        branches=source.branches,
        image_size=backbone.image_size,
        epochs=backbone.epochs,
        dtype=source.dtype,
        backbone_tensors=len(source.names),
        backbone_parameters=sum(t.numel() for name, t in source.tensors.items() if not _is_statistic(name)),
        channel_order=backbone.channel_order,
        mean=backbone.mean,
        std=backbone.std,
        input_range=backbone.input_range,
        padding=backbone.padding,
        stride_in=None if backbone.is_vit else backbone.stride_in,
        dropped=source.dropped,
        used=tuple(sorted({name.partition(".")[0] for name in source.names.values()})),
        notes=source.notes,
        targets=tuple(name for name, target in TARGETS.items() if not target.refuse(backbone)),
        problems=tuple(problems),
    )


def render(inspection: Inspection) -> str:
    """The answer as aligned lines."""
    seen = inspection
    rows: list[tuple[str, str]] = [
        ("file", f"{seen.file} ({seen.size_bytes / 2**20:.1f} MiB, {seen.container})"),
        ("sha256", seen.sha256),
        ("entries", ", ".join(f"{name or '(top)'} {count}" for name, count in seen.entries.items()) + " tensors"),
    ]
    if seen.layout is not None:
        mean, std = (", ".join(f"{v:g}" for v in values or ()) for values in (seen.mean, seen.std))
        rows += [
            ("method", f"{seen.method} (layout {seen.layout})"),
            ("architecture", f"{seen.architecture}" + (f", images of {seen.image_size}" if seen.image_size else "")),
            ("branch", f"{seen.branch}" + (f" (present: {', '.join(seen.branches)})" if seen.branches else "")),
            ("backbone", f"{seen.backbone_tensors} tensors, {seen.backbone_parameters:,} parameters, {seen.dtype}"),
            ("pixels", f"{seen.channel_order}, range {seen.input_range}, mean {mean}, std {std}"),
        ]
        if seen.padding == "same" or seen.stride_in == "1x1":
            rows.append(("network", f"padding {seen.padding}, stride in the {seen.stride_in} convolution"))
        rows.append(("would drop", _shortened(seen.dropped, used=seen.used)))
        rows.append(("converts to", ", ".join(seen.targets)))
    epoch = seen.epochs if seen.epochs is not None else seen.epoch_entry
    if epoch is not None:
        rows.append(("epochs", f"{epoch}" + ("" if seen.epochs is not None else " (the entry `epoch`, as it stands)")))
    rows += [("note", note) for note in seen.notes]
    rows += [("problem", problem) for problem in seen.problems]
    return "\n".join(f"{key:12}  {value}" for key, value in rows)


def _entries(contents: Contents) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path, tensors in detect.state_dicts(contents.value):
        key = path[0] if path else ""
        counts[key] = counts.get(key, 0) + len(tensors)
    return counts


def _epoch(contents: Contents) -> int | None:
    epoch = contents.value.get("epoch") if isinstance(contents.value, dict) else None
    return epoch if type(epoch) is int else None


def _is_statistic(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def _shortened(names: tuple[str, ...], *, used: tuple[str, ...]) -> str:
    """`encoder_k (320), encoder_q.fc (4), queue` instead of 325 names; of a module in use, the part that is not."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        module = ".".join(parts[: 2 if parts[0] in used else 1]).split("/")[0]
        counts[module] = counts.get(module, 0) + 1
    return ", ".join(module + (f" ({count})" if count > 1 else "") for module, count in counts.items()) or "nothing"
