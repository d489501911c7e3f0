"""Detectron2's config of a run: the model zoo's, ours and the weights', and what of it is recorded."""

import copy
import functools
import json
from typing import IO, Any, ClassVar

import yaml
from detectron2.config import CfgNode, get_cfg

from twist.catalog.boxes import mask_format
from twist.catalog.data_sets import read_sample
from twist.contracts.errors import UserError
from twist.contracts.machine import cores
from twist.converters.targets.detectron2 import config_file
from twist.transfer.engines import framework
from twist.transfer.engines.detectron2 import ENGINE, vit
from twist.transfer.engines.detectron2.data import OWN_TRAIN, OWN_VAL, known_splits
from twist.transfer.engines.framework import FrameworkConfig
from twist.transfer.recipe import Schedule, Tree
from twist.transfer.request import Request, Weights

# What belongs to the weights and not to the protocol: their normalisation, channel order and stride.
_OF_THE_WEIGHTS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1")
_OF_A_VITS_WEIGHTS = tuple(f"MODEL.TWIST_VIT.{key}" for key in ("ARCHITECTURE", "IMAGE_SIZE", "VIT"))
# What one kind of backbone or of crops leaves without use.
_OF_RESNETS, _OF_VITS = ("MODEL.RESNETS", "MODEL.FPN"), ("MODEL.TWIST_VIT", "MODEL.VITDET")
_OF_RESIZING = tuple(f"INPUT.{key}" for key in ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN", "MIN_SIZE_TRAIN_SAMPLING"))
# Detectron2's global defaults that no R-CNN of ours uses, unless an override does (`transfer/overrides.py`).
_NOT_USED = (
    "GLOBAL", "INPUT.CROP", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS", "MODEL.PANOPTIC_FPN", "MODEL.RETINANET",
    "MODEL.ROI_BOX_CASCADE_HEAD", "MODEL.ROI_KEYPOINT_HEAD", "MODEL.SEM_SEG_HEAD", "TEST.KEYPOINT_OKS_SIGMAS",
    "VERSION",
)  # fmt: skip


class _Files(CfgNode):
    """Reads our YAML, whose `_BASE_` may name a file of the installed model zoo."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        return super()._open_cfg(config_file(filename))


def read_tree(tree: Any) -> CfgNode:
    """Detectron2's defaults with `tree` over them, a config as YAML has it."""
    config = get_cfg()
    vit.add_keys(config, tree)
    config.merge_from_other_cfg(CfgNode(tree))
    return config


class Detectron2Config(FrameworkConfig):
    options: ClassVar = {
        "MODEL.DEVICE": "--gpus", "MODEL.WEIGHTS": "--weights", "OUTPUT_DIR": "--output", "SEED": "--seed",
        "SOLVER.REFERENCE_WORLD_SIZE": "--gpus",
    }  # fmt: skip
    # Images, their order and what is learnt from them stay as they are; the evaluation that counts is the last one.
    harmless = (
        "CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD",
        "TEST.EXPECTED_RESULTS", "VIS_PERIOD",
    )  # fmt: skip
    schedule_keys = tuple(f"SOLVER.{key}" for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS"))
    unfrozen = "MODEL.BACKBONE.FREEZE_AT=0 and a trained norm"

    def __init__(self, request: Request, weights: Weights) -> None:
        assert weights.overlay is not None
        self._is_vit = weights.header.is_vit
        path = str(ENGINE.folder / request.protocol.config)
        self.config = read_tree(_Files.load_yaml_with_base(path, allow_unsafe=False))
        if request.protocol.scale == "sample" and request.own is None:
            sample = read_sample(request.data)
            assert sample is not None, "run.py checks the root first"
            self.config.MODEL.ROI_HEADS.NUM_CLASSES = len(sample["classes"])
        self._about = self._set_own(request) if request.own else self._set_masks(request)
        if self._is_vit:
            self._about += vit.set_weights(self.config, weights.header)
        else:
            freeze_at = self.config.MODEL.BACKBONE.FREEZE_AT
            self.config.merge_from_other_cfg(CfgNode(yaml.safe_load(weights.overlay.read_text())))
            self.config.MODEL.BACKBONE.FREEZE_AT = freeze_at  # the recipe's, and not what suits most of them
        self.reference = self.config.SOLVER.REFERENCE_WORLD_SIZE
        self.config.SOLVER.REFERENCE_WORLD_SIZE = 0  # the rule is applied here; the trainer shall not do it again

    def _set_own(self, request: Request) -> list[str]:
        """A card's classes and forms of annotation; what was chosen for them, a line each."""
        assert request.own is not None
        assert request.own.boxes is not None
        if any(name.startswith("cityscapes") for name in self.config.DATASETS.TRAIN):
            raise UserError(
                f"{request.protocol.name} is measured by Cityscapes' own evaluator, which needs its instanceIds: take "
                "coco-mrcnn-fpn-1x for masks of your own."
            )
        config, about = self.config, []
        config.DATASETS.TRAIN, config.DATASETS.TEST = (OWN_TRAIN,), (OWN_VAL,)
        config.MODEL.ROI_HEADS.NUM_CLASSES = len(request.own.classes)
        if config.MODEL.MASK_ON and not all(boxes.has_masks for boxes in request.own.boxes.values()):
            config.MODEL.MASK_ON = False
            about.append("the annotations have no masks: boxes alone are learnt and measured (MODEL.MASK_ON False)")
        for role, boxes in request.own.boxes.items():
            found = {text: count for text, count in boxes.found.items() if config.MODEL.MASK_ON or "mask" not in text}
            about += [f"{role}: {count} {text}" for text, count in found.items() if count]
        if config.MODEL.MASK_ON and any(boxes.mask_format == "bitmask" for boxes in request.own.boxes.values()):
            about += self._take_bitmasks()
        return about

    def _set_masks(self, request: Request) -> list[str]:
        """The form of masks that the training files of a data root in COCO's layout have."""
        if not self.config.MODEL.MASK_ON:
            return []
        known = known_splits()
        for name in {name.removeprefix("sample_") for name in self.config.DATASETS.TRAIN} & known.keys():
            path = known[name][0].place(request.data) / known[name][1].names
            if path.suffix == ".json" and path.is_file() and mask_format(path) == "bitmask":
                return self._take_bitmasks()
        return []

    def _take_bitmasks(self) -> list[str]:
        self.config.INPUT.MASK_FORMAT = "bitmask"
        return ["masks are run lengths and not outlines alone: they are learnt as bitmaps (INPUT.MASK_FORMAT bitmask)"]

    def about_data(self) -> list[str]:
        return list(self._about)

    def schedule(self, *, processes: int) -> Schedule:  # noqa: ARG002 (the config counts the images of all)
        solver = self.config.SOLVER
        steps = tuple(int(step) for step in solver.STEPS)
        return Schedule(solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, solver.WARMUP_ITERS, steps)

    def set_schedule(self, schedule: Schedule, *, processes: int) -> None:  # noqa: ARG002
        solver = self.config.SOLVER
        solver.IMS_PER_BATCH, solver.BASE_LR = schedule.images_per_step, schedule.learning_rate
        solver.MAX_ITER, solver.WARMUP_ITERS = schedule.iterations, schedule.warmup_iterations
        solver.STEPS = schedule.steps

    def override(self, key: str, value: Any) -> None:
        *sections, last = key.split(".")
        node = self.config
        for section in sections:
            node = node[section]
        self.config.merge_from_list([key, float(value) if isinstance(node[last], float) else value])

    def tree(self) -> Tree:
        # Through JSON, because Detectron2's YAML shares equal lists between sections.
        return json.loads(json.dumps(yaml.safe_load(self.config.dump())))

    def recipe(self, tree: Tree, processes: int) -> Tree:  # noqa: ARG002
        """`tree` without where things lie, what the machine is, what is the weights' and what nothing uses."""
        values = copy.deepcopy(tree)
        unused = (*_NOT_USED, *(() if tree["MODEL"]["MASK_ON"] else ("MODEL.ROI_MASK_HEAD",)))
        unused += (*_OF_A_VITS_WEIGHTS, *_OF_RESNETS) if self._is_vit else _OF_VITS
        unused += _OF_RESIZING if tree["INPUT"].get("LSJ_SIZE") else ()
        for name in (*self.options, *self.harmless, *_OF_THE_WEIGHTS, *unused):
            *sections, key = name.split(".")
            table = values
            for section in sections:
                table = table.get(section, {})
            table.pop(key, None)
        return values

    def is_frozen(self) -> bool:
        model = self.config.MODEL
        return model.BACKBONE.FREEZE_AT > 0 or (not self._is_vit and "Frozen" in model.RESNETS.NORM)

    def is_synchronised(self) -> bool:
        return not self._is_vit and "SyncBN" in self.config.MODEL.RESNETS.NORM

    def place(self, request: Request, weights: Weights) -> None:
        config = self.config
        config.DATALOADER.NUM_WORKERS = min(config.DATALOADER.NUM_WORKERS, cores())  # more would wait, and torch warns
        # A ViT's names could be those of the pyramid's norms, too: the engine loads them where they belong.
        config.MODEL.WEIGHTS = "" if self._is_vit else f"{weights.file}?matching_heuristics=True"
        config.SOLVER.AMP.ENABLED = bool(config.SOLVER.AMP.ENABLED and request.gpus)  # Detectron2 has it on GPUs alone
        config.MODEL.DEVICE = "cuda" if request.gpus else "cpu"
        config.OUTPUT_DIR = str(request.output)
        config.SEED = request.seed
        config.freeze()


resolve = functools.partial(framework.resolve, Detectron2Config)
