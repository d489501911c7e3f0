"""What a reader has to know before a table's numbers: facts of its records, and what may be concluded from them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from twist.compare.grouping import architecture_of, device_hours
from twist.compare.statistics import FEWEST
from twist.compare.table import Table
from twist.contracts.published import display_name
from twist.contracts.record import RunRecord


def facts_of(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Heading and text: backbones, images, image size, hardware and budget, as far as `records` say."""
    hours = sum(map(device_hours, records))
    lengths = sorted({(record.method, record.weights.epochs) for record in records if record.weights.epochs})
    pretrained = ", ".join(f"{display_name(method)} {epochs} epochs" for method, epochs in lengths)
    budget = f"{len(records)} transfer runs, {hours:.2g} device hours"
    return [
        ("Backbones", _listed(architecture_of(record) for record in records)),
        ("Images", _by_protocol((record.protocol, _images_of(record)) for record in records)),
        ("Image size", _by_protocol((record.protocol, _size_of(record.recipe)) for record in records)),
        ("Hardware", _listed(record.hardware.get("gpu") or record.hardware.get("processor") for record in records)),
        ("Budget", f"{budget}; pretraining: {pretrained}" if pretrained else budget),
    ]


def conclusions_of(table: Table, records: Sequence[RunRecord]) -> list[str]:
    """Sentences: what may be concluded from `table`, and what not."""
    measured = [cell.measured for cell in table.cells.values() if cell.measured]
    said = []
    if own := sorted({record.scale for record in records} - {"full"}):
        said.append(
            f"Runs at {' and '.join(own)} scale compare weights here; do not set them beside published numbers."
        )
    if any(cell.n < FEWEST for cell in measured):
        said.append(f"Fewer than {FEWEST} results on a side show no difference: they are not tested.")
    if any(cell.pretrainings == 1 and record.method != "random" for cell in measured for record in cell.records[:1]):
        said.append("Where all runs share one pretraining, a difference may be that pretraining's, not its method's.")
    if any(column.mixed for column in table.columns):
        said.append("Some protocols have columns of several recipes; compare within a column only.")
    if any(cell.published for cell in table.cells.values()):
        said.append("Published numbers come from others' code and hardware, and have no recipe hash.")
    return [*said, "No ranking of methods follows unless their recipes were tuned alike, which records do not say."]


def _listed(values: Iterator[Any]) -> str:
    """Each value with the number of runs, the most frequent first."""
    counted = Counter(str(value or "not said") for value in values)
    runs = "" if len(counted) == 1 else " ({})"
    return ", ".join(value + runs.format(number) for value, number in counted.most_common())


def _by_protocol(pairs: Iterator[tuple[str, str]]) -> str:
    """`A (these protocols); B (those)`; a text that holds for all of them alone."""
    texts: dict[str, dict[str, None]] = {}
    for protocol, text in sorted(pairs):
        texts.setdefault(text, {})[protocol] = None
    return "; ".join(f"{text} ({', '.join(names)})" if len(texts) > 1 else text for text, names in texts.items())


def _images_of(record: RunRecord) -> str:
    counts = record.recipe.get("images") or record.recipe.get("data")
    counted = isinstance(counts, dict) and [
        f"{n} {name}" for name, n in counts.items() if name in ("train", "val", "test")
    ]
    return " + ".join(filter(None, [record.data, *(counted or ())])) or "not said"


def _size_of(recipe: dict[str, Any]) -> str:
    """The size in pixels, from where each engine's recipe has it: `size`, Detectron2's short side, a crop."""
    if isinstance(size := recipe.get("size"), int):
        return f"{size} × {size}"
    if isinstance(given := recipe.get("INPUT"), dict) and "MIN_SIZE_TEST" in given:
        return f"short side {given['MIN_SIZE_TEST']}"
    crop = next(_find(recipe, "crop_size"), None)
    return "not said" if crop is None else " × ".join(map(str, crop)) if isinstance(crop, list) else f"{crop} × {crop}"


def _find(value: Any, name: str) -> Iterator[Any]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == name:
            yield inner
        yield from _find(inner, name)
