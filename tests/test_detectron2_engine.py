"""Detectron2 for real: every full protocol on trees in the real layouts, evaluators against hand and pycocotools."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_requests import QUICK_OF, EngineUser, track, value_at, weights_maker
from tiny_trees import COCO_IDS, COCO_NAMES, HEIGHT, WIDTH, make_cityscapes, make_coco, make_voc_detection

from twist.contracts.errors import UserError
from twist.contracts.weights import usual_vit
from twist.transfer.engines import framework
from twist.transfer.protocols import PROTOCOLS
from twist.transfer.request import Request

pytestmark = pytest.mark.slow
FULL = [row for row in PROTOCOLS.values() if row.engine == "detectron2" and row.scale == "full"]
# Of a pair that differs in its length alone the shorter; the frozen one is trained below.
TRAINED = [row for row in FULL if "-2x" not in row.name and "frozen" not in row.name]
QUICK = QUICK_OF["detectron2"]
LSJ = ("INPUT.LSJ_SIZE=128", "MODEL.VITDET.WINDOW=4")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("root")
    make_coco(root)
    make_voc_detection(root)
    make_cityscapes(root)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return weights_maker(tmp_path_factory.mktemp("weights"), "detectron2")


@pytest.fixture
def user(tree, weights, tmp_path) -> EngineUser:
    return EngineUser("detectron2", tree, weights, tmp_path / "run")


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_every_full_protocol_trains_two_steps_and_is_evaluated(row, user, monkeypatch) -> None:
    tracked = track(monkeypatch)
    architecture = "vit_tiny_patch16" if row.networks == ("vit",) else "resnet18"
    result = user.run(
        row.name, *QUICK, "logger=wandb", *(LSJ if "vitdet" in row.name else ()), architecture=architecture
    )
    assert list(result.metrics) == list(row.metrics)
    assert all(0 <= value <= 100 for value in result.metrics.values())
    steps = [json.loads(line) for line in result.curves.read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2]
    assert tracked == [("wandb", line["step"], line["loss"]) for line in steps]
    assert all(line["loss"] > 0 for line in steps)
    assert ("loss_mask" in steps[0]) == (row.task == "instance-segmentation")
    assert [path.name for path in result.media][-1] == "losses.png"
    assert len(result.media) >= 3
    assert list((user.output / "tensorboard").iterdir())


# What a reader of the papers would check, on the resolved configs and at the recipes' eight GPUs.
COCO = {"SOLVER.IMS_PER_BATCH": 16, "SOLVER.BASE_LR": 0.02, "SOLVER.WEIGHT_DECAY": 1e-4}
ONCE = {"SOLVER.MAX_ITER": 90000, "SOLVER.STEPS": (60000, 80000), **COCO}
TWICE = {"SOLVER.MAX_ITER": 180000, "SOLVER.STEPS": (120000, 160000), **COCO}
MOCO = {
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0, "MODEL.ROI_BOX_HEAD.NUM_FC": 2, "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NORM": "",
}  # fmt: skip
TWIST = {
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4, "MODEL.ROI_BOX_HEAD.NUM_FC": 1, "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN", "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
}  # fmt: skip
PUBLISHED = {
    "voc-frcnn-c4-24k": {
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm", "MODEL.ROI_HEADS.NUM_CLASSES": 20, "SOLVER.MAX_ITER": 24000,
        "SOLVER.STEPS": (18000, 22000), "SOLVER.WARMUP_ITERS": 100, "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000, "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
    },
    "coco-mrcnn-c4-1x": ONCE, "coco-mrcnn-c4-2x": TWICE, "coco-mrcnn-fpn-1x": ONCE | MOCO, "coco-mrcnn-fpn-2x": TWICE,
    "coco-mrcnn-fpn-infomin-1x": ONCE | TWIST, "coco-mrcnn-fpn-infomin-2x": TWICE,
    "cityscapes-mrcnn-fpn-24k": {"SOLVER.IMS_PER_BATCH": 8, "SOLVER.BASE_LR": 0.01, "MODEL.ROI_HEADS.NUM_CLASSES": 8},
}  # fmt: skip
OF_ALL = {
    "MODEL.BACKBONE.FREEZE_AT": 0, "TEST.PRECISE_BN.ENABLED": True, "INPUT.FORMAT": "RGB",
    "MODEL.RESNETS.STRIDE_IN_1X1": False, "SOLVER.AMP.ENABLED": False,
}  # fmt: skip


def test_full_recipes_are_the_published_ones(user) -> None:
    for row in FULL:
        if row.networks == ("vit",) or "frozen" in row.name:
            continue
        config = user.resolve(row.name, "keep_batch=true", architecture="resnet50").config
        for key, value in (OF_ALL | PUBLISHED.get(row.name, {})).items():
            found = value_at(config, key)
            assert (tuple(found) if isinstance(value, tuple) else found) == value, (row.name, key)
        assert config.MODEL.RESNETS.NORM in ("SyncBN", "naiveSyncBN"), row.name
    assert {row.name for row in FULL} >= PUBLISHED.keys()


@pytest.mark.parametrize(
    ("protocol", "architecture", "changed"),
    [
        ("coco-vitdet-b-100ep", "vit_base_patch16", {}),
        ("coco-vitdet-ti-640-100ep", "vit_tiny_patch16", {"embed_dim": 192, "num_heads": 3, "drop_path_rate": 0.0}),
    ],
)
def test_vitdet_is_the_zoos_lazy_config(protocol: str, architecture: str, changed: dict, user) -> None:
    """Every parameter's name and shape, and the rate and decay that it learns with."""
    from functools import partial

    from detectron2 import model_zoo
    from detectron2.config import instantiate
    from detectron2.modeling import build_model
    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

    config = user.resolve(protocol, "keep_batch=true", architecture=architecture).config
    side, decay, weight_decay = (1024, 0.7, 0.1) if "-b-" in protocol else (640, 1.0, 0.05)
    lazy = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    lazy.backbone.net.update(img_size=side, **changed)
    lazy.backbone.square_pad = side
    adamw = model_zoo.get_config("common/optim.py").AdamW
    adamw.params.lr_factor_func = partial(get_vit_lr_decay_rate, lr_decay_rate=decay, num_layers=12)
    adamw.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
    adamw.weight_decay = weight_decay
    adamw.params.model = theirs = instantiate(lazy)
    ours = build_model(config)
    assert {name: p.shape for name, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.backbone.padding_constraints == theirs.backbone.padding_constraints
    windows = [[block.window_size for block in one.backbone.net.blocks] for one in (ours, theirs)]
    assert windows[0] == windows[1] == [14, 14, 0] * 4

    def learns(model, optimizer) -> dict[str, tuple[float, float]]:
        names = {id(p): name for name, p in model.named_parameters()}
        groups = optimizer.param_groups
        return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert learns(ours, user.engine.Trainer.build_optimizer(config, ours)) == learns(theirs, instantiate(adamw))
    solver, (first, second) = config.SOLVER, config.SOLVER.STEPS
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, solver.WARMUP_ITERS) == (64, 1e-4, 184375, 250)
    assert (first * 27 // solver.MAX_ITER, round(second * 27 / solver.MAX_ITER)) in ((23, 26), (24, 26))
    assert (side, side, "RGB") == (config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST, config.INPUT.FORMAT)


def test_crops_of_jittered_scale_are_square_and_boxes_follow(user) -> None:
    from detectron2.data import DatasetCatalog

    from twist.transfer.engines.detectron2 import vit
    from twist.transfer.engines.detectron2.data import register_data

    config = user.resolve("coco-vitdet-b-100ep", *LSJ, architecture="vit_tiny_patch16").config
    register_data(user._tree, ["coco_2017_train"], sample=None)
    torch.manual_seed(0)
    np.random.seed(0)
    sizes = set()
    for _ in range(8):
        item = vit.lsj_mapper(config)(DatasetCatalog.get("coco_2017_train")[0])
        height, width = item["image"].shape[1:]
        assert max(height, width) <= 128
        sizes.add((height, width))
        for box, mask in zip(item["instances"].gt_boxes.tensor, item["instances"].gt_masks.tensor, strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert (box - torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])).abs().max() <= 1
    assert len(sizes) > 3


def test_vits_that_a_protocol_does_not_compute_are_refused(user) -> None:
    """Registers go through the frozen protocol alone, and every form of ViT meets one recipe there."""
    request, made = user.ask("coco-mrcnn-fpn-frozen-12ep", architecture="vit_tiny_patch16")
    plain = user.engine.resolve(request, made)
    registers = usual_vit("vit_tiny_patch16").model_copy(update={"registers": 4})
    held = replace(made, header=made.header.model_copy(update={"vit": registers}))
    assert user.engine.resolve(request, held).recipe == plain.recipe
    with pytest.raises(UserError, match=r"registers, .*coco-mrcnn-fpn-frozen-12ep"):
        user.engine.resolve(replace(request, protocol=PROTOCOLS["coco-vitdet-b-100ep"]), held)
    coarse = made.header.model_copy(update={"architecture": "vit_tiny_patch14", "stem": "patch14"})
    with pytest.raises(UserError, match="patches of 14 pixels"):
        user.engine.resolve(request, replace(made, header=coarse))
    with pytest.raises(UserError, match=r"vit_tiny_patch16 is no backbone of coco-mrcnn-fpn-1x: .*--list vit"):
        user.resolve("coco-mrcnn-fpn-1x", architecture="vit_tiny_patch16")


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_patch16"])
def test_a_frozen_backbone_stays_and_what_is_on_it_learns(architecture: str, user, weights) -> None:
    options = (*QUICK, "SOLVER.WARMUP_ITERS=0", "SOLVER.CHECKPOINT_PERIOD=2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.0")
    result = user.run("coco-mrcnn-fpn-frozen-12ep", *options, architecture=architecture)
    state = torch.load(user.output / "model_final.pth", weights_only=True)["model"]
    file = torch.load(weights(architecture)[0], weights_only=True)["model"]
    prefix = "backbone.net.network." if "vit" in architecture else "backbone.bottom_up."
    kept = {name: tensor for name, tensor in file.items() if not name.endswith("num_batches_tracked")}
    assert kept
    assert all(torch.equal(state[prefix + name], tensor) for name, tensor in kept.items())
    assert any("weight" in name and not name.startswith(prefix) for name in state)
    assert result.loaded == json.loads((user.output / "loaded.json").read_text())["sha256"]
    assert len(result.loaded) == 64
    if architecture == "resnet18":
        _predictions_are_the_evaluations(user)


def _predictions_are_the_evaluations(user) -> None:
    """Boxes, masks, scores and classes of a finished run, on its validation pictures given as anyone's."""
    pictures = sorted((user._tree / "coco" / "val2017").iterdir())
    drawings = user.output / "drawings"
    drawings.mkdir()
    found = user.predict(pictures, drawings)
    names = {category["id"]: category["name"] for category in found["categories"]}
    evaluated = json.loads((user.output / "inference" / "coco_instances_results.json").read_text())
    assert len(evaluated) >= 20
    known = dict(zip(COCO_IDS, COCO_NAMES, strict=True))
    paths = {image["id"]: Path(image["file_name"]) for image in found["images"]}

    def plain(one, name: str, image: int) -> tuple:
        return image, name, one["score"], *one["bbox"], one["segmentation"]["counts"]

    ours = [plain(one, names[one["category_id"]], int(paths[one["image_id"]].stem)) for one in found["annotations"]]
    theirs = [plain(one, known[one["category_id"]], one["image_id"]) for one in evaluated]
    for one, other in zip(sorted(ours), sorted(theirs), strict=True):
        assert one[:2] == other[:2]
        assert one[2:7] == pytest.approx(other[2:7], abs=1e-4)
        assert one[7] == other[7]
    assert sorted(path.stem for path in drawings.iterdir()) == [path.stem for path in pictures]


def test_ranks_with_different_weights_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="2 processes of this run began with different weights"):
        framework.agree(tmp_path, ["a", "b"], leads=True)
    assert not any(tmp_path.iterdir())


def test_the_frameworks_own_linear_rule_is_ours(user) -> None:
    from detectron2.engine import DefaultTrainer

    published = user.resolve("coco-mrcnn-fpn-1x", "keep_batch=true").config.clone()
    published.defrost()
    published.SOLVER.REFERENCE_WORLD_SIZE = 8
    resolved = user.resolve("coco-mrcnn-fpn-1x")
    theirs, ours = DefaultTrainer.auto_scale_workers(published, 1).SOLVER, resolved.config.SOLVER
    for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "WARMUP_ITERS", "STEPS"):
        assert theirs[key] == ours[key], key
    assert "linear rule" in resolved.plan
    assert not resolved.reduced  # the same images are seen


def test_extra_norm_stands_behind_res5(user) -> None:
    from detectron2.modeling import build_model

    res5 = build_model(user.resolve("voc-frcnn-c4-24k").config).roi_heads.res5
    assert [name for name, _ in res5.named_children()] == ["0", "1", "norm"]
    assert isinstance(res5.norm, torch.nn.BatchNorm2d)
    assert res5(torch.randn(2, 256, 14, 14)).shape[-1] == 7


def test_weights_that_do_not_arrive_are_found(user, weights) -> None:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from twist.transfer.engines.detectron2 import model as outcome

    file, _, _ = weights("vit_tiny_patch16")
    model = build_model(user.resolve("coco-vitdet-b-100ep", *LSJ, architecture="vit_tiny_patch16").config)
    with pytest.raises(UserError, match="did not take the weights"):
        outcome.prove_loaded(model, file)
    file, _, _ = weights("resnet18")
    model = build_model(user.resolve("voc-frcnn-c4-24k").config)
    with pytest.raises(UserError, match="did not take the weights"):
        outcome.prove_loaded(model, file)
    DetectionCheckpointer(model).load(f"{file}?matching_heuristics=True")
    outcome.prove_loaded(model, file)
    # One tensor of the file changed, and one of the file missing.
    loaded = torch.load(file, weights_only=True)
    changed = file.with_name("changed.pth")
    loaded["model"]["res5.1.conv2.weight"] += 1e-6
    torch.save(loaded, changed)
    with pytest.raises(UserError, match=r"model: 1 with other values \(first: .*res5\.1\.conv2\.weight"):
        outcome.prove_loaded(model, changed)
    del loaded["model"]["res5.1.conv2.weight"]
    torch.save(loaded, changed)
    with pytest.raises(UserError, match=r"model: 1 extra \(first: .*res5\.1\.conv2\.weight"):
        outcome.prove_loaded(model, changed)


def _worker_on_cpu(request: Request, weights: Path, dumped: str) -> None:
    """The engine's worker where Detectron2 would hand `device_ids` to a model without GPU."""
    from detectron2.engine import defaults
    from torch.nn.parallel import DistributedDataParallel

    from twist.transfer.engines.detectron2 import engine

    torch.set_num_threads(1)
    defaults.create_ddp_model = lambda model, **options: DistributedDataParallel(model, **options)
    engine._worker(request, weights, dumped)


def test_two_processes_train_and_evaluate_together(user) -> None:
    """Detectron2's launcher with two gloo ranks: MoCo's naiveSyncBN runs on CPUs, so the path can be tested here."""
    from detectron2.engine import launch

    request, made = user.ask("voc-frcnn-c4-24k", *QUICK)
    resolved = user.engine.resolve(request, made)
    launch(_worker_on_cpu, 2, dist_url="auto", args=(request, made.file, resolved.config.dump()))
    result = user.engine.collect(request, resolved)
    assert list(result.metrics) == list(request.protocol.metrics)
    assert [json.loads(line)["step"] for line in result.curves.read_text().splitlines()] == [1, 2]
    assert (user.output / "log.rank1.txt").is_file()


def test_images_that_an_annotation_file_names_must_be_there(tmp_path) -> None:
    from twist.transfer.engines.detectron2.data import count_images, register_data

    make_coco(tmp_path)
    register_data(tmp_path, ["coco_2017_val"], sample=None)
    assert count_images(["coco_2017_val"]) == {"coco_2017_val": 3}
    next((tmp_path / "coco" / "val2017").iterdir()).unlink()
    with pytest.raises(UserError, match="1 of the 3 images of coco_2017_val are not on disk"):
        count_images(["coco_2017_val"])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluators


def instances(boxes, scores, classes, masks=None):
    from detectron2.structures import Boxes, Instances

    found = Instances((HEIGHT, WIDTH))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.tensor(scores, dtype=torch.float32)
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if masks is not None:
        found.pred_masks = torch.tensor(masks, dtype=torch.bool)
    return found


def test_voc_evaluation_is_the_11_point_one(tmp_path) -> None:
    """Two aeroplanes and one difficult; found: one right, one wrong, the difficult one. Worked out by hand.

    Ranked by score: right (precision 1, recall 1/2), wrong (1/2, 1/2), difficult (neither). Eleven points: recall
    0 … 0.5 have precision 1, the rest 0: AP50 = 6/11. The area under the curve, which VOC 2012 takes, would be 1/2.
    The other 19 classes have no object and no detection: AP 0. The box is off by design at IoU .75.
    """
    from twist.transfer.engines.detectron2.data import register_data
    from twist.transfer.engines.detectron2.engine import Trainer

    folder = tmp_path / "VOC2007"
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "test.txt").write_text("a\nb\n")
    objects = {"a": [((10, 10, 50, 50), 0)], "b": [((5, 5, 45, 45), 0), ((60, 20, 90, 60), 1)]}
    for name, entries in objects.items():
        text = "".join(
            f"<object><name>aeroplane</name><pose>x</pose><truncated>0</truncated><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), difficult in entries
        )
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{text}</annotation>"
        )
    register_data(tmp_path, ["voc_2007_test"], sample=None)
    evaluator = Trainer.build_evaluator(None, "voc_2007_test")
    evaluator.reset()
    # Right at IoU .5 and .6, wrong from .65 on: 40×40 against 40×26 has IoU .65.
    evaluator.process([{"image_id": "a"}], [{"instances": instances([[10, 10, 50, 35]], [0.9], [0])}])
    found = instances([[70, 0, 90, 10], [60, 20, 90, 60]], [0.8, 0.7], [0, 0])
    evaluator.process([{"image_id": "b"}], [{"instances": found}])
    results = evaluator.evaluate()["bbox"]
    one_class = 100 * 6 / 11 / 20
    assert results["AP50"] == pytest.approx(one_class)
    assert results["AP75"] == 0
    # IoU with VOC's inclusive pixels: 41·26 / (41·41) = .634, so .50, .55 and .60 of the ten thresholds count.
    assert results["AP"] == pytest.approx(one_class * 3 / 10)


def _random_coco(file: Path) -> list[dict]:
    """Boxes and masks of all sizes in 24 images, crowds among them, and detections: near, far, tied, above 100."""
    from pycocotools import mask as rle

    rng, side = np.random.default_rng(3), 240

    def thing(image: int, box: np.ndarray) -> dict:
        x, y, w, h = (float(value) for value in box)
        mask = np.zeros((side, side), np.uint8, order="F")
        mask[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1] = 1
        mask &= rng.random((side, side)) < 0.98
        encoded = rle.encode(mask)
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        area = int(rle.area(encoded))
        return {"image_id": image, "bbox": [x, y, w, h], "segmentation": segmentation, "area": area}

    annotations, detections = [], []
    for image in range(1, 25):
        for _ in range(int(rng.integers(0, 9))):
            box = np.array([*rng.uniform(0, 110, 2), *rng.choice([9, 25, 60, 110], 2) * rng.uniform(0.7, 1.1, 2)])
            category = int(rng.choice([2, 5, 7]))
            true = {"id": len(annotations) + 1, "category_id": category, "iscrowd": int(rng.random() < 0.1)}
            annotations.append({**thing(image, box), **true})
            for _ in range(18 if image == 1 else 2):
                near = np.maximum(box + rng.normal(0, 2, 4), 1)
                seen = category if rng.random() < 0.8 else 2
                detections.append({**thing(image, near), "category_id": seen, "score": round(rng.random(), 1)})
    images = [{"id": image, "width": side, "height": side} for image in range(1, 25)]
    categories = [{"id": number, "name": str(number)} for number in (2, 5, 7)]
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))
    return detections


def test_fast_coco_evaluation_gives_every_number_of_pycocotools(tmp_path, monkeypatch) -> None:
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator

    from twist.transfer.engines.detectron2.engine import FastCocoEvaluator

    detections = _random_coco(tmp_path / "truth.json")
    numbers = {2: 0, 5: 1, 7: 2}
    meta = MetadataCatalog.get("random_coco_of_a_test")
    meta.set(json_file=str(tmp_path / "truth.json"), thing_classes=["a", "b", "c"])
    meta.set(thing_dataset_id_to_contiguous_id=numbers)
    derive, seen = COCOEvaluator._derive_coco_results, {}

    def derived(self, scores, kind, class_names=None):
        seen[type(self), kind] = type(scores), list(scores.stats), scores.eval["precision"]
        return derive(self, scores, kind, class_names)

    monkeypatch.setattr(COCOEvaluator, "_derive_coco_results", derived)
    results = []
    with contextlib.redirect_stdout(io.StringIO()):
        for evaluator in (COCOEvaluator, FastCocoEvaluator):
            one = evaluator("random_coco_of_a_test", tasks=("bbox", "segm"), use_fast_impl=False)
            one._predictions = [
                {"instances": [{**row, "category_id": numbers[row["category_id"]]} for row in detections]}
            ]
            results.append(one.evaluate())
    for kind in ("bbox", "segm"):
        assert results[0][kind] == pytest.approx(results[1][kind], abs=1e-10)
        (official, stats, precision), (fast, found, ours) = (
            seen[one, kind] for one in (COCOEvaluator, FastCocoEvaluator)
        )
        assert (official.__module__, fast.__module__) == (
            "pycocotools.cocoeval",
            "faster_coco_eval.core.faster_eval_api",
        )
        assert len(stats) == 12
        assert found[:12] == pytest.approx(stats, abs=1e-12)
        assert np.allclose(ours, precision, atol=1e-12, rtol=0)
        assert 0 < min(stats) <= stats[0] < 0.9


def test_cityscapes_evaluation_by_hand(tmp_path, monkeypatch) -> None:
    """Every car found with its exact mask, and as many again that are wrong with a higher score.

    With P true cars and as many false ones ranked above, precision at the i-th hit is i / (P + i); cityscapesScripts
    integrates with its own step rule, so the bounds are what is asserted: perfect is 100, the ranking must cost.
    """
    from twist.transfer.engines.detectron2.data import register_data
    from twist.transfer.engines.detectron2.engine import Trainer

    monkeypatch.chdir(tmp_path)
    make_cityscapes(tmp_path, size=(256, 128))
    name = "cityscapes_fine_instance_seg_val"
    register_data(tmp_path, [name], sample=None)
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from PIL import Image

    car = MetadataCatalog.get(name).thing_classes.index("car")
    scores = {}
    for wrong in (0, 1):
        evaluator = Trainer.build_evaluator(None, name)
        evaluator.reset()
        for entry in DatasetCatalog.get(name):
            truth = entry["file_name"].replace("leftImg8bit/", "gtFine/", 1)
            ids = np.asarray(Image.open(truth.replace("_leftImg8bit", "_gtFine_instanceIds")))
            masks = [ids == value for value in np.unique(ids) if value >= 1000]
            masks += [np.roll(mask, ids.shape[1] // 2, axis=1) & (ids < 1000) for mask in masks] * wrong
            values = [0.5] * (len(masks) // (1 + wrong)) + [0.9] * (len(masks) - len(masks) // (1 + wrong))
            found = instances(np.zeros((len(masks), 4)), values, [car] * len(masks), np.stack(masks))
            evaluator.process([entry], [{"instances": found}])
        with contextlib.redirect_stdout(io.StringIO()):
            scores[wrong] = evaluator.evaluate()["segm"]
    assert scores[0]["AP"] == pytest.approx(100)
    assert scores[0]["AP50"] == pytest.approx(100)
    assert 0 < scores[1]["AP50"] < 75
    assert list(tmp_path.glob("*.json")) == []  # cityscapesScripts' matches.json
