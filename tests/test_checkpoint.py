"""Resume files: whole or absent, verified, pruned; and a run folder that belongs to one run and one process."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import Crash, crash_after, differing, final_state, make_images, rows, run, tiny_config

from twist.contracts import states
from twist.contracts.errors import UserError
from twist.pretrain import checkpoint
from twist.pretrain.checkpoint import Manifest, Position

STATE = {"model": {"w": torch.arange(200.0)}, "optimizer": {"param_groups": [{"lr": 0.1, "name": "decayed"}]}}


def save(folder: Path, steps: int, *, keep: int = 3, state=STATE) -> Path:
    manifest = Manifest(Position(steps, 1, 8), images=20, images_sha256="x", names_sha256="y", world_size=2)
    return checkpoint.save(folder, state, manifest, keep=keep)


def newest(folder: Path) -> tuple[Path | None, Manifest | None, list[str]]:
    """The newest valid state with its manifest, and what is said about others."""
    said: list[str] = []
    return *(checkpoint.newest_valid(folder, say=said.append) or (None, None)), said


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_reads_back_and_the_newest_are_kept(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, None, [])
    path = save(tmp_path, 7)
    found, manifest, said = newest(tmp_path)
    assert (found, said) == (path, [])
    assert manifest is not None
    assert (manifest.position, manifest.images, manifest.world_size) == (Position(7, 1, 8), 20, 2)
    assert (manifest.images_sha256, manifest.names_sha256, manifest.format_version) == ("x", "y", 2)
    assert differing(checkpoint.load(path, device=torch.device("cpu")), STATE) == []
    for steps in (5, 10, 100, 15):
        save(tmp_path, steps, keep=2)
    assert names(tmp_path) == [f"step_{step:08d}.{ending}" for step in (15, 100) for ending in ("json", "pt")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), torn=st.booleans())
def test_a_damaged_file_is_named_and_the_one_before_it_taken(tmp_path: Path, place, bit, torn) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    before, damaged = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray(damaged.read_bytes())
    offset = int(place * len(data))
    if torn:
        data = data[:offset]
    else:
        data[offset] ^= 1 << bit
    damaged.write_bytes(data)
    found, _, (sentence,) = newest(tmp_path)
    assert found == before
    assert str(damaged) in sentence
    assert "SHA-256" in sentence


def test_a_damaged_manifest_counts_as_damage(tmp_path: Path) -> None:
    before, damaged = save(tmp_path, 1), save(tmp_path, 2)
    damaged.rename(tmp_path / "gone")
    assert "the file is gone" in newest(tmp_path)[2][0]
    for text in ("{", "[]", '{"position": 3}', '{"sha256": "x"}'):
        damaged.with_suffix(".json").write_text(text)
        found, _, said = newest(tmp_path)
        assert found == before
        assert "manifest is damaged" in said[0]
    future = json.loads(before.with_suffix(".json").read_text())
    del future["manifest_sha256"]
    states.write_manifest(before.with_suffix(".json"), {**future, "format_version": 99})
    with pytest.raises(UserError, match=r"format 99.*put a good copy back"):
        newest(tmp_path)


def test_a_flipped_bit_of_a_manifest_is_damage(tmp_path: Path) -> None:
    before, damaged = save(tmp_path, 1), save(tmp_path, 2).with_suffix(".json")
    whole = damaged.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        damaged.write_bytes(flipped)
        assert newest(tmp_path)[0] == before, bytes(flipped)


@pytest.mark.parametrize(
    ("position", "is_taken"),
    [({}, True), ({"steps": -1}, False), ({"epoch": True}, False), ({"samples": "8"}, False)],
    ids=str,
)
def test_an_older_manifest_is_read_and_its_ranges_are_checked(tmp_path: Path, position: dict, is_taken: bool) -> None:
    before, older = save(tmp_path, 1), save(tmp_path, 2)
    values = json.loads(older.with_suffix(".json").read_text())
    del values["manifest_sha256"]
    values |= {"format_version": 1, "position": {**values["position"], **position}}
    older.with_suffix(".json").write_text(json.dumps(values))
    assert newest(tmp_path)[0] == (older if is_taken else before)


def test_a_state_without_manifest_is_an_unfinished_write(tmp_path: Path) -> None:
    whole, unfinished = save(tmp_path, 1), save(tmp_path, 2)
    unfinished.with_suffix(".json").unlink()
    assert newest(tmp_path)[0] == whole


@pytest.mark.parametrize(("function", "step"), [("torch.save", 1), ("os.fsync", 2), ("pathlib.Path.replace", 1)])
def test_a_write_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch, function: str, step: int) -> None:
    """An epoch's end may be a step that was saved already: what is there goes only when the new one is whole."""
    kept = save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(function, full)
        save(tmp_path, step)
    assert newest(tmp_path)[0] == kept
    assert names(tmp_path) == ["step_00000001.json", "step_00000001.pt"]


def test_a_step_that_ends_an_epoch_is_written_once(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    written = path.stat().st_mtime_ns
    checkpoint.move(path, Position(1, 2, 0))
    _, manifest, _ = newest(tmp_path)
    assert manifest is not None
    assert (manifest.position, path.stat().st_mtime_ns) == (Position(1, 2, 0), written)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path, 1, state={"model": Evil()})
    with pytest.raises(UserError, match="cannot be read safely"):
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_run_is_neither_overwritten_nor_continued_as_another(config, folder: Path, tmp_path: Path) -> None:
    checkpoint.prepare(folder, tiny_config(tmp_path / "images", optim={"lr": 1.0}), resume=False)
    checkpoint.prepare(folder, config, resume=False)  # before its first step there is nothing to protect
    assert json.loads((folder / "config.json").read_text())["optim"]["lr"] == 8.0
    (folder / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="pass --resume to continue"):
        checkpoint.prepare(folder, config, resume=False)
    other = tiny_config(tmp_path / "images", run={"seed": 5}, optim={"lr": 1.0})
    with pytest.raises(UserError, match=r"run.seed was 0 and is 5 now \(and 1 more\)"):
        checkpoint.prepare(folder, other, resume=True)
    (folder / "config.json").write_text("not json")
    with pytest.raises(UserError, match="not a run's config"):
        checkpoint.prepare(folder, config, resume=True)
    assert (folder / "config.json").read_text() == "not json"


def test_what_does_not_make_the_run_may_change(config, folder: Path, tmp_path: Path) -> None:
    checkpoint.prepare(folder, config, resume=False)
    save(folder / "checkpoints", 1)
    moved = tiny_config(tmp_path / "elsewhere", data={"workers": 3}, run={"log_every_steps": 7, "keep_checkpoints": 9})
    checkpoint.prepare(folder, moved, resume=True)
    assert checkpoint.recipe_hash(moved) == checkpoint.recipe_hash(config)
    assert checkpoint.recipe_hash(tiny_config(tmp_path, run={"seed": 5})) == checkpoint.recipe_hash(config)
    assert checkpoint.recipe_hash(tiny_config(tmp_path, optim={"lr": 1.0})) != checkpoint.recipe_hash(config)


def test_resuming_nothing_starts_and_says_so(config, tmp_path: Path, capsys) -> None:
    run(config, tmp_path / "run", resume=True)
    assert "to resume from: starting from scratch" in capsys.readouterr().err
    assert (tmp_path / "run" / "backbone.safetensors").exists()
