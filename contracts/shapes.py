"""Names, shapes and types of the tensors of every architecture, by formula, in the state dict's order.

Looking into a checkpoint of a ResNet or ViT needs no more, and then neither torch nor the libraries that build
networks, which take seconds to import. A test compares each formula with the network itself.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from twist.contracts.weights import RESNETS, TIMM, Backbone, Vit, stem_of, usual_vit

Named = Iterator[tuple[str, tuple[int, ...]]]


@functools.cache
def shapes_of(
    architecture: str, *, width: int = 1, image_size: int | None = None, vit: Vit | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """A backbone's state dict as arrays of zeros that take no memory."""
    if architecture in RESNETS:
        named = _resnet(architecture, width)
    elif architecture.startswith(TIMM):
        from twist.contracts.timm_networks import outline  # timm itself knows

        named = ((name, tuple(tensor.shape)) for name, tensor in outline(architecture).state_dict().items())
    else:
        patch = int(stem_of(architecture).removeprefix("patch"))
        named = _vit(vit or usual_vit(architecture), patch, (image_size or 224) // patch)
    zeros: dict[bool, Any] = {True: np.int64(0), False: np.float32(0)}
    return {name: np.broadcast_to(zeros[name.endswith("num_batches_tracked")], shape) for name, shape in named}


def tensors_of(header: Backbone) -> dict[str, np.ndarray[Any, Any]]:
    """The same for the network that a header describes."""
    return shapes_of(header.architecture, width=header.width, image_size=header.image_size, vit=header.vit)


def _resnet(architecture: str, width: int) -> Named:
    blocks, bottleneck = RESNETS[architecture]
    channels = 64 * width

    def convolution(name: str, norm: str, shape: tuple[int, ...]) -> Named:
        yield f"{name}.weight", shape
        yield from ((f"{norm}.{part}", shape[:1]) for part in ("weight", "bias", "running_mean", "running_var"))
        yield f"{norm}.num_batches_tracked", ()

    yield from convolution("conv1", "bn1", (channels, 3, 7, 7))
    for stage, count in enumerate(blocks):
        planes = 64 * width * 2**stage
        out = planes * 4 if bottleneck else planes
        sides, outputs = ((1, 3, 1), (planes, planes, out)) if bottleneck else ((3, 3), (planes, out))
        for index in range(count):
            block, inputs = f"layer{stage + 1}.{index}", channels
            for number, (side, made) in enumerate(zip(sides, outputs), start=1):
                yield from convolution(f"{block}.conv{number}", f"{block}.bn{number}", (made, inputs, side, side))
                inputs = made
            if index == 0 and (stage > 0 or channels != out):
                yield from convolution(f"{block}.downsample.0", f"{block}.downsample.1", (out, channels, 1, 1))
            channels = out


def _vit(vit: Vit, patch: int, side: int) -> Named:
    dim, halves, rope = vit.embed_dim, 2 if vit.mlp == "swiglu" else 1, vit.rope_base is not None
    # Of the networks with rotary positions timm has other names, and no bias of the keys.
    scales = ("gamma_1", "gamma_2") if rope else ("ls1.gamma", "ls2.gamma")

    def layer(name: str, *shape: int, bias: bool = True) -> Named:
        yield f"{name}.weight", shape
        if bias:
            yield f"{name}.bias", shape[:1]

    if vit.class_token:
        yield "cls_token", (1, 1, dim)
    if vit.registers:
        yield "reg_token", (1, vit.registers, dim)
    if not rope:
        yield "pos_embed", (1, side**2 + (vit.class_token + vit.registers) * vit.prefix_positions, dim)
    yield from layer("patch_embed.proj", dim, 3, patch, patch, bias=not vit.pre_norm)
    if vit.pre_norm:
        yield from layer("norm_pre", dim)
    for block in (f"blocks.{index}" for index in range(vit.depth)):
        if rope and vit.layer_scale:
            yield from ((f"{block}.{scale}", (dim,)) for scale in scales)
        yield from layer(f"{block}.norm1", dim)
        if rope and vit.qkv_bias:
            yield from ((f"{block}.attn.{part}_bias", (dim,)) for part in "qv")
        yield from layer(f"{block}.attn.qkv", 3 * dim, dim, bias=vit.qkv_bias and not rope)
        yield from layer(f"{block}.attn.proj", dim, dim)
        if vit.layer_scale and not rope:
            yield f"{block}.{scales[0]}", (dim,)
        yield from layer(f"{block}.norm2", dim)
        yield from layer(f"{block}.mlp.fc1", halves * vit.mlp_features, dim)
        yield from layer(f"{block}.mlp.fc2", dim, vit.mlp_features)
        if vit.layer_scale and not rope:
            yield f"{block}.{scales[1]}", (dim,)
    if vit.final_norm:
        yield from layer("norm", dim)
