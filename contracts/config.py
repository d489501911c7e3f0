"""Typed configs: a TOML file and `section.key=value` overrides, read into a frozen pydantic model.

TOML, because PyYAML reads `1e-3` as a string. Values in an override are TOML too (`lr=1e-3`, `scales=[0.4, 1.0]`,
`sync_bn=true`); a bare word is a string.
"""

import os
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twist.contracts import files
from twist.contracts.errors import UsageError, UserError, did_you_mean

# Our own configs, in a clone and in an installed package alike: `configs` stands where `contracts` does.
SHIPPED = Path(__file__).resolve().parent.parent / "configs"
# Of values in values in TOML, and of a number that somebody means.
_MOST_DEPTH, _MOST_BITS = 64, 1024
_ADDED = "added"


class Config(BaseModel):
    """Base of every config: frozen, unknown keys and numbers that are none refused, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def added(default: Any, **limits: Any) -> Any:
    """A field that earlier versions did not have: their run folders and recipe hashes stay what they are. Every field
    that is added to a config whose runs are stored is written `key: float = added(1.0, gt=0)`."""
    return Field(default, json_schema_extra={_ADDED: True}, **limits)


def identity_of(config: BaseModel) -> dict[str, Any]:
    """The values of `config` as JSON, for hashes and comparisons: without `added` fields that change nothing."""
    values = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value, extra = getattr(config, name), field.json_schema_extra
        if isinstance(extra, dict) and _ADDED in extra and value == field.default:
            del values[name]
        elif isinstance(value, BaseModel):
            values[name] = identity_of(value)
    return values


def load_config(
    path: str | os.PathLike[str], model: type[ConfigT], overrides: Sequence[str] = (), *, extra_keys: Iterable[str] = ()
) -> ConfigT:
    """The TOML file at `path` with `overrides`, as a `model`; `UsageError`, one sentence, where it is none.
    `extra_keys` are also suggested for an unknown key: the caller takes them out of the overrides itself."""
    values = read_toml(path)
    for override in overrides:
        keys, value = parse_override(override)
        table = values
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise UsageError(f'"{override}": {key} is a value, not a section.')
        table[keys[-1]] = value
    return validate(values, model, where=str(path), extra_keys=extra_keys)


def find_config(path: Path, folder: str) -> Path:
    """`path`, or our config of that name, wherever it was installed: `smoke` is `configs/pretrain/smoke.toml`."""
    ours = SHIPPED / folder / f"{path.name.removesuffix('.toml')}.toml"
    by_name = path.parent == Path() and ours.is_file()
    if path.is_file() or (path.exists() and not by_name):  # a folder `sample` does not hide our config of that name
        return path
    if by_name:
        return ours
    meant = did_you_mean(path.stem, [file.stem for file in ours.parent.glob("*.toml")])
    raise UsageError(f"There is no config at {path}: check the path, or name one of ours.{meant}")


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of the TOML file at `path`; `UsageError` when it is missing or not TOML."""
    path = Path(path)
    if path.suffix != ".toml":
        raise UsageError(
            f"{path} is not a .toml file: our configs are TOML (.yaml is Detectron2's, .py MMSegmentation's)."
        )
    try:
        return parse_toml(files.read_text(path, remedy="name the config file"))
    except UserError as error:
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a TOML text; `ValueError` for one that is none, is nested too deeply, or has endless numbers."""
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [values]
    for _ in range(_MOST_DEPTH):
        if any(isinstance(value, int) and value.bit_length() > _MOST_BITS for value in level):
            raise ValueError("it has a number of more than 300 digits")
        tables = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [value for table in tables if isinstance(table, list) for value in table]
    if level:
        raise ValueError("it is nested too deeply")
    return values


def validate(values: dict[str, Any], model: type[ConfigT], *, where: str, extra_keys: Iterable[str] = ()) -> ConfigT:
    """`model` built from `values`; pydantic's first error becomes one sentence that names the key and `where`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError(_sentence(error.errors()[0], model, where, extra_keys)) from None


def problems(values: dict[str, Any], model: type[BaseModel], *, where: str) -> list[str]:
    """Everything that keeps `values` from being a `model`, a sentence each; empty when they are one."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [_sentence(one, model, where) for one in error.errors()]
    return []


def parse_override(override: str) -> tuple[list[str], Any]:
    """`"section.key=value"` → (["section", "key"], value), the value read as TOML, a bare word as a string."""
    name, separator, text = override.partition("=")
    keys = [part.strip() for part in name.split(".")]
    if not separator or not all(keys):
        raise UsageError(f'"{override}" is not an override: write section.key=value, for example optim.lr=0.5.')
    try:
        return keys, parse_toml(f"value = {text.strip()}")["value"]
    except ValueError:
        return keys, text.strip()


def _sentence(first: Any, model: type[BaseModel], where: str, extra_keys: Iterable[str] = ()) -> str:
    location = [str(part) for part in first["loc"]]
    name = ".".join(location)
    if first["type"] == "extra_forbidden":
        paths = [*_paths(model), *extra_keys]
        section = ".".join(part for part in location[:-1] if not part.isdecimal())
        elsewhere = [path for path in paths if path.rpartition(".")[2] == location[-1]]  # right, without its section
        known = elsewhere or [path.rpartition(".")[2] for path in paths if path.rpartition(".")[0] == section]
        return f"{where}: unknown key {name}.{did_you_mean(elsewhere[0] if elsewhere else location[-1], known)}"
    if first["type"] == "missing":
        return f"{where}: {name} is missing and has no default; add it to the file or pass {name}=value."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    # A message of our own validators is already a sentence; pydantic's own needs the key and the value.
    if first["type"] == "value_error":
        return f"{where}: {name + ': ' if name else ''}{message}."
    return f"{where}: {name} = {first.get('input')!r} does not fit: {message}."


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of the fields of `model` and its sections."""
    for name, field in model.model_fields.items():
        yield prefix + name
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for section in (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)):
            yield from _paths(section, f"{prefix}{name}.")
