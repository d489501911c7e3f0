"""Masks that a finished MMSegmentation run gives any picture."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from PIL import Image

from twist.contracts.pickles import read_state
from twist.converters.open import TORCH_GLOBALS
from twist.transfer.engines import framework
from twist.transfer.engines.mmseg.engine import drawn, last_checkpoint
from twist.transfer.pictures import PANEL_PIXELS
from twist.transfer.predict import Picture


@torch.no_grad()
def predict(run: Path, pictures: Iterable[Picture], output: Path) -> dict[str, Any]:
    """Classes and files of `pictures`; `<name>.png` (an index for each pixel) and `<name>-drawn.png` in `output`."""
    register_all_modules(init_default_scope=False)
    init_default_scope("mmseg")
    config = Config.fromfile(run / "config.py")
    model = MODELS.build(config.model).eval()
    # mmengine's own loader falls back to unpickling whatever the file names.
    allowed = [(stand_in, name) for name, stand_in in TORCH_GLOBALS.items()]
    checkpoint = framework.newest_checkpoint(run, "iter") or last_checkpoint(run)
    assert checkpoint is not None, "a finished run has one"
    state = read_state(checkpoint, "state_dict", "meta", remedy="run the protocol again", allowed=allowed)
    model.load_state_dict(state["state_dict"])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names = {key: list(state["meta"]["dataset_meta"][key]) for key in ("classes", "palette")}
    steps = [step for step in config.val_dataloader.dataset.pipeline if not step["type"].startswith("Load")]
    prepare = Compose([{"type": "LoadImageFromNDArray"}, *steps])
    images = []
    for name, path, pixels in pictures:
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        item = prepare({"img": image[:, :, ::-1]})
        (found,) = model.test_step({"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]})
        mask = Image.fromarray(found.pred_sem_seg.data[0].byte().cpu().numpy(), mode="P")
        mask.putpalette([value for colour in names["palette"] for value in colour])
        mask.save(output / f"{name}.png")
        enlarged = mmcv.imrescale(image, max(1.0, PANEL_PIXELS / max(image.shape[:2])))  # names can be read
        whole = drawn(enlarged, found.pred_sem_seg.data, names)
        Image.fromarray(whole).save(output / f"{name}-drawn.png")
        images.append({"file_name": str(path), "mask": f"{name}.png"})
    return {**names, "images": images}
