"""The engines, found by name: one folder each under `transfer/engines/`, whose `__init__.py` holds its row `ENGINE`.

A protocol names its engine; nothing else in the suite knows one engine from another. What an engine has to do is
`resolve` (a request and its weights → what will run; nothing is built or written) and `run` (→ the result).
"""

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from twist.contracts.config import SHIPPED


@dataclass(frozen=True)
class Engine:
    """One row.

    `module` has `resolve(request, weights) -> Resolved` and `run(request, weights, resolved) -> Result`, and is
    imported only when a run needs it; `predict` has `predict(run, pictures, output)` (see `transfer/predict.py`), None
    where a run keeps no network. `configs` is its folder under `configs/`. `target` is what the weights are converted
    to, None to take them as tensors. `packages` must be installed; `extra` is the part that has them.
    """

    name: str
    module: str
    configs: str
    target: str | None
    packages: tuple[str, ...]
    extra: str = "transfer"
    predict: str | None = None

    @property
    def folder(self) -> Path:
        return SHIPPED / self.configs


@functools.cache
def all_engines() -> dict[str, Engine]:
    """Every engine by its name."""
    folders = [found.name for found in pkgutil.iter_modules(__path__) if found.ispkg]
    rows = [importlib.import_module(f"{__name__}.{folder}").ENGINE for folder in folders]
    return {row.name: row for row in rows}
