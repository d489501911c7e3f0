"""What `benchmarks/summary.py` says of `benchmarks/gpu.py`'s file: a reader for each of the table's GPU rows.

A reader gives None when the parts it needs are absent, failed, were skipped, or are those of a --tiny run.
"""

from collections.abc import Callable, Mapping
from typing import Any

Found = Mapping[str, Any]
Reader = Callable[[Found], str | None]
Title = Callable[[Found], str]
# Where the photometric part's time stands, by case; it does not depend on how the networks are run.
PHOTOMETRIC = {"two-views": ("photometric_two-views",), "multi-crop": ("pipeline", "pipeline_compiled")}
VIEWS = {"two-views": "two views", "multi-crop": "14 views"}


def spread(times: Found) -> str:
    return f"{times['least_s']:.3g}–{times['most_s']:.3g} s, n = {times['n']}"


def parts(found: Found, *names: str) -> dict[str, Any]:
    """Those of the run's parts that are there and did not fail, by name."""
    of_run = {} if found.get("tiny") else found.get("parts", {})
    return {name: of_run[name] for name in names if of_run.get(name, {}).get("ok")}


def steps(found: Found, case: str) -> dict[str, Any]:
    """The steps of `case` that were measured, by "plain" and "compiled"."""
    measured = parts(found, f"step_{case}", f"step_{case}_compiled")
    return {_mode(part): part for part in measured.values()}


def runs(found: Found, case: str) -> dict[str, Any]:
    """The runs with a loader, by "plain" and "compiled"; there are none for two views."""
    measured = parts(found, "pipeline", "pipeline_compiled") if case == "multi-crop" else {}
    return {_mode(part): part for part in measured.values()}


def photometric_s(found: Found, case: str) -> float | None:
    """Seconds of a step's photometric part on the device; None when it was not measured for `case`."""
    measured = parts(found, *PHOTOMETRIC[case]).values()
    return next((part["times"]["photometric part"]["median_s"] for part in measured), None)


def title(case: str, with_it: str, without: str) -> Title:
    """A row's name: `with_it`; for a file that has the step but not its photometric part `without`, and that said."""
    other = "multi-crop" if case == "two-views" else "two-views"

    def name(found: Found) -> str:
        if not steps(found, case) or photometric_s(found, case) is not None:
            return with_it
        measured = "not measured" if photometric_s(found, other) is None else f"measured for {VIEWS[other]} only"
        return f"{without} (without the photometric part, which was {measured})"

    return name


def speedup(case: str) -> Reader:
    """The better of the plain and the compiled step in full, the other's ratio beside it."""

    def read(found: Found) -> str | None:
        measured = steps(found, case)
        if not measured:
            return None
        best, *others = sorted(measured, key=lambda mode: -measured[mode]["speedup"])
        times = measured[best]["times"]
        skipped = sum(measured[best][name] for name in ("naive_steps_skipped", "our_steps_skipped"))
        return (
            f"{measured[best]['speedup']:.1f} × {best} ({spread(times['ours'])} against {spread(times['naive'])})"
            + "".join(f"; {mode} {measured[mode]['speedup']:.1f} ×" for mode in others)
            + (f"; {skipped} step{' was' if skipped == 1 else 's were'} skipped" if skipped else "")
        )

    return read


def outside(case: str) -> Reader:
    """1 − networks / step; the photometric part, where measured, is added to the step: it takes the device's time."""

    def read(found: Found) -> str | None:
        values = []
        for mode, part in steps(found, case).items():
            ours, networks = (part["times"][name]["median_s"] for name in ("ours", "backbone and head"))
            share = 1 - networks / (ours + (photometric_s(found, case) or 0.0))
            values.append(f"{mode} {_percent(share, 1)}")
        return ", ".join(values) or None

    return read


def over_bare(case: str) -> Reader:
    """Images/s of the step over the bare backbone's; with 14 views those of a run with its loader, too, and with two,
    where there is no such run, those of step and photometric part."""

    def read(found: Found) -> str | None:
        values = []
        for mode, part in steps(found, case).items():
            ours, backbone = (part["times"][name]["median_s"] for name in ("ours", "backbone"))
            bare = part["batch_size"] / backbone
            run, added = runs(found, case).get(mode), photometric_s(found, case)
            also = "" if run is None else f", in a run {_percent(run['images_per_s']['median'] / bare)}"
            if case == "two-views" and added is not None:
                also = f", with the photometric part {_percent(backbone / (ours + added))}"
            values.append(f"{mode} {_percent(part['share_of_bare_backbone'])}{also} of {bare:.0f} images/s")
        return "; ".join(values) or None

    return read


def data_wait(found: Found) -> str | None:
    """Share of a run's time in which it stood still for data, by log window, and the run's images/s."""
    values = []
    for mode, run in runs(found, "multi-crop").items():
        wait, rate = run["data_wait_share"], run["images_per_s"]
        values.append(
            f"{mode} {_percent(wait['median'], 1)} ({_percent(wait['least'], 1)}–{_percent(wait['most'], 1)}, "
            f"n = {wait['n']} windows; {rate['least']:.0f}–{rate['most']:.0f} images/s, {run['workers']} workers)"
        )
    return "; ".join(values) or None


def memory(mode: str) -> Reader:
    """Bytes an image and the largest batch, `mode` being "plain" or "activation_checkpointing"."""

    def read(found: Found) -> str | None:
        part = parts(found, "memory").get("memory", {}).get(mode)
        if part is None:
            return None
        ran = part["largest_batch_run"]
        largest = f"{ran} images ran" if ran else "no batch near the limit ran"
        return f"{part['bytes_an_image'] / 2**20:.0f} MiB; {largest} ({part['largest_batch_on_paper']} on paper)"

    return read


def also(name: str, read: Callable[[Found], str]) -> Reader:
    """Another program's row, from the part `name` of the GPU run, which measures the same."""

    def read_part(found: Found) -> str | None:
        measured = parts(found, name)
        return read(measured[name]) if measured else None

    return read_part


def _mode(part: Found) -> str:
    return "compiled" if part["compile"] else "plain"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"
