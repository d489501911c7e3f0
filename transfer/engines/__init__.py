"""The engines, found by name: one folder each under `transfer/engines/`, whose `__init__.py` holds its row `ENGINE`.

A protocol names its engine; nothing else in the suite knows one engine from another. What an engine has to do is
`resolve` (a request and its weights → what will run; nothing is built or written) and `run` (→ the result).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twist.contracts.config import SHIPPED
from twist.contracts.errors import UserError


@dataclass(frozen=True)
class Engine:
    """One row.

    `module` has `resolve(request, weights) -> Resolved` and `run(request, weights, resolved) -> Result`, and is
    imported only when a run needs it. `configs` is its folder under `configs/`. `target` is what the weights are
    converted to, None to take them as tensors. `packages` must be installed, and `install` is the command that does so.
    """

    name: str
    title: str
    module: str
    configs: str
    target: str | None
    packages: tuple[str, ...]
    install: str

    def load(self) -> Any:
        """Its module.

        Raises:
            UserError: a package that it needs is not installed.
        """
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            raise UserError(f"{self.title} is not installed (no package {absent[0]}): {self.install}")
        return importlib.import_module(self.module)

    @property
    def folder(self) -> Path:
        return SHIPPED / self.configs


@functools.cache
def all_engines() -> dict[str, Engine]:
    """Every engine by its name."""
    folders = [found.name for found in pkgutil.iter_modules(__path__) if found.ispkg]
    rows = [importlib.import_module(f"{__name__}.{folder}").ENGINE for folder in folders]
    return {row.name: row for row in rows}
