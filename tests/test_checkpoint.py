"""Resume files: whole or absent, verified, pruned; and a run folder that belongs to one run and one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import Crash, crash_after, differing, final_state, make_images, rows, run, tiny_config

from twist.contracts.errors import UserError
from twist.pretrain import checkpoint, run_folder
from twist.pretrain.checkpoint import Manifest, Position

STATE = {"model": {"w": torch.arange(200.0)}, "optimizer": {"param_groups": [{"lr": 0.1, "name": "decayed"}]}}


def save(folder: Path, steps: int, *, keep: int = 3, state=STATE) -> Path:
    manifest = Manifest(Position(steps, 1, 8), images=20, images_sha256="x", names_sha256="y", world_size=2)
    return checkpoint.save(folder, state, manifest, keep=keep)


def test_what_is_saved_reads_back(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    said: list[str] = []
    found = checkpoint.newest_valid(tmp_path, say=said.append)
    assert found is not None
    assert found[0] == path
    assert found[1].position == Position(7, 1, 8)
    assert (found[1].images, found[1].world_size) == (20, 2)
    assert (found[1].images_sha256, found[1].names_sha256, found[1].format_version) == ("x", "y", 1)
    assert differing(checkpoint.load(path, device=torch.device("cpu")), STATE) == []
    assert said == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for steps in (5, 10, 100, 15):
        save(tmp_path, steps, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_00000015.json",
        "step_00000015.pt",
        "step_00000100.json",
        "step_00000100.pt",
    ]


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path, say=print) is None
    assert Position() == Position(steps=0, epoch=0, samples=0)


def test_a_state_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    newest.unlink()
    said: list[str] = []
    found = checkpoint.newest_valid(tmp_path, say=said.append)
    assert found is not None
    assert found[0] == before
    assert said == [f"Checkpoint {newest} is not valid (the file is gone)."]
    save(tmp_path, 3, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003.json", "step_00000003.pt"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), torn=st.booleans())
def test_a_damaged_file_is_named_and_the_one_before_it_taken(tmp_path: Path, place, bit, torn) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray(newest.read_bytes())
    offset = int(place * len(data))
    if torn:
        data = data[:offset]
    else:
        data[offset] ^= 1 << bit
    newest.write_bytes(data)
    said: list[str] = []
    found = checkpoint.newest_valid(tmp_path, say=said.append)
    assert found is not None
    assert found[0] == before
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "SHA-256" in said[0]


def test_a_damaged_manifest_counts_as_damage(tmp_path: Path) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    for text in ("{", "[]", '{"position": 3}', '{"sha256": "x"}'):
        newest.with_suffix(".json").write_text(text)
        said: list[str] = []
        found = checkpoint.newest_valid(tmp_path, say=said.append)
        assert found is not None
        assert found[0] == before
        assert "manifest is damaged" in said[0]
    future = json.loads(before.with_suffix(".json").read_text())
    before.with_suffix(".json").write_text(json.dumps({**future, "format_version": 99}))
    with pytest.raises(UserError, match="None of the 2 checkpoint"):
        checkpoint.newest_valid(tmp_path, say=said.append)
    assert "format 99" in said[-1]


def test_a_state_without_manifest_is_an_unfinished_write(tmp_path: Path) -> None:
    whole, unfinished = save(tmp_path, 1), save(tmp_path, 2)
    unfinished.with_suffix(".json").unlink()
    for name in (".step_00000003.pt.abc.pt", ".step_00000003.json.abc.json"):
        (tmp_path / name).write_bytes(b"half")
    found = checkpoint.newest_valid(tmp_path, say=print)
    assert found is not None
    assert found[0] == whole
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001.json", "step_00000001.pt"]


@pytest.mark.parametrize("name", ["fsync", "rename", "write"])
def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch, name: str) -> None:
    save(tmp_path, 1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if name == "write":
        monkeypatch.setattr(torch, "save", fail)
    elif name == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001.json", "step_00000001.pt"]


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path, 1, state={"model": Evil()})
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(path, device=torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_a_run_falls_back_and_says_so(tmp_path: Path, capsys) -> None:
    config = tiny_config(make_images(tmp_path / "images"), run={"keep_checkpoints": 3})
    with crash_after(4), pytest.raises(Crash):
        run(config, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    run(config, tmp_path / "run", resume=True)
    said = capsys.readouterr().err
    assert f"{newest} is not valid" in said
    assert "Resuming from" in said
    assert "3 steps done" in said
    run(config, tmp_path / "whole")
    assert differing(final_state(tmp_path / "run"), final_state(tmp_path / "whole")) == []
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path):
    return tiny_config(make_images(tmp_path / "images"))


def test_a_run_is_not_overwritten(config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_folder.prepare(folder_of(folder), config, resume=False)
    (folder / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="pass --resume to continue"):
        run_folder.prepare(folder, config, resume=False)


def folder_of(path: Path) -> Path:
    path.mkdir()
    return path


def test_another_run_is_refused_with_the_key(config, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run")
    run_folder.prepare(folder, config, resume=False)
    (folder / "metrics.jsonl").touch()
    other = tiny_config(tmp_path / "images", run={"seed": 5}, optim={"lr": 1.0})
    with pytest.raises(UserError, match=r"optim.lr was 8.0 and is 1.0 now \(and 1 more\)"):
        run_folder.prepare(folder, other, resume=True)


def test_a_start_that_failed_before_its_first_step_protects_nothing(config, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run")
    run_folder.prepare(folder, config, resume=False)
    mended = tiny_config(tmp_path / "images", optim={"lr": 1.0})
    run_folder.prepare(folder, mended, resume=False)
    assert json.loads((folder / "config.json").read_text())["optim"]["lr"] == 1.0


def test_a_disk_that_fills_costs_no_state_of_the_same_step(tmp_path: Path, monkeypatch) -> None:
    """An epoch's end may be a step that was saved already: what is there goes only when the new one is whole."""
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(checkpoint.torch, "save", full)
        save(tmp_path, 1)
    checkpoint.clean(tmp_path)
    found = checkpoint.newest_valid(tmp_path, say=print)
    assert found is not None
    assert found[0].name == "step_00000001.pt"


def test_a_step_that_ends_an_epoch_is_written_once(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    written = path.stat().st_mtime_ns
    checkpoint.move(path, Position(1, 2, 0))
    found = checkpoint.newest_valid(tmp_path, say=print)
    assert found is not None
    assert (found[1].position, path.stat().st_mtime_ns) == (Position(1, 2, 0), written)


def test_what_does_not_make_the_run_may_change(config, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run")
    run_folder.prepare(folder, config, resume=False)
    save(folder / "checkpoints", 1)
    moved = tiny_config(tmp_path / "elsewhere", data={"workers": 3}, run={"log_every_steps": 7, "keep_checkpoints": 9})
    run_folder.prepare(folder, moved, resume=True)
    assert run_folder.recipe_hash(moved) == run_folder.recipe_hash(config)
    assert run_folder.recipe_hash(tiny_config(tmp_path, run={"seed": 5})) == run_folder.recipe_hash(config)
    assert run_folder.recipe_hash(tiny_config(tmp_path, optim={"lr": 1.0})) != run_folder.recipe_hash(config)


def test_every_exempt_key_exists(config) -> None:
    values = config.model_dump()
    for section, keys in run_folder.NOT_IDENTITY.items():
        assert keys <= values[section].keys()


def test_resuming_nothing_starts_and_says_so(config, tmp_path: Path, capsys) -> None:
    run(config, tmp_path / "run", resume=True)
    assert "to resume from: starting from scratch" in capsys.readouterr().err
    assert (tmp_path / "run" / "backbone.safetensors").exists()


def test_a_file_that_is_no_config_is_not_overwritten(config, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run")
    (folder / "config.json").write_text("not json")
    with pytest.raises(UserError, match="not a run's config"):
        run_folder.prepare(folder, config, resume=True)
    assert (folder / "config.json").read_text() == "not json"


def hold(folder: Path, ready) -> None:
    with run_folder.locked(folder):
        ready.set()
        import time

        time.sleep(60)


@pytest.mark.slow
def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    child = context.Process(target=hold, args=(tmp_path, ready))
    child.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="Another process is writing"), run_folder.locked(tmp_path):
        pass
    child.kill()
    child.join()
    with run_folder.locked(tmp_path):
        pass
