"""What a finished run says of pictures that are not its own: boxes, masks or classes, as files and drawn."""

import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from twist.contracts import files, run_folder
from twist.contracts.errors import UserError, require
from twist.contracts.failures import explained
from twist.contracts.images import read_image
from twist.contracts.progress import Progress
from twist.transfer.engines.framework import frameworks_quiet
from twist.transfer.features import find_images
from twist.transfer.protocols import find_protocol

PREDICTIONS = "predictions.json"


class Picture(NamedTuple):
    """A picture: uint8 RGB (3, H, W), upright; `name` is that of the files about it, which no other picture has."""

    name: str
    path: Path
    pixels: Tensor


def predict(
    run: str | Path, images: str | Path | Sequence[str | Path], output: str | Path = "predictions"
) -> dict[str, Any]:
    """Apply the network of a finished transfer run to pictures; what is written as `predictions.json` is returned.

    Detection and instance segmentation give COCO's `images`, `categories` and `annotations` (boxes in pixels, masks as
    run lengths, scores) and a drawn picture each. Semantic segmentation gives `classes` and, for each picture, an
    indexed PNG whose values are their positions, and a drawn picture. `linear`, `semi-…` and `finetune-…` give the five
    best classes of each picture with their probabilities.

    Args:
        run: the run folder. It is trusted: MMSegmentation's `config.py` in it is run as code.
        images: pictures, or folders with pictures at any depth.
        output: the folder to write; earlier predictions there are replaced, anything else is refused.

    Raises:
        UserError: no finished run, one that trained nothing, a picture that cannot be read, memory that ran out.
    """
    run, output = Path(run), Path(output)
    described = run_folder.read_run(run)
    if described is None:
        raise UserError(f"There is no run in {run}: give the folder of a finished `twist transfer`.")
    engine = find_protocol(described["protocol"]).engine_row
    require("transfer", *engine.packages)
    with frameworks_quiet():
        program = importlib.import_module(engine.module)
    if not hasattr(program, "predict"):
        raise UserError(
            f"{described['protocol']} measures features and keeps no network that predicts: use a detection, "
            "segmentation, linear or semi-supervised run."
        )
    if described.get("state") != run_folder.DONE:
        raise UserError(f"The run in {run} is not finished: finish it with --resume.")
    given = [images] if isinstance(images, str | Path) else images
    paths = [found for one in given for found in find_images(Path(one))]
    run_folder.refuse_foreign(output, run_file=PREDICTIONS)
    with run_folder.replaced_whole(output) as new, explained(memory="give smaller pictures"), frameworks_quiet():
        found: dict[str, Any] = program.predict(run, _read(paths), new)
        files.write_json(new / PREDICTIONS, found)
    return found


def _read(paths: Sequence[Path]) -> Iterator[Picture]:
    """Each picture when it is needed; those of equal names in several folders get a number."""
    names: set[str] = set()
    with Progress("predict", total=len(paths), unit="image") as progress:
        for path in paths:
            numbered = itertools.chain([path.stem], (f"{path.stem}-{number}" for number in itertools.count(2)))
            name = next(one for one in numbered if one not in names)
            names.add(name)
            yield Picture(name, path, read_image(path))
            progress.advance()
