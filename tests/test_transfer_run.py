"""One run from checkpoint to record, and what surrounds the engines: data checks, folder, curves, pictures, failure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_tree import write_tree
from PIL import Image
from tiny_trees import make_voc_segmentation

from twist.contracts.curves import Curves
from twist.contracts.errors import UsageError, UserError
from twist.contracts.networks import build_backbone
from twist.contracts.record import find_records, read_record
from twist.contracts.weights import Backbone, write_backbone
from twist.transfer import folder
from twist.transfer.end import render_end
from twist.transfer.failures import guard, raise_failure
from twist.transfer.pictures import colour_of, draw_classes, draw_instances, legend_of, plot_losses, save_pair
from twist.transfer.protocols import find_protocol
from twist.transfer.request import split_overrides
from twist.transfer.run import _find_weights, transfer

# ---------------------------------------------------------------------------------------------------------------------
# What is said before anything runs


def test_controls_are_taken_out_of_the_overrides() -> None:
    controls, rest = split_overrides(["architecture=resnet18", "SOLVER.BASE_LR=0.1", "keep_batch=true", "iterations=5"])
    assert (controls.architecture, controls.keep_batch, controls.iterations) == ("resnet18", True, 5)
    assert rest == ("SOLVER.BASE_LR=0.1",)
    with pytest.raises(UsageError, match="master=HOST:PORT"):
        split_overrides(["nodes=2"])
    with pytest.raises(UsageError, match="architecture"):
        split_overrides(["architecture=resnet19"])


# ---------------------------------------------------------------------------------------------------------------------
# The folder, curves, failures, pictures


def test_a_folder_belongs_to_one_run(tmp_path) -> None:
    target = tmp_path / "run"
    run = {"protocol": "knn", "seed": 0, "recipe": {"SOLVER": {"BASE_LR": 0.02}}}
    assert folder.earlier_run(target) is None
    with folder.taken(target):
        folder.note_run(target, run, state=folder.RUNNING)
    earlier = folder.earlier_run(target)
    assert earlier is not None
    with pytest.raises(UserError, match=r"holds this run, unfinished: pass --resume to continue it"):
        folder.refuse_again(target, earlier)
    folder.check_same_run(target, earlier, run)
    with pytest.raises(UserError, match=r"recipe\.SOLVER\.BASE_LR was 0\.02 and is 0\.01"):
        folder.check_same_run(target, run, {**run, "recipe": {"SOLVER": {"BASE_LR": 0.01}}})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and holds no run"):
        folder.earlier_run(tmp_path / "foreign")


def test_of_what_differs_the_protocol_is_named_first_and_whose_weights_before_their_network(tmp_path) -> None:
    drawn = {"name": "random", "sha256": None, "architecture": "resnet18", "width": 1}
    run = {"protocol": "knn", "seed": 0, "weights": drawn, "data": "imagenet a"}
    with pytest.raises(UserError, match="protocol was 'knn' and is 'linear' now"):
        folder.check_same_run(tmp_path, run, {**run, "data": "imagenet b", "protocol": "linear"})
    with pytest.raises(UserError, match=r"weights\.name was 'random' and is 'r50' now"):
        folder.check_same_run(tmp_path, run, {**run, "weights": {"name": "r50", "sha256": "ab"}})
    with pytest.raises(UserError, match=r"weights\.architecture was 'resnet18' and is 'resnet50' now"):
        folder.check_same_run(tmp_path, run, {**run, "weights": {**drawn, "architecture": "resnet50"}})


def test_a_run_that_is_done_is_called_so_with_its_record(tmp_path) -> None:
    record = tmp_path / "run" / "results" / "knn" / "x.json"
    record.parent.mkdir(parents=True)
    record.touch()
    folder.note_run(tmp_path / "run", {"protocol": "knn"}, state=folder.DONE, record=record)
    (tmp_path / "run").rename(tmp_path / "moved")  # a folder that was moved still says where
    earlier = folder.earlier_run(tmp_path / "moved")
    assert earlier is not None
    there = tmp_path / "moved" / "results" / "knn" / "x.json"
    assert folder.record_of(tmp_path / "moved", earlier) == there
    assert folder.record_of(tmp_path / "moved", earlier, results=tmp_path / "other") is None
    with pytest.raises(UserError, match=rf"holds this run, done \(its record is {there}\): pass --resume to print its"):
        folder.refuse_again(tmp_path / "moved", earlier)
    there.unlink()
    with pytest.raises(UserError, match=r"holds this run, done: pass --resume to collect its .*, --eval-only"):
        folder.refuse_again(tmp_path / "moved", earlier)


def test_a_folder_that_a_failed_start_made_is_gone(tmp_path) -> None:
    with pytest.raises(UserError), folder.taken(tmp_path / "run"):
        folder.note_run(tmp_path / "run", {"protocol": "knn"}, state=folder.STARTED)
        (tmp_path / "run" / "weights").mkdir()
        raise UserError("no")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError), folder.taken(tmp_path / "run"):
        (tmp_path / "run" / "weights").mkdir()
        raise UserError("no")
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(UserError), folder.taken(tmp_path / "run"):
        folder.note_run(tmp_path / "run", {"protocol": "knn"}, state=folder.RUNNING)
        raise UserError("no")
    assert (tmp_path / "run" / folder.FILE).exists(), "a run under way can be resumed"


def test_a_run_that_was_killed_while_it_started_is_begun_again(tmp_path) -> None:
    target, run = tmp_path / "run", {"protocol": "knn", "seed": 0}
    folder.note_run(target, run, state=folder.STARTED)
    (target / "weights").mkdir()
    earlier = folder.earlier_run(target)
    assert earlier is not None
    assert earlier["state"] == folder.STARTED
    folder.check_same_run(target, earlier, {**run, "recipe": {"k": 20}})
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        folder.check_same_run(target, earlier, {**run, "seed": 1, "recipe": {"k": 20}})


def test_curves_continue_without_repeating(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = Curves(path, start=0)
    for step in (10, 20, 30):
        curves.add(step, {"loss": 1 / step, "bad": float("nan")})
    curves.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # what a kill leaves
    curves = Curves(path, start=21)
    curves.add(30, {"loss": 7.0})
    curves.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1] == {"step": 30, "loss": 7.0}


def test_running_out_of_memory_names_the_knob(tmp_path) -> None:
    expected = pytest.raises(UserError, match=r"CUDA ran out of memory .*lower SOLVER\.IMS_PER_BATCH")
    with expected, raise_failure(tmp_path), guard(tmp_path, knob="SOLVER.IMS_PER_BATCH"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FloatingPointError("Loss became infinite or NaN at iteration=7!"), r"iteration=7.*lower the learning rate"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), r"pid 7.*fewer workers.*--resume"),
    ],
)
def test_what_is_nobodys_bug_is_one_sentence_with_its_remedy(tmp_path, error: Exception, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught, raise_failure(tmp_path), guard(tmp_path, knob="x"):
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="shape mismatch"), guard(tmp_path, knob="x"):
        raise RuntimeError("shape mismatch")  # a bug stays what it is


def _die(_rank: int) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def _break(_rank: int, output: Path) -> None:
    with guard(output, knob="x"):
        raise ValueError("deep in the framework")


def _complain(_rank: int, output: Path) -> None:
    with guard(output, knob="x"):
        raise UsageError("This key is wrong.")


@pytest.mark.slow
def test_what_happens_in_a_worker_reaches_the_user(tmp_path) -> None:
    with pytest.raises(UserError, match=r"Worker 0 died \(SIGKILL\)"), raise_failure(tmp_path):
        torch.multiprocessing.start_processes(_die, nprocs=1)
    with pytest.raises(UsageError, match=r"^This key is wrong\.$"), raise_failure(tmp_path):
        torch.multiprocessing.start_processes(_complain, args=(tmp_path,), nprocs=1)
    with pytest.raises(RuntimeError, match=r"^ValueError: deep in the framework$"), raise_failure(tmp_path):
        torch.multiprocessing.start_processes(_break, args=(tmp_path,), nprocs=1)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_small_and_coloured_by_class(tmp_path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)  # noise: the worst case for a PNG
    boxes = np.array([[10.0, 20.0, 200.0, 300.0]])
    left = draw_instances(image, boxes, [1], ["a", "b"])
    right = draw_instances(image, boxes, [1], ["a", "b"], scores=[0.9], masks=np.ones((1, 480, 640), dtype=bool))
    assert left.size == right.size == (352, 264)
    assert left.getpixel((100, 11)) == colour_of(1)  # the box's upper edge, at the picture's scale
    path = save_pair(left, right, tmp_path / "pair.png")
    assert path.stat().st_size < 200_000
    classes = np.zeros((480, 640), dtype=np.uint8)
    classes[:, :320], classes[:, 320:] = 3, 255
    panel = np.asarray(draw_classes(np.full((480, 640, 3), 100, np.uint8), classes))
    assert np.array_equal(panel[100, 300], [100, 100, 100])  # ignored: untouched
    assert np.abs(panel[100, 50] - (0.45 * 100 + 0.55 * np.array(colour_of(3)))).max() <= 1


def test_the_legend_of_a_pair_names_the_classes_in_it(tmp_path) -> None:
    truth, prediction = np.full((48, 64), 255, np.uint8), np.full((48, 64), 255, np.uint8)
    truth[:9], prediction[:9] = 2, 0
    names = ["background", "cat", "dog"]
    legend = legend_of([truth, prediction], names)
    assert legend == [((0, 0, 0), "background"), (colour_of(2), "dog")]  # neither the absent nor what is ignored
    panel = draw_classes(np.full((48, 64, 3), 255, np.uint8), truth)
    plain, named = (
        Image.open(save_pair(panel, panel, tmp_path / f"{number}.png", legend=given)).convert("RGB")
        for number, given in enumerate(([], legend))
    )
    assert named.height > plain.height
    strip = np.asarray(named)[plain.height :].reshape(-1, 3).astype(int)
    assert (np.abs(strip - colour_of(2)).max(axis=1) <= 8).sum() >= 80, "a swatch of the class's colour"
    many = [(colour_of(number), f"a class called {number}") for number in range(30)]
    with Image.open(save_pair(panel, panel, tmp_path / "many.png", legend=many)) as picture:
        strip = np.asarray(picture.convert("L"))[plain.height :]
    assert strip.shape[0] > 18 * 3, "as many rows as they need"
    assert (strip[:, -2:] > 200).all(), "none beyond the edge"


def test_losses_are_plotted(tmp_path) -> None:
    curves = Curves(tmp_path / "metrics.jsonl", start=0)
    for step in range(1, 20):
        curves.add(step, {"loss": 3 / step, "loss_mask": 1 / step, "lr": 0.1})
    curves.close()
    path = plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png", title="t")
    with Image.open(path) as image:
        assert image.size == (640, 360)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs (through MMSegmentation, the lighter framework)

QUICK = [
    "iterations=2",
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "train_dataloader.dataset.pipeline.2.scale=[96, 64]",
    "train_dataloader.dataset.pipeline.3.crop_size=[64, 64]",
    "model.data_preprocessor.size=[64, 64]",
    "val_dataloader.dataset.pipeline.1.scale=[96, 64]",
    "model.decode_head.channels=16",
]
PROTOCOL = "voc12aug-fcn-d16-30k"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_voc_segmentation(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """An artefact that is no random initialisation of ours, with pixels of its own."""
    from twist.contracts.networks import build_backbone

    torch.manual_seed(7)
    header = Backbone(architecture="resnet18", method="twist", epochs=3, seed=7, mean=(0.4, 0.4, 0.4), config_hash="ab")
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    return write_backbone(path, build_backbone("resnet18").state_dict(), header)


@pytest.mark.slow
def test_two_weights_meet_under_one_recipe_and_records_are_whole(tree, trained, tmp_path, capsys) -> None:
    torch.set_num_threads(1)
    results = tmp_path / "results"
    common = {"data": tree, "gpus": 0, "results": results}
    ours = transfer(PROTOCOL, weights=str(trained), output=tmp_path / "twist", overrides=QUICK, **common)
    random = transfer(
        PROTOCOL, weights="random", output=tmp_path / "random", overrides=["architecture=resnet18", *QUICK], **common
    )
    assert ours.recipe_hash == random.recipe_hash  # mean, std and paths are no part of a recipe
    assert (ours.method, random.method) == ("twist", "random")
    assert ours.scale == "reduced"
    assert (ours.weights.epochs, ours.weights.pretrain_seed, ours.weights.architecture) == (3, 7, "resnet18")
    assert random.weights.sha256 is None
    records = list(find_records([results]))
    assert len(records) == 2
    for path in records:
        record = read_record(path)
        assert set(record.metrics) == {"miou_percent", "macc_percent", "aacc_percent"}
        assert len(record.media) == 4  # three validation images and the losses
        assert all((path.parent / name).is_file() for name in record.media)
        assert record.curves is not None
        assert [json.loads(line)["step"] for line in (path.parent / record.curves).read_text().splitlines()] == [1, 2]
    err = capsys.readouterr().err
    assert "linear rule" in err
    assert "not comparable with published numbers" in err

    # A changed recipe is refused, the same one continues, and the folder is not taken by another run.
    again = {"weights": str(trained), "output": tmp_path / "twist", **common}
    with pytest.raises(UserError, match=r"holds this run, done \(its record is .*\.json\): pass --resume"):
        transfer(PROTOCOL, overrides=QUICK, **again)
    with pytest.raises(UserError, match=r"optimizer\.lr was .* and is 1\.0"):
        transfer(PROTOCOL, overrides=[*QUICK, "optim_wrapper.optimizer.lr=1.0"], resume=True, **again)
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        transfer(PROTOCOL, overrides=QUICK, resume=True, seed=1, **again)
    once_more = transfer(PROTOCOL, overrides=QUICK, eval_only=True, **again)
    assert once_more.metrics == ours.metrics


@pytest.mark.slow
def test_bad_input_is_one_sentence_and_leaves_nothing(tree, tmp_path) -> None:
    def attempt(protocol: str = PROTOCOL, *, weights: str = "random", overrides: tuple[str, ...] = (), **more) -> str:
        with pytest.raises(UserError) as caught:
            transfer(protocol, weights=weights, data=tree, output=tmp_path / "run", overrides=overrides, **more)
        assert not (tmp_path / "run").exists()
        text = str(caught.value)
        assert "\n" not in text
        return text

    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"no checkpoint")
    assert str(junk) in attempt(weights=str(junk))
    assert "There is no weights file" in attempt(weights="absent.pth")
    assert "has no key optim" in attempt(overrides=("optim.lr=1",))
    assert "is no backbone of an FCN recipe" in attempt(overrides=("architecture=vit_small_patch16",))
    assert "holds no run to evaluate" in attempt(eval_only=True)
    assert "this machine shows" in attempt(gpus=99)
    assert "this machine shows" in attempt(gpus=-1)
    assert "cannot be part of a file's name" in attempt(method="my/../../method")
    assert "architecture and width are for --weights random" in attempt(
        weights=str(junk), overrides=("architecture=resnet18",)
    )


def test_weights_are_called_by_their_folder_from_within_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "r50").mkdir()
    (tmp_path / "r50" / "backbone.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "r50")
    assert _find_weights("backbone.safetensors", layout=None, branch=None).name == "r50"
    assert _find_weights(str(tmp_path / "r50"), layout=None, branch=None).path == tmp_path / "r50/backbone.safetensors"
    # Of a run with a teacher, its network, and by a name that the student's run does not have.
    (tmp_path / "r50" / "teacher_backbone.safetensors").write_bytes(b"")
    found = _find_weights(str(tmp_path / "r50"), layout=None, branch=None)
    assert (found.path, found.name) == (tmp_path / "r50" / "teacher_backbone.safetensors", "r50-teacher")


def test_the_end_compares_with_the_published_rows_of_the_same_method(make_record) -> None:
    row = find_protocol("voc-frcnn-c4-24k")
    moco = Backbone(architecture="resnet50", method="moco-v2", epochs=800)
    text = render_end(make_record(method="moco-v2", value=57.1), row, moco)
    assert "published 57.4 ± 0.6, 800 ep: -0.30, within" in text
    assert "OUTSIDE" in render_end(make_record(method="moco-v2", value=50.0), row, moco)
    detco = Backbone(architecture="resnet50", method="detco")
    assert "nothing published for detco" in render_end(make_record(method="detco", value=50.0), row, detco)
    assert "published 57" not in render_end(make_record(method="moco-v2", value=57.1, scale="reduced"), row, moco)
    small = moco.model_copy(update={"architecture": "resnet18"})
    assert "on a resnet18" in render_end(make_record(method="moco-v2", value=57.1), row, small)
    byol = Backbone(architecture="resnet50", method="byol", epochs=200)
    text = render_end(make_record(method="byol", value=49.0), row, byol)
    assert "under another recipe (VOC07+12 C4 24k, learning rate searched) 55.3, 200 ep: -6.30" in text
    assert "OUTSIDE" not in text


@pytest.fixture
def make_record():
    from twist.contracts.record import RunRecord, WeightsProvenance

    def make(*, method: str, value: float, scale: str = "full") -> RunRecord:
        return RunRecord(
            method=method, protocol="voc-frcnn-c4-24k", task="detection", scale=scale, seed=0,
            metrics={"voc07_box_ap_percent": value}, weights=WeightsProvenance(name="x"), recipe={}, software={},
            hardware={}, wall_s=1, git_commit=None,
        )  # fmt: skip

    return make


def test_how_a_checkpoint_is_read_can_be_said(tmp_path) -> None:
    """What `twist convert` takes as --from and --branch; here for a file that two layouts fit."""
    from twist.transfer.run import _default_output

    file = tmp_path / "byol_r18.pth"
    torch.save({}, file)
    source = _find_weights(str(file), layout="byol-torch", branch="online")
    assert (source.layout, source.branch, source.name) == ("byol-torch", "online", "byol_r18")
    assert _find_weights(f"torchvision:{file}", layout=None, branch=None).layout == "torchvision"
    with pytest.raises(UsageError, match="leave out the prefix"):
        _find_weights(f"torchvision:{file}", layout="moco", branch=None)
    row = find_protocol("sample-knn")
    other = _find_weights(str(file), layout="byol-torch", branch="target")
    assert _default_output(row, source, None, 0, None) != _default_output(row, other, None, 0, None)
    for given in ({"layout": "moco", "branch": None}, {"layout": None, "branch": "online"}):
        with pytest.raises(UsageError, match="--weights random reads none"):
            _find_weights("random", **given)


def test_a_checkpoint_that_needs_its_layout_said_is_measured(tmp_path) -> None:
    """A plain state dict of a ResNet, which several layouts fit: refused with the options, and run with them."""
    write_tree(tmp_path / "data")
    torch.manual_seed(0)
    file = tmp_path / "mine.pth"
    torch.save({**build_backbone("resnet18").state_dict(), "fc.weight": torch.zeros(10, 512)}, file)
    given = {"data": tmp_path / "data", "overrides": ("size=32", "resize=36", "machine.workers=0"), "gpus": 0}
    record = transfer("knn", weights=str(file), layout="torchvision", method="mine", output=tmp_path / "run", **given)
    assert (record.method, record.weights.layout) == ("mine", "torchvision")
    with pytest.raises(UsageError, match='no layout "torchvison"'):
        transfer("knn", weights=str(file), layout="torchvison", output=tmp_path / "other", **given)


def test_a_run_is_continued_on_its_own_data_alone(tmp_path) -> None:
    """Trees of equal names, so that only what the files are tells them apart; the same tree elsewhere is the same."""
    write_tree(tmp_path / "data")
    write_tree(tmp_path / "other", side=48)
    given = {"weights": "random", "output": tmp_path / "run", "gpus": 0, "resume": True}
    quick = ("architecture=resnet18", "size=32", "resize=36", "machine.workers=0")
    record = transfer("knn", data=tmp_path / "data", overrides=quick, **given)
    assert record.data is not None
    assert record.data.startswith("imagenet ")
    with pytest.raises(UserError, match=r"holds another run: data was 'imagenet \w+' and is 'imagenet \w+' now"):
        transfer("knn", data=tmp_path / "other", overrides=quick, **given)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert transfer("knn", data=tmp_path / "moved", overrides=quick, **given).metrics == record.metrics
    # A run that was begun before folders said their data goes on.
    account = json.loads((tmp_path / "run" / folder.FILE).read_text())
    del account["data"]
    (tmp_path / "run" / folder.FILE).write_text(json.dumps(account))
    assert transfer("knn", data=tmp_path / "moved", overrides=quick, **given).data == record.data


QUICK_KNN = ("size=32", "resize=36", "machine.workers=0")


@pytest.fixture
def knn(tmp_path, monkeypatch):
    """`twist transfer knn` of random weights in a working directory with a tree; overrides and options are given."""
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "data")

    def run(*overrides: str, **options):
        options = {"data": tmp_path / "data", "gpus": 0, **options}
        return transfer("knn", weights="random", overrides=(*QUICK_KNN, *overrides), **options)

    return run


def test_random_weights_of_another_network_are_another_run(knn, tmp_path) -> None:
    out = tmp_path / "out"
    knn("architecture=resnet18", output=out)
    began_with = (out / "weights" / "random.safetensors").read_bytes()
    for resume in (True, False):
        with pytest.raises(UserError, match=r"weights\.architecture was 'resnet18' and is 'resnet34' now"):
            knn("architecture=resnet34", output=out, resume=resume)
        with pytest.raises(UserError, match=r"weights\.width was 1 and is 2 now"):
            knn("architecture=resnet18", "width=2", output=out, resume=resume)
    with pytest.raises(UserError, match=r"recipe\.neighbours was 20 and is 3 now"):
        knn("architecture=resnet18", "neighbours=3", output=out)
    # Earlier versions noted no network: that of the weights in the folder counts.
    account = json.loads((out / folder.FILE).read_text())
    del account["weights"]["architecture"], account["weights"]["width"], account["record"]
    (out / folder.FILE).write_text(json.dumps(account))
    with pytest.raises(UserError, match=r"weights\.architecture was 'resnet18' and is 'resnet34' now"):
        knn("architecture=resnet34", output=out, resume=True)
    assert (out / "weights" / "random.safetensors").read_bytes() == began_with
    knn("architecture=resnet18", output=out, resume=True)
    assert json.loads((out / folder.FILE).read_text())["weights"]["architecture"] == "resnet18"
    (_,) = find_records([out / "results"])


def test_random_weights_of_another_network_have_a_folder_of_their_own(knn, tmp_path) -> None:
    from twist.transfer.run import _default_output, _find_weights, _random_network

    random = _find_weights("random", layout=None, branch=None)

    def name(protocol: str, *overrides: str) -> str:
        row, (controls, _) = find_protocol(protocol), split_overrides(overrides)
        return _default_output(row, random, "random", 0, _random_network(random, controls, row, seed=0)).name

    assert name("sample-knn") == name("sample-knn", "architecture=resnet18") == name("knn") == "random-seed0"
    assert name("sample-knn", "architecture=resnet50") == "random-resnet50-seed0"
    assert name("knn", "width=2") == "random-resnet50w2-seed0"
    knn("architecture=resnet18")
    (record,) = find_records([tmp_path / "runs" / "knn" / "random-resnet18-seed0" / "results"])
    assert read_record(record).recipe["architecture"] == "resnet18"


def test_a_run_that_is_done_is_not_measured_again_by_a_resume(knn, tmp_path, capsys) -> None:
    given = {"output": tmp_path / "out"}
    first = knn("architecture=resnet18", **given)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"out holds this run, done \(its record is .*\.json\): pass --resume to print"):
        knn("architecture=resnet18", **given)
    assert knn("architecture=resnet18", resume=True, **given) == first
    said = capsys.readouterr().err
    assert "out is done: this is its record; --eval-only measures it again." in said
    assert "k-NN top-1" in said
    assert "k-NN top-5" not in said, "of three classes it is always 100"
    assert "plan: " not in said
    again = knn("architecture=resnet18", eval_only=True, **given)
    assert again.metrics == first.metrics
    assert "plan: " in capsys.readouterr().err
    assert not [note for note in again.notes if "continued from a checkpoint" in note], "there is none"
    # A record that is gone is made again, and so is one for another folder.
    (there,) = find_records([tmp_path / "out" / "results"])
    there.unlink()
    knn("architecture=resnet18", resume=True, **given)
    knn("architecture=resnet18", resume=True, results=tmp_path / "elsewhere", **given)
    assert there.is_file()
    assert len(list(find_records([tmp_path / "elsewhere"]))) == 1


def test_the_end_says_where_everything_is_and_how_to_show_it(knn, tmp_path, capsys) -> None:
    knn("architecture=resnet18", output=Path("my runs/a"))
    said = capsys.readouterr().err
    (there,) = find_records([tmp_path / "my runs" / "a" / "results"])
    place = f"my runs/a/results/knn/{there.stem}"
    assert f"  record    {place}.json\n  pictures  {place}/neighbours.png\n" in said
    assert said.endswith("  show it   twist compare 'my runs/a/results'\n")
