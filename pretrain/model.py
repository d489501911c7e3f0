"""Backbone and head, as one module that maps the views of a batch to logits.

Source: arXiv 2110.07402, section 3.2; published code (commit 796d36e). Views of one resolution go through the backbone
as one batch; then the head sees all views together, and its last norm takes its statistics over all of them.

Shapes: `B` images a rank, `V` views, `D` backbone features, `K` classes.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twist.contracts.networks import Head, ResNet, build_backbone
from twist.pretrain import distributed
from twist.pretrain.batch_norm import synchronise
from twist.pretrain.config import ModelConfig, PretrainConfig


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

    Every rank must call it; the weights are the same on all of them, drawn from `run.seed`.
    """
    model = config.model
    torch.manual_seed(config.run.seed)
    backbone = build_backbone(
        model.backbone, width=model.width, image_size=config.views.global_size, drop_path=model.drop_path, vit=model.vit
    )
    is_vit = model.is_vit
    if is_vit:  # as published; timm's starts at almost nothing
        nn.init.trunc_normal_(backbone.cls_token, std=0.02)  # type: ignore[arg-type]
    student = Twist(backbone, build_head(int(backbone.num_features), model, truncated_normal=is_vit))  # type: ignore[arg-type]
    ranks = distributed.ranks_per_bunch(
        model.bunch_size, batch_size=config.run.batch_size, world_size=distributed.world_size()
    )
    teacher = copy.deepcopy(student) if model.teacher else None
    bunch = distributed.consecutive_group(ranks) if ranks > 1 else None
    for network in filter(None, (student, teacher)):
        synchronise(network.backbone)
        synchronise(network.head.hidden)
        if ranks > 1:
            network.head.norm = synchronise(network.head.norm, group=bunch)
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


def build_head(features: int, config: ModelConfig, *, truncated_normal: bool) -> Head:
    """The head of a recipe for D = `features`; `truncated_normal` initialises its layers as a ViT's are."""
    head = Head(features, config.hidden_dim, config.classes, activation=config.activation)
    for layer in head.modules() if truncated_normal else ():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return head


@torch.no_grad()
def update_teacher(teacher: Twist, student: Twist, *, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, parameters only: its batch norms see its own batches."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def checkpoint_activations(backbone: nn.Module) -> None:
    """Keep only the inputs of the backbone's blocks and compute the rest again in the backward pass."""
    if not isinstance(backbone, ResNet):
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        return
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage:
            contexts = functools.partial(lambda block: (contextlib.nullcontext(), _statistics_kept(block)), block)
            block.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False, context_fn=contexts
            )


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
