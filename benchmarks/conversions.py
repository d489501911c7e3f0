"""`docs/conversions.md`, written from the tables by `python -m benchmarks.conversions`. A test keeps it current."""

from collections.abc import Iterable
from pathlib import Path

from twist.contracts.files import write_text
from twist.contracts.weights import ARCHITECTURES, TIMM, Backbone, is_vit, stem_of
from twist.converters.proof import TOLERANCE
from twist.converters.sources import ANYWHERE, LAYOUTS, Layout
from twist.converters.tables import VIT_TABLES
from twist.converters.targets import TARGETS, Target

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conversions.md"
_SHOWN = {"": "resnet50", ", a ViT": "vit_base_patch16"}


def page() -> str:
    """The whole page as Markdown: the template `docs/conversions.in.md` with its tables."""
    return (
        PAGE.with_suffix(".in.md")
        .read_text()
        .format(
            tolerance=TOLERANCE,
            targets=_table(["`--to`", "writes", "settings"], map(_target_row, TARGETS.values())),
            usage=_usage(),
            networks=_table(["network", *_target_heads()], map(_network_row, _networks())),
            sources=_table(
                ["layout (`--from`)", "method", "branches", "pixels", "found", *_target_heads(), "read from"],
                map(_source_row, (*LAYOUTS, ANYWHERE)),
            ),
        )
    )


def _target_row(target: Target) -> list[str]:
    files = dict.fromkeys(", ".join(f"`{file}`" for file in target.settings(_backbone(net))) for net in _SHOWN.values())
    settings = " or ".join(files) or "in the file's header"
    return [f"`{target.name}`", f"`{target.weights}`, {target.title}", settings]


def _usage() -> str:
    """The lines for a ResNet-50, and those for a ViT where they are others."""
    shown = []
    for name, target in TARGETS.items():
        lines = {title: target.usage(Path("FOLDER"), _backbone(net)) for title, net in _SHOWN.items()}
        for title, text in lines.items():
            if title == "" or text != lines[""]:
                shown.append(f"`{name}`{title}:\n\n```python\n{text}```\n")
    return "\n".join(shown).rstrip()


def _networks() -> list[Backbone]:
    wide = [_backbone("resnet18", 2), _backbone("resnet50", 2), _backbone("resnet50", 4)]
    known = sorted([*map(_backbone, ARCHITECTURES), *wide], key=lambda net: ARCHITECTURES.index(net.architecture))
    return [*known, Backbone(architecture=f"{TIMM}any_other_name", stem="own", method="any")]


def _network_row(backbone: Backbone) -> list[str]:
    reasons = [target.refuse(backbone) for target in TARGETS.values()]
    return [backbone.display_name, *(f"no: {reason}" if reason else "yes" for reason in reasons)]


def _source_row(layout: Layout) -> list[str]:
    branches = ", ".join(dict.fromkeys(branch.name for branch in layout.branches))
    found = "by search" if layout.generic or layout is ANYWHERE else "by content" if layout.detect else "*by name*"
    cells = [_cell(layout, target) for target in TARGETS.values()]
    return [f"`{layout.name}`", layout.method, branches, layout.pixels.label, found, *cells, layout.note]


def _cell(layout: Layout, target: Target) -> str:
    changes: dict[str, object] = {"stride_in": layout.stride_in, "channel_order": layout.pixels.channel_order}
    changes["padding"] = layout.padding
    network = _backbone("resnet50")
    if layout.tables[0] in VIT_TABLES:
        network = _backbone("vit_base_patch16")
        changes = {"vit": network.transformer.model_copy(update={"resize": layout.resize, "norm_eps": layout.norm_eps})}
    if target.refuse(network.model_copy(update=changes)):
        return "no"
    return "plain" if layout.padding == "same" and not target.keeps_padding else "yes"


def _backbone(architecture: str, width: int = 1) -> Backbone:
    vit = {"stem": stem_of(architecture), "image_size": 224} if is_vit(architecture) else {}
    return Backbone(architecture=architecture, width=width, method="any", **vit)  # type: ignore[arg-type]


def _target_heads() -> list[str]:
    return [f"`{name}`" for name in TARGETS]


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    write_text(PAGE, page())
