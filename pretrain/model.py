"""Backbone and head, as one module that maps the views of a batch to logits; its teacher; its warm start.

Source: arXiv 2110.07402, section 3.2; published code (commit 796d36e). Views of one resolution go through the backbone
as one batch; then the head sees all views together, and its last norm takes its statistics over all of them.

Shapes: `B` images a rank, `V` views, `D` backbone features, `K` classes.
"""

import argparse
import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twist.contracts.errors import UserError
from twist.contracts.networks import Head, ResNet, build_backbone, own_names
from twist.contracts.pickles import read_state
from twist.contracts.rename import RenameError
from twist.contracts.weights import difference
from twist.pretrain import distributed
from twist.pretrain.config import PretrainConfig


class Twist(nn.Module):
    """The network that is trained. `backbone` alone is what the later stages take."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Logits (V, B, K) of view-major batches, one tensor a resolution, the global one (2·B, 3, G, G) first."""
        images = views[0].shape[0] // 2
        features = torch.cat([self.backbone(batch) for batch in views])  # (V·B, D)
        logits = self.head(features)  # (V·B, K)
        return logits.view(-1, images, logits.shape[-1])


def build_model(config: PretrainConfig, *, device: torch.device) -> tuple[Twist, Twist | None]:
    """Student and (when the recipe has one) teacher on `device`, a copy of the student, with batch norms synchronised.
    Every rank must call it; the weights are the same on all of them, drawn from `run.seed`."""
    model = config.model
    torch.manual_seed(config.run.seed)
    backbone = build_backbone(
        model.backbone, width=model.width, image_size=config.views.global_size, drop_path=model.drop_path, vit=model.vit
    )
    if model.is_vit:  # as published; timm's starts at almost nothing
        nn.init.trunc_normal_(backbone.cls_token, std=0.02)  # type: ignore[arg-type]
    head = Head(int(backbone.num_features), model.hidden_dim, model.classes, activation=model.activation)  # type: ignore[arg-type]
    for layer in head.modules() if model.is_vit else ():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    student = Twist(backbone, head)
    ranks = distributed.ranks_per_bunch(
        model.bunch_size, batch_size=config.run.batch_size, world_size=distributed.world_size()
    )
    teacher = copy.deepcopy(student) if model.teacher else None
    bunch = distributed.consecutive_group(ranks) if ranks > 1 else None
    for network in filter(None, (student, teacher)):
        distributed.synchronise(network.backbone)
        distributed.synchronise(network.head.hidden)
        if ranks > 1:
            network.head.norm = distributed.synchronise(network.head.norm, group=bunch)
        network.to(device)
        if config.run.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if network is teacher:
            network.requires_grad_(False)
        elif model.activation_checkpointing:
            checkpoint_activations(network.backbone)
        if config.run.compile:
            # Two static shapes, global and local crops; names in the state dict stay.
            network.backbone.compile(dynamic=False)
    return student, teacher


def in_layout(views: Sequence[Tensor], config: PretrainConfig) -> list[Tensor]:
    """The views in the memory layout the networks have."""
    layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
    return [view.contiguous(memory_format=layout) for view in views]


@torch.no_grad()
def update_teacher(teacher: Twist, student: Twist, *, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, parameters only: its batch norms see its own batches."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def checkpoint_activations(backbone: nn.Module) -> None:
    """Keep only the inputs of the backbone's blocks and compute the rest again in the backward pass."""
    if not isinstance(backbone, ResNet):
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        return
    for block in (block for n in (1, 2, 3, 4) for block in getattr(backbone, f"layer{n}")):
        contexts = functools.partial(lambda block: (contextlib.nullcontext(), _statistics_kept(block)), block)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The block's batch norms update copies of their running statistics: the second forward is of the same images."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept):
            norm._buffers.update(buffers)


def warm_start(path: str | os.PathLike[str], student: Twist, teacher: Twist | None) -> None:
    """Load the checkpoint at `path` into `student` and, when there is one, `teacher`; `UserError` where it does not
    fit.

    Ours and that of the published code (commit 796d36e, `train.py`) hold the state dicts `model` and `teacher`; `args`
    of the latter is an argparse.Namespace, the one global that torch's safe unpickler is allowed here.
    """
    path = Path(path)
    remedy = f"a warm start needs the full checkpoint of a TWIST run; `twist inspect {path}` shows what this file holds"
    values = read_state(path, remedy=remedy, allowed=[argparse.Namespace])
    for network, key in ((student, "model"), (teacher, "teacher")):
        if network is None:
            continue
        if not isinstance(values.get(key), dict):
            raise UserError(f"{path} has no `{key}`: {remedy}; model.teacher = false does without a teacher.")
        try:
            state = own_names(values[key])
            reason = difference(network.state_dict(), state, values=False)
        except RenameError as error:
            state, reason = {}, str(error).rstrip(".")
        if reason is not None:
            raise UserError(
                f"{path}, {key}: does not fit this config's network: {reason}; check model.backbone, model.classes "
                "and model.hidden_dim."
            )
        network.load_state_dict(state)
