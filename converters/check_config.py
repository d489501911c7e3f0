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
from twist.contracts.errors import UsageError, UserError, printable
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


# Characters of a value that is a number or a few.
_LONGEST_LITERAL = 200
# A setting's key, the framework's default, the values that fit (the first is recommended), and why others do not.
Rule = tuple[str, Any, tuple[Any, ...], str]


def check_config(config: Path, weights: Path, **reading: Unpack[Reading]) -> list[Mismatch]:
    """Every setting of `config` that does not fit `weights` (any checkpoint); empty when all do.

    Raises:
        UserError: a file is missing or not readable. UsageError: the config is neither .yaml nor .py.
    """
    config = Path(config)
    if not config.is_file():
        raise UserError(f"There is no config at {config}: check the path.")
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
    if not mismatches:
        return "The config fits the weights."
    return printable("\n".join(f"{m.key} is {m.found!r}, should be {m.wanted!r}: {m.reason}" for m in mismatches))


# ---- Detectron2 ------------------------------------------------------------------------------------------------------

_SKIPPED = "another network: its weights would be skipped with a warning"
# key, default of a YAML that does not say (detectron2 config/defaults.py, v2), reason
_DETECTRON2 = (
    ("INPUT.FORMAT", "BGR", "the weights were trained on the other channel order"),
    ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "each channel would be shifted"),
    ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "the input would have another scale"),
    ("MODEL.RESNETS.STRIDE_IN_1X1", True, "the stride would move to the other convolution and the features with it"),
    ("MODEL.RESNETS.DEPTH", 50, _SKIPPED),
    ("MODEL.RESNETS.NUM_GROUPS", 1, _SKIPPED),
    ("MODEL.RESNETS.WIDTH_PER_GROUP", 64, _SKIPPED),
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, _SKIPPED),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", 256, _SKIPPED),
    ("MODEL.BACKBONE.FREEZE_AT", 2, "frozen stages keep self-supervised statistics that do not fit detection's crops"),
)


def _detectron2_rules(settings: Mapping[str, Any], backbone: Backbone) -> Iterable[Rule]:
    if backbone.is_vit:
        raise UserError(
            "Detectron2 builds plain ViTs from lazy configs (.py), not from YAML: use the overlay.py that the "
            "conversion writes."
        )
    wanted = detectron2_overlay(backbone)
    yield from ((key, default, (_at(wanted, key),), reason) for key, default, reason in _DETECTRON2)
    norms = ("SyncBN", "BN", "naiveSyncBN", "naiveSyncBN_N")
    reason = "frozen norms with self-supervised weights lose points or diverge, others do not take their statistics"
    yield "MODEL.RESNETS.NORM", "FrozenBN", norms, reason
    own_backbone = _at(settings, "MODEL.BACKBONE.NAME") not in (None, "build_resnet_backbone")
    if not own_backbone and _at(settings, "MODEL.ROI_HEADS.NAME") in (None, "Res5ROIHeads"):
        reason = (
            "the C4 recipe of MoCo puts a norm after res5, without it the unnormalised features diverge "
            "(`import twist.transfer.engines.detectron2.model` registers it)"
        )
        yield "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", ("Res5ROIHeadsExtraNorm",), reason
    if str(_at(settings, "MODEL.WEIGHTS")).startswith("detectron2://ImageNetPretrained"):
        yield "MODEL.WEIGHTS", "", ("weights.pth",), "these are supervised weights; name the converted file"


# Of lists in lists; of `*name`, which Detectron2's own configs do not have.
_MOST_DEPTH, _MOST_ALIASES = 64, 20


def _read_yaml(path: Path) -> Mapping[str, Any]:
    """A Detectron2 YAML over its `_BASE_` chain, by fvcore's reader. Tags that would run code are left out."""
    from fvcore.common.config import CfgNode

    class Reader(CfgNode):
        @classmethod
        def _open_cfg(cls, filename: str) -> io.StringIO:
            # Old configs compute anchor sizes with `!!python/object/apply:eval`; no setting that is checked is such.
            text = files.read_text(config_file(filename), remedy="check the config")
            depth = 0
            for bracket in re.findall(r"[\[\]{}]", text):
                depth += 1 if bracket in "[{" else -1
                if depth > _MOST_DEPTH:
                    raise UserError(f"{filename} is nested too deeply: check the config.")
            # Copies of copies: eleven lists of ten aliases are 10**11 values once they are written out.
            if len(re.findall(r"(?<![\w*])\*\w", text)) > _MOST_ALIASES:
                raise UserError(f"{filename} repeats parts by more than {_MOST_ALIASES} aliases: write them out.")
            return io.StringIO(re.sub(r"!!python/\S+", "", text))

    return Reader.load_yaml_with_base(str(path))


# ---- MMSegmentation --------------------------------------------------------------------------------------------------

_OTHER = "another network than the weights'"
_FROZEN = "frozen with self-supervised weights loses points"
# key, default of the constructor, reason; a key that the overlay of these weights does not have is skipped
_MMSEG = (
    ("model.pretrained", None, "it replaces or clashes with init_cfg and loads other weights"),
    ("model.backbone.depth", None, _OTHER),
    ("model.backbone.stem_channels", 64, _OTHER),
    ("model.backbone.base_channels", 64, _OTHER),
    ("model.backbone.style", "pytorch", _OTHER),
    ("model.backbone.deep_stem", False, _OTHER),
    ("model.backbone.avg_down", False, _OTHER),
    ("model.backbone.patch_size", 16, _OTHER),
    ("model.backbone.patch_bias", False, _OTHER),
    ("model.backbone.embed_dims", 768, _OTHER),
    ("model.backbone.num_layers", 12, _OTHER),
    ("model.backbone.num_heads", 12, _OTHER),
    ("model.backbone.norm_cfg.eps", 1e-5, _OTHER),
    ("model.backbone.frozen_stages", -1, _FROZEN),
    ("model.backbone.norm_eval", False, _FROZEN),
    ("model.data_preprocessor.mean", None, "the weights were trained on other pixels"),
    ("model.data_preprocessor.std", None, "the weights were trained on other pixels"),
    ("model.data_preprocessor.bgr_to_rgb", False, "the weights were trained on the other channel order"),
)


def _mmseg_rules(settings: Mapping[str, Any], backbone: Backbone) -> Iterable[Rule]:
    wanted = mmseg_overlay(backbone)
    theirs, ours = _at(settings, "model.backbone"), wanted["model"]["backbone"]
    stem = " with a deep 3×3 stem that would stay random" if theirs.get("type") in ("ResNetV1c", "ResNetV1d") else ""
    yield "model.backbone.type", None, (ours["type"],), f"another network{stem}: its weights would be skipped"
    for key, default, reason in _MMSEG:
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
    try:
        from mmengine.config import Config
    except ImportError:
        raise UserError(
            "Reading an MMSegmentation config needs mmengine: pip install onedl-mmengine (or twist-suite[transfer])."
        ) from None
    config = Config.fromfile(str(path))
    if not isinstance(_at(config.get("model"), "backbone"), Mapping):
        raise UserError("The config defines no model.backbone: name a whole MMSegmentation config, not a part of one.")
    preprocessor = config["model"].get("data_preprocessor") or config.get("data_preprocessor")
    return {"model": {**config["model"], "data_preprocessor": preprocessor}}


_READERS = {
    ".yaml": (_read_yaml, _detectron2_rules),
    ".yml": (_read_yaml, _detectron2_rules),
    ".py": (_read_mmengine, _mmseg_rules),
}


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _same(a: Any, b: Any) -> bool:
    # yacs reads "(1.0, 2.0)" and "True" as Python's literals; Python's parser fails on long ones in ways of its own.
    if isinstance(a, str) and not isinstance(b, str) and len(a) < _LONGEST_LITERAL:
        with contextlib.suppress(ValueError, SyntaxError):
            a = ast.literal_eval(a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        # A hundredth of a grey level: less than any rounding of the published means and stds, more than ours.
        with contextlib.suppress(ValueError, TypeError, OverflowError):  # no numbers, which do not fit
            return len(a) == len(b) and all(abs(float(x) - float(y)) <= 0.01 for x, y in zip(a, b))
        return False
    return bool(a == b)
