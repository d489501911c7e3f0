"""`twist inspect`: what a checkpoint holds, without running anything from it."""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, Unpack

from twist.contracts.errors import UsageError, UserError, printable
from twist.converters.evidence import HeadsUnknownError
from twist.converters.find import Candidate, networks, own_table, state_dicts
from twist.converters.open import Contents, read_contents
from twist.converters.read import Source, assumed, check_values, counts_by_module, read_source
from twist.converters.sources import Reading
from twist.converters.targets import TARGETS
from twist.converters.zoo import located

_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
_OF_HEADER = ("method", "image_size", "epochs", "channel_order", "mean", "std", "input_range", "padding")


@dataclass(frozen=True)
class Inspection:
    """The answer: the file, its backbone when there is one that can be converted, and what is wrong, as sentences."""

    contents: Contents
    source: Source | None
    problems: tuple[str, ...]
    targets: tuple[str, ...] = ()  # that can hold the backbone
    networks: tuple[Candidate, ...] = ()  # every whole one in the file, wherever it lies

    def to_json(self) -> dict[str, Any]:
        """All of it; None for what the file does not give."""
        source, header, value = self.source, self.source.backbone if self.source else None, self.contents.value
        entries: Counter[str] = Counter()  # top-level entry → tensors in it; "" is the file's own level
        for path, state in state_dicts(value):
            entries[path[0] if path else ""] += len(state)
        epoch = value.get("epoch") if isinstance(value, dict) else None
        arrays = source.arrays if source else {}
        return {
            "file": str(self.contents.path),
            "size_bytes": self.contents.path.stat().st_size,
            "sha256": self.contents.sha256,
            "container": self.contents.container,
            "entries": dict(entries),
            "layout": header and header.source_layout,
            "architecture": header and header.display_name,
            "branch": header and header.source_branch,
            "branches": source.branches if source else (),
            **{name: getattr(header, name, None) for name in _OF_HEADER},
            "stride_in": header.stride_in if header and not header.is_vit else None,
            "epoch_entry": epoch if type(epoch) is int else None,
            "dtype": source and source.dtype,
            "backbone_tensors": len(source.names) if source else 0,
            "backbone_parameters": sum(a.size for name, a in arrays.items() if not name.endswith(_STATISTICS)),
            "dropped": source.dropped if source else (),
            "used": source.used_modules if source else (),
            "notes": source.notes if source else (),
            "assumed": assumed(header) if header else (),
            "networks": [net.to_json() for net in self.networks],
            "targets": self.targets,
            "problems": self.problems,
        }


def inspect(checkpoint: str | os.PathLike[str], **reading: Unpack[Reading]) -> Inspection:
    """Look into `checkpoint` (a file, a run's folder, `zoo:NAME`).

    As the source layout of that name, or at the network in that place, where one is given.

    Raises:
        UsageError: there is no layout of that name.
        UserError: it is no checkpoint at all, is damaged, or asks for code to be run. What merely cannot be converted
            is among the problems.
    """
    file, how = located(checkpoint, **reading)
    contents = read_contents(file)
    table = own_table(contents, how.get("architecture"))
    found = tuple(net for net in networks(contents.value, table) if not net.reason)
    problems, targets = [], list(TARGETS.values())
    try:
        source = read_source(contents, allow_nan=True, **how)
    except UsageError:
        raise
    except HeadsUnknownError as error:
        problems, targets = [str(error)], []
        how["heads"] = error.usual
        source = read_source(contents, allow_nan=True, **how)
    except UserError as error:
        return Inspection(contents, None, (str(error),), networks=found)
    try:
        check_values(source.arrays, str(contents.path))
    except UserError as error:
        problems.append(str(error))
    refusals = {target: target.refuse(source.backbone) for target in targets}
    problems += [f"not for {target.title}: {reason}" for target, reason in refusals.items() if reason]
    able = tuple(target.name for target, reason in refusals.items() if not reason)
    return Inspection(contents, source, tuple(problems), able, found)


def inspection_text(inspection: Inspection) -> str:
    """The answer as aligned lines."""
    seen = inspection.to_json()
    rows: list[tuple[str, str]] = [
        ("file", f"{seen['file']} ({seen['size_bytes'] / 2**20:.1f} MiB, {seen['container']})"),
        ("sha256", seen["sha256"]),
        ("entries", ", ".join(f"{name or '(top)'} {count}" for name, count in seen["entries"].items()) + " tensors"),
    ]
    if inspection.source is not None:
        mean, std = (", ".join(f"{value:g}" for value in seen[key]) for key in ("mean", "std"))
        size = f", images of {seen['image_size']}" if seen["image_size"] else ""
        counts = counts_by_module(seen["dropped"], used=seen["used"])
        dropped = ", ".join(module + (f" ({count})" if count > 1 else "") for module, count in counts.items())
        rows += [
            ("method", f"{seen['method']} (layout {seen['layout']})"),
            ("architecture", f"{seen['architecture']}{size}"),
            ("branch", f"{seen['branch']} (present: {', '.join(seen['branches'])})"),
            (
                "backbone",
                f"{seen['backbone_tensors']} tensors, {seen['backbone_parameters']:,} parameters, {seen['dtype']}",
            ),
            ("pixels", f"{seen['channel_order']}, range {seen['input_range']}, mean {mean}, std {std}"),
            ("would drop", dropped or "nothing"),
            ("converts to", ", ".join(seen["targets"])),
        ]
        if seen["padding"] == "same" or seen["stride_in"] == "1x1":
            rows.append(("network", f"padding {seen['padding']}, stride in the {seen['stride_in']} convolution"))
    if seen["epochs"] is not None:
        rows.append(("epochs", f"{seen['epochs']}"))
    elif seen["epoch_entry"] is not None:
        rows.append(("epochs", f"{seen['epoch_entry']} (the entry `epoch`, as it stands)"))
    rows += [("network", net.text) for net in inspection.networks if len(inspection.networks) > 1 or not seen["layout"]]
    rows += [("note", note) for note in seen["notes"]]
    rows += [("problem", problem) for problem in seen["problems"]]
    return printable("\n".join(f"{key:12}  {value}" for key, value in rows))
