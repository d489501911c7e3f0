"""What a checkpoint says of itself besides its tensors: the network's name, the method, heads, what it was trained for.

Tensors do not say which activation, padding, dilation or pooling a network has, nor how many attention heads:
`resnetaa50` and `fcn_resnet50` hold a ResNet-50's tensors, twelve heads have the shapes of six. So a name in the file
has to be that of the network built, and heads that nothing says are asked for.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.weights import ARCHITECTURES, METADATA_KEY, TIMM, VITS, Vit, depth_of, usual_vit
from twist.converters import sources
from twist.converters.architecture import UNSEEN, Arrays, sincos
from twist.converters.open import Contents, Opaque
from twist.converters.sources import Dense, Layout, Pixels, matches

# ---- The network's name ----------------------------------------------------------------------------------------------

# Keys of settings whose text names a network; below `backbone` and its like also `name`, `type` and `arch`.
_KEYS = re.compile(r"(base_|timm_)?(arch|architecture|model|network|net|backbone|encoder|trunk)(_name|_arch|_type)?")
_INNER = frozenset(("name", "type", "_target_", "kind"))
# mmengine keeps the config as text: `backbone=dict(type='ResNetV1c', depth=50, …)`.
_CONFIG_TEXT = re.compile(r"\bbackbone=dict\((?:[^()]|\([^()]*\))*?\btype='(\w+)'")
# Words by which a text is known to name a network, at the beginning or the end of a run of letters.
_FAMILIES = re.compile(
    r"(?<![a-z])(res(net|next|nest)|res2net|convne?xt|regnet|densenet|vgg|(efficient|mobile|google|squeeze|hr|nf)net"
    r"|inception|swin|vit|deit|beit|eva|cait|xcit|pvt|mixer|vision_?transformer)|(net|vit|former)(?![a-z])",
)
# What may stand beside a network's name and changes nothing: makers, methods, data sets, versions of the training.
_METHODS = (
    r"(moco|simclr|deepcluster|sela|swav|dino|byol|pcl|simsiam|barlow_?twins|vicreg|vicregl|twist|mae|msn|ibot|ijepa|"
    r"densecl|pixpro|soco|detco|slotcon|infomin|pirl|nnclr|ressl|mim|sup|supervised|ssl|swsl|self)[-_]?(v?[1-4](?!\d))?"
)
_DATA = r"(reg\d*|imagenet\w*|in\d+k?|cifar\d*|coco|pretrain(ed|ing)?|[rs]gb|\d+e(p|pochs?)?)"
_HARMLESS = re.compile(
    rf"(tv|gluon|torchvision|timm|facebookresearch|facebook|microsoft|backbone|encoder|v1b|qkvb|{_METHODS}|{_DATA})"
)
_DENSE_WORDS = re.compile(
    r"(fcn|deeplab(v3)?(plus)?|lraspp|(mask|faster|keypoint|cascade)_?rcnn|retinanet|fpn|unet|upernet|pspnet|r)"
)
_RESNET = re.compile(r"resnet[-_]?(\d+)?(?:[-_]?(?:w|x)[124]|[-_]?[124]x)?")
_VIT = re.compile(
    r"(vit|deit|vision_?transformer)[-_]?"
    r"((t|ti|tiny|s|small|b|base|l|large|h|huge|g|giant)(?![a-z]))?([-_]plus)?[-_]?((patch|p)?[-_]?\d+)?([-_]?\d+)*"
)


def settings_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text in a file's settings, with the path of keys that leads to it."""
    if isinstance(value, Opaque):
        value = value.state
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from settings_in(item, (*path, str(key)))


def _names_said(contents: Contents) -> Iterator[tuple[str, str]]:
    """Where the file or what lies beside it names a network, and the name."""
    for path, text in settings_in({**contents.beside, "file": contents.value}):
        if path == ("config.json", "model_type"):  # `huggingface` knows these
            continue
        key, *outer = [part.lower() for part in reversed(path)]
        place = ".".join(path).removeprefix("file.")
        named = {f"{place} (backbone)": match[1] for match in _CONFIG_TEXT.finditer(text)}
        if _KEYS.fullmatch(key) or (key in _INNER and outer and _KEYS.fullmatch(outer[0])):
            named[place] = text
        yield from ((place, name) for place, name in named.items() if _FAMILIES.search(name.lower()))


def contradiction(contents: Contents, architecture: str, *, dense: bool = False) -> str | None:
    """Why the file's own words say that it is another network than `architecture`; None when they do not."""
    for place, name in _names_said(contents):
        if not agrees(name, architecture, dense=dense):
            return f"{place} calls it {name}, which is not the {architecture} that its tensors look like"
    said = contents.hub.get("model_args") if architecture.startswith(TIMM) else None
    if isinstance(said, dict):
        from timm.models import get_model_args  # of the release that began to write them always

        from twist.contracts.timm_networks import outline

        usual = json.loads(json.dumps(get_model_args(outline(architecture).network)))
        changed = {key: value for key, value in said.items() if key != "num_classes" and value != usual.get(key)}
        return f"model_args in its config.json changes that network ({changed})" if changed else None
    return None


def timm_architecture(contents: Contents) -> str | None:
    """`timm:NAME` where an earlier conversion or the file's own words name a network of timm's that is no plain ResNet
    or ViT."""
    value = contents.value if isinstance(contents.value, dict) else {}
    headers = (contents.metadata.get(METADATA_KEY), value.get(METADATA_KEY), contents.hub.get(METADATA_KEY))
    if header := next(filter(None, headers), None):
        return next(iter(re.findall(rf"architecture\W+({TIMM}\w+)", str(header))), None)
    for name in (contents.hub.get("architecture"), *(name for _, name in _names_said(contents))):
        bare = re.split(r"[/:]", name or "")[-1].split(".")[0]
        if bare and not any(agrees(bare, plain, dense=True) for plain in ARCHITECTURES):
            import timm  # after the names that need it not

            if timm.is_model(bare):
                return TIMM + bare
    return None


def agrees(name: str, architecture: str, *, dense: bool = False) -> bool:
    """Whether a network that is called `name` can be `architecture`; every word that is not known speaks against it.

    With `dense` the words of a detector or segmentor may stand beside it: its backbone was asked for.
    """
    *outer, last = re.split(r"[/:]", name.lower().strip())
    parts = last.split(".")
    if architecture.startswith(TIMM):
        return parts[0] == architecture.removeprefix(TIMM)
    # Of timm's `resnet50.a1_in1k` the first part, of a path in Python (`torchvision.models.resnet50`) the last.
    last = parts[-1] if {"models", "backbones", "resnet"} & set(parts[:-1]) or outer[-1:] == ["models"] else parts[0]
    vit = architecture.startswith("vit_")
    match = (_VIT if vit else _RESNET).search(last)
    if match is None or (not vit and match[1] not in (None, str(depth_of(architecture)))):
        return False
    if match.end() < len(last) and last[match.end()].isalnum():
        return False  # resnet50d, vit_small_r26
    words = [word for word in re.split(r"[-_\s]+", last[: match.start()] + "_" + last[match.end() :]) if word]
    known = (_HARMLESS, _DENSE_WORDS) if dense else (_HARMLESS,)

    def fits(text: str) -> bool:
        return text.isdigit() or any(pattern.fullmatch(text) for pattern in known)

    return fits("_".join(words)) or all(map(fits, words))


# ---- What it was trained for, and by which method -------------------------------------------------------------------


def trained_for(state: Arrays, declared: tuple[str, ...] = ()) -> Dense | None:
    """The kind of detector or segmentor that a state dict (cleaned names) is; names in `declared` do not count."""

    def found(row: Dense) -> bool:
        return any(
            re.search(row.names, name) and row.axes in (None, tensor.ndim) and not matches(name, declared)
            for name, tensor in state.items()
        )

    return next(filter(found, sources.DENSE), None)


def method_of(contents: Contents, layout: Layout) -> str:
    """The method that the program's settings name where the layout says, a timm folder's tag, or the layout's."""
    if layout.name == "timm" and contents.hub:
        tag = contents.hub.get("pretrained_cfg", {}).get("tag", "")
        named = ".".join(part for part in (str(contents.hub["architecture"]), str(tag)) if part)
        found = (method for pattern, method in sources.TIMM_METHODS.items() if re.search(pattern, named))
        return next(found, "unknown" if tag else layout.method)
    places = {**contents.beside, **contents.value} if layout.method_at else {}
    texts = {"/".join(path): text for path, text in settings_in(places)}
    return next((texts[path] for path in layout.method_at if texts.get(path)), layout.method)


def hub_pixels(contents: Contents) -> Pixels | None:
    """Mean and std that the hub's config.json names; None when it does not."""
    settings = contents.hub.get("pretrained_cfg", contents.hub)
    try:
        return Pixels(mean=settings["mean"], std=settings["std"])
    except (KeyError, TypeError, ValueError):
        return None


def header_of_run(contents: Contents) -> str | None:
    """The header (JSON) of the weights that a `twist transfer` run began with, of a checkpoint in the run's folder."""
    folder = contents.path.resolve().parent
    report = next(folder.glob("weights/*/report.json"), None)
    if report is None or not (folder / "run.json").is_file():
        return None
    return json.dumps(files.read_json(report).get("backbone"))


# Settings of transformers' models that no tensor shows, and the value that the network built here has.
_HUGGINGFACE = {"hidden_act": ("relu", "gelu"), "downsample_in_first_stage": (False,)}


def huggingface(contents: Contents) -> dict[str, Any]:
    """Fields of a header that the config files of a Hugging Face folder give.

    Raises:
        UserError: it is of a kind that no header describes, or a setting makes another network of it than its tensors
            look like.
    """
    config = contents.beside.get("config.json", {})
    if "model_type" not in config:
        return {}
    kind = str(config["model_type"])
    if kind not in sources.HUGGINGFACE:
        reason = sources.HUGGINGFACE_OTHERS.get(kind, "whose network is not described here")
        raise UserError(
            f"{contents.path} is a {kind} of Hugging Face transformers, {reason}; of that library "
            f"{', '.join(sources.HUGGINGFACE)} are converted."
        )
    for key, values in _HUGGINGFACE.items():
        if config.get(key, values[0]) not in (
            ("silu",) if config.get("use_gated_mlp") and key == "hidden_act" else values
        ):
            raise UserError(
                f"{contents.path}: its config.json sets {key} to {config[key]}, another network than the plain {kind} "
                "that is built here; it is not converted."
            )
    classifies = "ForImageClassification" in str(config.get("architectures"))
    method = "supervised" if classifies and "dino" not in kind else sources.HUGGINGFACE[kind]
    found = {"stride_in": "1x1" if config.get("downsample_in_bottleneck") else "3x3", "method": method}
    images = contents.beside.get("preprocessor_config.json", {})
    if "image_mean" in images and "image_std" in images and images.get("do_normalize", True):
        found |= {"mean": images["image_mean"], "std": images["image_std"]}
    return found


# ---- A ViT's heads ---------------------------------------------------------------------------------------------------

# moco-v3 vits.py: 12 heads in both sizes.
MOCO_V3_HEADS, _MOCO_V3_SIZES = 12, (384, 768)
_NUM_HEADS = re.compile(r"(?<![A-Za-z_])num_(?:attention_)?heads[^\w\[]{1,4}(\d+)")
_MOCO_V3 = re.compile(r"moco[-_]?v3", re.IGNORECASE)
# Names of networks with the usual heads: timm's, DeiT's and MAE's.
_USUAL = re.compile(r"\b(?:mae_)?(?:vit|deit3?)_(tiny|small|base|large|huge)_patch\d+")
# In mmengine's text of a config: what our backbone for MMSegmentation was built with.
_VIT_TEXT = re.compile(r"\bvit=(dict\([^()]*\))")


# Fields of a network with rotary positions, and Hugging Face's names.
_ROPE = {"rope_base": "rope_theta", "norm_eps": "layer_norm_eps"}


class HeadsUnknownError(UserError):
    """Nothing says how many heads a ViT has, or what says so disagrees; `usual` is the most frequent number."""

    def __init__(self, message: str, usual: int) -> None:
        super().__init__(message)
        self.usual = usual


def described(
    shape: Mapping[str, Any], heads: int | None, contents: Contents, layout: Layout, table: Any
) -> Vit | None:
    """The ViT of `shape` with the heads that are told or that evidence gives, and what Hugging Face's settings or the
    layout say; None for the usual network of the name. `table` is its position table.

    Raises:
        HeadsUnknownError: there is no evidence, or it disagrees.
        UserError: the dimension is no multiple of the heads, or the activation is not known.
    """
    vit: Vit = shape["vit"]
    if vit.pre_norm:
        raise UserError(
            f"{contents.path} is a ViT with a norm before its blocks (CLIP), and no tensor says whether its MLPs have "
            "GELU or quick GELU, so it is not converted; take a plain ViT's weights."
        )
    own = _of_config(contents)
    if own is not None and own.model_dump(exclude=UNSEEN) == vit.model_dump(exclude=UNSEEN):
        return own
    if heads is None:
        evidence = _evidence(contents, layout, vit, table)
        if len(evidence) != 1:
            raise HeadsUnknownError(_question(str(contents.path), vit, evidence), vit.heads)
        heads = next(iter(evidence))
    config = contents.beside.get("config.json", {})
    said = {"resize": layout.resize, "norm_eps": config.get("layer_norm_eps", layout.norm_eps)}
    if vit.rope_base:
        said = {key: config.get(name, getattr(vit, key)) for key, name in _ROPE.items()}
    try:
        vit = Vit.model_validate({**vit.model_dump(), **said, "heads": heads})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{contents.path}: {reason}: say another number of --heads, or mend config.json.") from None
    return None if vit == usual_vit(shape["architecture"]) else vit


def _of_config(contents: Contents) -> Vit | None:
    """The description in the config that mmengine keeps in its checkpoints, where the backbone is this suite's."""
    for _, text in settings_in(contents.value):
        if match := _VIT_TEXT.search(text):
            with contextlib.suppress(SyntaxError, ValueError, TypeError):
                call = ast.parse(match[1], mode="eval").body
                said = {str(word.arg): ast.literal_eval(word.value) for word in getattr(call, "keywords", ())}
                return Vit.model_validate(said)
    return None


def _evidence(contents: Contents, layout: Layout, vit: Vit, table: Any) -> dict[int, str]:
    """Number of heads → what says so: the strongest kind of evidence that there is, which may disagree with itself."""

    def numbers(settings: str) -> set[int]:
        return {int(number) for number in _NUM_HEADS.findall(settings)}

    def named(settings: str) -> set[int]:
        if _MOCO_V3.search(settings) and vit.embed_dim in _MOCO_V3_SIZES:
            return {MOCO_V3_HEADS}
        if vit.rope_base:
            return {vit.heads} if "dinov3" in settings else set()
        usual = {VITS[size] for size in _USUAL.findall(settings)}
        return {heads for dimension, _, heads, _ in usual if dimension == vit.embed_dim}

    inside = {"its settings": _text(contents.value), "config.json": _text(contents.hub)}
    beside = {place: _text(settings) for place, settings in contents.beside.items()}
    by_layout = {layout.vit_heads or vit.heads: f"the layout {layout.name}"}
    known = layout.heads_known or layout.vit_heads or (vit.rope_base and layout.method == "dinov3")
    kinds = [
        {heads: place for place, settings in inside.items() for heads in numbers(settings)},
        by_layout if known else {},
        {heads: place for place, settings in inside.items() for heads in named(settings)},
        {heads: place for place, settings in beside.items() for heads in numbers(settings)},
        {heads: place for place, settings in beside.items() for heads in named(settings)},
    ]
    if table is not None and vit.embed_dim in _MOCO_V3_SIZES and sincos(table) == "moco-v3":
        kinds.append({MOCO_V3_HEADS: "the position table"})
    return next(filter(None, kinds), {})


def _text(settings: Any) -> str:
    return json.dumps(settings, default=lambda item: item.state if isinstance(item, Opaque) else None, skipkeys=True)


def _question(where: str, vit: Vit, said: Mapping[int, str]) -> str:
    choice = f"--heads {vit.heads} for the usual number"
    if vit.embed_dim == VITS["small"][0]:
        choice = f"--heads {vit.heads} (DeiT's, DINO's and timm's ViT-S) or --heads {MOCO_V3_HEADS} (MoCo v3's)"
    if said:
        places = ", ".join(f"{heads} heads by {place}" for heads, place in said.items())
        return f"{where}: what says how many heads this ViT has disagrees ({places}): say {choice}."
    return (
        f"{where}: nothing in the file or beside it says how many heads this ViT of {vit.embed_dim} features has, and "
        f"the shapes are the same for any number: say {choice}, or name the source with --from."
    )
