"""The tables of speed, from the JSON files that the benchmark programs wrote.

    python -m benchmarks.summary                     # print all; with --headlines the README's few
    python -m benchmarks.summary --update README.md  # put it between the markers, which say which
    python -m benchmarks.summary --check README.md   # fail when the file's table is another

A figure whose file, or whose part of it, is absent is "not measured". No number in the table is typed by hand.
"""

import argparse
import json
import re
import statistics
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import gpu_summary
from benchmarks.gpu_summary import Found, Reader, Title, spread
from twist.contracts import files

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"
BEGIN, END = "<!-- python -m benchmarks.summary{} -->", "<!-- end of summary -->"
HEADLINES = " --headlines"
NOT_MEASURED = "not measured"


class Figure(NamedTuple):
    """A row: what it is, what was aimed at, the program that measures it, and how its JSON says it.

    What it is may depend on what the file has.
    `read` gives None for a file without this figure: an older one, or a GPU run in which the part failed.
    """

    what: str | Title
    goal: str
    program: str
    read: Reader
    headline: bool = False


def _speedup(slow: str, fast: str) -> Callable[[Found], str]:
    def read(found: Found) -> str:
        times = found["times"]
        return f"{found['speedup']:.1f} × ({spread(times[fast])} against {spread(times[slow])})"

    return read


def _pipeline(mode: str, case: str) -> Callable[[Found], str]:
    def read(found: Found) -> str:
        rates, low_high = found[case]["images_per_s_core"], found[case]["spread"]
        ours, theirs = ("{:.0f}–{:.0f}".format(*low_high[name]) for name in (mode, "pil"))
        n = found[case]["rounds"]
        return f"{rates[mode] / rates['pil']:.1f} × ({ours} against {theirs} images/s a core, n = {n} each)"

    return read


def _peers(found: Found) -> str:
    rates, spread_of = found["images_per_s_core"], found["spread"]
    ours = rates["ours, cpu"]
    parts = [
        f"{ours / rates[name]:.1f} × ({spread_of[name][0]:.0f}–{spread_of[name][1]:.0f} images/s a core)"
        for name in ("lightly", "torchvision v2")
    ]
    low, high = spread_of["ours, cpu"]
    return f"{', '.join(parts)}, ours {low:.0f}–{high:.0f} (n = {found['rounds']} each)"


def _features(images: str) -> Callable[[Found], str]:
    def read(found: Found) -> str:
        rates, low_high = found["images_per_s_core"], found["spread"]
        ours, theirs = ("{:.0f}–{:.0f}".format(*low_high[f"{images}, {name}"]) for name in ("ours", "ImageFolder"))
        times = rates[f"{images}, ours"] / rates[f"{images}, ImageFolder"]
        return f"{times:.1f} × ({ours} against {theirs} images/s a core, n = {found['rounds']} each)"

    return read


def _network(found: Found) -> str | None:
    rates, low_high = found["images_per_s_core"], found["spread"]
    names = [name for name in rates if name.startswith("features of ")]
    if not names:
        return None
    ours, theirs = ("{:.0f}–{:.0f}".format(*low_high[name]) for name in names)
    times = rates[names[0]] / rates[names[1]]
    return f"{times:.2f} × ({ours} against {theirs} images/s a core, n = {found['rounds']} each)"


def _help(found: Found) -> str:
    times = found["help_s"]
    return f"{times['median']} s ({times['min']}–{times['max']} s, n = {times['n']})"


def _inspect(found: Found) -> str | None:
    if "inspect" not in found:
        return None
    part = found["inspect"]
    ours, torchs = (f"{part[name]['min']}–{part[name]['max']} s" for name in ("inspect_s", "import_torch_s"))
    median = part["inspect_s"]["median"]
    return f"{median:.2f} s ({ours}; the import of torch {torchs}; n = {part['inspect_s']['n']} each)"


def _demo(found: Found) -> str | None:
    if "fast_demo" not in found:
        return None
    demo = found["fast_demo"]
    return f"{demo['wall_s']:.0f} s, {demo['peak_mib'] / 1024:.1f} GiB (n = {demo['n']})"


def _compare(found: Found) -> str:
    walls = [time["wall_s"] for time in found["times"]["total"]]
    return f"{statistics.median(walls):.1f} s ({min(walls):.1f}–{max(walls):.1f} s, n = {len(walls)})"


def _convert(found: Found) -> str:
    return f"{found['wall_over_bare']:.2f} × ({spread(found['times']['convert, no proof'])})"


def _convert_memory(found: Found) -> str:
    return f"{found['peak_over_file']:.1f} × the file"


def _proof(found: Found) -> str:
    times = found["times"]["convert, with proof"]
    return f"{times['median_s']:.1f} s ({spread(times)})"


def _checks(found: Found) -> str:
    parts = [f"{dataset} {times['median_s']:.0f} s" for dataset, times in found["times"].items()]
    most = max(times["most_s"] for times in found["times"].values())
    return f"{', '.join(parts)} (at most {most:.0f} s, n = {min(t['n'] for t in found['times'].values())} each)"


def _knn(found: Found) -> str:
    parts = [f"{limit}: {run['peak_mb']:.0f} MiB" for limit, run in found["runs"].items() if "MiB" in limit]
    return f"{'; '.join(parts)} ({found['queries']} queries among {found['bank']:,})"


def _overhead(engine: str) -> Callable[[Found], str]:
    def read(found: Found) -> str:
        part = found[engine]
        percent = part["overhead_percent"]
        return f"{percent['median']:+.1f} % ({percent['low']:+.1f}–{percent['high']:+.1f} %, n = {part['n']} pairs)"

    return read


def _grid(found: Found) -> str:
    times = found["times"]
    return f"{found['ratio']:.2f} × ({spread(times['linear-grid'])} against {spread(times['linear'])})"


def _retrieval(found: Found) -> str | None:
    runs = found["runs"]
    if "FAISS" not in runs:
        return None
    (ours,) = (run["wall_s"] for name, run in runs.items() if name != "FAISS")
    theirs = runs["FAISS"]["wall_s"]
    spans = " against ".join(f"{min(times):.1f}–{max(times):.1f} s" for times in (ours, theirs))
    return f"{statistics.median(theirs) / statistics.median(ours):.2f} × its speed ({spans}, n = {len(ours)} each)"


def _first(found: Found) -> str | None:
    parts = found["first"]["parts_s"] if "first" in found else {}
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return f"{found['first']['wall_s']:.1f} s ({listed}; n = 1)" if parts else None


def _suite(found: Found) -> str | None:
    part = found.get("suite")
    return (
        None
        if part is None
        else f"{part['wall_s']:.0f} s (own time of {part['runs']} runs {part['own_s']:.0f} s; n = 1)"
    )


def _dense(found: Found) -> str | None:
    part = found.get("dense")
    if part is None:
        return None
    minutes = [f"{part[name] / 60:.1f} min" for name in ("wall_s", "apart_s")]
    return f"{minutes[0]}, {part['peak_mib'] / 1024:.1f} GiB, against {minutes[1]} (n = 1)"


def _outside(case: str) -> Title:
    step = f"of the step with {gpu_summary.VIEWS[case]}"
    head = "outside backbone and head"
    return gpu_summary.title(case, f"{step} and the photometric part, {head}", f"{step}, {head}")


def _faults(found: Found) -> str:
    trials, lost, different = (found["rows"][-1][name] for name in ("trials", "LOST", "SILENTLY DIFFERENT"))
    kills = sum(row["trials"] for row in found["rows"] if row["fault"] in ("killed", "told to end"))
    bits = sum(row["trials"] for row in found["rows"] if row["fault"].startswith("a bit"))
    return f"{lost} and {different} of {trials:,} ({kills} kills, {bits:,} flipped bits)"


_LOSS, _LARS = _speedup("pair by pair", "closed form"), _speedup("tensor by tensor", "ours")
FIGURES = (
    Figure("loss, 14 views × 128 × 4096, forward and backward, over pair by pair", "≥ 8 ×", "loss", _LOSS,
           headline=True),
    Figure("LARS step, ResNet-50 and head, over tensor by tensor", "≥ 3 ×", "lars", _LARS),
    Figure("ResNet-18 on a CPU, bfloat16, views of 32 pixels, over torchvision's", "", "small_views",
           _speedup("torchvision, bfloat16", "ours, bfloat16")),
    Figure("14 views a core, `device` mode, over the PIL chain", "≥ 8 ×", "data", _pipeline("device", "14 views"),
           headline=True),
    Figure("14 views a core, `cpu` mode, over the PIL chain", "≥ 3 ×", "data", _pipeline("cpu", "14 views"),
           headline=True),
    Figure("the same over lightly's `DINOTransform`, and over torchvision v2 on tensors", "", "data_peers", _peers),
    Figure("images of the ImageNet protocols, test time (resize 256, crop 224), over `ImageFolder` with Pillow", "",
           "features", _features("test images")),
    Figure("the same, random crops for training", "", "features", _features("training crops")),
    Figure("features of a ResNet-18, test images, over timm's network in a plain loop", "≥ 1 ×", "features", _network),
    Figure("a linear probe's step with 13 rates, over one rate", "≤ 1.3 ×", "linear_grid", _grid),
    Figure("k-NN among 1 M × 384 features, beside FAISS (flat)", "≥ 0.8 ×", "retrieval", _retrieval),
    Figure("a ResNet-50's first number: `inspect`, `convert` with proof, k-NN on the sample", "≤ 25 s", "first_numbers",
           _first, headline=True),
    Figure("a suite of twelve runs on the sample", "≤ 80 s", "first_numbers", _suite),
    Figure("k-NN and linear segmentation of CamVid and object discovery on 100 COCO pictures, of a ResNet-50, over "
           "features anew for each protocol and rate", "", "first_numbers", _dense, headline=True),
    Figure("`twist --help`", "< 0.3 s", "command_line", _help),
    Figure("`twist inspect`, a 100 MB file", "≤ 0.6 s", "command_line", _inspect),
    Figure("`twist demo --fast`", "2 min, 4 GB", "command_line", _demo),
    Figure("`twist convert`, two targets, no proof, over reading and writing alone", "< 2 ×", "convert", _convert),
    Figure("the same, memory", "< 2.5 ×", "convert", _convert_memory),
    Figure("`twist convert`, two targets, with proof", "< 15 s", "convert", _proof, headline=True),
    Figure("our Detectron2 engine, time an iteration over its own training loop", "≤ 2 %", "engine_overhead",
           _overhead("detectron2")),
    Figure("our MMSegmentation engine, likewise", "≤ 2 %", "engine_overhead", _overhead("mmseg")),
    Figure("k-NN, peak memory by its limit", "within it", "knn", _knn),
    Figure("`twist data check`, a healthy tree of real size", "< 60 s", "data_check", _checks),
    Figure("`twist compare`, 10,000 records", "< 3 s", "compare", _compare),
    Figure("work lost, and silently different results, after kills, full disks and damaged files", "0 and 0", "faults",
           _faults, headline=True),
    Figure("step on one GPU, ResNet-50, two views × 256, over the naive step", "≥ 2 ×", "gpu",
           gpu_summary.speedup("two-views"), headline=True),
    Figure("step on one GPU, ResNet-50, 14 views × 128, over the naive step", "≥ 2.5 ×", "gpu",
           gpu_summary.speedup("multi-crop"), headline=True),
    Figure(_outside("two-views"), "≤ 5 %", "gpu", gpu_summary.outside("two-views")),
    Figure(_outside("multi-crop"), "≤ 5 %", "gpu", gpu_summary.outside("multi-crop")),
    Figure(gpu_summary.title("two-views", *["images/s over the bare backbone's, two views"] * 2), "≥ 90 %", "gpu",
           gpu_summary.over_bare("two-views")),
    Figure("images/s over the bare backbone's, 14 views", "≥ 90 %", "gpu", gpu_summary.over_bare("multi-crop"),
           headline=True),
    Figure("waiting for data in a run, 14 views, `device` mode", "< 3 %", "gpu", gpu_summary.data_wait),
    Figure("memory an image, 14 views; largest batch", "", "gpu", gpu_summary.memory("plain")),
    Figure("the same with activation checkpointing", "", "gpu", gpu_summary.memory("activation_checkpointing")),
    Figure("loss, 14 views × 128 × 4096, over pair by pair, on the GPU", "≥ 8 ×", "gpu",
           gpu_summary.also("loss", _LOSS)),
    Figure("LARS step over tensor by tensor, on the GPU", "≥ 3 ×", "gpu", gpu_summary.also("lars", _LARS)),
)  # fmt: skip


def render(results: Path = RESULTS, *, headlines: bool = False) -> str:
    """The table as Markdown, all of it or the headlines, and below it which machine each row was measured on."""
    rows: list[list[str]] = []
    machines: dict[str, str] = {}
    for figure in FIGURES:
        if headlines and not figure.headline:
            continue
        path = results / f"{figure.program}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        value = figure.read(found) if found else None
        letter = "" if value is None else machines.setdefault(_machine(found), string.ascii_uppercase[len(machines)])
        what = figure.what if isinstance(figure.what, str) else figure.what(found)
        rows.append([what, NOT_MEASURED if value is None else value, letter, figure.goal, figure.program])
    lines = ["| figure | measured (median) | on | goal | `python -m benchmarks.…` |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    legend = "; ".join(f"{letter}: {machine}" for machine, letter in machines.items())
    return "\n".join([*lines, "", f"Measured on {legend or 'nothing yet'}."])


def _machine(found: Found) -> str:
    """What a program ran on; some say it at the top of their file, some in `machine`, some in every case."""
    places = [found, found.get("machine", {}), *(part for part in found.values() if isinstance(part, dict))]
    about = next((place for place in places if "hardware" in place), None)
    if about is None:
        return "a machine that the file does not name"
    hardware = about["hardware"]
    name = hardware["gpu"] or hardware["processor"]
    return f"{name}, {hardware['cores']} cores, torch {about['software']['torch']}"


def updated(text: str, results: Path = RESULTS) -> str:
    """`text` with the table that its opening marker asks for between the two.

    Raises:
        ValueError: `text` does not have the two markers exactly once.
    """
    begin = re.escape(BEGIN).replace(re.escape("{}"), f"({HEADLINES})?")
    found = re.findall(f"{begin}.*?{re.escape(END)}", text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"the file needs {BEGIN.format('')} (or {HEADLINES.strip()} in it) and {END}, once")
    table = render(results, headlines=bool(found[0]))
    return re.sub(
        f"{begin}.*?{re.escape(END)}",
        lambda _: f"{BEGIN.format(found[0])}\n\n{table}\n\n{END}",
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", type=Path, metavar="FILE")
    which.add_argument("--update", type=Path, metavar="FILE")
    which.add_argument("--headlines", action="store_true")
    given = parser.parse_args()
    if (path := given.check or given.update) is None:
        print(render(headlines=given.headlines))
        return 0
    before = path.read_text()
    after = updated(before)
    if given.update:
        files.write_text(path, after)
    elif before != after:
        print(
            f"{path}: the table of speed is stale; run `python -m benchmarks.summary --update {path}`.", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
