"""ImageNet protocols through `transfer`: what makes a run the same run, evaluation alone, what a folder keeps."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet_tree import write_tree
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from twist.cli import app
from twist.contracts import run_folder as folder
from twist.contracts.errors import UserError
from twist.contracts.networks import build_backbone
from twist.contracts.record import find_records, read_record
from twist.contracts.weights import METADATA_KEY
from twist.transfer.engines.imagenet import training
from twist.transfer.predict import predict
from twist.transfer.run import transfer

QUICK = ["architecture=resnet18", "size=32", "resize=36", "batch_size=9", "epochs=2"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


def go(tree: Path, output: Path, *overrides: str, **more: Any) -> Any:
    torch.set_num_threads(1)
    given = [*QUICK, "machine.workers=0", *overrides]  # the last of a key counts
    return transfer("linear", weights="random", data=tree, gpus=0, output=output, overrides=given, **more)


@pytest.fixture
def stopped(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped after the first of its two epochs."""
    save = training.Trainer._save

    def save_then_stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Trainer, "_save", save_then_stop)
        patch.setattr(training, "SAVE_EVERY_S", 0.0)
        go(tree, tmp_path / "run")
    return tmp_path / "run"


def state_of(output: Path) -> str:
    return json.loads((output / folder.RUN_FILE).read_text())["state"]


@pytest.mark.slow
def test_resume_takes_another_machine_and_no_other_recipe(
    tree: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"holds another run: recipe\.lr_classifier was 0\.2 and is 0\.1 now"):
        go(tree, stopped, "lr_classifier=0.1", resume=True)
    with pytest.raises(UserError, match=r"holds another run: data was 'imagenet \w+' and is 'imagenet \w+' now"):
        go(write_tree(stopped.parent / "fewer", train=2), stopped, resume=True)
    with pytest.raises(UserError, match=r"stands at epoch 1 of 2: .*so finish this one with --resume\.$"):
        go(tree, stopped, eval_only=True)
    assert state_of(stopped) == folder.RUNNING
    # What `decoded` advises when a worker dies, and an override that says what the recipe says already.
    record = go(tree, stopped, "machine.workers=1", "machine.feature_batch_size=4", "lr_classifier=0.2", resume=True)
    assert state_of(stopped) == folder.DONE
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert record.metrics["top1_percent"] == rows[-1]["top1_percent"]
    assert "plan: 1 process on the CPU\n  images a step 9 (9 a process)" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_alone_of_a_finished_run_replaces_its_record(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = go(tree, tmp_path / "run")
    capsys.readouterr()
    checkpoint = (tmp_path / "run" / training.CHECKPOINT).read_bytes()
    again = go(tree, tmp_path / "run", "machine.feature_batch_size=2", eval_only=True)
    assert (again.metrics, again.recipe_hash) == (first.metrics, first.recipe_hash)
    assert "the stored weights are evaluated, nothing is trained" in capsys.readouterr().err
    assert (tmp_path / "run" / training.CHECKPOINT).read_bytes() == checkpoint
    assert state_of(tmp_path / "run") == folder.DONE
    (path,) = find_records([tmp_path / "run" / "results"])
    record = read_record(path)
    assert any("nothing was trained" in note for note in record.notes)
    assert [Path(name).name for name in record.media] == ["predictions.png", "losses.png"]
    assert all((path.parent / name).is_file() for name in (*record.media, record.curves))

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("twist.measure.features.Extractor.features", run_out)
    with pytest.raises(UserError, match=r"lower machine\.feature_batch_size\.$"):
        go(tree, tmp_path / "run", eval_only=True)
    assert state_of(tmp_path / "run") == folder.DONE, "an evaluation that fails leaves it finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "overrides"),
    [("linear-grid", ("holdout_every=4",)), ("semi-10pct", ("labels_from=seed", "batch_size=3"))],
)
def test_predictions_of_a_finished_run_are_as_often_right_as_it_measured(
    protocol: str, overrides: tuple[str, ...], tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    given = [*QUICK, "machine.workers=0", *overrides]
    run, output = tmp_path / "run", tmp_path / "told"
    record = transfer(protocol, weights="random", data=tree, gpus=0, output=run, overrides=given)
    capsys.readouterr()
    arguments = ["predict", str(run), str(tree / "val"), "--output", str(output)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).output.endswith(f"{output}/predictions.json\n")
    found = json.loads((output / "predictions.json").read_text())
    assert found == predict(run, tree / "val", output), "earlier predictions are replaced"
    right = [image["classes"][0]["name"] == Path(image["file_name"]).parent.name for image in found["images"]]
    assert 100 * sum(right) / len(right) == pytest.approx(record.metrics["top1_percent"])
    assert all(sum(one["score"] for one in image["classes"]) == pytest.approx(1) for image in found["images"])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").touch()
    with pytest.raises(UserError, match=r"holds letter\.txt"):
        predict(run, tree / "val", tmp_path / "own")
    if protocol == "linear-grid":  # fine-tuning has its own backbone
        (run / "weights" / "random.safetensors").unlink()
        with pytest.raises(UserError, match=r"random\.safetensors.* put it back"):
            predict(run, tree / "val", output)


def test_runs_that_cannot_predict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no run in"):
        predict(tmp_path, tmp_path)
    cases = (("voc12aug-knn-seg", folder.DONE, "keeps no network"), ("linear", folder.RUNNING, "with --resume"))
    for protocol, state, said in cases:
        folder.write_run(tmp_path / protocol, {"protocol": protocol}, state=state)
        with pytest.raises(UserError, match=said):
            predict(tmp_path / protocol, tmp_path)
    folder.write_run(tmp_path / "knn", {"protocol": "knn"}, state=folder.DONE)
    (tmp_path / "knn" / "recipe.json").write_text('{"kind": "knn", "config": "knn"}')
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    with pytest.raises(UserError, match="knn trains no classifier"):
        predict(tmp_path / "knn", tmp_path / "p.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_start_that_is_refused_takes_no_folder(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key lr_clasifier"):
        go(tree, tmp_path / "run", "lr_clasifier=1")
    (tree / "val" / "class_1" / "torn.png").write_bytes(b"no picture")
    try:
        sentence = r"^Cannot read the image \S+torn\.png: Unsupported image file; delete or replace it\.$"
        with pytest.raises(UserError, match=sentence):
            go(tree, tmp_path / "other")
    finally:
        (tree / "val" / "class_1" / "torn.png").unlink()
    assert not (tmp_path / "run").exists()


STORED = Path(__file__).parent / "stored" / "linear"


def exact_weights(path: Path) -> Path:
    """A ResNet-18 of numbers that are the same on every machine, as an artefact with the header of its time."""
    state = build_backbone("resnet18").state_dict()
    for number, (name, tensor) in enumerate(sorted(state.items())):
        if tensor.ndim == 4:
            values = (torch.arange(tensor.numel()) * 40503 + 977 * number) % 65536 - 32768
            # About the scale of He's initialisation, by a power of two.
            scale = 2.0 ** -round(14 + math.log2(tensor[0].numel()) / 2)
            state[name] = values.float().mul(scale).view(tensor.shape)
    header = (STORED / "header.json").read_text().strip()
    save_file(state, path, metadata={METADATA_KEY: header})
    return path


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_continued_to_the_end_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """tests/stored/linear: a sample-linear of three epochs, stopped after the first by version 0.1.0 @9b5e91f."""
    weights = exact_weights(tmp_path / "exact.safetensors")
    shutil.copytree(STORED / "run", tmp_path / "run")
    torch.set_num_threads(1)
    changes = ["size=32", "resize=36", "batch_size=6", "epochs=3", "machine.evaluate_every_epochs=1"]
    how = {"weights": str(weights), "data": STORED / "tree", "gpus": 0, "overrides": changes}
    with pytest.raises(UserError, match="lr_classifier"):
        transfer(
            "sample-linear", **{**how, "overrides": [*changes, "lr_classifier=1"]}, output=tmp_path / "run", resume=True
        )
    resumed = transfer("sample-linear", **how, output=tmp_path / "run", resume=True)
    whole = transfer("sample-linear", **how, output=tmp_path / "whole")
    assert (resumed.metrics, resumed.recipe_hash) == (whole.metrics, whole.recipe_hash)
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    )
    assert [row["epoch"] for row in first] == [0, 1, 2]
    assert first[0] == json.loads((STORED / "run" / "metrics.jsonl").read_text()), "what was done is kept"
    assert [row["loss"] for row in first] == pytest.approx([row["loss"] for row in second], rel=1e-5)


def test_a_plan_says_what_a_run_would_do_and_leaves_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["transfer", "linear", *QUICK, "--weights", "random", "--data", tree, "--gpus", "0", "--dry-run"]
    app([str(word) for word in words], standalone_mode=False)
    planned = capsys.readouterr().out
    assert "batch_size" in planned
    assert "hours" in planned
    words = ["pretrain", "smoke", f"data.root={tree}/train", "run.epochs=3", "--dry-run"]
    app(words, standalone_mode=False)
    assert "epochs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
