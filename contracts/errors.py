"""Errors that the user can correct: one plain sentence each, with a remedy, and an exit status."""

import difflib
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

# What numpy takes. Here, where the command line finds it without pydantic: a tenth of a second of every command.
MOST_SEED: Final = 2**32 - 1
# Builds Detectron2 from the package registry; a part of the wheel, too.
DETECTRON2: Final = Path(__file__).resolve().parent.parent / "third_party" / "detectron2"
# Import names of what each extra of pyproject.toml installs, as far as a command cannot do without it.
EXTRAS: Final[dict[str, tuple[str, ...]]] = {
    "convert": ("torch", "torchvision", "timm", "safetensors", "PIL", "yaml", "fvcore"),
    "pretrain": ("torch", "torchvision", "timm", "safetensors", "PIL", "numba", "matplotlib", "sklearn"),
    "compare": ("scipy", "jinja2", "tabulate"),
    "transfer": ("torch", "torchvision", "timm", "safetensors", "PIL", "fvcore", "matplotlib", "sklearn", "scipy"),
    "hub": ("datasets",),
    "ray": ("ray",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "huggingface": ("transformers",),
}
# Packages that only some commands of an extra need.
PARTS: Final = {"tensorboard": "pretrain", "submitit": "pretrain"} | dict.fromkeys(
    ("mmseg", "mmcv", "mmengine", "pycocotools", "faster_coco_eval", "cityscapesscripts"), "transfer"
)
# What a terminal obeys and an encoder refuses: control characters, marks that turn the direction of text, halves of
# surrogate pairs (file names that are no UTF-8).
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text`, which may quote a stranger's file, for a terminal: what is not text is escaped, and words above 400 and
    lines above 1,600 characters are cut in their middle."""
    text = UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    for long, kept in ((r"\S{400,}", 120), (r".{1600,}", 700)):
        text = re.sub(long, lambda found, kept=kept: f"{found[0][:kept]} … {found[0][-kept:]}", text)  # type: ignore[misc]
    return text


class UserError(ValueError):
    """Something the user can correct. The message says what, where and what to do; the command line prints it alone."""

    exit_status = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(UserError):
    """A command, a config or an option that is wrong as written (exit status 2)."""

    exit_status = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known word, or for those that begin with `word`; the sorted list of what is
    known when none is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    near = near or [choice for choice in choices if word and choice.startswith(word)]
    if near:
        return " Did you mean {}?".format(" or ".join(f'"{choice}"' for choice in near))
    return f" Known: {', '.join(choices)}." if choices else ""


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """`UserError` for the first of `names` that is not `known`."""
    for name in names:
        if name not in known:
            raise UserError(f"There is no feature {name}: choose from {known[0]} to {known[-1]}.")


def require(extra: str, *packages: str) -> None:
    """Look, without importing them, for `packages` (default: all that commands of `extra` need); `UserError` with the
    command that installs the first one missing."""
    for name in packages or EXTRAS[extra]:
        if find_spec(name) is None:
            raise UserError(f"{name} is not installed: {install_command(name, extra)}")


def install_command(package: str, extra: str | None = None) -> str:
    """The command that installs `package` (an import name), as a part of `extra` where several have it; "" for a
    package that is not among ours."""
    if package == "detectron2":
        return f'pip install "{DETECTRON2}"'
    extra = extra or PARTS.get(package) or next((name for name, held in EXTRAS.items() if package in held), None)
    return f'pip install "twist-suite[{extra}]"' if extra else ""


def missing_package(error: Exception) -> UserError | None:
    """The sentence for a `ModuleNotFoundError` of a package that one of our extras installs."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    command = install_command(package) if isinstance(error, ModuleNotFoundError) else ""
    return UserError(f"{package} is not installed: {command}") if command else None
