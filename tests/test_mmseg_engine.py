"""MMSegmentation for real: every full protocol on trees in the real layouts, its IoU against a hand-computed case."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_requests import committed, own_part, request_maker, sample_root, sweep, weights_maker
from tiny_trees import make_cityscapes, make_voc_segmentation

from twist.contracts.errors import UsageError, UserError
from twist.transfer.protocols import PROTOCOLS
from twist.transfer.request import Request
from twist.transfer.scaling import Schedule

pytestmark = pytest.mark.slow
FULL = [row for row in PROTOCOLS.values() if row.engine == "mmseg" and row.scale == "full"]
# Two steps on two crops of 65 pixels; model, losses, pipelines and metric are the protocol's.
QUICK = (
    "iterations=2",
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "train_dataloader.dataset.pipeline.2.scale=[128, 80]",
    "train_dataloader.dataset.pipeline.3.crop_size=[65, 65]",
    "model.data_preprocessor.size=[65, 65]",
    "val_dataloader.dataset.pipeline.1.scale=[128, 80]",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_cityscapes(make_voc_segmentation(tmp_path_factory.mktemp("root")))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from twist.converters.targets import mmseg

    return weights_maker(tmp_path_factory.mktemp("weights"), mmseg, suffix=".py")


@pytest.fixture
def request_of(tree, weights, tmp_path):
    torch.set_num_threads(1)
    return request_maker(tree, weights, tmp_path / "run")


@pytest.mark.parametrize("row", FULL, ids=lambda row: row.name)
def test_every_full_protocol_trains_two_steps_and_is_evaluated(row, request_of) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    slide = ("model.test_cfg.crop_size=[65, 65]", "model.test_cfg.stride=[43, 43]") if "cityscapes" in row.name else ()
    architecture = "resnet50" if row.name == "voc12aug-fcn-d8-20k" else "resnet18"
    request = request_of(row.name, *QUICK, *slide, architecture=architecture)
    result = engine.run(request, engine.resolve(request))
    assert list(result.metrics) == list(row.metrics)
    assert all(0 <= value <= 100 for value in result.metrics.values())
    steps = [json.loads(line) for line in result.curves.read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2]
    assert ("aux.loss_ce" in steps[0]) == ("d8" in row.name)
    assert [path.name for path in result.media][-1] == "losses.png"
    assert all(path.stat().st_size < 200_000 for path in result.media)
    assert (request.output / "log.txt").is_file()
    assert list(request.output.rglob("events.out.tfevents*"))
    json.dumps(result.recipe)


def test_full_recipes_are_the_published_ones(request_of) -> None:
    """What a reader of the papers would check, on the resolved configs and at the recipes' own batch."""
    from twist.transfer.engines.mmseg import config as module
    from twist.transfer.engines.mmseg import engine as engine

    def config(protocol: str):
        return engine.resolve(request_of(protocol, "keep_batch=true", architecture="resnet50")).config

    for row in FULL:
        resolved = config(row.name)
        backbone = resolved.model.backbone
        assert backbone.type == "ResNet", "the deep stem of ResNetV1c takes no self-supervised stem"
        assert resolved.model.pretrained is None
        assert backbone.init_cfg.prefix == "backbone."
        assert backbone.norm_cfg.type == "SyncBN"
        assert not backbone.norm_eval
        assert resolved.model.decode_head.num_classes == (21 if "voc" in row.name else 19)
        head = resolved.model.decode_head
        if "d8" in row.name:
            assert (tuple(backbone.dilations), tuple(backbone.strides)) == ((1, 1, 2, 4), (1, 2, 1, 1))
            assert backbone.contract_dilation
            assert (head.channels, head.num_convs, head.concat_input, head.dropout_ratio) == (512, 2, True, 0.1)
            assert (resolved.model.auxiliary_head.channels, resolved.model.auxiliary_head.loss_decode.loss_weight) == (
                256,
                0.4,
            )
            assert resolved.optim_wrapper.optimizer.weight_decay == 5e-4
            assert resolved.param_scheduler[0].type == "PolyLR"
        else:
            assert (tuple(backbone.dilations), tuple(backbone.strides)) == ((1, 1, 1, 2), (1, 2, 2, 1))
            assert (head.channels, head.num_convs, head.concat_input, head.dilation) == (256, 2, False, 6)
            assert head.dropout_ratio == 0
            assert resolved.model.auxiliary_head is None
            assert resolved.optim_wrapper.optimizer.weight_decay == 1e-4
            types = [step.type for step in resolved.train_dataloader.dataset.pipeline]
            assert "PhotoMetricDistortion" not in types
    facts = {
        "voc12aug-fcn-d8-20k": Schedule(16, 0.01, 20000, 0),
        "cityscapes-fcn-d8-40k": Schedule(8, 0.01, 40000, 0),
        "voc12aug-fcn-d16-30k": Schedule(16, 0.003, 30000, 0, (21000, 27000)),
        "cityscapes-fcn-d16-90k": Schedule(16, 0.01, 90000, 0, (63000, 81000)),
    }
    for name, schedule in facts.items():
        assert module._schedule(config(name), processes=1) == schedule, name
    city = config("cityscapes-fcn-d8-40k").model
    assert (city.test_cfg.mode, tuple(city.test_cfg.crop_size), tuple(city.test_cfg.stride)) == (
        "slide",
        (769, 769),
        (513, 513),
    )
    assert city.decode_head.align_corners


def test_linear_rule_on_one_process(request_of) -> None:
    from twist.transfer.engines.mmseg import config
    from twist.transfer.engines.mmseg import engine as engine

    resolved = engine.resolve(request_of("voc12aug-fcn-d8-20k"))
    assert config._schedule(resolved.config, processes=1) == Schedule(4, 0.0025, 80000, 0)
    policy = resolved.config.param_scheduler[0]
    assert (policy.end, policy.eta_min) == (80000, pytest.approx(2.5e-5))
    assert "linear rule" in resolved.plan
    assert not resolved.reduced
    step = engine.resolve(request_of("voc12aug-fcn-d16-30k")).config.param_scheduler[0]
    assert list(step.milestones) == [42000, 54000]


@pytest.mark.parametrize(("word", "value"), [("false", False), ("False", False), ("true", True), ("True", True)])
def test_a_switch_is_a_switch_however_it_is_written(word: str, value: bool, request_of) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    config = engine.resolve(request_of("voc12aug-fcn-d8-20k", f"model.decode_head.concat_input={word}")).config
    assert config.model.decode_head.concat_input is value


@pytest.mark.parametrize("word", ["no", "0", "fals"])
def test_what_is_no_switch_is_refused(word: str, request_of) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    with pytest.raises(UsageError, match=r"concat_input is (True|False); write true or false"):
        engine.resolve(request_of("voc12aug-fcn-d8-20k", f"model.decode_head.concat_input={word}"))


def test_the_last_checkpoint_is_the_folders_own(tmp_path: Path) -> None:
    """mmengine notes a whole path; a folder that was moved or copied would evaluate another run's weights."""
    from twist.transfer.engines.mmseg import engine as engine

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    assert engine._last_checkpoint(here) is None
    (here / "iter_4.pth").write_bytes(b"mine")
    (here / "last_checkpoint").write_text(str(here / "iter_4.pth"))
    here.rename(there)
    here.mkdir()
    (here / "iter_4.pth").write_bytes(b"another run's")
    assert engine._last_checkpoint(there) == there / "iter_4.pth"
    (there / "iter_4.pth").unlink()
    with pytest.raises(UserError, match=r"there holds no iter_4\.pth, its newest checkpoint"):
        engine._last_checkpoint(there)


def test_an_override_that_leaves_the_protocol_keeps_the_record_from_published_numbers(request_of) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    def resolved(*overrides: str):
        return engine.resolve(request_of("voc12aug-fcn-d8-20k", "keep_batch=true", *overrides))

    assert not resolved().reduced
    assert not resolved("optim_wrapper.optimizer.lr=0.02").reduced, "searching the rate is part of the protocol"
    half = resolved("train_dataloader.batch_size=8", "optim_wrapper.optimizer.lr=0.005", "iterations=40000")
    assert not half.reduced, "what the message of too little memory advises"
    for longer in ("iterations=40000", "train_cfg.max_iters=40000", "train_dataloader.batch_size=32"):
        assert resolved(longer).reduced, "twice as many images"
    early = resolved("param_scheduler.0.end=10000")
    assert early.reduced
    assert "the rate's policy ends at iteration 10000 of 20000, and in the protocol with the run" in early.notes
    other = resolved("model.decode_head.dropout_ratio=0.5")
    assert other.reduced
    assert "changed from the protocol: model.decode_head.dropout_ratio 0.1 → 0.5" in other.notes
    assert resolved("param_scheduler.0.power=1.0").reduced
    assert resolved("val_dataloader.dataset.pipeline.1.scale=[1024, 256]").reduced


def test_whatever_an_override_changes_is_recorded(request_of) -> None:
    """Every key of the config, one after the other: only those named here leave the record as it was."""
    from twist.transfer.engines.mmseg import config
    from twist.transfer.engines.mmseg import engine as engine

    def resolved(override: str):
        return engine.resolve(request_of("voc12aug-fcn-d8-20k", "keep_batch=true", *filter(None, [override])))

    loaders = [f"{part}_dataloader" for part in ("train", "val", "test")]
    harmless = {
        *(f"{loader}.{key}" for loader in loaders for key in ("num_workers", "persistent_workers")),
        "default_hooks.checkpoint.interval", "default_hooks.checkpoint.max_keep_ckpts", "default_hooks.logger.interval",
        "env_cfg.cudnn_benchmark", "env_cfg.dist_cfg.backend", "env_cfg.mp_cfg.mp_start_method",
        "env_cfg.mp_cfg.opencv_num_threads", "log_level", "train_cfg.val_interval", "vis_backends.0.type",
        "visualizer.name", "visualizer.type", "visualizer.vis_backends.0.type",
    }  # fmt: skip
    # One iteration of 20,000 more is none; a rate is named by its value.
    schedule = {
        "train_cfg.max_iters", "optim_wrapper.optimizer.lr",
        "param_scheduler.0.begin", "param_scheduler.0.end", "param_scheduler.0.eta_min",
    }  # fmt: skip
    found = sweep(config._tree(resolved("").config), resolved)
    assert found.same_recipe == harmless
    assert found.not_reduced == harmless | schedule
    assert found.unnamed == harmless | schedule | {"train_dataloader.batch_size"}
    assert found.refused == {
        *(f"{loader}.dataset.data_root" for loader in loaders), "data_root", "load_from", "resume", "model.pretrained",
        *(f"model.backbone.init_cfg.{key}" for key in ("type", "checkpoint", "prefix")),
        "model.backbone.frozen_stages", "model.backbone.norm_eval",
        # Set by the engine, and no keys of a config of ours.
        "work_dir", "launcher", "experiment_name", "randomness.seed", "device",
    }  # fmt: skip


def test_an_override_of_what_the_recipe_leaves_out_enters_it(request_of) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    def resolved(*overrides: str):
        return engine.resolve(request_of("voc12aug-fcn-d8-20k", "keep_batch=true", *overrides))

    hidden = {
        "model.data_preprocessor.bgr_to_rgb": False,
        "model.backbone.style": "caffe",
        "val_evaluator.iou_metrics": ["mDice"],
        "train_dataloader.sampler.shuffle": False,
    }
    other = resolved(*(f"{key}={json.dumps(value)}" for key, value in hidden.items()))
    assert other.recipe == {**resolved().recipe, "overrides": hidden}
    assert "changed from the protocol: val_evaluator.iou_metrics ['mIoU'] → ['mDice']" in other.notes
    assert resolved("model.backbone.style=pytorch").recipe == resolved().recipe, "as it was already"


@pytest.mark.parametrize(
    ("protocol", "folder", "overrides"),
    [
        ("sample-voc-fcn-d8", "demo-photos", ()),
        ("sample-voc-fcn-d8", "study", ()),
        ("sample-cityscapes-fcn-d8", "study", ()),
        ("sample-cityscapes-fcn-d8", "study-longer", ("iterations=480",)),
    ],
)
def test_recipes_of_committed_records_are_still_these(protocol, folder, overrides, weights, tmp_path) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    record = committed(protocol, folder)
    request = request_maker(sample_root(record, tmp_path / "sample"), weights, tmp_path / "run")(protocol, *overrides)
    assert engine.resolve(request).recipe == own_part(record)


def test_a_loss_that_is_no_number_ends_the_run(request_of) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    request = request_of("voc12aug-fcn-d8-20k", *QUICK, "iterations=2", "optim_wrapper.optimizer.lr=1e30")
    with pytest.raises(UserError, match="lower the learning rate"):
        engine.run(request, engine.resolve(request))


def test_heads_follow_the_backbone(request_of) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    for architecture, channels in (("resnet18", (512, 256)), ("resnet50", (2048, 1024))):
        model = engine.resolve(request_of("voc12aug-fcn-d8-20k", architecture=architecture)).config.model
        assert (model.decode_head.in_channels, model.auxiliary_head.in_channels) == channels


def test_recipe_knows_the_protocol_and_not_the_weights(request_of) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    first = engine.resolve(request_of("voc12aug-fcn-d8-20k", seed=0)).recipe
    second = engine.resolve(request_of("voc12aug-fcn-d8-20k", "train_dataloader.num_workers=1", seed=5)).recipe
    assert first == second
    assert first != engine.resolve(request_of("voc12aug-fcn-d8-20k", "optim_wrapper.optimizer.lr=0.1")).recipe
    assert "mean" not in first["model"]
    assert "init_cfg" not in first["model"]["backbone"]


def test_no_more_processes_decode_than_there_are_cores(request_of, monkeypatch) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    request = request_of("voc12aug-fcn-d8-20k", "train_dataloader.num_workers=7")
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    many = engine.resolve(request)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 5}, raising=False)
    few = engine.resolve(request)
    assert (many.config.train_dataloader.num_workers, few.config.train_dataloader.num_workers) == (7, 2)
    assert few.recipe == many.recipe


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim_wrapper.optimizer.lrr=1", r'has no key optim_wrapper\.optimizer\.lrr .* Did you mean "lr"'),
        ("lr=0.1", r'has no key lr .* Did you mean "optim_wrapper\.optimizer\.lr"\?'),
        ("arch=resnet50", r'has no key arch .* Did you mean "architecture"'),
        ("model.decode_head=1", r"model\.decode_head is a section"),
        (
            "val_dataloader.dataset.data_root=/elsewhere",
            r"takes val_\S+data_root from --data alone; pass --data in its",
        ),
        ("optim_wrapper.optimizer.lr=fast", r"optimizer\.lr is .* a number"),
        ("train_dataloader.dataset.pipeline.99.scale=1", r"has no key train_dataloader\.dataset\.pipeline\.99"),
        ("model.backbone.norm_eval=true", "Frozen batch norm or frozen stages do not go with self-supervised"),
        ("model.backbone.frozen_stages=1", "Frozen batch norm or frozen stages do not go with self-supervised"),
    ],
)
def test_impossible_overrides_are_one_sentence(request_of, override, sentence) -> None:
    from twist.transfer.engines.mmseg import engine as engine

    with pytest.raises(UsageError, match=sentence) as caught:
        engine.resolve(request_of("voc12aug-fcn-d8-20k", override))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_arrive_are_found(request_of, weights) -> None:
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    from twist.transfer.engines.mmseg import engine as engine
    from twist.transfer.engines.mmseg import outcome

    register_all_modules(init_default_scope=False)
    init_default_scope("mmseg")
    file, _, _ = weights("resnet18")
    config = engine.resolve(request_of("voc12aug-fcn-d8-20k")).config
    backbone = MODELS.build(config.model.backbone)
    with pytest.raises(UserError, match="did not take the weights"):
        outcome.prove_loaded(backbone, file)
    backbone.init_weights()
    outcome.prove_loaded(backbone, file)
    # The trap of the field: the deep-stem network takes what fits of a plain stem's weights, and says little.
    settings = {k: v for k, v in config.model.backbone.items() if k not in ("deep_stem", "avg_down")}
    deep = MODELS.build({**settings, "type": "ResNetV1c"})
    deep.init_weights()
    with pytest.raises(UserError, match=r"left at random \(first: .*"):
        outcome.prove_loaded(deep, file)


def test_an_interrupted_run_continues_from_its_checkpoint(request_of, monkeypatch) -> None:
    """Stopped in its fourth step of four; the continued run takes the last two and ends like any other."""
    from twist.transfer.engines.mmseg import engine as engine

    options = (*QUICK, "iterations=4", "default_hooks.checkpoint.interval=2")
    request = request_of("voc12aug-fcn-d16-30k", *options)
    after = engine._Watch.after_train_iter

    def stops(self, runner, **more) -> None:
        if runner.iter == 3:
            raise KeyboardInterrupt
        after(self, runner, **more)

    monkeypatch.setattr(engine._Watch, "after_train_iter", stops)
    with pytest.raises(KeyboardInterrupt):
        engine.run(request, engine.resolve(request))
    monkeypatch.undo()
    early = request_of("voc12aug-fcn-d16-30k", *options, eval_only=True)
    with pytest.raises(UserError, match=r"stands at iteration 2 of 4: .* --resume"):
        engine.run(early, engine.resolve(early))
    continued = request_of("voc12aug-fcn-d16-30k", *options, resume=True)
    result = engine.run(continued, engine.resolve(continued))
    assert [json.loads(line)["step"] for line in result.curves.read_text().splitlines()] == [1, 2, 3, 4]
    assert "resumed epoch: 0, iter: 2" in (request.output / "log.txt").read_text()
    # The finished run continued once more has nothing to train and is evaluated.
    assert engine.run(continued, engine.resolve(continued)).metrics == result.metrics


def _worker_on_cpu(local_rank: int, request: Request, address: str) -> None:
    """The engine's worker with what CPUs have in place of SyncBN; leaves what a rank saw and what it ended with."""
    from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm

    from twist.pretrain.batch_norm import synchronise
    from twist.transfer.engines.mmseg import engine as engine

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
    engine._worker(local_rank, request, address)
    state = runners[0].model.module.state_dict()
    torch.save({"seen": seen, "state": state}, request.output / f"ended.rank{local_rank}.pth")


def test_two_processes_train_and_evaluate_together(request_of) -> None:
    """Two gloo ranks: different images, one network at the end, and one IoU over all images, each counted once.

    Three images do not divide over two ranks, so the metric must drop the one that the sampler repeats.
    """
    from twist.transfer.engines.mmseg import engine as engine

    request = request_of("voc12aug-fcn-d16-30k", *QUICK)
    config = engine.resolve(request).config
    config.launcher = "pytorch"
    config.dump(request.output / "config.py")
    address = f"127.0.0.1:{engine._free_port()}"
    # Processes are counted by GPUs, and there are none.
    both = replace(request, controls=request.controls.model_copy(update={"nodes": 2}))
    torch.multiprocessing.start_processes(_worker_on_cpu, args=(both, address), nprocs=2)
    together = engine.collect(request, engine.resolve(request))
    ranks = [torch.load(request.output / f"ended.rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert [len(rank["seen"]) for rank in ranks] == [4, 4]
    assert ranks[0]["seen"] != ranks[1]["seen"]
    moved = torch.load(request.weights, weights_only=True)["state_dict"]
    for name, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][name]), name
        if name in moved and name.endswith(("running_var", "conv1.weight")):
            assert not torch.equal(value, moved[name]), f"{name} was not trained"
    assert [json.loads(line)["step"] for line in together.curves.read_text().splitlines()] == [1, 2]
    alone = request_of("voc12aug-fcn-d16-30k", *QUICK, eval_only=True)
    assert engine.run(alone, engine.resolve(alone)).metrics == together.metrics
    with pytest.raises(UsageError, match="Several processes need GPUs"):
        engine.resolve(request_of("voc12aug-fcn-d16-30k", *QUICK, "nodes=2", "master=localhost:1"))


def test_iou_by_hand(request_of) -> None:
    """Four pixels of class 0, four of 1, one ignored; one pixel of class 1 is called 0.

    IoU of class 0: 4/5, of class 1: 3/4; the third class is in neither and counts for nothing. mIoU 77.5, mAcc
    (1 + 3/4) / 2 = 87.5, aAcc 7/8 = 87.5.
    """
    from mmseg.registry import METRICS
    from mmseg.utils import register_all_modules

    from twist.transfer.engines.mmseg import engine as engine
    from twist.transfer.engines.mmseg import outcome

    register_all_modules(init_default_scope=False)
    config = engine.resolve(request_of("voc12aug-fcn-d8-20k")).config
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
