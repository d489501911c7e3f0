"""The networks that an artefact can describe, built once for every stage.

ResNets are torchvision's (width multipliers by subclass), ViTs and all others timm's; none has a classifier. This is
the one place that knows them: the pretrainer trains them, the converters' proof runs them as the reference, the
ImageNet protocols read their features. `B` images, `D` features.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as tv

from twist.contracts import rename
from twist.contracts.errors import UserError, check_names
from twist.contracts.rename import Table
from twist.contracts.weights import ARCHITECTURES, RESNETS, TIMM, Backbone, Vit, difference, is_vit


class ResNet(tv.ResNet):
    """torchvision's ResNet without its classifier, every width times `width`; `forward` gives (B, D)."""

    def __init__(self, architecture: str, width: int = 1) -> None:
        blocks, bottleneck = RESNETS[architecture]
        block = tv.Bottleneck if bottleneck else tv.BasicBlock
        self._width = width
        super().__init__(block, list(blocks))
        if width > 1:
            self.conv1 = nn.Conv2d(3, 64 * width, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(64 * width)
        self.num_features = 512 * width * block.expansion
        self.fc = nn.Identity()  # no parameters: the state dict is the artefact's
        for module in self.modules():
            if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
                module.__class__ = Conv3x3  # same parameters, no second initialisation

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):  # type: ignore[no-untyped-def]
        if planes == 64:  # the first stage: its input is the stem's output
            self.inplanes = 64 * self._width
        return super()._make_layer(block, planes * self._width, blocks, stride, dilate)

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of the four stages under Detectron2's names, res2 … res5."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = {}
        for index, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4)):
            x = layer(x)
            features[f"res{index + 2}"] = x
        return features

    def features(self, images: Tensor, names: Sequence[str] = ("res5",)) -> dict[str, Tensor]:
        """Stages by name; `UserError` for one that there is not."""
        check_names(names, ("res2", "res3", "res4", "res5"))
        stages = self.stages(images)
        return {name: stages[name] for name in names}


class Conv3x3(nn.Conv2d):
    """A padded 3×3 convolution that is a matrix product where its output is one pixel, as with views of 32 pixels.

    All taps but those over the map see padding only, and a CPU's convolution multiplies them all the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        one_pixel = max(height, width) <= self.stride[0] <= 2
        if not one_pixel or x.device.type != "cpu" or self.padding != (1, 1) or self.dilation != (1, 1):
            return super().forward(x)
        seen = self.weight[:, :, 1 : 1 + height, 1 : 1 + width]
        return F.linear(x.flatten(1), seen.flatten(1), self.bias)[:, :, None, None]  # (B, C, 1, 1)


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's 'SAME': the odd pixel goes to the bottom and the right."""

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, _same_padding(x, self.kernel_size[0], self.stride[0]))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class SameMaxPool2d(nn.Module):
    """The stem's 3×3 max pool with stride 2, padded as TensorFlow's 'SAME'."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, _same_padding(x, 3, 2), value=float("-inf")), kernel_size=3, stride=2)


def build_backbone(
    architecture: str,
    *,
    width: int = 1,
    image_size: int | None = None,
    drop_path: float = 0.0,
    vit: Vit | None = None,
    output_stride: int = 32,
) -> nn.Module:
    """A randomly initialised backbone; `forward(images (B, 3, H, W))` gives (B, `num_features`).

    Of a ViT, `image_size` is the side of the images of its position table (default 224), and `vit` describes it where
    it is not the usual one of its name. `output_stride` 16 dilates a last stage instead of halving its map.

    Raises:
        UserError: the architecture is unknown.
    """
    if architecture in RESNETS:
        resnet = ResNet(architecture, width)
        if output_stride == 16:
            _dilate_last_stage(resnet)
        return resnet
    if architecture in ARCHITECTURES and is_vit(architecture):
        from twist.contracts.vit import build_vit  # timm: two seconds that a ResNet need not pay

        whole = vit.model_dump() if vit else None
        network: nn.Module = build_vit(architecture, image_size=image_size or 224, vit=whole, drop_path=drop_path)
        return network
    if architecture.startswith(TIMM):
        from twist.contracts.timm_networks import TimmNetwork

        return TimmNetwork(architecture, output_stride=output_stride)
    raise UserError(f"Unknown architecture {architecture}: known are {', '.join(ARCHITECTURES)} and {TIMM}NAME.")


def network_of(
    header: Backbone, tensors: Mapping[str, Tensor] | None = None, *, share: bool = False, output_stride: int = 32
) -> nn.Module:
    """The network an artefact describes, strides and padding included, in eval mode, with `tensors` when given.

    With `share` the network holds these very tensors, and neither draws nor copies any; `output_stride` as above.

    Raises:
        UserError: `tensors` are not exactly this architecture's (every missing, extra or misshapen name is counted), or
            the network cannot be dilated.
    """
    if header.padding == "same" and output_stride == 16:
        raise UserError("output_stride = 16 is not known for networks with TensorFlow's padding: use 32.")
    with torch.device("meta") if share and not header.computes_when_built else contextlib.nullcontext():
        network = build_backbone(
            header.architecture,
            width=header.width,
            image_size=header.image_size,
            vit=header.vit,
            output_stride=output_stride,
        )
        if header.stride_in == "1x1":
            _move_strides_to_1x1(network)
        if header.padding == "same":
            _pad_as_tensorflow(network)
    if tensors is not None:
        load_exactly(network, tensors, name=header.display_name, assign=share)
    return network.eval()


def load_exactly(network: nn.Module, tensors: Mapping[str, Tensor], *, name: str, assign: bool = False) -> None:
    """Load `tensors` into `network`; `UserError` unless names and shapes agree one to one."""
    reason = difference(network.state_dict(), tensors, values=False)
    if reason is not None:
        raise UserError(
            f"These weights are not {name}: {reason}. `twist inspect` says which architecture a file holds."
        )
    network.load_state_dict(dict(tensors), strict=True, assign=assign)


def stage_features(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What a proof compares: res2 … res5 of a ResNet, the tokens after every block of a ViT (before the last norm), of
    timm's other networks their maps and the pooled output."""
    if hasattr(network, "stages"):
        stages: dict[str, Tensor] = network.stages(images)  # type: ignore[operator]
        return stages
    tokens = network.forward_intermediates(  # type: ignore[operator]
        images, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    # Patches and prefix tokens of each block, or the patches alone where there is no prefix.
    both = (block[::-1] if isinstance(block, tuple) else (block,) for block in tokens)
    return {f"block{i}": torch.cat(parts, dim=1) for i, parts in enumerate(both)}


def normalise(images: Tensor, header: Backbone) -> Tensor:
    """uint8 RGB images (B, 3, H, W) → float32 input of the network `header` describes."""
    pixels = images.float() * (header.input_range / 255)
    if header.channel_order == "BGR":
        pixels = pixels.flip(1)
    mean = torch.tensor(header.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(header.std, device=images.device).view(1, 3, 1, 1)
    return (pixels - mean) / std


def _move_strides_to_1x1(network: nn.Module) -> None:
    for block in network.modules():
        if isinstance(block, tv.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _dilate_last_stage(network: ResNet) -> None:
    """Stride 1 in the last stage, its 3×3 convolutions dilated by 2 after the first block, as torchvision builds it."""
    for number, block in enumerate(network.layer4):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3) and number > 0:
                    module.dilation = module.padding = (2, 2)


def _pad_as_tensorflow(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.padding != (0, 0):
                same = SameConv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size[0],
                    child.stride[0],
                    bias=child.bias is not None,
                )
                same.load_state_dict(child.state_dict())
                setattr(module, name, same)
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, SameMaxPool2d())


def _same_padding(x: Tensor, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of TensorFlow's 'SAME': total = (⌈n/s⌉ − 1)·s + k − n, the smaller half first."""

    def one(size: int) -> tuple[int, int]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    return (*one(x.shape[-1]), *one(x.shape[-2]))


# Modules of TWIST's head, layer and norm in turn: of the published code (its number 3 is a dropout), of its early files
# and of ours.
_HEAD: Final = "head.output head.norm head.hidden.0 head.hidden.1 head.hidden.3 head.hidden.4"
_PUBLISHED_HIDDEN: Final = " ".join(f"projection_heads.projection_head.{index}" for index in (0, 1, 4, 5))
_HEAD_PATHS: Final = {
    "twist-published": f"projection_heads.last_linear projection_heads.norm {_PUBLISHED_HIDDEN}",
    "twist-early": f"projection_heads.cls_heads.0.0 projection_heads.cls_heads.0.1 {_PUBLISHED_HIDDEN}",
    "twist": _HEAD,
}
_KINDS: Final[tuple[rename.Kind, ...]] = ("linear", "norm") * 3
HEAD_TABLES: Final = tuple(
    Table(name, tuple(zip(_KINDS, paths.split(), _HEAD.split()))) for name, paths in _HEAD_PATHS.items()
)


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a TWIST network, this suite's or the published code's, under the names `backbone.…`, `head.…`.

    Raises:
        RenameError: it holds a tensor that is neither the backbone's nor the head's.
    """
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    backbone = {name: tensor for name, tensor in bare.items() if name.startswith("backbone.")}
    head = {name: tensor for name, tensor in bare.items() if name not in backbone}
    found = [table for table in HEAD_TABLES if any(name in head for name in table.anchors)]
    table = found[0] if found else HEAD_TABLES[-1]
    return {**backbone, **rename.apply(rename.inwards(table, head), head)}


_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Head(nn.Module):
    """Linear–BN–act–Linear–BN–act–Linear, then batch norm without affine parameters: (N, D) → (N, K) logits."""

    def __init__(self, features: int, hidden: int, classes: int, *, activation: Literal["relu", "gelu"]) -> None:
        super().__init__()
        act = _ACTIVATIONS[activation]
        self.hidden = nn.Sequential(
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            act(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            act(),
        )
        self.output = nn.Linear(hidden, classes)
        # The paper's normalisation before the softmax; in training over a bunch of images.
        self.norm: nn.Module = nn.BatchNorm1d(classes, affine=False)

    def forward(self, features: Tensor) -> Tensor:
        raw = self.output(self.hidden(features))
        # Never in half precision: what follows is a softmax over thousands of classes.
        with torch.autocast(raw.device.type, enabled=False):
            return self.norm(raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw)
