"""Measuring alternatives in turn, on the same machine, in one run, so that a slow minute hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from twist.contracts import files
from twist.contracts import machine as this_machine
from twist.contracts.machine import hardware


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the median of `n` rounds and how far they spread."""

    median_s: float
    least_s: float
    most_s: float
    n: int


def measure(
    alternatives: Mapping[str, Callable[[], Any]], *, rounds: int = 7, calls: int = 1, warm_up: int = 2
) -> dict[str, Times]:
    """Time every alternative once a round, `calls` calls together; the device is waited for before and after."""
    for function in alternatives.values():
        for _ in range(warm_up):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, function in alternatives.items():
            _wait()
            began = time.perf_counter()
            for _ in range(calls):
                function()
            _wait()
            seconds[name].append((time.perf_counter() - began) / calls)
    return {name: Times(statistics.median(s), min(s), max(s), len(s)) for name, s in seconds.items()}


def rates_a_core(alternatives: Mapping[str, Callable[[], Any]], *, count: int, rounds: int) -> dict[str, Any]:
    """Images over the CPU seconds of this process, for calls that each make `count` images: median and spread."""
    rates: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(1 + rounds):
        for name, work in alternatives.items():
            began = time.process_time()
            work()
            if number:
                rates[name].append(count / (time.process_time() - began))
    return {
        "images_per_s_core": {name: statistics.median(values) for name, values in rates.items()},
        "spread": {name: [min(values), max(values)] for name, values in rates.items()},
        "images": count,
        "rounds": rounds,
    }


def ratio(times: Mapping[str, Times], *, of: str, to: str) -> float:
    """How many times as long `of` takes as `to`."""
    return times[of].median_s / times[to].median_s


def rates_table(found: Mapping[str, Any]) -> str:
    spread, n = found["spread"], found["rounds"]
    return "\n".join(
        f"  {name:<30}{rate:7.0f}   {spread[name][0]:.0f}–{spread[name][1]:.0f} (n = {n})"
        for name, rate in found["images_per_s_core"].items()
    )


def machine() -> dict[str, Any]:
    """What a figure must not stand without."""
    return {
        "hardware": hardware(),
        "software": this_machine.software(),
        "threads": torch.get_num_threads(),
        "git_commit": this_machine.git_commit(),
    }


def heading(title: str) -> str:
    about = machine()
    hardware, software = about["hardware"], about["software"]
    device = hardware["gpu"] or f"{hardware['processor']}, {about['threads']} thread(s)"
    return f"{title}\n{device}, torch {software['torch']}, Python {software['python']}"


def table(times: Mapping[str, Times]) -> str:
    return "\n".join(
        f"  {name:<28}{1000 * t.median_s:10.2f} ms   {1000 * t.least_s:.2f}–{1000 * t.most_s:.2f} (n = {t.n})"
        for name, t in times.items()
    )


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write `figures` with the machine and the commit they were measured on, as JSON, when a path is given."""
    if path is not None:
        files.write_json(path, {"machine": machine(), **plain(figures)})


def plain(value: Any) -> Any:
    """`value` with every dataclass in its mappings and lists as a mapping, as JSON wants it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
