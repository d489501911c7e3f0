"""What a user gets who has no clone: the wheel, alone, from the package registry into an empty environment."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from twist.contracts.errors import EXTRAS, PARTS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) or "uv"
install = pytest.mark.install


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def copy_tree(target: Path) -> Path:
    """The files of this clone in `target`, so that nothing is built or changed here."""
    for name in tracked_files():
        if not name.startswith(("results/", "tests/", "docs/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(UV, "build", "--wheel", "--out-dir", folder, copy_tree(folder / "tree"), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def new_environment(folder: Path, requirement: str | Path) -> Path:
    """The `bin` folder of a new environment with `requirement` installed."""
    run(UV, "venv", "--python", sys.executable, folder / "venv", cwd=folder)
    run(UV, "pip", "install", "--python", folder / "venv", requirement, cwd=folder)
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel without any extra."""
    return new_environment(tmp_path_factory.mktemp("alone"), wheel)


@install
def test_the_wheel_holds_every_file_of_the_rooms_and_nothing_else(wheel: Path) -> None:
    rooms = {folder: name.replace(".", "/") for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
    expected = {
        f"{package}{name.removeprefix(folder)}"
        for name in tracked_files()
        for folder, package in rooms.items()
        if name.startswith(f"{folder}/")
    }
    assert {"twist/py.typed", "twist/configs/suites/paper.toml", "twist/contracts/published.toml"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == expected


@install
def test_the_first_commands_of_a_user(installed: Path, tmp_path: Path) -> None:
    for command in ("twist", "twist-suite"):
        version = run(installed / command, "--version", cwd=tmp_path).stdout
        assert version == f"twist-suite {PROJECT['project']['version']}\n"
    assert "demo" in run(installed / "twist", "--help", cwd=tmp_path).stdout
    assert "coco-mrcnn-fpn-1x" in run(installed / "twist", "transfer", "--list", cwd=tmp_path).stdout
    assert "key=value" in run(installed / "twist", "pretrain", "smoke", "--help", cwd=tmp_path).stdout
    doctor = run(installed / "twist", "doctor", cwd=tmp_path).stdout
    assert 'pip install "twist-suite[convert]"' in doctor
    assert "make" not in doctor.split()


@install
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("pretrain smoke", "pretrain"), ("convert x.pth --to timm", "convert"), ("compare .", "compare"),
        ("transfer sample-knn --weights x.pth", "transfer"), ("data check coco .", "transfer"), ("demo", "transfer"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_one_command_before_any_file_is_opened(
    installed: Path, tmp_path: Path, command: str, extra: str
) -> None:
    done = run(installed / "twist", *command.split(), cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(f' is not installed: pip install "twist-suite[{extra}]"\n')
    assert list(tmp_path.iterdir()) == []


@install
@pytest.mark.parametrize("extra", [name for name in PROJECT["project"]["optional-dependencies"] if name != "dev"])
def test_an_extra_resolves_from_the_registry_alone(wheel: Path, installed: Path, tmp_path: Path, extra: str) -> None:
    done = run(UV, "pip", "install", "--dry-run", "--python", installed.parent, f"{wheel}[{extra}]", cwd=tmp_path)
    assert "Would install" in done.stderr


@install
def test_the_command_for_detectron2_installs_it(installed: Path, tmp_path: Path) -> None:
    ask = "from twist.contracts.errors import install_command; print(install_command('detectron2'))"
    pip, *arguments = shlex.split(run(installed / "python", "-c", ask, cwd=tmp_path).stdout)
    assert pip == "pip"
    run(UV, "pip", *arguments, "--no-deps", "--target", tmp_path / "site", cwd=tmp_path)
    assert (tmp_path / "site" / "detectron2" / "modeling" / "__init__.py").is_file()


@install
def test_a_checkpoint_is_inspected_converted_and_measured(wheel: Path, tmp_path: Path) -> None:
    """From the command line, and then all of the README's "In Python"."""
    bin_folder = new_environment(tmp_path, f"{wheel}[transfer]")
    make = "import torch, torchvision; torch.save(torchvision.models.resnet18().state_dict(), 'CHECKPOINT')"
    run(bin_folder / "python", "-c", make, cwd=tmp_path)
    assert "resnet18" in run(bin_folder / "twist", "inspect", "CHECKPOINT", cwd=tmp_path).stdout
    run(bin_folder / "twist", "convert", "CHECKPOINT", "--to", "timm", "--output", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()

    run(bin_folder / "twist", "data", "sample", "sample", "--size", "tiny", cwd=tmp_path)
    (block,) = re.findall(r"## In Python\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    before = "import torch; from PIL import Image; Image.new('RGB', (96, 64)).save('picture.jpg')\n"
    before += "images = torch.zeros(2, 3, 64, 64)\n"
    after = "\nassert record.metrics['miou_percent'] in list(frame.value), frame"
    after += "\nassert maps[0].shape[0] == 512 and header.architecture == 'resnet18'"
    # Detectron2, which is in no extra, proves its own conversion.
    run(bin_folder / "python", "-c", before + block.replace('to="detectron2"', 'to="timm"') + after, cwd=tmp_path)


@install
def test_files_of_the_user_with_our_names_are_left_alone(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("value = 'my config'\n")
    for name in ("pretrain", "transfer", "contracts", "compare"):
        (tmp_path / f"{name}.py").write_text("value = 'my program'\nprint(value)\n")
    ours = run(installed / "python", "-m", "twist", "transfer", "--list", cwd=tmp_path).stdout
    assert "coco-mrcnn-fpn-1x" in ours
    assert "my program" not in ours
    missing = run(installed / "python", "-m", "twist", "pretrain", "smoke", cwd=tmp_path, check=False)
    assert (missing.stdout, "twist-suite[pretrain]" in missing.stderr) == ("", True)
    theirs = run(installed / "python", "-c", "import configs.mine, pretrain; print(configs.mine.value)", cwd=tmp_path)
    assert theirs.stdout == "my program\nmy config\n"


def test_what_a_command_looks_for_is_what_its_extra_installs() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    names = {extra: {re.split(r"[\[<>=]", line)[0].lower() for line in lines} for extra, lines in extras.items()}
    names["transfer"] |= names["pretrain"] | names["convert"] | names["compare"]
    owners = importlib.metadata.packages_distributions()
    looked_for = [(extra, package) for extra, packages in EXTRAS.items() for package in packages]
    assert len(looked_for) > 20
    for extra, package in [*looked_for, *((extra, package) for package, extra in PARTS.items())]:
        assert {name.lower() for name in owners.get(package, [package])} & names[extra], (
            f"{package} is not in [{extra}]"
        )


def test_a_second_work_tree_that_borrows_the_environment_runs_its_own_code(tmp_path: Path) -> None:
    other = copy_tree(tmp_path / "other")
    modules = ("twist.cli", "twist.contracts.errors", "twist.transfer.protocols")
    ask = f"import importlib; print([importlib.import_module(name).__file__ for name in {modules}])"
    for tree in (ROOT, other):
        found = run(sys.executable, "-c", ask, cwd=tree).stdout
        assert found.count(f"'{tree}/") == len(modules), found
