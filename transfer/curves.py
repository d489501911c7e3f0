"""`metrics.jsonl` of a run: one JSON object a line with `step` (iterations done) and that step's numbers.

A resumed run first cuts what an interrupted one wrote beyond its last checkpoint, so steps never repeat.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from twist.contracts import files


class Curves:
    """Appends to `path`; `start` is the step the run continues from (0 begins the file anew)."""

    def __init__(self, path: Path, *, start: int = 0) -> None:
        kept = []
        if start and path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line a killed run was writing
                    continue
                if row["step"] <= start:
                    kept.append(line + "\n")
        files.write_text(path, "".join(kept))
        self._file = path.open("a")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line; numbers that are not finite are left out, JSON has none."""
        finite = {name: round(float(value), 6) for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
