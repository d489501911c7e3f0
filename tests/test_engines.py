"""What holds for every engine: found by its name, and, of both frameworks, what overrides do to plan and record."""

import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from engine_requests import (
    QUICK_OF,
    EngineUser,
    committed,
    flip_a_bit,
    own_part,
    sample_root,
    sweep,
    value_at,
    weights_maker,
)
from gloo import run_on_ranks
from tiny_trees import make_cityscapes, make_coco, make_voc_detection, make_voc_segmentation

from twist.contracts.errors import UsageError, UserError
from twist.contracts.record import read_record
from twist.transfer.engines import Engine, all_engines, framework
from twist.transfer.engines.framework import processes_of, require_one_run, seal
from twist.transfer.protocols import PROTOCOLS, Protocol
from twist.transfer.request import Controls, Request, Resolved, Result, Weights
from twist.transfer.run import transfer

# ---------------------------------------------------------------------------------------------------------------------
# The registry (docs/extending.md, "A new engine")

TOY = Engine("toy", target=None, packages=("torch",))


def _toy_module() -> ModuleType:
    """An engine that counts: accuracy is the number of weights, whatever the images."""

    def resolve(request: Request, weights: Weights) -> Resolved:
        recipe = {"factor": float(dict(o.split("=") for o in request.overrides).get("factor", 1))}
        return Resolved(recipe, recipe, f"plan: count the weights of a {weights.header.display_name}", reduced=True)

    def run(request: Request, weights: Weights, resolved: Resolved) -> Result:
        assert weights.tensors is not None
        counted = len(weights.tensors) * resolved.config["factor"]
        return Result(dict.fromkeys(request.protocol.metrics, counted), resolved.recipe)

    module = ModuleType("toy_engine")
    module.resolve, module.run = resolve, run  # type: ignore[attr-defined]
    return module


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Protocol:
    row = Protocol("toy-count", "toy", "segmentation", "x", ("voc2012-aug",), ("miou_percent",), 0, "count", 1.0)
    monkeypatch.setitem(sys.modules, TOY.module, _toy_module())
    monkeypatch.setitem(all_engines(), "toy", TOY)
    monkeypatch.setitem(PROTOCOLS, row.name, row)
    return row


def test_every_protocol_names_an_engine_with_its_config() -> None:
    assert set(all_engines()) >= {"detectron2", "mmseg", "imagenet"}
    for row in PROTOCOLS.values():
        folder = all_engines()[row.engine].folder
        assert any((folder / f"{row.config}{ending}").is_file() for ending in ("", ".toml")), row.name


def test_a_new_engine_is_one_row_and_two_functions(toy: Protocol, tmp_path: Path, capsys: Any) -> None:
    make_voc_segmentation(tmp_path / "data")
    given = {"weights": "random", "data": tmp_path / "data", "output": tmp_path / "run", "gpus": 0}
    small = "architecture=resnet18"
    record = transfer(toy.name, overrides=[small, "factor=0.5"], **given)
    assert record.metrics == {"miou_percent": 60.0}  # a ResNet-18 without its classifier has 120 tensors
    assert record.recipe["factor"] == 0.5
    assert "plan: count the weights of a resnet18" in capsys.readouterr().err
    assert read_record(next((tmp_path / "run" / "results" / toy.name).glob("*.json"))) == record
    with pytest.raises(UserError, match=r"recipe.factor was 0.5 and is 1.0 now"):
        transfer(toy.name, overrides=[small], resume=True, **given)
    with pytest.raises(UserError, match="this run, done"):
        transfer(toy.name, overrides=[small, "factor=0.5"], **given)
    assert transfer(toy.name, overrides=[small, "factor=0.5"], resume=True, **given) == record


def test_an_engine_that_is_not_installed_says_what_installs_it(
    toy: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(all_engines(), "toy", replace(TOY, packages=("no_such_package",)))
    make_voc_segmentation(tmp_path / "data")
    with pytest.raises(UserError, match=r"no_such_package is not installed: pip install"):
        transfer(toy.name, weights="random", data=tmp_path / "data", output=tmp_path / "run", gpus=0)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Both frameworks


@dataclass(frozen=True)
class Facts:
    """A framework's keys for what is tested of each: of `protocol`, at its own batch."""

    protocol: str
    rate: str  # with the recipe's value times two
    workers: str
    # The advice where memory runs out; other lengths of the run.
    half: tuple[str, ...]
    longer: tuple[str, ...]
    # An override and the note on it.
    other: tuple[str, str]
    more: tuple[str, ...]
    # Overrides that do not show in the recipe, and one that changes nothing.
    hidden: dict[str, Any]
    unchanged: str
    refused: dict[str, str]
    committed: tuple[tuple[str, str, tuple[str, ...]], ...] = field(default=())


FROZEN = "Frozen batch norm or frozen stages do not go with self-supervised"
FACTS = {
    "detectron2": Facts(
        protocol="coco-mrcnn-fpn-1x",
        rate="SOLVER.BASE_LR=0.04",
        workers="DATALOADER.NUM_WORKERS",
        half=("SOLVER.IMS_PER_BATCH=8", "SOLVER.BASE_LR=0.01", "iterations=180000"),
        longer=("iterations=180000", "SOLVER.MAX_ITER=180000", "SOLVER.IMS_PER_BATCH=32"),
        other=("MODEL.ROI_BOX_HEAD.NUM_CONV=4", "changed from the protocol: MODEL.ROI_BOX_HEAD.NUM_CONV 0 → 4"),
        more=("INPUT.MIN_SIZE_TEST=600", "SOLVER.STEPS=[1,2]"),
        hidden={"INPUT.FORMAT": "BGR", "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0], "INPUT.CROP.ENABLED": True},
        unchanged="INPUT.FORMAT=RGB",
        refused={
            "BASE_LR=1": r'has no key BASE_LR .* Did you mean "SOLVER\.BASE_LR"',
            "SEED=1": r"takes SEED from --seed alone",
            "SOLVER.BASE_LR=fast": r"SOLVER\.BASE_LR is .*a number",
            "SOLVER.STEPS=true": r"does not fit",
            "SOLVER.IMS_PER_BATCH=0": "0 images a step do not divide over 1 processes",
            "MODEL.BACKBONE.FREEZE_AT=2": FROZEN,
            "MODEL.RESNETS.NORM=FrozenBN": FROZEN,
        },
        committed=tuple(("sample-coco-mrcnn-fpn", folder, ()) for folder in ("demo-photos", "study-40", "study")),
    ),
    "mmseg": Facts(
        protocol="voc12aug-fcn-d8-20k",
        rate="optim_wrapper.optimizer.lr=0.02",
        workers="train_dataloader.num_workers",
        half=("train_dataloader.batch_size=8", "optim_wrapper.optimizer.lr=0.005", "iterations=40000"),
        longer=("iterations=40000", "train_cfg.max_iters=40000", "train_dataloader.batch_size=32"),
        other=(
            "model.decode_head.dropout_ratio=0.5",
            "changed from the protocol: model.decode_head.dropout_ratio 0.1 → 0.5",
        ),
        more=("param_scheduler.0.power=1.0", "val_dataloader.dataset.pipeline.1.scale=[1024, 256]"),
        hidden={
            "model.data_preprocessor.bgr_to_rgb": False,
            "model.backbone.style": "caffe",
            "val_evaluator.iou_metrics": ["mDice"],
            "train_dataloader.sampler.shuffle": False,
        },
        unchanged="model.backbone.style=pytorch",
        refused={
            "lr=0.1": r'has no key lr .* Did you mean "optim_wrapper\.optimizer\.lr"\?',
            "val_dataloader.dataset.data_root=/elsewhere": r"takes val_\S+data_root from --data alone",
            "optim_wrapper.optimizer.lr=fast": r"optimizer\.lr is .* a number",
            "train_dataloader.dataset.pipeline.99.scale=1": r"has no key train_dataloader\.dataset\.pipeline\.99",
            "model.decode_head.concat_input=no": r"concat_input is True; write true or false",
            "train_cfg.max_iters=0": "at least one iteration",
            "model.backbone.norm_eval=true": FROZEN,
            "model.backbone.frozen_stages=1": FROZEN,
        },
        committed=(
            ("sample-voc-fcn-d8", "demo-photos", ()),
            ("sample-voc-fcn-d8", "study", ()),
            ("sample-cityscapes-fcn-d8", "study", ()),
            ("sample-cityscapes-fcn-d8", "study-longer", ("iterations=480",)),
        ),
    ),
}
frameworks = pytest.mark.parametrize("name", FACTS)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for make in (make_coco, make_voc_detection, make_voc_segmentation, make_cityscapes):
        make(root)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory):
    return {name: weights_maker(tmp_path_factory.mktemp(name), name) for name in FACTS}


@pytest.fixture
def user(name: str, tree: Path, weights: Any, tmp_path: Path) -> EngineUser:
    return EngineUser(name, tree, weights[name], tmp_path / "run")


@pytest.mark.slow
@frameworks
def test_what_leaves_the_protocol_keeps_the_record_from_published_numbers(name: str, user: EngineUser) -> None:
    facts = FACTS[name]

    def resolved(*overrides: str) -> Resolved:
        return user.resolve(facts.protocol, "keep_batch=true", *overrides)

    assert not resolved().reduced
    assert not resolved(facts.rate).reduced, "searching the rate is part of the protocol"
    assert any("by an override; the protocol's is" in note for note in resolved(facts.rate).notes)
    assert not resolved(*facts.half).reduced, "what the message of too little memory advises"
    assert resolved(*facts.half[:2]).reduced, "half of the images"
    for longer in facts.longer:
        assert resolved(longer).reduced, "a 2× run is no 1× run"
        assert any(note.startswith("sees ") for note in resolved(longer).notes)
    override, note = facts.other
    assert note in resolved(override).notes
    for changed in (override, *facts.more):
        assert resolved(changed).reduced, changed


@pytest.mark.slow
@frameworks
def test_an_override_of_what_the_recipe_leaves_out_enters_it(name: str, user: EngineUser) -> None:
    facts = FACTS[name]
    other = user.resolve(facts.protocol, *(f"{key}={json.dumps(value)}" for key, value in facts.hidden.items()))
    plain = user.resolve(facts.protocol).recipe
    assert other.recipe == {**plain, "overrides": facts.hidden}
    assert user.resolve(facts.protocol, facts.unchanged).recipe == plain, "as it was already"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "protocol", "folder", "overrides"),
    [(name, *one) for name, facts in FACTS.items() for one in facts.committed],
)
def test_recipes_of_committed_records_are_still_these(
    name: str, protocol: str, folder: str, overrides: tuple[str, ...], weights: Any, tmp_path: Path
) -> None:
    record = committed(protocol, folder)
    user = EngineUser(name, sample_root(record, tmp_path / "sample"), weights[name], tmp_path / "run")
    assert user.resolve(protocol, *overrides).recipe == own_part(record)


@pytest.mark.slow
@frameworks
def test_no_more_processes_decode_than_there_are_cores(
    name: str, user: EngineUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = FACTS[name]
    found = {}
    for cores in (8, 2):
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid, cores=cores: set(range(cores)), raising=False)
        found[cores] = user.resolve(facts.protocol, f"{facts.workers}=7")
    assert [value_at(found[cores].config, facts.workers) for cores in (8, 2)] == [7, 2]
    assert found[8].recipe == found[2].recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [(name, *one) for name, facts in FACTS.items() for one in facts.refused.items()],
)
def test_impossible_overrides_are_one_sentence(name: str, override: str, sentence: str, user: EngineUser) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        user.resolve(FACTS[name].protocol, override)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@frameworks
def test_supervised_weights_may_be_frozen_and_vits_are_refused(name: str, user: EngineUser) -> None:
    frozen = {"detectron2": "MODEL.BACKBONE.FREEZE_AT=2", "mmseg": "model.backbone.norm_eval=true"}[name]
    assert user.resolve(FACTS[name].protocol, frozen, method="supervised").reduced
    request, made = user.ask(FACTS[name].protocol)
    vit = made.header.model_copy(update={"architecture": "vit_small_patch16", "stem": "patch16"})
    with pytest.raises(UserError, match="vit_small_patch16 is no backbone of"):
        user.engine.resolve(request, Weights(vit, made.file, made.overlay))
    with pytest.raises(UsageError, match="Several processes need GPUs"):
        user.resolve(FACTS[name].protocol, "nodes=2", "master=localhost:1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detectron2"])
def test_whatever_an_override_changes_is_recorded_by_detectron2(name: str, user: EngineUser) -> None:  # noqa: ARG001
    """Only the keys named here leave the record as it was."""

    def resolved(override: str) -> Resolved:
        return user.resolve("coco-mrcnn-fpn-1x", "keep_batch=true", *filter(None, [override]))

    harmless = {
        "CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD",
        "TEST.EXPECTED_RESULTS", "VIS_PERIOD",
    }  # fmt: skip
    # One iteration of 90,000 more is none; a rate is named by its value.
    schedule = {f"SOLVER.{key}" for key in ("BASE_LR", "MAX_ITER", "WARMUP_ITERS")}
    unnamed = harmless | schedule | {"SOLVER.IMS_PER_BATCH", "SOLVER.STEPS"}
    refused = {
        "MODEL.BACKBONE.FREEZE_AT", "MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR", "SEED", "SOLVER.REFERENCE_WORLD_SIZE"
    }  # fmt: skip
    tree = json.loads(json.dumps(yaml.safe_load(resolved("").config.dump())))
    found = sweep(tree, resolved, unnamed | refused)
    assert (found.same_recipe, found.not_reduced) == (harmless, harmless | schedule)
    assert (found.unnamed, found.refused) == (unnamed, refused)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmseg"])
def test_whatever_an_override_changes_is_recorded_by_mmseg(name: str, user: EngineUser) -> None:  # noqa: ARG001
    def resolved(override: str) -> Resolved:
        return user.resolve("voc12aug-fcn-d8-20k", "keep_batch=true", *filter(None, [override]))

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
    unnamed = harmless | schedule | {"train_dataloader.batch_size"}
    refused = {
        *(f"{loader}.dataset.data_root" for loader in loaders), "data_root", "load_from", "resume", "model.pretrained",
        *(f"model.backbone.init_cfg.{key}" for key in ("type", "checkpoint", "prefix")),
        "model.backbone.frozen_stages", "model.backbone.norm_eval",
        # Set by the engine, and no keys of a config of ours.
        "work_dir", "launcher", "experiment_name", "randomness.seed", "device",
    }  # fmt: skip
    found = sweep(json.loads(json.dumps(resolved("").config.to_dict())), resolved, unnamed | refused)
    assert (found.same_recipe, found.not_reduced) == (harmless, harmless | schedule)
    assert (found.unnamed, found.refused) == (unnamed, refused)


# ---------------------------------------------------------------------------------------------------------------------
# The frameworks' checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "protocol", "often", "damaged", "taken", "said", "again"),
    [
        ("detectron2", "voc-frcnn-fpn-24k", "SOLVER.CHECKPOINT_PERIOD=1", "model_0000002.pth", "model_0000001",
         "Starting training from iteration 2", "eval_only"),
        ("mmseg", "voc12aug-fcn-d16-30k", "default_hooks.checkpoint.interval=1", "iter_3.pth", "iter_2",
         "resumed epoch: 0, iter: 2", "resume"),
    ],
)  # fmt: skip
def test_an_interrupted_run_continues_from_its_checkpoint(
    name: str, protocol: str, often: str, damaged: str, taken: str, said: str, again: str, user: EngineUser,
    monkeypatch, capsys,
) -> None:  # fmt: skip
    """Stopped in its fourth step of four, and the newest state damaged: it goes on from the one before, and says so."""
    options, step = (*QUICK_OF[name], "iterations=4", often), framework.TrainingLog.step

    def stops(self: Any, done: int, values: Any) -> None:
        if done == 4:
            raise KeyboardInterrupt
        step(self, done, values)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(framework.TrainingLog, "step", stops)
        user.run(protocol, *options)
    with pytest.raises(UserError, match=r"stands at iteration 3 of 4: .* --resume"):
        user.run(protocol, *options, eval_only=True)
    flip_a_bit(user.output / damaged)
    (user.output / "last_checkpoint").write_text("gone.pth")
    result = user.run(protocol, *options, resume=True)
    assert re.search(rf"{damaged}.*SHA-256.*{taken}", capsys.readouterr().err)
    assert [json.loads(line)["step"] for line in result.curves.read_text().splitlines()] == [1, 2, 3, 4]
    assert said in (user.output / "log.txt").read_text()
    # The finished run evaluated again, or continued once more with nothing to train, gives the same numbers.
    assert user.run(protocol, *options, **{again: True}).metrics == result.metrics


@pytest.mark.parametrize(
    ("prefix", "names", "damaged", "chosen"),
    [
        ("iter", ("iter_2", "iter_10"), (), "iter_10.pth"),  # by number, not by letters
        ("iter", ("iter_2", "iter_10"), ("iter_10",), "iter_2.pth"),
        ("model", ("model_0000003", "model_final"), (), "model_final.pth"),
        ("model", ("model_0000003", "model_final"), ("model_final",), "model_0000003.pth"),
        ("model", ("model_0000001", "model_0000003"), ("model_0000001", "model_0000003"), None),
    ],
)
def test_a_framework_goes_on_from_the_newest_checkpoint_that_is_as_it_was_saved(
    prefix: str, names: tuple[str, ...], damaged: tuple[str, ...], chosen: str | None, tmp_path: Path, capsys
) -> None:
    request = Request(PROTOCOLS["sample-voc-fcn-d8"], tmp_path, tmp_path, resume=True)
    (tmp_path / f"{prefix}_0.json").write_text("{}")  # of a file that the framework has removed since
    for name in names:
        (tmp_path / f"{name}.pth").write_bytes(name.encode())
        seal(tmp_path / f"{name}.pth")
    assert not (tmp_path / f"{prefix}_0.json").exists()
    (tmp_path / "last_checkpoint").write_bytes(b"\xffdamaged")
    for name in damaged:
        flip_a_bit(tmp_path / f"{name}.pth")
    if chosen is None:
        with pytest.raises(UserError, match=r"model_0000003.*model_0000001.*Start again in another folder"):
            processes_of(request, prefix).__enter__()
        return
    with processes_of(request, prefix):
        pass
    assert (tmp_path / "last_checkpoint").read_text() == chosen
    assert capsys.readouterr().err.count("is not valid") == len(damaged)


def test_the_note_of_a_run_without_manifests_stays(tmp_path: Path) -> None:
    (tmp_path / "iter_2.pth").write_bytes(b"an earlier version's")
    (tmp_path / "last_checkpoint").write_text("/there/iter_2.pth")
    with processes_of(Request(PROTOCOLS["sample-voc-fcn-d8"], tmp_path, tmp_path, resume=True), "iter"):
        pass
    assert (tmp_path / "last_checkpoint").read_text() == "/there/iter_2.pth"


def asked_on(rank: int, changes: list[dict[str, Any]]) -> list[str]:
    """What each node says when the second one's request is changed so."""
    said = []
    for change in changes:
        request = Request(
            PROTOCOLS["sample-voc-fcn-d8"],
            Path(f"/data{rank}"),
            Path(),
            data_name="voc 1",
            controls=Controls(nodes=2, master="a:1"),
        )
        try:
            require_one_run(replace(request, **change) if rank else request)
            said.append("one run")
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_nodes_of_other_data_or_commands_are_refused_on_each(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "one run": {"output": tmp_path},
        "data is 'voc 1' on rank 0 and 'voc 2' on rank 1": {"data_name": "voc 2"},
        "overrides is [] on rank 0 and ['a=1'] on rank 1": {"overrides": ("a=1",)},
        "seed is 0 on rank 0 and 3 on rank 1": {"seed": 3},
    }
    for said in run_on_ranks(2, asked_on, [*changes.values()]):
        assert all(expected in found for expected, found in zip(changes, said, strict=True)), said
