"""A ViT of TWIST from pretraining to a record of each kind of dense protocol: pretrain → convert → transfer."""

from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config
from tiny_sample import tiny_sample

from twist.contracts.record import RunRecord
from twist.contracts.weights import read_header
from twist.pretrain.train import pretrain
from twist.transfer.protocols import PROTOCOLS
from twist.transfer.run import transfer

pytestmark = pytest.mark.slow
PROTOCOL_OVERRIDES = {
    "sample-coco-vitdet": ("iterations=2", "SOLVER.IMS_PER_BATCH=2", "MODEL.RPN.POST_NMS_TOPK_TEST=20"),
    "sample-ade20k-upernet-vit": ("iterations=2", "train_dataloader.batch_size=2"),
    "sample-voc-linear-seg": ("iterations=5",),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TWIST ViT-Ti with a teacher after one epoch, its positions resized as the published code does."""
    torch.set_num_threads(1)
    model = {"backbone": "vit_tiny_patch16", "resize": "offset", "activation": "gelu", "teacher": True}
    config = tiny_config(
        tiny_sample().root / "unlabelled",
        model=model,
        views={"global_size": 32, "local_size": 16},
        optim={"name": "adamw", "lr": 1e-4},
        run={"epochs": 1, "mutual_information_epochs": 1, "batch_size": 10},
    )
    return pretrain(config, output=tmp_path_factory.mktemp("run")).parent


@pytest.mark.parametrize("protocol", PROTOCOL_OVERRIDES)
def test_a_vit_of_ours_is_measured_by(protocol: str, run_folder: Path, tmp_path: Path) -> None:
    weights = run_folder / "teacher_backbone.safetensors"
    record: RunRecord = transfer(
        protocol, weights=str(weights), data=tiny_sample().root, gpus=0, output=tmp_path / "run",
        overrides=PROTOCOL_OVERRIDES[protocol],
    )  # fmt: skip
    assert (record.method, record.weights.architecture) == ("twist", read_header(weights).display_name)
    assert record.recipe["architecture"] == "vit_tiny_patch16"
    assert tuple(record.metrics) == PROTOCOLS[protocol].metrics
    assert record.weights.loaded_sha256
    assert record.media
