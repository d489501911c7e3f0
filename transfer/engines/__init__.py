"""The engines, found by name: one folder each under `transfer/engines/`, whose `__init__.py` holds its row `ENGINE`.

A protocol names its engine; nothing else in the suite knows one engine from another.
"""

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from twist.contracts.config import SHIPPED


@dataclass(frozen=True)
class Engine:
    """One row. Its folder's `engine.py`, which is imported only when a run needs it, has

    - `resolve(request, weights) -> Resolved`, which builds and writes nothing,
    - `run(request, weights, resolved) -> Result`,
    - where a run keeps a network, `predict(run, pictures, output)` (see `transfer/predict.py`).

    `target` is what the weights are converted to, None to take them as tensors. `packages` must be installed. The
    configs lie in `configs/<name>/`.
    """

    name: str
    target: str | None
    packages: tuple[str, ...]

    @property
    def module(self) -> str:
        return f"{__name__}.{self.name}.engine"

    @property
    def folder(self) -> Path:
        return SHIPPED / self.name


@functools.cache
def all_engines() -> dict[str, Engine]:
    """Every engine by its name."""
    folders = [found.name for found in pkgutil.iter_modules(__path__) if found.ispkg]
    rows = [importlib.import_module(f"{__name__}.{folder}").ENGINE for folder in folders]
    return {row.name: row for row in rows}
