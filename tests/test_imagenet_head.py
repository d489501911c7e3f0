"""TWIST's own head: from our checkpoints and the published code's, only beside the backbone it was trained with."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twist.contracts.errors import UserError
from twist.transfer.engines.imagenet.head import read_head

D, H, K = 5, 7, 4


class Published(nn.Module):
    """The published code's module names (TWIST repository, commit 796d36e, train.py)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(D, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Dropout(0.0)]
        self.projection_head = nn.Sequential(*layers, nn.Linear(H, H), nn.BatchNorm1d(H), nn.ReLU())
        self.last_linear = nn.Linear(H, K)
        self.norm = nn.BatchNorm1d(K, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.last_linear(self.projection_head(x)))


Trained = tuple[Published, dict[str, Tensor], Tensor]


@pytest.fixture
def trained() -> Trained:
    """A head whose norms have seen data, a backbone's tensors, and features."""
    torch.manual_seed(0)
    head, features = Published(), torch.randn(50, D) * 3 + 1
    for _ in range(20):
        head.train()(features)
    return head.eval(), {"conv1.weight": torch.randn(3, 3), "bn1.num_batches_tracked": torch.tensor(7)}, features


def network(backbone: dict[str, Tensor], head: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"backbone.{k}": v for k, v in backbone.items()} | {prefix + k: v for k, v in head.items()}


def ours(head: Published) -> dict[str, Tensor]:
    names = {"projection_head.0": "hidden.0", "projection_head.1": "hidden.1", "projection_head.4": "hidden.3"}
    names |= {"projection_head.5": "hidden.4", "last_linear": "output", "norm": "norm"}
    return {names[k.rpartition(".")[0]] + "." + k.rpartition(".")[2]: v for k, v in head.state_dict().items()}


def test_head_of_our_run_folder(trained: Trained, tmp_path: Path) -> None:
    head, backbone, features = trained
    path = tmp_path / "checkpoints" / "step_00000010.pt"
    path.parent.mkdir()
    torch.save({"model": network(backbone, ours(head), "head."), "teacher": None}, path)
    with pytest.raises(UserError, match=r"does not say which activation .* head_activation=relu"):
        read_head(path, backbone, activation=None)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"activation": "relu"}}))
    read = read_head(path, backbone, activation=None)
    with torch.no_grad():
        assert torch.equal(read(features), head(features))


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_head_of_the_published_full_checkpoint(trained: Trained, tmp_path: Path, wrapped: str) -> None:
    head, backbone, features = trained
    state = network(backbone, dict(head.state_dict()), "projection_heads.")
    file: dict[str, Any] = {"model": {wrapped + k: v for k, v in state.items()}, "args": argparse.Namespace(act="relu")}
    torch.save(file, tmp_path / "checkpoint.pth")
    read = read_head(tmp_path / "checkpoint.pth", backbone, activation=None)
    with torch.no_grad():
        assert torch.equal(read(features), head(features))
        gelu = read_head(tmp_path / "checkpoint.pth", backbone, activation="gelu")
        assert not torch.allclose(gelu(features), head(features))


def test_the_teachers_head_goes_with_the_teachers_backbone(trained: Trained, tmp_path: Path) -> None:
    head, backbone, features = trained
    student = network({k: v + 1 for k, v in backbone.items()}, ours(Published()), "head.")
    torch.save({"model": student, "teacher": network(backbone, ours(head), "head.")}, tmp_path / "both.pt")
    with torch.no_grad():
        assert torch.equal(read_head(tmp_path / "both.pt", backbone, activation="relu")(features), head(features))


def test_what_is_no_head_of_this_backbone_is_refused(trained: Trained, tmp_path: Path) -> None:
    head, backbone, _ = trained

    def refuse(file: dict[str, Any], sentence: str) -> None:
        torch.save(file, tmp_path / "f.pt")
        with pytest.raises(UserError, match=sentence):
            read_head(tmp_path / "f.pt", backbone, activation="relu")

    refuse({"state_dict": backbone}, "holds no TWIST network with its head")
    other = {**backbone, "conv1.weight": backbone["conv1.weight"] + 1e-6}
    refuse({"model": network(other, ours(head), "head.")}, "belongs to another backbone")
    refuse({"model": network(backbone, {}, "head.")}, "holds the backbone but no head")
    shallow = {k: v for k, v in ours(head).items() if not k.startswith("hidden.3")}
    refuse({"model": network(backbone, shallow, "head.")}, "is not Linear–BN–act")
    with pytest.raises(UserError, match="check the path"):
        read_head(tmp_path / "absent.pt", backbone, activation="relu")
