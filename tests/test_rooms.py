"""The house plan, kept by a test: imports run downwards only, and some names and calls have one home."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "contracts": set(),
    "measure": {"contracts"},
    "catalog": {"contracts"},
    "pretrain": {"contracts", "measure", "catalog"},
    "converters": {"contracts"},
    "compare": {"contracts"},
    "integrations": {"contracts"},
    "transfer": {"contracts", "measure", "catalog", "converters", "integrations"},
    "twist": {"contracts", "measure", "catalog", "pretrain", "converters", "compare", "integrations", "transfer"},
}
FRAMEWORKS = {"detectron2": "detectron2", "mmseg": "mmseg", "mmcv": "mmseg", "mmengine": "mmseg"}
CATCH_ALL = {"utils.py", "misc.py", "helpers.py", "common.py"}


SOURCES = {path: ast.parse(path.read_text()) for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))}


def imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.stmt]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node


def module_level(tree: ast.Module) -> list[str]:
    """Modules imported when the file is imported: not those inside functions or under TYPE_CHECKING."""
    return [name for name, _ in imports(tree.body)]


def room_of(name: str) -> str:
    """The room that `name`, a module's whole name, lies in: `twist.contracts.errors` in contracts; "" for others'."""
    top, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    return "" if top != "twist" else first if first in MAY_IMPORT else "twist"


def test_imports_run_downwards() -> None:
    for path, tree in SOURCES.items():
        room = path.relative_to(ROOT).parts[0]
        for name, node in imports(ast.walk(tree)):
            where = f"{path}:{node.lineno}"
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{where}: relative import"
            names = [name]
            if name == "twist" and isinstance(node, ast.ImportFrom):
                names = [f"twist.{alias.name}" for alias in node.names]
            for other in map(room_of, names):
                assert other in MAY_IMPORT[room] | {room, ""}, f"{where} imports {name}: {room} may not know {other}"
            # It has one home.
            distributed = room == "pretrain" and name.startswith("torch.distributed")
            assert not distributed or path.name == "distributed.py", where


def test_frameworks_stay_in_their_engine_and_writer_and_the_ground_floor_needs_no_torch() -> None:
    for path, tree in SOURCES.items():
        room, *here = path.relative_to(ROOT).parts
        assert path.name not in CATCH_ALL
        for name in {module.split(".")[0] for module in module_level(tree)}:
            family = FRAMEWORKS.get(name)
            assert family is None or family in "/".join(here), f"{path} imports {name} at module level"
            assert (room, name) != ("contracts", "torch") or path.name in (
                "networks.py",
                "timm_networks.py",
                "vit.py",
            ), path


def test_every_folder_of_a_room_is_a_package_of_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in SOURCES}
    packages = {"twist" if name == "twist" else f"twist.{name}" for name in folders}
    assert packages <= set(settings["packages"])
    rooms = {f"twist.{room}" for room in MAY_IMPORT if room != "twist" and (ROOT / room).is_dir()}
    assert rooms <= set(settings["package-dir"])


def test_no_large_file_is_tracked() -> None:
    """Weights, pictures and run folders stay out of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 100
    large = [str(file.relative_to(ROOT)) for file in files if file.is_file() and file.stat().st_size > 1_000_000]
    assert large == []
