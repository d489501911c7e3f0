"""The blocks of the README, top to bottom, as they stand, in an empty folder: the first evening of a stranger.

Files with the names of its placeholders (CHECKPOINT, PICTURES, NESTS, …) are made first. Commands that want a cluster
or days are run with --dry-run.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_files import random_tensors, write_checkpoint
from made_records import make_record
from photographs import jpeg
from tiny_cards import write_classes, write_coco
from tiny_trees import make_coco

from twist.contracts.networks import build_backbone
from twist.contracts.record import write_record
from twist.contracts.weights import Backbone, write_backbone
from twist.converters.sources import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
# Sections whose runs want a cluster, or ImageNet.
PLANNED = ("Your own boxes and masks", "On a cluster", "Full protocols")
LONG = ("twist pretrain r50", "twist transfer coco-mrcnn-fpn-1x", "twist suite")

pytestmark = pytest.mark.readme


def blocks() -> Iterator[tuple[str, str, str]]:
    """(section, language, text) of every block up to the results."""
    for section in (ROOT / "README.md").read_text().split("\n## ")[1:]:
        title = section.partition("\n")[0]
        if title == "What was measured":
            return
        for block in BLOCK.finditer(section):
            yield title, block["language"], block["text"]


def commands(section: str, text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        command = re.split(r"\s{2,}#", line)[0].strip()
        if "--slurm" in command or "--executor slurm" in command or not command.startswith(("twist ", "torchrun ")):
            continue  # a SLURM of its own has test_slurm.py
        words = re.sub(r"^torchrun .*? -m twist", "twist", command).replace(" --gpus 8", "").split()
        if section in PLANNED or command.startswith("twist suite"):
            words += ["--dry-run"] * command.startswith(LONG)
        if command.startswith("torchrun"):  # one process with the batch of two ranks
            words += ["run.batch_size=256", "--dry-run"]
        yield words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with the things that the README's placeholders stand for."""
    (tmp_path / "home").mkdir()
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "CHECKPOINT")
    moco = next(layout for layout in LAYOUTS if layout.name == "moco")
    write_checkpoint(tmp_path / "moco_v2_800ep.pth.tar", moco, moco.branches[0], random_tensors("resnet50"))
    (tmp_path / "runs" / "r50_multicrop_100ep").mkdir(parents=True)
    header = Backbone(architecture="resnet50", method="twist", epochs=100)
    write_backbone(
        tmp_path / "runs" / "r50_multicrop_100ep" / "backbone.safetensors",
        build_backbone("resnet50").state_dict(),
        header,
    )
    (tmp_path / "PICTURES").mkdir()
    for seed in range(130):
        (tmp_path / "PICTURES" / f"{seed}.jpg").write_bytes(jpeg(seed, height=48, width=64))
    (tmp_path / "picture.jpg").write_bytes(jpeg(1, height=64, width=96))
    write_classes(tmp_path / "LABELLED")
    write_coco(tmp_path / "NESTS", count=600)
    for file in ("card.toml", "val.json"):  # both are still to be made
        (tmp_path / "NESTS" / file).unlink()
    make_coco(tmp_path / "DATASETS")
    (tmp_path / "DATASETS" / "imagenet" / "train").mkdir(parents=True)
    for number in range(1100):
        os.link(tmp_path / "picture.jpg", tmp_path / "DATASETS" / "imagenet" / "train" / f"{number}.jpg")
    for number, architecture in enumerate(("resnet18", "resnet34", "resnet50", "resnet101", "vit_small_patch16")):
        for protocol, metric in (("knn", "knn_top1_percent"), ("linear", "top1_percent")):
            metrics, weights = {metric: 30.0 + number}, {"architecture": architecture, "sha256": f"{number}" * 64}
            record = make_record(protocol=protocol, metrics=metrics, weights=weights)
            write_record(record, tmp_path / "RECORDS")
    return tmp_path


def test_every_block_runs_as_it_stands(folder: Path) -> None:
    environment = {
        **os.environ, "HOME": str(folder / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ran = []
    for section, language, text in blocks():
        if language == "python":
            runs = [[sys.executable, "-c", f"import torch\n\nimages = torch.zeros(1, 3, 64, 64)\n{text}"]]
        else:
            runs = [] if language else [*commands(section, text)]
        for words in runs:
            print("$", *words, flush=True)
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            said = f"{section}: {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            # The COCO of this test is three images, and the check says so.
            assert done.returncode == ("118287 expected" in done.stdout), said
            ran.append(words)
    assert len(ran) > 25
    assert (folder / "runs" / "sample" / "views.png").is_file()
    assert (folder / "NESTS" / "card.toml").is_file()
