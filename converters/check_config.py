"""`twist convert --check-config`: does a user's own Detectron2 or MMSegmentation config fit these weights?

The mistakes that cost the field months (BGR pixels, another mean, the stride in the 1×1, a deep stem, frozen norms)
train without an error and lose points. Each is named here with its cure. Detectron2's YAML is read without running
it; an MMSegmentation config is a Python program of the user's own, so mmengine reads it, as the training will.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twist.contracts.errors import UsageError, UserError
from twist.contracts.weights import Backbone, weights_file
from twist.converters.read import load_artefact
from twist.converters.targets.detectron2 import detectron2_overlay
from twist.converters.targets.mmseg import mmseg_overlay

# detectron2 config/defaults.py (v2): what a YAML that says nothing gets.
_DETECTRON2_DEFAULTS: dict[str, Any] = {
    "MODEL": {
        "WEIGHTS": "",
        "PIXEL_MEAN": [103.53, 116.28, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        "RESNETS": {
            "DEPTH": 50,
            "NORM": "FrozenBN",
            "STRIDE_IN_1X1": True,
            "WIDTH_PER_GROUP": 64,
            "NUM_GROUPS": 1,
            "STEM_OUT_CHANNELS": 64,
            "RES2_OUT_CHANNELS": 256,
        },
        "ROI_HEADS": {"NAME": "Res5ROIHeads"},
    },
    "INPUT": {"FORMAT": "BGR"},
}
_WHY = {
    "INPUT.FORMAT": "the weights were trained on the other channel order",
    "MODEL.PIXEL_MEAN": "each channel would be shifted",
    "MODEL.PIXEL_STD": "the input would have another scale",
    "MODEL.RESNETS.STRIDE_IN_1X1": "the stride would move to the other convolution and the features with it",
    "MODEL.RESNETS.DEPTH": "another network: most weights would be skipped with a warning",
    "MODEL.RESNETS.NUM_GROUPS": "grouped convolutions: the weights would be skipped with a warning",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "another width: the weights would be skipped with a warning",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "another width: the weights would be skipped with a warning",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "another width: the weights would be skipped with a warning",
    "MODEL.BACKBONE.FREEZE_AT": "frozen stages keep self-supervised statistics that do not fit detection's crops",
}


@dataclass(frozen=True)
class Mismatch:
    """One setting that does not fit: what stands there, what should, and what to do."""

    key: str
    found: Any
    wanted: Any
    cure: str


def check_config(
    config: Path, weights: Path, *, layout: str | None = None, branch: str | None = None
) -> list[Mismatch]:
    """Every setting of `config` that does not fit `weights` (any checkpoint); empty when all do.

    Raises:
        UserError: a file is missing or not readable. UsageError: the config is neither .yaml nor .py.
    """
    config = Path(config)
    if not config.is_file():
        raise UserError(f"There is no config at {config}: check the path.")
    backbone = load_artefact(weights_file(weights), layout=layout, branch=branch)[1]
    if config.suffix in (".yaml", ".yml"):
        return _check_detectron2(_merged(_DETECTRON2_DEFAULTS, _read_yaml(config)), backbone)
    if config.suffix == ".py":
        return _check_mmseg(_read_mmengine(config), backbone)
    raise UsageError(f"{config} is neither a Detectron2 config (.yaml) nor an MMSegmentation config (.py).")


def render(mismatches: list[Mismatch]) -> str:
    """One line a mismatch, or that there is none."""
    if not mismatches:
        return "The config fits the weights."
    return "\n".join(f"{m.key} is {m.found!r}, should be {m.wanted!r}: {m.cure}" for m in mismatches)


def _check_detectron2(settings: dict[str, Any], backbone: Backbone) -> list[Mismatch]:
    if backbone.is_vit:
        raise UserError(
            "Detectron2 builds plain ViTs from lazy configs (.py), not from YAML: use the overlay.py that the "
            "conversion writes."
        )
    wanted = detectron2_overlay(backbone)
    found = []
    for key, why in _WHY.items():
        is_, should = _at(settings, key), _at(wanted, key)
        if not _same(is_, should):
            found.append(Mismatch(key, is_, should, f"{why}; set {key}: {should}"))
    norm = _at(settings, "MODEL.RESNETS.NORM")
    if norm == "FrozenBN":
        cure = "frozen norms with self-supervised weights lose points or diverge; set MODEL.RESNETS.NORM: SyncBN"
        found.append(Mismatch("MODEL.RESNETS.NORM", norm, "SyncBN", cure))
    elif norm not in ("BN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N"):
        cure = "other norms than the weights', whose statistics would be left out; set MODEL.RESNETS.NORM: SyncBN"
        found.append(Mismatch("MODEL.RESNETS.NORM", norm, "SyncBN", cure))
    heads = _at(settings, "MODEL.ROI_HEADS.NAME")
    if _at(settings, "MODEL.BACKBONE.NAME") == "build_resnet_backbone" and heads == "Res5ROIHeads":
        cure = (
            "the C4 recipe of MoCo puts a norm after res5, without it the unnormalised features diverge; set "
            "MODEL.ROI_HEADS.NAME: Res5ROIHeadsExtraNorm (in twist.transfer.engines.detectron2.model)"
        )
        found.append(Mismatch("MODEL.ROI_HEADS.NAME", heads, "Res5ROIHeadsExtraNorm", cure))
    path = str(_at(settings, "MODEL.WEIGHTS"))
    if path.startswith("detectron2://ImageNetPretrained"):
        cure = "these are supervised weights of another network; set MODEL.WEIGHTS to the converted weights.pth"
        found.append(Mismatch("MODEL.WEIGHTS", path, "weights.pth", cure))
    return found


def _check_mmseg(settings: Mapping[str, Any], backbone: Backbone) -> list[Mismatch]:
    model = settings.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("backbone"), Mapping):
        raise UserError("The config defines no model.backbone: name a whole MMSegmentation config, not a part of one.")
    wanted = mmseg_overlay(backbone)["model"]
    theirs, ours = model["backbone"], wanted["backbone"]
    found = []

    def differ(key: str, is_: Any, should: Any, cure: str) -> None:
        if not _same(is_, should):
            found.append(Mismatch(key, is_, should, cure))

    stem = " (its deep 3×3 stem would stay random)" if theirs.get("type") in ("ResNetV1c", "ResNetV1d") else ""
    differ(
        "model.backbone.type", theirs.get("type"), ours["type"],
        f"another network{stem}: most weights would be skipped with a warning; set type='{ours['type']}'",
    )  # fmt: skip
    if model.get("pretrained"):
        cure = "it replaces or clashes with init_cfg and loads other weights; set model.pretrained=None"
        found.append(Mismatch("model.pretrained", model["pretrained"], None, cure))
    defaults = {"style": "pytorch", "stem_channels": 64, "base_channels": 64, "num_layers": 12, "embed_dims": 768}
    defaults |= {"num_heads": 12, "patch_bias": False, "patch_size": 16, "norm_cfg": {"type": "LN"}}
    defaults |= {"deep_stem": False, "avg_down": False}
    keys = (
        ("patch_size", "patch_bias", "embed_dims", "num_layers", "num_heads", "norm_cfg")
        if backbone.is_vit
        else ("depth", "stem_channels", "base_channels", "style", "deep_stem", "avg_down")
    )
    for key in keys:
        cure = f"another network than the weights'; set {key}={ours[key]!r}"
        differ(f"model.backbone.{key}", theirs.get(key, defaults.get(key)), ours[key], cure)
    preprocessor = model.get("data_preprocessor") or settings.get("data_preprocessor") or {}
    for key in ("mean", "std", "bgr_to_rgb"):
        should = wanted["data_preprocessor"][key]
        cure = f"the weights were trained on other pixels; set data_preprocessor.{key}={should}"
        differ(
            f"model.data_preprocessor.{key}",
            preprocessor.get(key, False if key == "bgr_to_rgb" else None),
            should,
            cure,
        )
    if theirs.get("frozen_stages", -1) >= 0:
        cure = "frozen stages keep self-supervised statistics; set frozen_stages=-1"
        found.append(Mismatch("model.backbone.frozen_stages", theirs["frozen_stages"], -1, cure))
    norm = theirs.get("norm_cfg") or {}
    if not backbone.is_vit and norm.get("type", "BN") not in ("BN", "BN2d", "SyncBN", "MMSyncBN"):
        cure = "other norms than the weights', whose statistics would be left out; set norm_cfg=dict(type='SyncBN')"
        found.append(Mismatch("model.backbone.norm_cfg.type", norm["type"], "SyncBN", cure))
    if theirs.get("norm_eval") or (norm.get("requires_grad") is False and not backbone.is_vit):
        cure = "frozen norms with self-supervised weights lose points; set norm_eval=False and requires_grad=True"
        found.append(Mismatch("model.backbone.norm_eval", True, False, cure))
    load = theirs.get("init_cfg") or {}
    if isinstance(load, Mapping) and load.get("prefix", "") != ours["init_cfg"].get("prefix", ""):
        should = ours["init_cfg"].get("prefix")
        cure = f"no tensor of the file has the prefix that is asked for; set init_cfg.prefix={should!r}"
        found.append(Mismatch("model.backbone.init_cfg.prefix", load.get("prefix"), should, cure))
    return found


def _read_yaml(path: Path, depth: int = 0) -> dict[str, Any]:
    """A Detectron2 YAML over its `_BASE_` chain. Tags that would run code are read as nothing."""
    import yaml

    class Reader(yaml.SafeLoader):
        pass

    # Old configs compute anchor sizes with `!!python/object/apply:eval`; no setting that is checked here is such.
    Reader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    try:
        values = Reader(path.read_text()).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]}): check the file.") from None
    if not isinstance(values, dict) or depth > 16:
        raise UserError(f"{path} is no Detectron2 config: a mapping is expected, over bases that end.")
    bases = values.pop("_BASE_", None) or []
    below: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:  # fvcore takes a list, too: the later win
        file = path.parent / Path(str(base)).expanduser()
        if not file.is_file():
            raise UserError(f"{path} builds on {base}, which is not there: copy it beside the config.")
        below = _merged(below, _read_yaml(file, depth + 1))
    return _merged(below, values)


def _read_mmengine(path: Path) -> Mapping[str, Any]:
    try:
        from mmengine.config import Config
    except ImportError:
        raise UserError(
            "Reading an MMSegmentation config needs mmengine: pip install onedl-mmengine (or twist-suite[transfer])."
        ) from None
    try:
        return Config.fromfile(str(path))
    except Exception as error:  # the config is a program: whatever it raises becomes one sentence
        raise UserError(
            f"{path} cannot be read by mmengine ({type(error).__name__}: {error}): check the config."
        ) from None


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, str) and not isinstance(b, str):  # yacs reads "(1.0, 2.0)" and "True" as Python's literals
        with contextlib.suppress(ValueError, SyntaxError):
            a = ast.literal_eval(a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        # A hundredth of a grey level: less than any rounding of the published means and stds, more than ours.
        return len(a) == len(b) and all(abs(float(x) - float(y)) <= 0.01 for x, y in zip(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(a.get(key) == value for key, value in b.items())
    return bool(a == b)
