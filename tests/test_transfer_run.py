"""One run from checkpoint to record, and what surrounds the engines: data checks, folder, curves, pictures, failure."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from imagenet_tree import write_tree
from made_records import make_record
from tiny_trees import make_voc_segmentation

from twist.catalog.check import identify_data
from twist.contracts import run_folder as folder
from twist.contracts.errors import UsageError, UserError
from twist.contracts.networks import build_backbone
from twist.contracts.record import RunRecord, find_records, read_record
from twist.contracts.weights import Backbone, write_backbone
from twist.transfer.end import render_end
from twist.transfer.engines import all_engines
from twist.transfer.protocols import find_protocol
from twist.transfer.request import Controls, Request, Result, split_overrides
from twist.transfer.run import default_output, find_weights, prepare_weights, transfer

STORED = Path(__file__).resolve().parent / "stored" / "transfer"


def test_controls_are_taken_out_of_the_overrides() -> None:
    controls, rest = split_overrides(["architecture=resnet18", "SOLVER.BASE_LR=0.1", "keep_batch=true", "iterations=5"])
    assert (controls.architecture, controls.keep_batch, controls.iterations) == ("resnet18", True, 5)
    assert rest == ("SOLVER.BASE_LR=0.1",)
    with pytest.raises(UsageError, match="master=HOST:PORT"):
        split_overrides(["nodes=2"])
    with pytest.raises(UsageError, match="architecture"):
        split_overrides(["architecture=resnet19"])


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
    assert "vit_small_patch16 is no backbone of voc12aug-fcn-d16-30k" in attempt(
        overrides=("architecture=vit_small_patch16",)
    )
    assert "holds no run to evaluate" in attempt(eval_only=True)
    assert "this machine shows" in attempt(gpus=99)
    assert "cannot be part of a file's name" in attempt(method="my/../../method")
    assert "architecture and width are for --weights random" in attempt(
        weights=str(junk), overrides=("architecture=resnet18",)
    )


KNN = find_protocol("sample-knn")


def test_weights_are_called_by_their_folder_from_within_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "r50").mkdir()
    (tmp_path / "r50" / "backbone.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "r50")
    assert find_weights("backbone.safetensors", KNN, Controls())["name"] == "r50"
    assert find_weights(str(tmp_path / "r50"), KNN, Controls())["checkpoint"] == tmp_path / "r50/backbone.safetensors"
    # Of a run with a teacher, its network, and by a name that the student's run does not have.
    (tmp_path / "r50" / "teacher_backbone.safetensors").write_bytes(b"")
    found = find_weights(str(tmp_path / "r50"), KNN, Controls())
    assert (found["checkpoint"].name, found["name"]) == ("teacher_backbone.safetensors", "r50-teacher")


def test_the_end_compares_with_the_published_rows_of_the_same_method() -> None:
    def record(method: str, value: float, scale: str = "full") -> RunRecord:
        return make_record(method, "voc-frcnn-c4-24k", scale=scale, metrics={"voc07_box_ap_percent": value})

    row = find_protocol("voc-frcnn-c4-24k")
    moco = Backbone(architecture="resnet50", method="moco-v2", epochs=800)
    text = render_end(record("moco-v2", 57.1), row, moco)
    assert "published 57.4 ± 0.6, 800 ep: -0.30, within" in text
    assert "OUTSIDE" in render_end(record("moco-v2", 50.0), row, moco)
    detco = Backbone(architecture="resnet50", method="detco")
    assert "nothing published for detco" in render_end(record("detco", 50.0), row, detco)
    assert "published 57" not in render_end(record("moco-v2", 57.1, scale="reduced"), row, moco)
    small = moco.model_copy(update={"architecture": "resnet18"})
    assert "on a resnet18" in render_end(record("moco-v2", 57.1), row, small)
    byol = Backbone(architecture="resnet50", method="byol", epochs=200)
    text = render_end(record("byol", 49.0), row, byol)
    assert "under another recipe (VOC07+12 C4 24k, learning rate searched) 55.3, 200 ep: -6.30" in text
    assert "OUTSIDE" not in text


def test_how_a_checkpoint_is_read_can_be_said(tmp_path) -> None:
    """What `twist convert` takes as --from and --branch; here for a file that two layouts fit."""
    file = tmp_path / "byol_r18.pth"
    torch.save({}, file)

    def found(weights: str, **given: str):
        return find_weights(weights, KNN, Controls(), **given)

    online, target = (found(str(file), layout="byol-torch", branch=branch) for branch in ("online", "target"))
    assert (online["reading"], online["name"]) == ({"layout": "byol-torch", "branch": "online"}, "byol_r18")
    assert default_output(KNN, online, 0) != default_output(KNN, target, 0)
    supervised = found(f"torchvision:{file}")
    assert (supervised["reading"], supervised["method"]) == ({"layout": "torchvision"}, "supervised")
    with pytest.raises(UsageError, match="leave out the prefix"):
        found(f"torchvision:{file}", layout="moco")
    for given in ({"layout": "moco"}, {"branch": "online"}):
        with pytest.raises(UsageError, match="--weights random reads none"):
            found("random", **given)


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
    (tmp_path / "data").mkdir()  # as a disk that is not mounted
    with pytest.raises(UserError, match=rf"on imagenet \w+, and {tmp_path / 'data'} has no readable imagenet"):
        transfer("knn", data=tmp_path / "data", overrides=quick, **given)
    assert transfer("knn", data=tmp_path / "moved", overrides=quick, **given).metrics == record.metrics
    # A run that was begun before folders said their data goes on.
    account = json.loads((tmp_path / "run" / folder.RUN_FILE).read_text())
    del account["data"]
    (tmp_path / "run" / folder.RUN_FILE).write_text(json.dumps(account))
    assert transfer("knn", data=tmp_path / "moved", overrides=quick, **given).data == record.data


QUICK_KNN = ("size=32", "resize=36", "machine.workers=0")


def test_runs_with_a_shared_folder_convert_once(tmp_path, monkeypatch) -> None:
    made = []

    def convert(checkpoint, *, to, output, **reading):
        made.append((checkpoint, to, reading.get("branch")))
        output.mkdir(parents=True)
        for name in ("weights.pth", "overlay.py"):
            (output / name).write_text(name)
        header = Backbone(architecture="resnet18", method="twist", epochs=7)
        return SimpleNamespace(backbone=header, weights=output / "weights.pth", overlay=output / "overlay.py")

    monkeypatch.setattr("twist.transfer.run.convert", convert)
    (tmp_path / "one.pth").write_bytes(b"1")
    shared = Controls(shared=str(tmp_path / "shared"))

    def prepared(seed: int, **reading: str):
        request = Request(
            find_protocol("sample-voc-fcn-d8"),
            tmp_path,
            tmp_path / f"{seed}",
            tmp_path / "one.pth",
            controls=shared,
            reading=reading,
        )
        return prepare_weights(request)

    first = prepared(0)
    assert (first.header.epochs, first.file.read_text(), first.overlay.read_text()) == (7, "weights.pth", "overlay.py")
    assert prepared(1) == first
    assert len(made) == 1
    assert prepared(2, branch="teacher").file != first.file  # other tensors of the same file
    first.overlay.write_text("damaged")
    assert prepared(3) == first
    assert first.overlay.read_text() == "overlay.py"
    (tmp_path / "one.pth").write_bytes(b"2")
    assert prepared(4).file not in (first.file, prepared(2, branch="teacher").file)
    assert len(made) == 5


@pytest.fixture
def knn(tmp_path, monkeypatch):
    """`twist transfer knn` of random weights in a working directory with a tree; overrides and options are given."""
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "data")

    def run(*overrides: str, **options):
        options = {"data": tmp_path / "data", "gpus": 0, **options}
        return transfer("knn", weights="random", overrides=(*QUICK_KNN, *overrides), **options)

    return run


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


def test_two_processes_do_not_continue_one_run(knn, tmp_path) -> None:
    out = tmp_path / "out"
    first = knn("architecture=resnet18", output=out)
    account = (out / folder.RUN_FILE).read_bytes()
    command = [sys.executable, "-c", HOLD, str(out / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for again in ({"resume": True}, {"eval_only": True}, {}):
            with pytest.raises(UserError, match=r"Another process is writing in .*--output"):
                knn("architecture=resnet18", output=out, **again)
        other.stdin.write("\n")
    assert (out / folder.RUN_FILE).read_bytes() == account
    assert knn("architecture=resnet18", output=out, resume=True) == first


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
        knn("architecture=resnet18", "neighbours=3", output=out, resume=True)
    # Earlier versions noted no network: that of the weights in the folder counts.
    account = json.loads((out / folder.RUN_FILE).read_text())
    del account["weights"]["architecture"], account["weights"]["width"], account["record"]
    (out / folder.RUN_FILE).write_text(json.dumps(account))
    with pytest.raises(UserError, match=r"weights\.architecture was 'resnet18' and is 'resnet34' now"):
        knn("architecture=resnet34", output=out, resume=True)
    assert (out / "weights" / "random.safetensors").read_bytes() == began_with
    knn("architecture=resnet18", output=out, resume=True)
    assert json.loads((out / folder.RUN_FILE).read_text())["weights"]["architecture"] == "resnet18"
    (_,) = find_records([out / "results"])


def test_random_weights_of_another_network_have_a_folder_of_their_own() -> None:
    def name(protocol: str, *overrides: str) -> str:
        row, (controls, _) = find_protocol(protocol), split_overrides(overrides)
        return default_output(row, find_weights("random", row, controls), 0).name

    assert name("sample-knn") == name("sample-knn", "architecture=resnet18") == name("knn") == "random-seed0"
    assert name("sample-knn", "architecture=resnet50") == "random-resnet50-seed0"
    assert name("knn", "width=2") == "random-resnet50w2-seed0"


@pytest.mark.parametrize(
    ("stored", "make_data", "overrides", "other"),
    [
        (
            "knn",
            write_tree,
            ("architecture=resnet18", *QUICK_KNN),
            ("neighbours=3", "recipe.neighbours was 20 and is 3"),
        ),
        pytest.param(
            PROTOCOL,
            make_voc_segmentation,
            ("architecture=resnet18", *QUICK),
            ("optim_wrapper.optimizer.lr=1.0", "lr was 0.0015 and is 1.0"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_folder_of_an_earlier_version_is_the_same_run(
    stored, make_data, overrides, other, tmp_path, monkeypatch
) -> None:
    """`tests/stored/transfer` was made at commit 9b5e91f, stopped before the first step."""
    make_data(tmp_path / "data")
    row, out = find_protocol(stored), tmp_path / "run"
    shutil.copytree(STORED / stored, out)
    run = json.loads((out / "run.json").read_text())
    # The sizes of the tree's pictures are Pillow's.
    (out / "run.json").write_text(
        json.dumps({**run, "data": identify_data(row.data, tmp_path / "data", subset=row.subset)})
    )
    program = importlib.import_module(all_engines()[row.engine].module)
    monkeypatch.setattr(program, "run", lambda _, __, plan: Result(dict.fromkeys(row.metrics, 1.0), plan.recipe))

    def go_on(*more: str, **options):
        given = {"weights": "random", "data": tmp_path / "data", "gpus": 0, "resume": True, **options}
        return transfer(stored, overrides=[*overrides, *more], output=out, **given)

    with pytest.raises(UserError, match=re.escape(other[1])):
        go_on(other[0])
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        go_on(seed=1)
    record = go_on()
    assert {key: record.recipe[key] for key in run["recipe"]} == run["recipe"]


def test_the_record_of_a_run_that_an_earlier_version_finished_is_taken(knn, tmp_path) -> None:
    shutil.copytree(STORED / "knn-done", tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    run["data"] = identify_data(("imagenet",), tmp_path / "data")
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    record = knn("architecture=resnet18", output=tmp_path / "out", resume=True)
    assert record == read_record(tmp_path / "out" / run["record"])


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
