"""MMSegmentation for real: every full protocol on trees in the real layouts, its IoU against a hand-computed case."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_requests import QUICK_OF, EngineUser, track, value_at, weights_maker
from PIL import Image
from tiny_trees import make_ade20k, make_cityscapes, make_voc_segmentation

from twist.contracts.errors import UserError
from twist.contracts.weights import usual_vit
from twist.converters.targets import TARGETS
from twist.transfer.protocols import PROTOCOLS
from twist.transfer.recipe import Schedule
from twist.transfer.request import Request

pytestmark = pytest.mark.slow
FULL = [row for row in PROTOCOLS.values() if row.engine == "mmseg" and row.scale == "full"]
TRAINED = [row for row in FULL if row.name != "voc12aug-fcn-d16-30k"]  # which two processes train below
QUICK = QUICK_OF["mmseg"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_ade20k(make_cityscapes(make_voc_segmentation(tmp_path_factory.mktemp("root"))))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return weights_maker(tmp_path_factory.mktemp("weights"), "mmseg")


@pytest.fixture
def user(tree, weights, tmp_path) -> EngineUser:
    return EngineUser("mmseg", tree, weights, tmp_path / "run")


def schedule_of(config) -> Schedule:
    """On one process, without warm-up."""
    steps = tuple(config.param_scheduler[-1].get("milestones", ()))
    return Schedule(
        config.train_dataloader.batch_size, config.optim_wrapper.optimizer.lr, config.train_cfg.max_iters, 0, steps
    )


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_every_full_protocol_trains_two_steps_and_is_evaluated(row, user, monkeypatch) -> None:
    tracked = track(monkeypatch)
    slide = ("model.test_cfg.crop_size=[65, 65]", "model.test_cfg.stride=[43, 43]") if "cityscapes" in row.name else ()
    architecture = "vit_tiny_patch16" if row.networks == ("vit",) else "resnet18"
    thin = () if "d16" in row.name else ("model.auxiliary_head.channels=16",)
    result = user.run(row.name, *QUICK, "logger=wandb", *slide, *thin, architecture=architecture)
    assert list(result.metrics) == list(row.metrics)
    assert all(0 <= value <= 100 for value in result.metrics.values())
    steps = [json.loads(line) for line in result.curves.read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2]
    assert tracked == [("wandb", line["step"], line["loss"]) for line in steps]
    assert ("aux.loss_ce" in steps[0]) == (row.networks == ("vit",) or "d8" in row.name)
    assert [path.name for path in result.media][-1] == "losses.png"
    assert list(user.output.rglob("events.out.tfevents*"))


# What a reader of the papers would check, on the resolved configs and at the recipes' own batch.
OF_ALL = {
    "model.backbone.type": "ResNet",  # the deep stem of ResNetV1c takes no self-supervised stem
    "model.pretrained": None, "model.backbone.init_cfg.prefix": "backbone.", "model.backbone.norm_cfg.type": "SyncBN",
    "model.backbone.norm_eval": False,
}  # fmt: skip
D8 = {
    "model.backbone.dilations": (1, 1, 2, 4), "model.backbone.strides": (1, 2, 1, 1),
    "model.backbone.contract_dilation": True, "model.decode_head.channels": 512, "model.decode_head.num_convs": 2,
    "model.decode_head.concat_input": True, "model.decode_head.dropout_ratio": 0.1,
    "model.auxiliary_head.channels": 256, "model.auxiliary_head.loss_decode.loss_weight": 0.4,
    "optim_wrapper.optimizer.weight_decay": 5e-4, "param_scheduler.0.type": "PolyLR",
}  # fmt: skip
D16 = {
    "model.backbone.dilations": (1, 1, 1, 2), "model.backbone.strides": (1, 2, 2, 1), "model.decode_head.channels": 256,
    "model.decode_head.num_convs": 2, "model.decode_head.concat_input": False, "model.decode_head.dilation": 6,
    "model.decode_head.dropout_ratio": 0, "model.auxiliary_head": None, "optim_wrapper.optimizer.weight_decay": 1e-4,
}  # fmt: skip
PUBLISHED = {
    "voc12aug-fcn-d8-20k": (Schedule(16, 0.01, 20000, 0), {}),
    "cityscapes-fcn-d8-40k": (
        Schedule(8, 0.01, 40000, 0),
        {
            "model.test_cfg.mode": "slide", "model.test_cfg.crop_size": (769, 769),
            "model.test_cfg.stride": (513, 513), "model.decode_head.align_corners": True,
        },
    ),
    "ade20k-fcn-d8-80k": (Schedule(16, 0.01, 80000, 0), {}),
    "voc12aug-fcn-d16-30k": (Schedule(16, 0.003, 30000, 0, (21000, 27000)), {}),
    "cityscapes-fcn-d16-90k": (Schedule(16, 0.01, 90000, 0, (63000, 81000)), {}),
}  # fmt: skip


def test_full_recipes_are_the_published_ones(user) -> None:
    assert {row.name for row in FULL if row.networks != ("vit",)} == PUBLISHED.keys()
    for name, (schedule, own) in PUBLISHED.items():
        config = user.resolve(name, "keep_batch=true", architecture="resnet50").config
        assert schedule_of(config) == schedule, name
        classes = {"voc": 21, "ade": 150}.get(name[:3], 19)
        wanted = OF_ALL | (D8 if "d8" in name else D16) | own | {"model.decode_head.num_classes": classes}
        for key, value in wanted.items():
            found = value_at(config, key)
            assert (tuple(found) if isinstance(value, tuple) else found) == value, (name, key)
        types = [step.type for step in config.train_dataloader.dataset.pipeline]
        assert ("PhotoMetricDistortion" in types) == ("d8" in name)


def test_a_vit_brings_its_widths_and_the_recipe_the_rest(user) -> None:
    """Warm-up, drop path and blocks are the recipe's; a ViT of another form meets the same recipe hash."""
    resolved = user.resolve("ade20k-upernet-vit-160k", "keep_batch=true", architecture="vit_small_patch16")
    model, policies = resolved.config.model, resolved.config.param_scheduler
    assert (model.decode_head.num_classes, list(model.neck.in_channels)) == (150, [384] * 4)
    assert (list(model.decode_head.in_channels), model.auxiliary_head.in_channels) == ([384] * 4, 384)
    assert (model.backbone.drop_path_rate, tuple(model.backbone.out_indices)) == (0.1, (2, 5, 8, 11))
    assert (policies[0].end, policies[1].begin, policies[1].end) == (1500, 1500, 160000)
    assert resolved.config.optim_wrapper.optimizer.lr == 6e-5
    assert not resolved.reduced
    ruled = user.resolve("ade20k-upernet-vit-160k", architecture="vit_small_patch16").config  # one process of eight
    assert (ruled.param_scheduler[0].end, ruled.param_scheduler[1].begin) == (12000, 12000)
    assert ruled.optim_wrapper.optimizer.lr == pytest.approx(7.5e-6)
    request, made = user.ask("ade20k-upernet-vit-160k", "keep_batch=true", architecture="vit_small_patch16")
    vit = usual_vit("vit_small_patch16").model_copy(update={"resize": "plain"})  # MMSegmentation's own backbone
    header = made.header.model_copy(update={"vit": vit})
    overlay = made.overlay.with_name("plain.py")
    overlay.write_text(next(iter(TARGETS["mmseg"].settings(header).values())))
    other = user.engine.resolve(request, replace(made, header=header, overlay=overlay))
    assert {model.backbone.type, other.config.model.backbone.type} == {"TwistVisionTransformer", "VisionTransformer"}
    assert other.recipe == resolved.recipe


def test_whole_images_of_any_size_go_through_a_vit() -> None:
    from mmseg.registry import MODELS

    from twist.integrations import mmseg as _registered  # noqa: F401

    backbone = MODELS.build({"type": "TwistVisionTransformer", "architecture": "vit_tiny_patch16"}).eval()
    image = torch.rand(1, 3, 33, 47)
    whole = torch.nn.functional.pad(image, (0, 1, 0, 15))
    assert torch.equal(backbone(image)[0], backbone(whole)[0])
    assert backbone(image)[0].shape == (1, 192, 3, 3)


def test_linear_rule_on_one_process(user) -> None:
    resolved = user.resolve("voc12aug-fcn-d8-20k")
    model = resolved.config.model
    assert (model.decode_head.in_channels, model.auxiliary_head.in_channels) == (512, 256), "of a ResNet-18"
    assert schedule_of(resolved.config) == Schedule(4, 0.0025, 80000, 0)
    policy = resolved.config.param_scheduler[0]
    assert (policy.end, policy.eta_min) == (80000, pytest.approx(2.5e-5))
    assert "linear rule" in resolved.plan
    assert not resolved.reduced
    step = user.resolve("voc12aug-fcn-d16-30k").config.param_scheduler[0]
    assert list(step.milestones) == [42000, 54000]


def test_the_last_checkpoint_is_the_folders_own(tmp_path: Path) -> None:
    """mmengine notes a whole path; a folder that was moved or copied would evaluate another run's weights."""
    from twist.transfer.engines.mmseg import engine

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    assert engine.last_checkpoint(here) is None
    (here / "iter_4.pth").write_bytes(b"mine")
    (here / "last_checkpoint").write_text(str(here / "iter_4.pth"))
    here.rename(there)
    here.mkdir()
    (here / "iter_4.pth").write_bytes(b"another run's")
    assert engine.last_checkpoint(there) == there / "iter_4.pth"
    (there / "iter_4.pth").unlink()
    with pytest.raises(UserError, match=r"there holds no iter_4\.pth, its newest checkpoint"):
        engine.last_checkpoint(there)


def test_a_loss_that_is_no_number_ends_the_run(user) -> None:
    with pytest.raises(UserError, match="lower the learning rate"):
        user.run("voc12aug-fcn-d8-20k", *QUICK, "iterations=2", "optim_wrapper.optimizer.lr=1e30")


def test_a_policy_that_ends_before_the_run_is_another_protocol(user) -> None:
    early = user.resolve("voc12aug-fcn-d8-20k", "keep_batch=true", "param_scheduler.0.end=10000")
    assert early.reduced
    assert "the rate's policy ends at iteration 10000 of 20000, and in the protocol with the run" in early.notes


def test_weights_that_do_not_arrive_are_found(user, weights) -> None:
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    from twist.transfer.engines.mmseg import engine as outcome

    register_all_modules(init_default_scope=False)
    init_default_scope("mmseg")
    file, _, _ = weights("resnet18")
    config = user.resolve("voc12aug-fcn-d8-20k").config
    backbone = MODELS.build(config.model.backbone)
    with pytest.raises(UserError, match="did not take the weights"):
        outcome.prove_loaded(backbone, file)
    backbone.init_weights()
    outcome.prove_loaded(backbone, file)
    # The trap of the field: the deep-stem network takes what fits of a plain stem's weights, and says little.
    settings = {k: v for k, v in config.model.backbone.items() if k not in ("deep_stem", "avg_down")}
    deep = MODELS.build({**settings, "type": "ResNetV1c"})
    deep.init_weights()
    with pytest.raises(UserError, match=r"extra \(first: .*left at random"):
        outcome.prove_loaded(deep, file)


def _predictions_have_the_evaluations_iou(user, miou: float) -> None:
    """Masks of a finished run for its validation pictures, given as anyone's, against the data set's own."""
    voc = next(user._tree.rglob("VOC2012"))
    names = (voc / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    drawings = user.output / "drawings"
    drawings.mkdir()
    found = user.predict([voc / "JPEGImages" / f"{name}.jpg" for name in names], drawings)
    assert (len(found["classes"]), found["classes"][15]) == (21, "person")
    counts = np.zeros((21, 21), np.int64)
    for name in names:
        truth = np.asarray(Image.open(voc / "SegmentationClass" / f"{name}.png"))
        with Image.open(drawings / f"{name}.png") as mask:
            assert mask.getpalette()[: 21 * 3] == [value for colour in found["palette"] for value in colour]
            np.add.at(counts, (truth[truth < 255], np.asarray(mask)[truth < 255]), 1)
        assert (drawings / f"{name}-drawn.png").is_file()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    assert 100 * np.mean(counts.diagonal()[union > 0] / union[union > 0]) == pytest.approx(miou, abs=0.02)


def _worker_on_cpu(local_rank: int, request: Request, weights: Path, address: str) -> None:
    """The engine's worker with what CPUs have in place of SyncBN; leaves what a rank saw and what it ended with."""
    from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm

    from twist.pretrain.distributed import synchronise
    from twist.transfer.engines.mmseg import engine

    torch.set_num_threads(1)
    runners, seen = [], []

    def wrap(self, _config, model):
        runners.append(self)
        return MMDistributedDataParallel(synchronise(revert_sync_batchnorm(model)))

    class Watch(engine._Watch):
        def after_train_iter(self, runner, *, data_batch, **more) -> None:
            seen.extend(sample.img_path for sample in data_batch["data_samples"])
            super().after_train_iter(runner, **more)

    torch.cuda.set_device = lambda _: None  # mmengine's launcher takes for granted that there is one
    engine._Runner.wrap_model = wrap
    engine._Watch = Watch
    engine._worker(local_rank, request, weights, address)
    state = runners[0].model.module.state_dict()
    torch.save({"seen": seen, "state": state}, request.output / f"ended.rank{local_rank}.pth")


def test_two_processes_train_and_evaluate_together(user) -> None:
    """Two gloo ranks: different images, one network at the end, and one IoU over all images, each counted once.

    Three images do not divide over two ranks, so the metric must drop the one that the sampler repeats.
    """
    request, made = user.ask("voc12aug-fcn-d16-30k", *QUICK)
    resolved = user.engine.resolve(request, made)
    config = user.resolve("voc12aug-fcn-d16-30k", *QUICK).config
    config.launcher = "pytorch"
    config.dump(user.output / "config.py")
    address = f"127.0.0.1:{user.engine.get_free_port()}"
    # Processes are counted by GPUs, and there are none.
    both = replace(request, controls=request.controls.model_copy(update={"nodes": 2}))
    torch.multiprocessing.start_processes(_worker_on_cpu, args=(both, made.file, address), nprocs=2)
    together = user.engine.collect(request, resolved)
    ranks = [torch.load(user.output / f"ended.rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert [len(rank["seen"]) for rank in ranks] == [4, 4]
    assert ranks[0]["seen"] != ranks[1]["seen"]
    moved = torch.load(made.file, weights_only=True)["state_dict"]
    for name, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][name]), name
        if name in moved and name.endswith(("running_var", "conv1.weight")):
            assert not torch.equal(value, moved[name]), f"{name} was not trained"
    assert [json.loads(line)["step"] for line in together.curves.read_text().splitlines()] == [1, 2]
    assert user.run("voc12aug-fcn-d16-30k", *QUICK, eval_only=True).metrics == together.metrics
    _predictions_have_the_evaluations_iou(user, together.metrics["miou_percent"])


def test_iou_by_hand(user) -> None:
    """Four pixels of class 0, four of 1, one ignored; one pixel of class 1 is called 0.

    IoU of class 0: 4/5, of class 1: 3/4; the third class is in neither and counts for nothing. mIoU 77.5, mAcc
    (1 + 3/4) / 2 = 87.5, aAcc 7/8 = 87.5.
    """
    from mmseg.registry import METRICS
    from mmseg.utils import register_all_modules

    from twist.transfer.engines.mmseg import engine as outcome

    register_all_modules(init_default_scope=False)
    config = user.resolve("voc12aug-fcn-d8-20k").config
    metric = METRICS.build({**config.val_evaluator, "_scope_": "mmseg"})
    metric.dataset_meta = {"classes": ("a", "b", "c")}
    truth = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 1, 255]])
    found = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1]])
    sample = {"pred_sem_seg": {"data": found[None]}, "gt_sem_seg": {"data": truth[None]}}
    metric.process({}, [sample])
    assert outcome.metrics_of(metric.evaluate(size=1)) == {
        "miou_percent": 77.5,
        "macc_percent": 87.5,
        "aacc_percent": 87.5,
    }
