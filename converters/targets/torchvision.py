"""The artefact itself, `backbone.safetensors`: torchvision's names (timm's for ViTs) and the header of every stage."""

from pathlib import Path

from twist.contracts.weights import Backbone, write_backbone
from twist.converters.targets import ProofRun, Stages, Target, pixel_text, quoted, timm

WEIGHTS = "backbone.safetensors"


def _is_torchvisions(backbone: Backbone) -> bool:
    """Whether torchvision itself builds this network, and not only one with the same names."""
    changed = backbone.width > 1 or backbone.stride_in == "1x1" or backbone.padding == "same"
    return not (
        backbone.stem != "conv7x7" or changed or backbone.channel_order == "BGR" or backbone.architecture == "resnet200"
    )


def _usage(folder: Path, backbone: Backbone) -> str:
    """torchvision's own network, or this suite's where torchvision builds no such one."""
    file, pixels = quoted(folder / WEIGHTS), f"# images: {pixel_text(backbone)}\n"
    if _is_torchvisions(backbone):
        name = backbone.architecture
        return f"""\
from safetensors.torch import load_file
from torchvision.models import {name}

network = {name}()
network.load_state_dict(load_file({file}), strict=False)  # all but the classifier
{pixels}"""
    return f"""\
from twist.contracts.networks import network_of
from twist.contracts.weights import read_backbone

tensors, header = read_backbone({file})
network = network_of(header)
network.load_state_dict(tensors)
{pixels}"""


def _framework(backbone: Backbone) -> tuple[ProofRun, str] | str:
    if backbone.timm_name:
        return timm.run, "timm"
    if backbone.is_vit:
        vit = backbone.transformer
        same = vit == vit.model_copy(update=timm.TARGET.changes(backbone))
        return (timm.run, "timm") if same and not timm.refuse(backbone) else "timm has no such network"
    return (_run, "torchvision") if _is_torchvisions(backbone) else "torchvision has no such network"


def _run(folder: Path, backbone: Backbone, files: list[Path]) -> list[Stages]:
    """res2 … res5 of each image in torchvision's network."""
    import torch
    from safetensors.torch import load_file
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    network = getattr(models, backbone.architecture)(weights=None)
    network.fc = torch.nn.Identity()
    network.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    stages = create_feature_extractor(network.eval(), {f"layer{index}": f"res{index + 1}" for index in (1, 2, 3, 4)})
    return [stages(timm.pil_input(file, *backbone.pixels(1))) for file in files]


TARGET = Target(
    name="torchvision",
    title="the artefact (torchvision's names, timm's for ViTs)",
    weights=WEIGHTS,
    package="torchvision",
    write=write_backbone,
    framework=_framework,
    usage=_usage,
    keeps_padding=True,
)
