"""Keeps the frameworks off the terminal, which shows progress: their logs go to a file, known noise is dropped.

Only what is known and harmless is dropped, by its text; every other warning passes. All is undone at the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

_NOISE = (
    "pkg_resources is deprecated",  # detectron2.model_zoo imports it
    "torch.meshgrid: in an upcoming release",  # detectron2's anchor generator
    "Fail to import ``MultiScaleDeformableAttention``",  # mmcv without compiled operators: none is needed here
    "Default ``avg_non_ignore`` is False",  # mmseg's cross entropy, as every published recipe has it
    "The given NumPy array is not writable",
)
_LOGGERS = ("detectron2", "fvcore", "mmengine", "current", "torch.fx._symbolic_trace")


@contextlib.contextmanager
def frameworks_quiet(log: Path | None = None) -> Iterator[None]:
    """Within: Detectron2's and mmengine's loggers write to `log` (nowhere when None), and their prints go nowhere."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    handler = logging.NullHandler() if log is None else logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler]
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),  # pycocotools prints its table, mmengine logs to stdout
        ):
            for text in _NOISE:
                warnings.filterwarnings("ignore", message=_pattern(text))
            yield
    finally:
        handler.close()
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = handlers


def _pattern(text: str) -> str:
    import re

    return r"\s*" + re.escape(text)
