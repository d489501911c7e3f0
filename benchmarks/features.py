"""How fast the ImageNet protocols get their images: our loader, and an `ImageFolder` with Pillow.

    python -m benchmarks.features [--images 32] [--network resnet18] [--json FILE]

k-NN and clustering, and the frozen features of the linear probe, take the test-time image (resize 256, centre crop
224); the linear probe's training and fine-tuning take random crops of 224. Both sides read the same made photographs of
ImageNet's size, with one thread and without workers, and end in a batch of bytes; they take turns, round by round. The
figure is images over CPU seconds. Then the features themselves, of `--network`, beside timm's network of that name in a
plain loop; both have the same weights.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from benchmarks.side_by_side import heading, rates_a_core, rates_table, write
from tests.photographs import write_folder
from twist.catalog.class_folders import read_split
from twist.contracts.networks import build_backbone
from twist.contracts.weights import Backbone
from twist.measure.features import Extractor
from twist.transfer.engines.imagenet.recipes import load_recipe
from twist.transfer.engines.plain import decoded, epoch_batches, ordered_batches

BATCH = 16


def theirs(root: Path, mode: InterpolationMode, *, augment: bool) -> Callable[[], None]:
    if augment:
        shape = [v2.RandomResizedCrop(224, interpolation=mode), v2.RandomHorizontalFlip()]
    else:
        shape = [v2.Resize(256, interpolation=mode), v2.CenterCrop(224)]
    loader = DataLoader(ImageFolder(str(root), v2.Compose([*shape, v2.PILToTensor()])), BATCH)

    def work() -> None:
        for _ in loader:
            pass

    return work


def ours(root: Path, *, augment: bool) -> tuple[Callable[[], None], InterpolationMode]:
    recipe = load_recipe("linear", architecture="resnet50", overrides=("machine.workers=0",))
    assert (recipe.size, recipe.resize) == (224, 256)
    images = read_split(root)
    if augment:
        batches = epoch_batches(len(images), batch_size=BATCH, seed=0, epoch=0)
    else:
        batches = ordered_batches(len(images), batch_size=BATCH)

    def work() -> None:
        for _ in decoded(images, recipe, batches, crops=(0, 0) if augment else None):
            pass

    return work, InterpolationMode(recipe.interpolation)


def features(root: Path, name: str, mode: InterpolationMode) -> dict[str, Callable[[], None]]:
    """Features of the test images: our extractor, and timm's network on what torchvision's transforms give."""
    torch.manual_seed(0)
    recipe = load_recipe("linear", architecture="resnet50", overrides=("machine.workers=0",))
    header = Backbone(architecture=name, method="random")
    network, plain = build_backbone(name).eval(), timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(network.state_dict())
    extractor, images = Extractor(network, header, torch.device("cpu")), read_split(root)
    to_input = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(header.mean, header.std)])
    shape = v2.Compose([v2.Resize(256, interpolation=mode), v2.CenterCrop(224), v2.PILToTensor(), to_input])
    loader = DataLoader(ImageFolder(str(root), shape), BATCH)

    def ours() -> None:
        for _ in extractor.batches(decoded(images, recipe, ordered_batches(len(images), batch_size=BATCH))):
            pass

    @torch.inference_mode()
    def timms() -> None:
        for batch, _ in loader:
            plain(batch)

    with torch.no_grad():  # one network, twice
        example = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(network(example), plain(example), rtol=1e-3, atol=1e-4)
    return {f"features of {name}, ours": ours, f"features of {name}, timm's loop": timms}


def figures(root: Path, *, count: int, rounds: int, network: str = "") -> dict[str, Any]:
    modes: dict[str, Callable[[], None]] = {}
    for name, augment in (("test images", False), ("training crops", True)):
        modes[f"{name}, ours"], mode = ours(root, augment=augment)
        modes[f"{name}, ImageFolder"] = theirs(root, mode, augment=augment)
    if network:
        modes |= features(root, network, mode)
    torch.manual_seed(0)
    return rates_a_core(modes, count=count, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--network", default="resnet18", help="a ResNet that timm has by the same name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "val"
        write_folder(root / "a", arguments.images // 2, height=375, width=500)
        write_folder(root / "b", arguments.images // 2, height=375, width=500)
        found = figures(root, count=arguments.images // 2 * 2, rounds=arguments.rounds, network=arguments.network)
    print(heading("images of the ImageNet protocols, images/s a core"))
    print(rates_table(found))
    write(arguments.json, found)


if __name__ == "__main__":
    main()
