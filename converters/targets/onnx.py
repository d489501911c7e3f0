"""ONNX: the backbone as a graph with named feature outputs, exported by torch and proven by onnxruntime.

`images` are float32 (B, 3, H, W), normalised. Outputs are the stages (`res2` … `res5`, maps (B, C, H/s, W/s); of a ViT
`block0`, …, all tokens (B, N, D)) and `features` (B, D), what the network returns. B, H and W are free; a ViT's H and W
are those of its position table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist.contracts.weights import METADATA_KEY, Backbone
from twist.converters.targets import TIMM_ALONE, Stages, Target, pixel_text, quoted

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "model.onnx"
# A protobuf ends at 2 GiB; the tensors of a larger network lie in a file beside it (`model.onnx.data`).
_MOST_BYTES = 2 * 10**9


def _stages(network: nn.Module, images: Tensor) -> Stages:
    from twist.contracts.networks import stage_features

    return {**stage_features(network, images), "features": network(images)}


def _write(path: Path, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """The network with `tensors` as an ONNX file; the header stands in its metadata under `twist`."""
    import torch

    from twist.contracts.networks import network_of

    class Graph(torch.nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return tuple(_stages(self.network, images).values())

    side, network = backbone.image_size or 64, network_of(backbone, tensors, share=True)
    images, axes = torch.zeros(2, 3, side, side), {0: "batch"} if backbone.is_vit else {0: "batch", 2: "H", 3: "W"}
    with torch.no_grad():
        names = list(_stages(network, images))
        program: Any = torch.onnx.export(
            Graph(network).eval(), (images,), input_names=["images"], output_names=names,
            dynamic_shapes={"images": axes}, dynamo=True, verbose=False, optimize=True,
        )  # fmt: skip
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's stack traces, with paths of this machine
    program.model.metadata_props[METADATA_KEY] = backbone.model_dump_json()
    program.save(path, external_data=sum(tensor.nbytes for tensor in tensors.values()) > _MOST_BYTES)


def _refuse(backbone: Backbone) -> str | None:
    if backbone.timm_name:
        return TIMM_ALONE
    return "padding that depends on the image's size is not exported" if backbone.padding == "same" else None


def _usage(folder: Path, backbone: Backbone) -> str:
    size = f"{backbone.image_size}, {backbone.image_size}" if backbone.is_vit else "H, W"
    return f"""\
import onnxruntime

session = onnxruntime.InferenceSession({quoted(folder / WEIGHTS)})
names = [output.name for output in session.get_outputs()]
# images: float32 (B, 3, {size}), {pixel_text(backbone)}
# features, = session.run(["features"], {{"images": images}})
"""


def _run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    import onnxruntime
    import torch

    from twist.contracts.images import read_image
    from twist.contracts.networks import normalise

    session = onnxruntime.InferenceSession(str(folder / WEIGHTS), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    inputs = [normalise(read_image(file)[None], backbone).numpy() for file in files]
    outputs = [session.run(names, {"images": images}) for images in inputs]
    return [{name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)} for values in outputs]


TARGET = Target(
    name="onnx",
    title="ONNX",
    weights=WEIGHTS,
    package="onnxruntime",
    extra="onnx",
    write=_write,
    framework=lambda _: (_run, "onnxruntime"),
    usage=_usage,
    refuse=_refuse,
    stages=_stages,
    fixed_size=True,
)
