"""MMSegmentation's config of a run: the installed one, ours and the weights', and what of it is recorded."""

import functools
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import mmseg
from mmcv.transforms import BaseTransform
from mmengine.config import Config, ConfigDict
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS

from twist.catalog.card import Segmentation
from twist.catalog.card_data import CardData
from twist.catalog.data_sets import find_data_set, read_sample
from twist.catalog.masks import read_mask
from twist.contracts.errors import UsageError, UserError
from twist.contracts.machine import cores
from twist.contracts.weights import Backbone
from twist.transfer.engines import framework
from twist.transfer.engines.framework import FrameworkConfig
from twist.transfer.engines.mmseg import ENGINE
from twist.transfer.recipe import TOLERANCE, Schedule, Tree
from twist.transfer.request import Request, Weights

# Where the installed MMSegmentation keeps its own configs; ours name it in `_base_` through this variable.
BASES_VARIABLE = "MMSEG_CONFIGS"
# Of a model and its backbone, what belongs to the weights and not to the protocol.
_OF_THE_WEIGHTS = ("data_preprocessor", "pretrained")
_OF_A_BACKBONE = ("init_cfg", "pretrained", "style")
# Of a ViT, what belongs to the protocol: all else describes the weights.
_OF_THE_RECIPE = ("drop_path_rate", "final_norm", "out_indices")


@DATASETS.register_module(force=True)
class OwnSegDataset(BaseSegDataset):
    """A data card's pairs of picture and mask, from the list `ann_file` in the run folder."""

    def load_data_list(self) -> list[dict[str, Any]]:
        pairs = json.loads(Path(self.ann_file).read_text(encoding="utf-8"))
        fixed: dict[str, Any] = {"label_map": None, "reduce_zero_label": False}
        return [{"img_path": image, "seg_map_path": mask, **fixed, "seg_fields": []} for image, mask in pairs]


@TRANSFORMS.register_module(force=True)
class LoadOwnMask(BaseTransform):
    """Sets `gt_seg_map` (H, W) uint8: classes as the card's `section` numbers them, 255 for none."""

    def __init__(self, section: dict[str, Any]) -> None:
        self.section = Segmentation.model_validate(section)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["gt_seg_map"] = read_mask(Path(results["seg_map_path"]), self.section)
        results["seg_fields"].append("gt_seg_map")
        return results


class MMSegConfig(FrameworkConfig):
    options: ClassVar = {
        "*_dataloader.dataset.data_root": "--data", "data_root": "--data", "load_from": "--weights",
        "model.backbone.init_cfg": "--weights", "model.pretrained": "--weights", "resume": "--resume",
    }  # fmt: skip
    # The evaluation that counts is the one at the end.
    harmless = (
        "*_dataloader.num_workers", "*_dataloader.persistent_workers", "default_hooks.checkpoint.interval",
        "default_hooks.checkpoint.max_keep_ckpts", "default_hooks.logger.interval", "env_cfg", "log_level",
        "train_cfg.val_interval", "vis_backends", "visualizer",
    )  # fmt: skip
    # The policies' places in the run follow its length and rate.
    schedule_keys = (
        "train_dataloader.batch_size", "train_cfg.max_iters", "optim_wrapper.optimizer.lr",
        *(f"param_scheduler.*.{place}" for place in ("begin", "end", "eta_min", "milestones")),
    )  # fmt: skip
    unfrozen = "model.backbone.norm_eval=false and frozen_stages=-1"
    copied = ("optimizer", "train_pipeline", "test_pipeline", "tta_pipeline", "tta_model", "crop_size")

    def __init__(self, request: Request, weights: Weights) -> None:
        os.environ[BASES_VARIABLE] = str(Path(mmseg.__file__).parent / ".mim" / "configs")
        config = self.config = Config.fromfile(ENGINE.folder / request.protocol.config)
        self._is_vit = weights.header.is_vit
        drop_path = config.model.backbone.get("drop_path_rate")  # the overlay replaces a ViT's whole section
        config.merge_from_dict(Config.fromfile(weights.overlay)._to_lazy_dict())
        config.model.pretrained = None
        config.model.backbone.init_cfg.checkpoint = str(weights.file)
        self.reference = request.protocol.gpus
        self._heads = [h for h in (config.model.decode_head, config.model.auxiliary_head) if h is not None]
        if self._is_vit:
            config.model.backbone.drop_path_rate = drop_path
        self._fit_heads(weights.header)
        classes = self._set_own(request.own, request.output) if request.own else self._set_data(request)
        for head in self._heads if classes else ():
            head.num_classes = len(classes)

    def _fit_heads(self, backbone: Backbone) -> None:
        """Heads take what this backbone gives: the stock configs are written for ViT-B and bottlenecks of width 1."""
        if backbone.is_vit:
            width = backbone.transformer.embed_dim
            self.config.model.neck.update(in_channels=[width] * 4, out_channels=width)
            for head in self._heads:
                head.in_channels = [width] * 4 if isinstance(head.in_index, list) else width
            return
        expansion = 1 if backbone.architecture in ("resnet18", "resnet34") else 4
        for head in self._heads:
            head.in_channels = 64 * 2**head.in_index * expansion * backbone.width

    def _set_data(self, request: Request) -> tuple[str, ...]:
        """Where the data lie; classes and files too, unless MMSegmentation's own dataset class knows those."""
        sample, row = read_sample(request.data), find_data_set(request.protocol.data[0])
        splits: dict[str, Any] = {split.role: split for split in row.run_splits().values() if "masks" in split.truth}
        classes: Any = ()
        for loader, role in zip(self._loaders, ("train", "val", "val"), strict=True):
            dataset, images, masks = loader.dataset, splits[role].images, splits[role].truth["masks"]
            dataset.data_root = str(row.place(request.data))
            plain = dataset.type == "BaseSegDataset"
            if plain:
                folders = {"img_path": images.folder, "seg_map_path": masks.folder}
                dataset.update({"data_prefix": folders, "ann_file": splits[role].names})
            # A sample's classes are none of the data set's, and MMSegmentation's own classes insist on their names.
            elif sample is None or not row.classes_of_sample:
                continue
            classes = row.label_names(sample)
            if not isinstance(classes, tuple):
                raise UserError(f"{row.name} has no names of classes: write them into its row of data_sets.toml.")
            form: dict[str, Any] = {"img_suffix": images.suffix, "seg_map_suffix": masks.suffix}
            form |= {"reduce_zero_label": row.reduce_zero_label, "metainfo": {"classes": list(classes)}}
            dataset.update({"type": "BaseSegDataset", **form})
        return classes

    def _set_own(self, own: CardData, output: Path) -> tuple[str, ...]:
        assert own.card.segmentation is not None
        load = {"type": "LoadOwnMask", "section": own.card.segmentation.model_dump(mode="json")}
        for loader, role in zip(self._loaders, ("train", "val", "val"), strict=True):
            steps = [load if step["type"] == "LoadAnnotations" else step for step in loader.dataset.pipeline]
            written = str(output / "data" / f"own_{role}.json")
            own_set = {"type": "OwnSegDataset", "ann_file": written, "metainfo": {"classes": list(own.classes)}}
            loader.dataset = ConfigDict({**own_set, "pipeline": steps})
        return own.classes

    @property
    def _loaders(self) -> list[Any]:  # an override replaces them
        return [self.config[f"{part}_dataloader"] for part in ("train", "val", "test")]

    def nested(self) -> Any:
        return self.config._cfg_dict

    def schedule(self, *, processes: int) -> Schedule:
        config = self.config
        return Schedule(
            images_per_step=config.train_dataloader.batch_size * processes,
            learning_rate=config.optim_wrapper.optimizer.lr,
            iterations=config.train_cfg.max_iters,
            warmup_iterations=sum(policy.end for policy in config.param_scheduler[:-1]),
            steps=tuple(config.param_scheduler[-1].get("milestones", ())),
        )

    def set_schedule(self, schedule: Schedule, *, processes: int) -> None:
        if schedule.images_per_step % processes:
            raise UsageError(f"{schedule.images_per_step} images a step do not divide over {processes} processes.")
        config = self.config
        *warm_ups, policy = config.param_scheduler
        for one in warm_ups:
            one.end = policy.begin = schedule.warmup_iterations
        if not schedule.warmup_iterations:  # mmengine refuses one of no length
            config.param_scheduler = [policy]
        if "eta_min" in policy:  # a learning rate too
            policy.eta_min *= schedule.learning_rate / config.optim_wrapper.optimizer.lr
        config.train_dataloader.batch_size = schedule.images_per_step // processes
        config.optim_wrapper.optimizer.lr = schedule.learning_rate
        config.train_cfg.max_iters = config.train_cfg.val_interval = policy.end = schedule.iterations
        if schedule.steps:
            policy.milestones = list(schedule.steps)

    def override(self, key: str, value: Any) -> None:
        self.config.merge_from_dict({key: value}, allow_list_keys=True)

    def tree(self) -> Tree:
        return json.loads(json.dumps(self.config.to_dict()))

    def recipe(self, tree: Tree, processes: int) -> Tree:
        model = {key: value for key, value in tree["model"].items() if key not in _OF_THE_WEIGHTS}
        kept = _OF_THE_RECIPE if self._is_vit else model["backbone"].keys() - set(_OF_A_BACKBONE)
        model["backbone"] = {key: value for key, value in model["backbone"].items() if key in kept}

        def data(loader: str) -> Tree:
            one = tree[loader]["dataset"]
            # Of a card the run's record has a digest, and paths are no part of a recipe.
            own = one["type"] == "OwnSegDataset"
            place = {} if own else {"prefix": one["data_prefix"], "list": one.get("ann_file", "")}
            return {"pipeline": one["pipeline"], **place}

        return {
            "model": model,
            "images_per_step": tree["train_dataloader"]["batch_size"] * processes,
            "iterations": tree["train_cfg"]["max_iters"],
            "optim_wrapper": tree["optim_wrapper"],
            "param_scheduler": tree["param_scheduler"],
            "train": data("train_dataloader"),
            "test": data("val_dataloader"),
        }

    def is_frozen(self) -> bool:
        backbone = self.config.model.backbone
        return backbone.get("norm_eval") or backbone.get("frozen_stages", -1) >= 0

    def is_synchronised(self) -> bool:
        return any(head.norm_cfg.type == "SyncBN" for head in self._heads)

    def more_departures(self) -> list[str]:
        end, last = self.config.param_scheduler[-1].end, self.config.train_cfg.max_iters
        if abs(end / last - 1) <= TOLERANCE:
            return []
        return [f"the rate's policy ends at iteration {end} of {last}, and in the protocol with the run"]

    def place(self, request: Request, weights: Weights) -> None:  # noqa: ARG002 (the overlay holds them)
        config = self.config
        for loader in self._loaders:
            loader.num_workers = min(loader.num_workers, cores())  # more would wait for each other, and torch warns
            loader.persistent_workers = loader.num_workers > 0  # torch refuses the one without the other
        config.work_dir = str(request.output)
        config.launcher = "pytorch" if request.processes > 1 else "none"
        # mmengine keeps loggers and writers by name for the whole process: a suite's next run must not get this one's.
        config.experiment_name = config.visualizer.name = str(request.output).strip("/").replace("/", "-")
        config.randomness = {"seed": request.seed}
        config.env_cfg.dist_cfg = {"backend": "nccl" if request.gpus else "gloo"}
        config.device = "cuda" if request.gpus else "cpu"
        config.default_hooks.logger.interval = max(1, min(20, config.train_cfg.max_iters // 50))
        config.resume = request.resume


resolve = functools.partial(framework.resolve, MMSegConfig)
