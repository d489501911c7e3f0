"""Classes that a finished linear or fine-tuning run gives any picture."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.networks import network_of
from twist.contracts.pickles import read_state
from twist.contracts.weights import Backbone
from twist.converters.read import load_artefact
from twist.measure.features import Extractor, centre_crop
from twist.transfer.engines import framework
from twist.transfer.engines.imagenet import training
from twist.transfer.predict import Picture

_SHOWN = 5


@torch.no_grad()
def predict(run: Path, pictures: Iterable[Picture], output: Path) -> dict[str, Any]:  # noqa: ARG001 (nothing is drawn)
    """The best classes of each picture with their probabilities."""
    told, recipe = framework.evaluation(run), files.read_json(run / "recipe.json")
    if recipe["kind"] not in ("linear", "finetune"):
        raise UserError(f"{recipe['config']} trains no classifier: use a linear or semi-supervised run.")
    if "classes" not in told:
        raise UserError(f"{run} is of an earlier version, which did not note its classes: measure it with --eval-only.")
    path = training.newest_state(run)
    if path is None:
        raise UserError(f"{run} holds no {training.CHECKPOINT}: put it back, or run the protocol again.")
    state = read_state(path, *training.STATE, remedy="run the protocol again")["model"]
    header = Backbone.model_validate(told["header"])
    if recipe["kind"] == "finetune":  # the backbone, then the classifier
        prefix, tensors = "1.", {name[2:]: value for name, value in state.items() if name.startswith("0.")}
    else:
        prefix, tensors = f"{told['chosen']}." if recipe["rate_factors"] else "", _backbone(run, told["weights"])
    weight, bias = (state[f"{prefix}{name}"] for name in ("weight", "bias"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network_of(header, tensors).to(device).eval()
    extractor = Extractor(network, header, device, recipe["precision"], recipe.get("last_blocks", 1))
    view = centre_crop(**{name: recipe[name] for name in ("size", "resize", "interpolation")})
    images = []
    for _, path, pixels in pictures:
        ((rows, _),) = extractor.batches([(view(pixels)[None], torch.zeros(1))])
        scores = F.linear(rows.cpu(), weight, bias)[0].softmax(0)
        best = scores.topk(min(_SHOWN, len(scores)))
        classes = [
            {"name": told["classes"][place], "score": score} for score, place in zip(*(part.tolist() for part in best))
        ]
        images.append({"file_name": str(path), "classes": classes})
    return {"classes": told["classes"], "images": images}


def _backbone(run: Path, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the frozen backbone, which a run does not copy, from the file it was given."""
    path = run / weights["file"]  # relative only where it lies in the run folder
    if not path.is_file() or weights["sha256"] not in (None, files.sha256_file(path)):
        raise UserError(f"{path}, whose features the classifier reads, is gone or another file: put it back.")
    return load_artefact(path, **weights["reading"])[0]
