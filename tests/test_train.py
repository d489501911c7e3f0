"""The training loop: what a run writes, what it refuses, and how it behaves when numbers go wrong."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gloo import run_on_ranks
from host_reads import HostReads
from imagenet_tree import write_tree
from tiny_cards import write_masks
from tiny_run import differing, final_state, make_images, rows, run, tiny_config, tiny_networks
from torch import nn

from twist.contracts import machine, states
from twist.contracts.config import load_config
from twist.contracts.errors import UsageError, UserError
from twist.contracts.networks import ResNet
from twist.contracts.weights import read_backbone
from twist.pretrain import run as run_module
from twist.pretrain import train
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data.loader import ViewLoader
from twist.pretrain.data.source import open_images
from twist.pretrain.model import build_model
from twist.pretrain.monitor import Monitor
from twist.pretrain.plan import Plan
from twist.pretrain.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


# --- what a run writes ------------------------------------------------------------------------------------------------

KEYS = {
    "step", "epoch", "stage", "total", "consistency", "sharpness", "diversity", "agreement", "mean_entropy",
    "mean_entropy_share", "row_entropy", "classes_used", "gradient_norm", "lr", "images_per_s", "data_wait_share",
    "nonfinite_steps", "bad_images",
}  # fmt: skip


def test_a_run_writes_what_it_promises(images: Path, tmp_path: Path, capsys) -> None:
    config = tiny_config(images, model={"teacher": True}, run={"mutual_information_epochs": 1})
    path = run(config, tmp_path)
    said = capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {
        "backbone.safetensors", "teacher_backbone.safetensors", "checkpoints", "config.json", "lock", "metrics.jsonl",
        "plan.txt", "tensorboard",
    }  # fmt: skip
    assert (tmp_path / "plan.txt").read_text() in said
    assert f"The backbone to evaluate is {tmp_path / 'teacher_backbone.safetensors'}" in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))
    assert lines[0].keys() == KEYS
    assert lines[9].keys() == KEYS - {"consistency", "sharpness", "diversity"} | {"self_label_threshold"}
    for line in lines:
        assert 0 <= line["agreement"] <= 1
        assert 0 < line["row_entropy"] <= math.log(12) + 1e-6
        assert 0 < line["mean_entropy_share"] <= 1 + 1e-6
        assert 1 <= line["classes_used"] <= 8
        assert line["images_per_s"] > 0
    first = lines[0]
    assert first["total"] == pytest.approx(first["consistency"] + first["sharpness"] - first["diversity"], abs=1e-5)
    tensors, header = read_backbone(path)
    assert (header.architecture, header.method, header.epochs, header.seed) == ("resnet18", "twist", 2, 0)
    assert header.images_sha256 == open_images(config.data).fingerprint()
    state = final_state(tmp_path)
    assert differing(tensors, {k.removeprefix("backbone."): v for k, v in state["model"].items() if k[0] == "b"}) == []
    teacher, header = read_backbone(tmp_path / "teacher_backbone.safetensors")
    assert header.source_branch == "teacher"
    assert differing(tensors, teacher) != []


def test_no_row_is_lost_where_an_epoch_ends_by_images_and_not_by_steps(tmp_path: Path, monkeypatch) -> None:
    """After a resume on another number of ranks the steps of an epoch do not say where it ends."""
    config = tiny_config(make_images(tmp_path / "images"), run={"log_every_steps": 10, "checkpoint_every_steps": None})
    batches = ViewLoader.epoch

    def fewer(self, number, **options):
        yield from itertools.islice(batches(self, number, **options), 3)

    monkeypatch.setattr(ViewLoader, "epoch", fewer)
    run(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(6))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("loss.lam1=nan", "does not fit"),
        ("model.teacher_momentum=[5.0,1.0]", "does not fit"),
        ("views.blur_sigma=[0.1,inf]", "finite"),
        ("model.backbone=vit_small_patch16 model.width=2", r"model\.width = 2 would have no effect"),
        ("optim.name=adamw optim.momentum=0.8", r"optim\.momentum = 0\.8 would have no effect"),
    ],
)
def test_numbers_that_are_none_or_would_do_nothing_are_refused(overrides: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_config(
            CONFIGS / "smoke.toml", PretrainConfig, ["views.global_size=32", "views.local_size=16", *overrides.split()]
        )


@pytest.mark.parametrize("name", ["checkpoints/step_1000.pt", "teacher_backbone.safetensors"])
def test_a_folder_of_somebody_else_is_left_as_it_is(name: str, images: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"holds {re.escape(name)} and no config.json"):
            run(tiny_config(images), tmp_path / "theirs", resume=resume)
    assert theirs.read_text() == "precious"
    assert [path for path in (tmp_path / "theirs").rglob("*") if path.is_file()] == [theirs]
    (tmp_path / "theirs" / "config.json").write_text('{"architectures": {"0": "BertModel"}}')
    with pytest.raises(UserError, match="is not a run's config"):
        run(tiny_config(images), tmp_path / "theirs", resume=True)


def test_too_little_shared_memory_is_named_before_workers_die_of_it(images: Path, monkeypatch) -> None:
    views = {"global_size": 224, "local_count": 12, "local_size": 96}
    config = tiny_config(images, views=views, data={"workers": 8}, run={"batch_size": 128})
    plan = Plan(config, images=1_281_167, world_size=8, device=CPU)
    # 8 workers × 3 batches × 128 images × (2 · 224² + 12 · 96²) pixels × 3 bytes.
    assert plan.loader_bytes == 8 * 3 * 128 * 210_944 * 3
    assert "1.9 GB of shared memory a rank" in plan.render()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for free, said in ((64_000_000, "may take 15.6 GB.* has 0.1 GB free"), (16_000_000_000, None), (None, None)):
        monkeypatch.setattr(machine, "free_shared_memory", lambda free=free: free)
        lack = plan.warnings()
        assert lack == [] if said is None else re.search(said, lack[0])


@pytest.mark.slow
def test_it_learns(images: Path, tmp_path: Path) -> None:
    config = tiny_config(images, run={"epochs": 12, "mutual_information_epochs": 12, "checkpoint_every_steps": None})
    run(config, tmp_path)
    totals = [row["total"] for row in rows(tmp_path)]
    assert sum(totals[-10:]) / 10 < sum(totals[:10]) / 10 - 0.1


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"batch_size": 32}}, r"20 images.*batch of 32"),
        ({"model": {"bunch_size": 256}}, r"model.bunch_size = 256 with run.batch_size = 4 on 1 rank"),
        ({"run": {"warm_start": "absent.pth"}}, "no checkpoint at absent.pth"),
        ({"run": {"online_eval_root": "absent"}}, "no ImageNet-like tree at"),
    ],
)
def test_a_run_that_cannot_be_leaves_no_folder(changes: dict, said: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        run(tiny_config(images, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("root", "evaluated"), [(".", False), ("imagenet", False), ("imagenet/val", True), ("above", True)]
)
def test_validation_images_are_not_trained_on(root: str, evaluated: bool, tmp_path: Path) -> None:
    write_tree(tmp_path / "imagenet", train=4, val=2)
    (tmp_path / "above").symlink_to(tmp_path)
    online = {"online_eval_root": str(tmp_path / "imagenet")} if evaluated else {}
    with pytest.raises(UserError, match=r"contains .*imagenet/val, on which .*data.root=.*imagenet/train"):
        run(tiny_config(tmp_path / root, run=online), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_end_of_the_first_stage_is_kept_and_the_second_one_starts_from_it(images: Path, tmp_path: Path) -> None:
    both = {"epochs": 3, "mutual_information_epochs": 1, "keep_checkpoints": 1}
    run(tiny_config(images, run=both), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    kept = folder / "first_stage.pt"
    assert sorted(path.stem for path in folder.glob("*.pt")) == ["first_stage", "step_00000015"]
    fields, sealed = states.read_manifest(states.manifest_of(kept))
    assert sealed
    assert states.damage(kept, fields) is None
    assert fields["position"] == {"steps": 5, "epoch": 1, "samples": 0}
    alone = {"epochs": 2, "mutual_information_epochs": 0, "warm_start": str(kept)}
    run(tiny_config(images, run=alone), tmp_path / "second")
    first, second = rows(tmp_path / "run")[5], rows(tmp_path / "second")[0]
    # The same weights and batch norms, at the rate of the second stage's first step; other views, as of another epoch.
    assert (second["lr"], second["step"]) == (first["lr"], 0)
    assert second["total"] == pytest.approx(first["total"], rel=0.5)
    with pytest.raises(UserError, match=r"needs a network that has learnt classes.*run.warm_start"):
        tiny_config(images, run={"epochs": 2, "mutual_information_epochs": 0})


def test_other_images_than_before(images: Path, tmp_path: Path) -> None:
    def listed(lines: list[str], ends: str = "\n"):
        (tmp_path / "list.txt").write_bytes(ends.join(lines).encode())
        return tiny_config(images, data={"root": str(tmp_path / "list.txt"), "format": "list"})

    names = [str(path) for path in sorted(images.iterdir())]
    run(listed(["\ufeff" + names[0], *names[1:], ""], "\r\n"), tmp_path / "run")  # as an editor may save it
    for lines in (names[::-1], names[:16]):  # in another order, and fewer
        with pytest.raises(UserError, match=rf"trained on 20 images, and data.root has {len(lines)} now, others"):
            run(listed(lines), tmp_path / "run", resume=True)
    # Elsewhere, and with a mended one, they are no others: the message of too many bad images says to go on.
    run(tiny_config(images), tmp_path / "folder")
    moved = shutil.copytree(images, tmp_path / "mended")
    (moved / "003.jpg").write_bytes((moved / "004.jpg").read_bytes() + b"\0")
    run(tiny_config(moved), tmp_path / "folder", resume=True)


# --- numbers that are not finite --------------------------------------------------------------------------------------


def poison(monkeypatch, steps: range, *, in_views: bool) -> None:
    """Make the loss (or the input) of these steps non-finite."""
    objective, in_layout = train.objective, train.in_layout
    done = [0]

    def poisoned_views(views, config):
        if done[0] in steps and in_views:
            views[0][0, 0, 0, 0] = math.inf
        return in_layout(views, config)

    def poisoned_loss(*arguments, **options):
        loss = objective(*arguments, **options)
        bad = done[0] in steps
        done[0] += 1
        return loss._replace(total=loss.total * math.nan) if bad and not in_views else loss

    monkeypatch.setattr(train, "in_layout", poisoned_views)
    monkeypatch.setattr(train, "objective", poisoned_loss)


def test_a_teacher_goes_on_towards_a_student_that_skipped(images: Path, tmp_path: Path, monkeypatch) -> None:
    """As published; what it takes from a skipped step is finite, and the student's as it was."""
    pairs = []
    original = Run.after_step

    def after_step(self, *step):
        pairs.append([torch.cat([p.flatten() for p in n.parameters()]).clone() for n in (self.student, self.teacher)])
        original(self, *step)

    monkeypatch.setattr(Run, "after_step", after_step)
    poison(monkeypatch, range(3, 4), in_views=False)
    run(tiny_config(images, model={"teacher": True, "teacher_momentum": [0.9, 0.9]}), tmp_path)
    (student, before), (same_student, after) = pairs[2:4]
    assert torch.equal(student, same_student)
    torch.testing.assert_close(after, before.lerp(student, 0.1))
    assert not torch.equal(after, before)


@pytest.mark.parametrize(("in_views", "optimizer"), [(False, "adamw"), (True, "lars")])
def test_a_nonfinite_step_changes_nothing(images: Path, tmp_path: Path, monkeypatch, in_views, optimizer) -> None:
    snapshots = []
    original = Run.after_step

    def after_step(self, *step):
        snapshots.append(torch.cat([t.flatten().double() for t in tensors_of(self)]))
        original(self, *step)

    monkeypatch.setattr(Run, "after_step", after_step)
    poison(monkeypatch, range(3, 5), in_views=in_views)
    config = tiny_config(images, model={"teacher": True, "teacher_momentum": [1.0, 1.0]}, optim={"name": optimizer})
    run(config, tmp_path)
    assert torch.equal(snapshots[2], snapshots[3])
    assert torch.equal(snapshots[2], snapshots[4])
    assert not torch.equal(snapshots[1], snapshots[2])
    assert not torch.equal(snapshots[4], snapshots[5])
    assert all(torch.isfinite(snapshot).all() for snapshot in snapshots)
    counts = [row["nonfinite_steps"] for row in rows(tmp_path)]
    assert counts == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]


def tensors_of(run: Run) -> list[torch.Tensor]:
    """Weights, running statistics, teacher and optimiser state (without the counters of batches seen)."""
    state = run.state()
    models = [t for part in ("model", "teacher") for n, t in state[part].items() if not n.endswith("tracked")]
    moments = [t for s in state["optimizer"]["state"].values() for t in s.values() if isinstance(t, torch.Tensor)]
    return [t.clone() for t in models + moments]


def test_a_streak_ends_the_run_before_anything_is_spoilt(images: Path, tmp_path: Path, monkeypatch) -> None:
    poison(monkeypatch, range(4, 100), in_views=True)
    with pytest.raises(UserError, match=r"not finite in the last \d steps.*--resume.*optim\.lr"):
        run(tiny_config(images, run={"max_nonfinite_steps": 3}), tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()
    assert all(torch.isfinite(t).all() for t in final_state(tmp_path)["model"].values())


def poisoned_on_one_rank(rank: int, config, folder: Path) -> dict[str, object]:
    original, done = train.objective, [0]

    def objective(*arguments, **options):
        loss = original(*arguments, **options)
        done[0] += 1
        return loss._replace(total=loss.total * math.nan) if rank == 1 and done[0] == 3 else loss

    train.objective = objective
    with tiny_networks():
        train.pretrain(config, output=folder)
    return {"counts": [row["nonfinite_steps"] for row in rows(folder)]}


@pytest.mark.slow
def test_one_rank_that_fails_makes_all_ranks_skip(images: Path, tmp_path: Path) -> None:
    config = tiny_config(images, run={"batch_size": 2})
    for rank in run_on_ranks(2, poisoned_on_one_rank, config, tmp_path):
        assert rank["counts"] == [0, 0] + [1] * 8
    assert all(torch.isfinite(t).all() for t in final_state(tmp_path)["model"].values())


# --- collapse ---------------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """A backbone that says the same of every image; the last norm makes that uniform predictions."""

    num_features = 8

    def __init__(self, *_, **__) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.ones(8))

    def forward(self, images):
        return self.output.expand(len(images), 8)


@pytest.mark.parametrize("reaction", ["warn", "stop"])
def test_a_constant_network_raises_the_alarm(images: Path, tmp_path: Path, monkeypatch, capsys, reaction) -> None:
    from twist.pretrain import model

    monkeypatch.setattr(model, "build_backbone", Constant)
    config = tiny_config(images, run={"epochs": 5, "mutual_information_epochs": 5, "on_collapse": reaction})
    if reaction == "stop":
        with pytest.raises(UserError, match=r"collapsed since step 0.*run.on_collapse"):
            train.pretrain(config, output=tmp_path)
        assert len(rows(tmp_path)) == 20
    else:
        train.pretrain(config, output=tmp_path)
        assert capsys.readouterr().err.count("ALARM: Predictions have collapsed") == 1
        assert len(rows(tmp_path)) == 25


# --- waiting for the device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "optimizer"), [("mutual_information", "adamw"), ("self_label", "lars")])
def test_no_step_reads_anything_on_the_host(images: Path, tmp_path: Path, monkeypatch, stage, optimizer) -> None:
    """The loop's part of every step, from the batch's arrival to the next one's request; but for the log's fetch."""
    first = 1 if stage == "self_label" else 2
    config = tiny_config(
        images,
        model={"teacher": True},
        optim={"name": optimizer, "clip_norm": 3.0},
        run={"mutual_information_epochs": first, "log_every_steps": 2, "checkpoint_every_steps": None},
    )
    reads, steps = HostReads(), []
    batches = ViewLoader.epoch

    def epoch(self, number, **options):
        for batch in batches(self, number, **options):
            steps.append(number)
            reads.listening = True
            yield batch
            reads.listening = False

    monkeypatch.setattr(ViewLoader, "epoch", epoch)
    fetches = []
    for name in ("pass_on", "flush"):
        original = getattr(Monitor, name)

        def fetch(self, _original=original):
            fetches.append(len(steps))
            with reads.ignored():
                return _original(self)

        monkeypatch.setattr(Monitor, name, fetch)
    with reads.heard(), reads.ignored():
        run(config, tmp_path)
    assert reads.found == []
    assert steps == [0] * 5 + [1] * 5
    assert set(fetches) == {2, 4, 5, 6, 8, 10}


def test_reads_are_heard() -> None:
    """The control of the test above: whatever waits for a device is noticed, what does not is not."""
    reads, x = HostReads(), torch.ones(3)
    waiting = (
        lambda: x.sum().item(), lambda: float(x[0]), lambda: bool(x[0] > 0), lambda: f"{x[0]:.2f}", lambda: x.tolist(),
        lambda: x.cpu(), lambda: x.numpy(), lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.equal(x, x),
    )  # fmt: skip
    for number, read in enumerate(waiting, start=1):
        with reads.heard():
            read()
        assert len(reads.found) == number, reads.found
    with reads.heard():
        x.mul_(2).sum().detach().float().clone()
        x[torch.tensor([0, 2])].max()
        with reads.ignored():
            x.tolist()
    assert len(reads.found) == len(waiting)


# --- online evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_online_evaluation_is_written_also_where_it_was_cut_off(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            make_images(tmp_path / "labelled" / split / name, 4)
    # By a data card, which has names of its own for the splits.
    (tmp_path / "labelled" / "val").rename(tmp_path / "labelled" / "held-out")
    card = 'name = "labels"\nroot = "labelled"\n[classification]\ntrain = "train"\nval = "held-out"\n'
    (tmp_path / "labels.toml").write_text(card)
    where = str(tmp_path / "labels.toml")
    config = tiny_config(images, run={"online_eval_root": where, "online_eval_every_epochs": 1})
    run(config, tmp_path / "whole")
    cut, whole = (tmp_path / name / "online_eval.jsonl" for name in ("cut", "whole"))
    found = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["epoch"] for row in found] == [0, 1]
    assert all(0 <= row["knn_top1_percent"] <= 100 and 0 <= row["nmi_percent"] <= 100 for row in found)
    assert all(1 <= row["rankme"] <= 512 for row in found)
    run(tiny_config(images), tmp_path / "plain")
    assert rows(tmp_path / "plain") == rows(tmp_path / "whole")  # looking changes nothing

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "evaluate", killed)
        run(config, tmp_path / "cut")
    for _ in range(2):  # the second time with nothing left to do
        run(config, tmp_path / "cut", resume=True)
    assert cut.read_text() == whole.read_text()


def test_masks_of_a_card_are_evaluated_as_knn_seg_does(images: Path, tmp_path: Path) -> None:
    """Features that are the pixels' own colours find the coloured squares; a random network finds some."""
    from twist.pretrain import online_eval

    card = write_masks(tmp_path / "nests", count=4)
    config = tiny_config(images, views={"global_size": 32}, run={"online_eval_root": str(card.parent)})
    model, _ = build_model(config, device=torch.device("cpu"))
    found = online_eval.evaluate(model, config, device=torch.device("cpu"))
    assert found.keys() == {"miou_percent"}
    assert model.training

    class Colours(ResNet):
        def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"res5": torch.nn.functional.avg_pool2d(x, 2)}

    model.backbone.__class__ = Colours
    assert online_eval.evaluate(model, config, device=torch.device("cpu"))["miou_percent"] > max(60, *found.values())
    card.write_text('name = "boxes"\n[pretraining]\nimages = "images"\n')
    with pytest.raises(UserError, match=r"neither \[classification\] nor \[segmentation\]"):
        online_eval.open_data(str(card))


# --- the shipped configs ----------------------------------------------------------------------------------------------

CONFIGS = Path(train.__file__).resolve().parent.parent / "configs" / "pretrain"
# File → GPUs, total batch, lr after scaling (README of bytedance/TWIST, commit 796d36e).
PUBLISHED = {
    "r50_multicrop_850ep": (16, 2048, 4.0),
    "r50_plain_800ep": (8, 2048, 4.0),
    "r50_clusters_800ep": (16, 2048, 4.0),
    "r50w2_250ep": (32, 1920, 3.75),
    "deit_s_300ep": (16, 1024, 1.2e-3),
    "vit_b_300ep": (32, 1024, 3e-3),
}


@pytest.mark.parametrize("path", sorted({*CONFIGS.glob("*.toml"), *(CONFIGS / f"{name}.toml" for name in PUBLISHED)}))
def test_every_config_is_valid_and_says_how_to_use_it(path: Path) -> None:
    config = load_config(path, PretrainConfig)
    heading = path.read_text().split("\n\n[")[0]
    assert all(line.startswith("#") for line in heading.splitlines())
    for part in (f"configs/pretrain/{path.name}", "Hardware:", "Expected:"):
        assert part in heading
    if path.stem in PUBLISHED:
        ranks, total_batch, lr = PUBLISHED[path.stem]
        plan = Plan(config, images=1_281_167, world_size=ranks, device=CPU)
        assert (plan.total_batch, plan.lr) == (total_batch, pytest.approx(lr))
        assert "Source:" in heading


# --- as a user starts it ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_on_two_ranks_ends_where_one_rank_would(images: Path, tmp_path: Path) -> None:
    # The real thing: two processes that find each other through torchrun's environment, the shipped smoke config.
    root = Path(train.__file__).resolve().parent.parent
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "twist",
        "pretrain", str(root / "configs" / "pretrain" / "smoke.toml"), f"data.root={images}", "run.batch_size=4",
        "run.device=cpu", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 images × 2 rank(s) = 8" in done.stderr
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    assert len(rows(tmp_path / "run")) == 4
