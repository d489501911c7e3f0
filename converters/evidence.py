"""What a checkpoint says of itself besides its tensors: the network's name, the method, what it was trained for.

Tensors do not say which activation, padding, dilation or pooling a network has: `resnetaa50` and `fcn_resnet50` hold a
ResNet-50's tensors and compute something else. So a name that stands in the file has to be that of the network built.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.weights import Vit, depth_of
from twist.converters import sources
from twist.converters.open import Contents, Opaque
from twist.converters.sources import Dense, Layout, matches

if TYPE_CHECKING:
    from torch import Tensor

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
    rf"(tv|gluon|torchvision|timm|facebookresearch|facebook|microsoft|backbone|encoder|v1b|{_METHODS}|{_DATA})"
)
_DENSE_WORDS = re.compile(
    r"(fcn|deeplab(v3)?(plus)?|lraspp|(mask|faster|keypoint|cascade)_?rcnn|retinanet|fpn|unet|upernet|pspnet|r)"
)
_RESNET = re.compile(r"resnet[-_]?(\d+)?(?:[-_]?(?:w|x)[124]|[-_]?[124]x)?")
_VIT = re.compile(
    r"(vit|deit|vision_?transformer)[-_]?"
    r"((t|ti|tiny|s|small|b|base|l|large|h|huge|g|giant)(?![a-z]))?[-_]?((patch|p)?[-_]?\d+)?([-_]?\d+)*"
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


def named_networks(contents: Contents) -> dict[str, str]:
    """Place → name of each network that the file, or the settings beside it, names."""
    named = {}
    for path, text in settings_in({**contents.beside, "file": contents.value}):
        if path == ("config.json", "model_type"):  # `huggingface` knows these
            continue
        key, *outer = [part.lower() for part in reversed(path)]
        place = ".".join(path).removeprefix("file.")
        if _KEYS.fullmatch(key) or (key in _INNER and outer and _KEYS.fullmatch(outer[0])):
            named[place] = text
        named |= {f"{place} (backbone)": match[1] for match in _CONFIG_TEXT.finditer(text)}
    return {place: name for place, name in named.items() if _FAMILIES.search(name.lower())}


def agrees(name: str, architecture: str, *, dense: bool = False) -> bool:
    """Whether a network that is called `name` can be `architecture`; every word that is not known speaks against it.

    With `dense` the words of a detector or segmentor may stand beside it: its backbone was asked for.
    """
    *outer, last = re.split(r"[/:]", name.lower().strip())
    parts = last.split(".")
    # Of timm's `resnet50.a1_in1k` the first part, of a path in Python (`torchvision.models.resnet50`) the last.
    last = parts[-1] if {"models", "backbones", "resnet"} & set(parts[:-1]) or outer[-1:] == ["models"] else parts[0]
    vit = architecture.startswith("vit_")
    match = (_VIT if vit else _RESNET).search(last)
    if match is None or (not vit and match[1] not in (None, str(depth_of(architecture)))):
        return False
    words = [word for word in re.split(r"[-_\s]+", last[: match.start()] + "_" + last[match.end() :]) if word]
    if match.end() < len(last) and last[match.end()].isalnum():
        return False  # resnet50d, vit_small_r26
    known = (_HARMLESS, _DENSE_WORDS) if dense else (_HARMLESS,)
    joined = "_".join(words)
    return (
        not joined
        or any(pattern.fullmatch(joined) for pattern in known)
        or all(word.isdigit() or any(pattern.fullmatch(word) for pattern in known) for word in words)
    )


def contradiction(contents: Contents, architecture: str, *, dense: bool = False) -> str | None:
    """Why the file's own words say that it is another network than `architecture`; None when they do not."""
    for place, name in named_networks(contents).items():
        if not agrees(name, architecture, dense=dense):
            return f"{place} calls it {name}, which is not the {architecture} that its tensors look like"
    return None


def trained_for(state: Mapping[str, Tensor], declared: tuple[str, ...] = ()) -> Dense | None:
    """The kind of detector or segmentor that a state dict (cleaned names) is; names in `declared` do not count."""
    for row in sources.DENSE:
        found = [
            name
            for name, tensor in state.items()
            if re.search(row.names, name) and row.axes in (None, tensor.ndim) and not matches(name, declared)
        ]
        if found:
            return row
    return None


def method_of(contents: Contents, layout: Layout) -> str:
    """The method that the program's settings name where the layout says, a timm folder's tag, or the layout's."""
    if layout.name == "timm" and contents.hub:
        tag = contents.hub.get("pretrained_cfg", {}).get("tag", "")
        named = ".".join(part for part in (str(contents.hub["architecture"]), str(tag)) if part)
        found = (method for pattern, method in sources.TIMM_METHODS.items() if re.search(pattern, named))
        return next(found, "unknown" if tag else layout.method)
    for path in layout.method_at:
        places = {**contents.beside, **(contents.value if isinstance(contents.value, dict) else {})}
        method = next((text for where, text in settings_in(places) if "/".join(where) == path), None)
        if method:
            return method
    return layout.method


def header_of_run(contents: Contents) -> str | None:
    """The header (JSON) of the weights that a `twist transfer` run began with, of a checkpoint in the run's folder."""
    folder = contents.path.resolve().parent
    report = next(folder.glob("weights/*/report.json"), None)
    if report is None or not (folder / "run.json").is_file():
        return None
    try:
        return json.dumps(files.read_json(report)["backbone"])
    except (ValueError, KeyError, TypeError):
        return None


# In mmengine's text of a config: what our backbone for MMSegmentation was built with.
_VIT_TEXT = re.compile(r"\bvit=(dict\([^()]*\))")


def vit_of_config(contents: Contents) -> Vit | None:
    """The description in the config that mmengine keeps in its checkpoints, where the backbone is this suite's."""
    for _, text in settings_in(contents.value):
        if match := _VIT_TEXT.search(text):
            with contextlib.suppress(SyntaxError, ValueError, TypeError):
                call = ast.parse(match[1], mode="eval").body
                said = {str(word.arg): ast.literal_eval(word.value) for word in getattr(call, "keywords", ())}
                return Vit.model_validate(said)
    return None


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
        known = ", ".join(sources.HUGGINGFACE)
        raise UserError(
            f"{contents.path} is a {kind} of Hugging Face transformers, {reason}; of that library {known} are "
            "converted."
        )
    for key, values in _HUGGINGFACE.items():
        if config.get(key, values[0]) not in values:
            raise UserError(
                f"{contents.path}: its config.json sets {key} to {config[key]}, another network than the plain "
                f"{config['model_type']} that is built here; it is not converted."
            )
    classifies = "ForImageClassification" in str(config.get("architectures"))
    method = "supervised" if classifies and "dino" not in kind else sources.HUGGINGFACE[kind]
    found = {"stride_in": "1x1" if config.get("downsample_in_bottleneck") else "3x3", "method": method}
    images = contents.beside.get("preprocessor_config.json", {})
    if "image_mean" in images and "image_std" in images and images.get("do_normalize", True):
        found |= {"mean": images["image_mean"], "std": images["image_std"]}
    return found
