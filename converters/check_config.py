"""`twist convert --check-config`: does a user's own Detectron2 or MMSegmentation config fit these weights?

Such mistakes (BGR pixels, another mean, the stride in the 1×1, a deep stem, frozen norms) train without an error and
lose points. Detectron2's YAML is read without running it; an MMSegmentation config is a Python program of the user's
own, so mmengine reads it, as the training will.
"""

import ast
import contextlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, printable, require
from twist.contracts.weights import Backbone
from twist.converters.read import load_artefact
from twist.converters.sources import Reading
from twist.converters.targets.detectron2 import config_file, detectron2_overlay
from twist.converters.targets.mmseg import mmseg_overlay


@dataclass(frozen=True)
class Mismatch:
    """A setting that does not fit: its value, the value that fits, and why."""

    key: str
    found: Any
    wanted: Any
    reason: str


# A setting's key, the framework's default, the values that fit (the first is recommended), and why others do not.
Rule = tuple[str, Any, tuple[Any, ...], str]


def check_config(config: Path, weights: Path, **reading: Unpack[Reading]) -> list[Mismatch]:
    """Every setting of `config` that does not fit `weights` (any checkpoint); empty when all do.

    Raises:
        UserError: a file is missing or not readable. UsageError: the config is neither .yaml nor .py.
    """
    config = files.require_regular(config)
    if config.suffix not in _READERS:
        raise UsageError(f"{config} is neither a Detectron2 config (.yaml) nor an MMSegmentation config (.py).")
    backbone = load_artefact(weights, **reading)[1]
    read, rules_of = _READERS[config.suffix]
    try:
        settings = read(config)
    except UserError:
        raise
    except Exception as error:  # a config may be a program: whatever it raises becomes one sentence
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{config} cannot be read ({type(error).__name__}: {first}): check the config.") from None
    found = []
    for key, default, accepted, reason in rules_of(settings, backbone):
        value = default if _at(settings, key) is None else _at(settings, key)
        if not any(_same(value, fitting) for fitting in accepted):
            found.append(Mismatch(key, value, accepted[0], reason))
    return found


def mismatch_text(mismatches: list[Mismatch]) -> str:
    """One line a mismatch, or that there is none."""
    lines = [f"{m.key} is {m.found!r}, should be {m.wanted!r}: {m.reason}" for m in mismatches]
    return printable("\n".join(lines)) or "The config fits the weights."


_OTHER = "another network: its weights would be skipped with a warning"
_PIXELS = "the weights were trained on other pixels"
_FROZEN = "frozen layers keep self-supervised statistics that do not fit the crops, and lose points"
# key, default of a YAML that does not say (detectron2 config/defaults.py, v2), reason
_DETECTRON2 = {
    "INPUT.FORMAT": ("BGR", "the weights were trained on the other channel order"),
    "MODEL.PIXEL_MEAN": ([103.53, 116.28, 123.675], _PIXELS),
    "MODEL.PIXEL_STD": ([1.0, 1.0, 1.0], _PIXELS),
    "MODEL.RESNETS.STRIDE_IN_1X1": (True, "the stride would move to the other convolution and the features with it"),
    "MODEL.RESNETS.DEPTH": (50, _OTHER),
    "MODEL.RESNETS.NUM_GROUPS": (1, _OTHER),
    "MODEL.RESNETS.WIDTH_PER_GROUP": (64, _OTHER),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64, _OTHER),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": (256, _OTHER),
    "MODEL.BACKBONE.FREEZE_AT": (2, _FROZEN),
}


def _detectron2_rules(settings: Mapping[str, Any], backbone: Backbone) -> Iterable[Rule]:
    if backbone.is_vit:
        raise UserError("Detectron2 builds plain ViTs from lazy configs (.py): use the overlay.py of the conversion.")
    wanted = detectron2_overlay(backbone)
    yield from ((key, default, (_at(wanted, key),), reason) for key, (default, reason) in _DETECTRON2.items())
    norms = ("SyncBN", "BN", "naiveSyncBN", "naiveSyncBN_N")
    reason = "frozen norms with self-supervised weights lose points or diverge, others do not take their statistics"
    yield "MODEL.RESNETS.NORM", "FrozenBN", norms, reason
    if _at(settings, "MODEL.BACKBONE.NAME") in (None, "build_resnet_backbone") and (
        _at(settings, "MODEL.ROI_HEADS.NAME") in (None, "Res5ROIHeads")
    ):
        reason = (
            "the C4 recipe of MoCo puts a norm after res5, without it the unnormalised features diverge "
            "(`import twist.transfer.engines.detectron2.model` registers it)"
        )
        yield "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", ("Res5ROIHeadsExtraNorm",), reason
    if str(_at(settings, "MODEL.WEIGHTS")).startswith("detectron2://ImageNetPretrained"):
        yield "MODEL.WEIGHTS", "", ("weights.pth",), "these are supervised weights; name the converted file"


def _read_yaml(path: Path) -> Mapping[str, Any]:
    """A Detectron2 YAML over its `_BASE_` chain, by fvcore's reader. Tags that would run code are left out."""
    from fvcore.common.config import CfgNode

    class Reader(CfgNode):
        @classmethod
        def _open_cfg(cls, filename: str) -> io.StringIO:
            # Old configs compute anchor sizes with `!!python/object/apply:eval`; no setting that is checked is such.
            text = files.read_yaml(config_file(filename), remedy="check the config")
            return io.StringIO(re.sub(r"!!python/\S+", "", text))

    return Reader.load_yaml_with_base(str(path))


# key, default of the constructor, reason; a key that the overlay of these weights does not have is skipped
_MMSEG = {
    "model.pretrained": (None, "it replaces or clashes with init_cfg and loads other weights"),
    "model.backbone.depth": (None, _OTHER),
    "model.backbone.stem_channels": (64, _OTHER),
    "model.backbone.base_channels": (64, _OTHER),
    "model.backbone.style": ("pytorch", _OTHER),
    "model.backbone.deep_stem": (False, _OTHER),
    "model.backbone.avg_down": (False, _OTHER),
    "model.backbone.patch_size": (16, _OTHER),
    "model.backbone.patch_bias": (False, _OTHER),
    "model.backbone.embed_dims": (768, _OTHER),
    "model.backbone.num_layers": (12, _OTHER),
    "model.backbone.num_heads": (12, _OTHER),
    "model.backbone.norm_cfg.eps": (1e-5, _OTHER),
    "model.backbone.frozen_stages": (-1, _FROZEN),
    "model.backbone.norm_eval": (False, _FROZEN),
    "model.data_preprocessor.mean": (None, _PIXELS),
    "model.data_preprocessor.std": (None, _PIXELS),
    "model.data_preprocessor.bgr_to_rgb": (False, "the weights were trained on the other channel order"),
}


def _mmseg_rules(settings: Mapping[str, Any], backbone: Backbone) -> Iterable[Rule]:
    wanted = mmseg_overlay(backbone)
    theirs, ours = _at(settings, "model.backbone"), wanted["model"]["backbone"]
    stem = " with a deep 3×3 stem that would stay random" if theirs.get("type") in ("ResNetV1c", "ResNetV1d") else ""
    yield "model.backbone.type", None, (ours["type"],), f"another network{stem}: its weights would be skipped"
    for key, (default, reason) in _MMSEG.items():
        place, _, name = key.rpartition(".")
        if name in (_at(wanted, place) or ()):
            yield key, default, (_at(wanted, key),), reason
    prefix = ours["init_cfg"].get("prefix", "")
    yield "model.backbone.init_cfg.prefix", "", (prefix,), "no tensor of the file has the prefix asked for"
    if not backbone.is_vit:
        norms = ("SyncBN", "BN", "BN2d", "MMSyncBN")
        yield "model.backbone.norm_cfg.type", "BN", norms, "such norms do not take the weights' statistics"
        yield "model.backbone.norm_cfg.requires_grad", True, (True,), _FROZEN


def _read_mmengine(path: Path) -> Mapping[str, Any]:
    require("transfer", "mmengine")
    from mmengine.config import Config

    config = Config.fromfile(str(path))
    if not isinstance(_at(config.get("model"), "backbone"), Mapping):
        raise UserError("The config defines no model.backbone: name a whole MMSegmentation config, not a part of one.")
    preprocessor = config["model"].get("data_preprocessor") or config.get("data_preprocessor")
    return {"model": {**config["model"], "data_preprocessor": preprocessor}}


_YAML = (_read_yaml, _detectron2_rules)
_READERS = {".yaml": _YAML, ".yml": _YAML, ".py": (_read_mmengine, _mmseg_rules)}


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, str) and not isinstance(b, str) and len(a) < 200:  # yacs reads "(1.0, 2.0)" as Python's literal
        with contextlib.suppress(ValueError, SyntaxError):
            a = ast.literal_eval(a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        # A hundredth of a grey level: less than any rounding of the published means and stds, more than ours.
        with contextlib.suppress(ValueError, TypeError):  # no numbers, which do not fit
            return len(a) == len(b) and all(abs(float(x) - float(y)) <= 0.01 for x, y in zip(a, b))
    return bool(a == b)
