"""Every command in the pages and in the heads of configs is one that the command line takes."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from twist.cli import app
from twist.contracts.config import find_config, load_config
from twist.contracts.errors import UsageError
from twist.converters.convert import TARGETS
from twist.pretrain.config import PretrainConfig
from twist.transfer.protocols import PROTOCOLS, find_protocol, list_protocols

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    ROOT / "results" / "README.md",
]
CONFIGS = [
    path
    for folder in ("configs", "benchmarks")
    for ending in ("toml", "yaml", "py")
    for path in sorted((ROOT / folder).glob(f"*/*.{ending}"))
    if folder == "configs" or ending == "toml"
]
COMMAND = re.compile(r"(?:^|(?<=[\s`(:]))((?:twist|torchrun|python -m|make) [^`\n]*)", re.MULTILINE)
TWIST = typer.main.get_command(app)
CLICK_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
WRONG = (AssertionError, UsageError, CLICK_ERROR)


def commands(path: Path) -> Iterator[str]:
    """The commands in the code of a page, or in the comments that open a config."""
    text = path.read_text()
    if path.suffix == ".md":
        fences = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        marked = re.findall(r"<!-- ((?:twist|python) .*?) -->", text)
        spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        text = "\n".join([*fences, *marked, *(" ".join(span.split()) for span in spans)])
    else:
        head = re.match(r"(?:#.*\n)*", text)
        text = re.sub(r"^# ?", "", head[0] if head else "", flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", text)
    for line in COMMAND.findall(text):
        for part in line.split(" && "):
            # Two spaces, a comment or a bracket begin an explanation.
            yield re.split(r"\s{2,}|\s#|\s\(|…", part)[0].strip().rstrip(".,;")


def is_placeholder(word: str) -> bool:
    return word.isupper() or re.fullmatch(r"\[.*\]|<.*>", word) is not None


def check_twist(arguments: list[str]) -> None:
    """Parse as the command line does; then the names of protocols, targets and configs, and the keys of configs."""
    command = TWIST
    while arguments and hasattr(command, "commands"):
        assert arguments[0] in command.commands or arguments[0].startswith("-"), f"no command {arguments[0]}"
        if arguments[0].startswith("-"):
            break
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if not arguments or set(arguments) & {"-h", "--help", "--version"}:  # only named, or explains itself
        return
    # Options alone are a mention: they are looked up, and what is required may be left out.
    values = command.make_context("twist", list(arguments), resilient_parsing=arguments[0].startswith("-")).params
    if (protocol := values.get("protocol")) and not is_placeholder(protocol):
        if values.get("list_protocols"):
            list_protocols([protocol, *(values["overrides"] or ())])
        else:
            find_protocol(protocol)
    if (target := values.get("to")) and not is_placeholder(target):
        assert target in TARGETS
    if (config := values.get("config")) and not is_placeholder(str(config)):
        known = [re.sub(r"=N$", "=0", override) for override in values["overrides"] or []]
        load_config(find_config(Path(config), "pretrain"), PretrainConfig, known)
    if (file := values.get("file")) and not is_placeholder(str(file)):
        find_config(Path(file), "suites")


def check_module(arguments: list[str]) -> None:
    module, *options = arguments
    if module == "twist":
        check_twist(options)
        return
    assert importlib.util.find_spec(module) is not None, module
    source = Path(importlib.util.find_spec(module).origin or "").read_text()  # type: ignore[union-attr]
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in source, f"{module} has no {option}"


def check(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
        assert arguments[0] in phony.split()
    elif program == "twist":
        check_twist(arguments)
    elif arguments[:2] != ["-m", "benchmarks."]:
        check_module(arguments[arguments.index("-m") + 1 :])


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_those_of_the_command_line_and_links_lead_somewhere(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(path):
        try:
            check(command)
        except WRONG as error:
            pytest.fail(f"{path}: `{command}`: {error}")
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()) if path in PAGES else ():
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_commands_are_found() -> None:
    found = {path: list(commands(path)) for path in (*PAGES, *CONFIGS)}
    assert "twist transfer coco-mrcnn-fpn-1x --weights random --data DATASETS --gpus 8" in found[ROOT / "README.md"]
    assert sum(map(len, found.values())) > 100


@pytest.mark.parametrize(
    "wrong",
    [
        "twist transfre", "twist transfer imagenet-linear --weights FILE", "twist pretrain r50_multicrop_99ep",
        "twist pretrain sample optim.learning_rate=1", "twist convert FILE --to mmdet",
        "twist compare runs --base random", "twist suite configs/suites/absent.toml", "python -m benchmarks.absent",
        "python -m benchmarks.publish a b --absent c", "make tests",
    ],
)  # fmt: skip
def test_wrong_commands_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(WRONG):
        check(wrong)


def test_pages_that_code_and_configs_cite_are_there() -> None:
    pages = {path.name for path in PAGES}
    rooms = ("contracts", "measure", "catalog", "pretrain", "converters", "transfer", "compare", "twist", "configs")
    for path in (path for room in rooms for path in (ROOT / room).rglob("*")):
        # The table of published numbers cites pages of others.
        if path.suffix in (".py", ".yaml", ".toml") and path.name != "published.toml":
            cited = set(re.findall(r"(?<![\w/])[a-z][\w-]*\.md\b", path.read_text()))
            assert cited <= pages, f"{path} cites {cited - pages}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    rooms = tmp_path / "types" / "twist"
    rooms.mkdir(parents=True)
    for part in (*(ROOT / "twist").glob("*.py"), *(path.parent for path in ROOT.glob("*/__init__.py"))):
        if part.name not in ("twist", "tests", "benchmarks"):
            (rooms / part.name).symlink_to(part)
    settings = (ROOT / "mkdocs.yml").read_text().replace("[.types]", f"[{tmp_path / 'types'}]")
    settings = settings.replace("docs_dir: docs", f"docs_dir: {ROOT / 'docs'}").replace("[docs/", f"[{ROOT}/docs/")
    (tmp_path / "mkdocs.yml").write_text(settings)
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=tmp_path, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "run_transfer" in (tmp_path / "site" / "python" / "index.html").read_text()
    protocols = (tmp_path / "site" / "protocols" / "index.html").read_text()
    assert all(name in protocols for name in PROTOCOLS)


def test_the_citation_agrees_with_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
