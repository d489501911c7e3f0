"""What a check of a data set found, and how it is told: errors first, each with its remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from twist.contracts.progress import Progress

Severity = Literal["error", "warning", "fine"]
# Names that a finding gives; its count is of all.
NAMED = 5
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "fine")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, how many files it concerns, and what mends it."""

    severity: Severity
    where: str
    message: str
    count: int = 1
    remedy: str = ""


@dataclass
class Report:
    """Findings as they are collected, with the progress display of the check."""

    bar: Progress
    findings: list[Finding] = field(default_factory=list)
    _counted: set[str] = field(default_factory=set)

    def count(self, place: Path, files: int) -> None:
        """Count the files of `place` in the progress display, once however often they are looked at."""
        self.bar.advance(0 if str(place) in self._counted else files)
        self._counted.add(str(place))

    def error(self, where: Path | str, message: str, *, remedy: str, count: int = 1) -> None:
        self.findings.append(Finding("error", str(where), message, count, remedy))

    def warning(self, where: Path | str, message: str, *, remedy: str, count: int = 1) -> None:
        self.findings.append(Finding("warning", str(where), message, count, remedy))

    def fine(self, where: Path | str, message: str, *, count: int) -> None:
        self.findings.append(Finding("fine", str(where), message, count))


def named(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def render(findings: Sequence[Finding]) -> str:
    """Findings as text: errors first, each with its remedy, and a line that counts them."""
    marks = {"error": "error  ", "warning": "warning", "fine": "ok     "}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.severity]}  {finding.where}: {finding.message}")
        if finding.remedy:
            lines.append(f"         → {finding.remedy}")
    counts = Counter(finding.severity for finding in findings)
    lines.append(
        "Everything is as it should be."
        if not counts["error"] and not counts["warning"]
        else f"{_count(counts['error'], 'error')}, {_count(counts['warning'], 'warning')}."
    )
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
