"""`docs/conversions.md`, written from the tables by `python -m twist.converters.document`. A test keeps it current."""

from __future__ import annotations

from pathlib import Path

from twist.contracts.files import write_text
from twist.contracts.weights import ARCHITECTURES, Backbone
from twist.converters.proof import TOLERANCE
from twist.converters.sources import HALF, IMAGENET, LAYOUTS, MSRA, SWAV, UNIT, Layout, Pixels
from twist.converters.targets.registry import TARGETS
from twist.converters.usage import usage

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conversions.md"
_PIXELS: dict[Pixels, str] = {
    IMAGENET: "ImageNet",
    SWAV: "std .228",
    UNIT: "[0, 1] only",
    HALF: "mean and std .5",
    MSRA: "BGR, Caffe",
}


_PAGE = """\
<!-- Written by `python -m twist.converters.document`; change the tables in converters/, not this page. -->
# Conversions

`twist convert CHECKPOINT --to TARGET` reads a checkpoint, finds out by its contents which layout it has, takes one
branch of it, and writes weights together with the settings they imply. Then the target's own network runs the same
image files through its own preprocessing; the folder appears only when every stage agrees to {tolerance:g} of its
largest feature. `twist inspect CHECKPOINT` says what a file holds. Nothing from a file is ever executed.

## Targets

{targets}

## Loading

{usage}

`twist convert` prints the lines for the file at hand. Where torchvision builds no such network (ViTs, double width,
"same" padding, the stride in the 1 × 1, BGR), `twist.contracts.networks` does.

## Networks and targets

{networks}

## Sources and targets

The first branch is taken unless `--branch` names another. Layouts marked *by name* look like another one, so they are
never guessed: say `--from NAME`. The columns on the right are for a ResNet-50; *plain* means that the target pads
symmetrically, and that the report states how far this is from the network as it was trained.

{sources}

Containers: `.pth`, `.pt`, `.tar` (PyTorch, zip and older stream), `.ckpt` (Lightning), `.pkl` (Detectron2, Caffe2,
haiku; numpy arrays only), `.safetensors`, `.npz`. `module.` and `_orig_mod.` are taken off; float16 and bfloat16 are
widened, which is exact.
"""


def page() -> str:
    """The whole page as Markdown."""
    tables = {"targets": _targets(), "usage": _usage(), "networks": _networks(), "sources": _sources()}
    return _PAGE.format(tolerance=TOLERANCE, **{name: "\n".join(rows) for name, rows in tables.items()})


def _targets() -> list[str]:
    rows = ["| `--to` | writes | settings |", "|---|---|---|"]
    resnet, vit = _backbone("resnet50"), _backbone("vit_base_patch16")
    for name, target in TARGETS.items():
        overlays = sorted({f"`{target.overlay_name(b)}`" for b in (resnet, vit)}) if target.overlay_name else []
        settings = " or ".join(overlays) or ("`config.json`" if name == "timm" else "in the file's header")
        rows.append(f"| `{name}` | `{target.weights}`, {target.title} | {settings} |")
    return rows


def _usage() -> list[str]:
    """What loads a ResNet-50's conversion, and Detectron2's of a ViT, which is another; then the artefact's own way."""
    shown = [(f"`{name}`", name, _backbone("resnet50")) for name in TARGETS]
    shown[1:1] = [("`detectron2`, a ViT", "detectron2", _backbone("vit_base_patch16"))]
    shown.append(("`torchvision`, any network", "torchvision", _backbone("resnet50", width=2)))
    blocks = [f"{title}:\n\n```python\n{usage(name, Path('FOLDER'), net)}```\n" for title, name, net in shown]
    return "\n".join(blocks).rstrip().split("\n")


def _networks() -> list[str]:
    rows = [_head("network"), "|---|" + "---|" * len(TARGETS)]
    networks = [_backbone(name) for name in ARCHITECTURES]
    networks[3:3] = [_backbone("resnet50", width=width) for width in (2, 4)]
    networks[1:1] = [_backbone("resnet18", width=2)]
    for backbone in networks:
        cells = [target.refuse(backbone) for target in TARGETS.values()]
        rows.append(f"| {backbone.display_name} | " + " | ".join(f"no: {c}" if c else "yes" for c in cells) + " |")
    return rows


def _sources() -> list[str]:
    rows = [
        _head("layout (`--from`) | method | branches | pixels | found") + " read from |",
        "|---|---|---|---|---|" + "---|" * len(TARGETS) + "---|",
    ]
    for layout in LAYOUTS:
        branches = ", ".join(dict.fromkeys(branch.name for branch in layout.branches))
        found = "by content" if layout.detect else "*by name*"
        rows.append(
            f"| `{layout.name}` | {layout.method} | {branches} | {_PIXELS[layout.pixels]} | {found} | "
            + " | ".join(_cell(layout, name) for name in TARGETS)
            + f" | {layout.note} |"
        )
    return rows


def _cell(layout: Layout, target: str) -> str:
    pixels = layout.pixels
    backbone = _backbone("resnet50").model_copy(
        update={"padding": layout.padding, "stride_in": layout.stride_in, "channel_order": pixels.channel_order}
    )
    if TARGETS[target].refuse(backbone):
        return "no"
    return "plain" if layout.padding == "same" and target != "torchvision" else "yes"


def _backbone(architecture: str, width: int = 1) -> Backbone:
    vit = architecture.startswith("vit_")
    return Backbone(
        architecture=architecture,  # type: ignore[arg-type]
        width=width,  # type: ignore[arg-type]
        stem="patch16" if vit else "conv7x7",
        image_size=224 if vit else None,
        method="any",
    )


def _head(first: str) -> str:
    return f"| {first} | " + " | ".join(f"`{name}`" for name in TARGETS) + " |"


if __name__ == "__main__":
    write_text(PAGE, page())
