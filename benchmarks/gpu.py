"""Everything that needs a GPU, in one call: first that it is right, then every GPU figure, each written as it is found.

    python benchmarks/gpu.py                                 on one GPU
    OUT=out python benchmarks/gpu.py --device cpu --tiny     the same path on a CPU, to see that it works
    python benchmarks/gpu.py --only memory loss              some parts again, into the file that is there

The figures go to `results/benchmarks/gpu.json`, where `benchmarks/summary.py` reads them, or to `$OUT/gpu.json` when
OUT is set: a file that comes back from another machine that way is copied to `results/benchmarks/` by hand (and to
that machine's OUT before a call with --only, which adds to it).

Needs this repository, Python ≥ 3.11, torch, torchvision, numpy and Pillow with what they require, and beside them
exactly: absl-py, annotated-types, fvcore, llvmlite, numba, protobuf, pydantic, pydantic-core, safetensors, tensorboard,
typing-inspection. (A test keeps the list. Of fvcore one module is used, which needs none of fvcore's own requirements;
pydantic may want newer typing-extensions than torch does.) No network, no data.

A part that fails is reported with its traceback and the others still run. Once --budget-s seconds have passed no other
part begins, and those left are written down as skipped. Failed or skipped parts make the exit status 1.
"""

import argparse
import copy
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

if not __package__:
    # Started as a file: Python has put this folder in front of the path. The packages lie one above, and here
    # compare.py would hide the package of that name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]

from benchmarks import gpu_memory, gpu_pipeline, lars, loss, step
from benchmarks.gpu_compiled import check as check_compiled_backbone
from benchmarks.gpu_compiled import compiler_for
from benchmarks.side_by_side import heading, machine, plain
from twist.contracts import files
from twist.contracts import machine as this_machine
from twist.pretrain.config import LossConfig
from twist.pretrain.distributed import SynchronisedBatchNorm
from twist.pretrain.loss import twist_loss
from twist.pretrain.optim import LARS

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
RESULTS = ROOT / "results" / "benchmarks"
Part = Callable[[torch.device, bool], dict[str, Any]]


# --- is it right? -----------------------------------------------------------------------------------------------------


def check_loss(device: torch.device, _: bool) -> dict[str, Any]:
    """The published values and gradients, on this device in float64."""
    with np.load(GOLDENS / "loss_multicrop_2ranks.npz") as file:
        values = {name: torch.from_numpy(np.asarray(file[name])) for name in file}
    logits = values["logits"].to(device).requires_grad_()
    terms = twist_loss(logits, LossConfig(**{name: float(values[name]) for name in LossConfig.model_fields}))
    terms.total.backward()
    assert logits.grad is not None
    worst = float((logits.grad.cpu() - values["grad"]).abs().max())
    assert worst < 1e-12, worst
    assert abs(terms.total.item() - float(values["total"])) < 1e-12
    return {"largest_gradient_difference": worst}


def check_lars(device: torch.device, _: bool) -> dict[str, Any]:
    """The published six steps, on this device in float64, with channels_last weights and contiguous gradients."""
    with np.load(GOLDENS / "lars.npz") as file:
        values = {name: torch.from_numpy(np.asarray(file[name])) for name in file}
    names = ("conv.weight", "fc.weight", "bn.weight", "fc.bias")
    weights = {name: nn.Parameter(values[f"init/{name}"].to(device)) for name in names}
    weights["conv.weight"].data = weights["conv.weight"].data.to(memory_format=torch.channels_last)
    excluded = {"params": [weights["bn.weight"], weights["fc.bias"]], "weight_decay": 0.0, "lars_exclude": True}
    decayed = {"params": [weights["conv.weight"], weights["fc.weight"]], "weight_decay": 1.5e-6}
    optimizer = LARS([decayed, excluded], lr=0.0)
    worst = 0.0
    for number, lr in enumerate(values["lrs"].tolist()):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, weight in weights.items():
            weight.grad = values[f"grad{number}/{name}"].to(device)
        optimizer.step()
        worst = max(
            worst, *(float((w.detach().cpu() - values[f"step{number}/{n}"]).abs().max()) for n, w in weights.items())
        )
    assert worst < 1e-12, worst
    return {"largest_weight_difference": worst}


def check_no_waiting(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Whole steps with torch's synchronisation debugger set to raise: none of them waits for the device."""
    config = step.case("multi-crop", batch=4 if tiny else 16, tiny=tiny)
    views = step.random_views(config, device)
    run_step = step.our_step(config, views, device)
    run_step()  # the first one chooses algorithms and makes buffers
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            seen = run_step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(seen[0])
    return {"steps": 3, "checked": device.type == "cuda"}


def check_skipping(device: torch.device, _: bool) -> dict[str, Any]:
    """A non-finite input changes no weight and no running statistic, in every precision this device has."""
    precisions = ("bf16", "fp16", "fp32") if device.type == "cuda" else ("fp32",)
    for precision in precisions:
        config = step.case("multi-crop", batch=4, tiny=True, run__precision=precision)
        views = step.random_views(config, device)
        run = step.build_run(config, device)
        run_step = step.our_step(config, views, device, run=run)
        run_step()
        before = copy.deepcopy(run.student.state_dict())
        views[0][0, 0, 0, 0] = torch.inf
        run_step()
        for name, tensor in run.student.state_dict().items():
            assert name.endswith("tracked") or torch.equal(tensor, before[name]), (precision, name)
        assert int(run.guard.total) >= 1
    return {"precisions": list(precisions)}


def check_batch_norm(device: torch.device, _: bool) -> dict[str, Any]:
    """What our batch norm does over several ranks, here on one, against torch's: both ways, and without a wait."""
    worst: dict[str, float] = {}
    # A bf16 number has 8 bits; running statistics are float32 in both, and gradients sums of 8 · 49 such numbers.
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            generator = torch.Generator().manual_seed(0)
            x, gradient = (
                torch.randn(8, 6, 7, 7, generator=generator).to(device, dtype).contiguous(memory_format=layout)
                for _ in range(2)
            )
            passed = []
            for norm in (SynchronisedBatchNorm(6).to(device), nn.BatchNorm2d(6).to(device)):
                with torch.no_grad():
                    norm.weight.copy_(torch.linspace(0.5, 2, 6))
                images = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    out = norm.over_ranks(images) if isinstance(norm, SynchronisedBatchNorm) else norm(images)
                    out.backward(gradient)
                finally:
                    if device.type == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
                passed.append(
                    [out.detach(), images.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
                )
            apart = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(*passed)]
            worst[f"{dtype} {layout}".replace("torch.", "")] = max(apart)
            assert max(apart) < bound, (dtype, layout, apart)
    return {"largest_relative_difference": worst}


def check_compiled(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The compiled backbone's features, gradients and statistics beside the plain one's."""
    with compiler_for(device):
        return check_compiled_backbone(device, tiny)


# --- how fast? --------------------------------------------------------------------------------------------------------


def time_loss(device: torch.device, tiny: bool) -> dict[str, Any]:
    views, batch, classes = (4, 8, 64) if tiny else (14, 128, 4096)
    return loss.figures(views=views, batch=batch, classes=classes, device=str(device), **_often(device, tiny, calls=20))


def time_lars(device: torch.device, tiny: bool) -> dict[str, Any]:
    architecture = "resnet18" if tiny else "resnet50"
    return lars.figures(device=str(device), architecture=architecture, **_often(device, tiny, calls=20))


def time_step(name: str, *, compiled: bool) -> Part:
    def run(device: torch.device, tiny: bool) -> dict[str, Any]:
        batch = 4 if tiny else 256 if name == "two-views" else 128  # the published images a GPU
        config = step.case(name, batch=batch, tiny=tiny, run__compile=compiled)
        with compiler_for(device):
            found = step.figures(config, device=device, **_often(device, tiny, calls=5))
        print(step.render(name, found))
        return found

    return run


def time_pipeline(*, compiled: bool) -> Part:
    def run(device: torch.device, tiny: bool) -> dict[str, Any]:
        with compiler_for(device):
            return gpu_pipeline.run(device, tiny, compiled=compiled)

    return run


def _often(device: torch.device, tiny: bool, *, calls: int) -> dict[str, int]:
    """Rounds, and calls a round: on a GPU so many that waiting for it at the round's ends does not count."""
    return {"rounds": 2 if tiny else 5, "calls": calls if device.type == "cuda" and not tiny else 1}


# What must be right and the figures with a goal come first, in case time runs out.
PARTS: dict[str, Part] = {
    "check_loss": check_loss,
    "check_lars": check_lars,
    "check_batch_norm": check_batch_norm,
    "check_no_waiting": check_no_waiting,
    "check_skipping": check_skipping,
    "check_photometric": gpu_pipeline.check_photometric,
    "step_two-views": time_step("two-views", compiled=False),
    "step_multi-crop": time_step("multi-crop", compiled=False),
    "pipeline": time_pipeline(compiled=False),
    "photometric_two-views": gpu_pipeline.photometric_of_two_views,
    "loss": time_loss,
    "lars": time_lars,
    "memory": gpu_memory.measure,
    "check_compiled": check_compiled,
    "step_multi-crop_compiled": time_step("multi-crop", compiled=True),
    "step_two-views_compiled": time_step("two-views", compiled=True),
    "pipeline_compiled": time_pipeline(compiled=True),
}


def take(names: Sequence[str], device: torch.device, *, tiny: bool, budget_s: float, path: Path, keep: bool) -> bool:
    """Run the parts `names` and write each as it is found into `path`; True when none failed or was skipped.

    Args:
        budget_s: seconds from now after which no other part begins.
        keep: add to what `path` holds. A part that is skipped leaves its older figure there.

    Raises:
        ValueError: `path` holds figures of another machine or other versions.
    """
    began, right = time.monotonic(), True
    results: dict[str, Any] = {"machine": machine(), "tiny": tiny, "parts": {}}
    if keep and path.exists():
        older = json.loads(path.read_text())
        for what in ("hardware", "software"):
            if older["machine"][what] != results["machine"][what]:
                raise ValueError(f"{path} was measured with other {what}: move it away, or set OUT to another folder")
        results["parts"] = older["parts"]
    for name in names:
        since = time.monotonic()
        if since - began > budget_s:
            part: dict[str, Any] = {"ok": False, "skipped": f"the {budget_s:g} s of --budget-s were over"}
        else:
            part = _one(PARTS[name], device, tiny) | {
                "wall_s": round(time.monotonic() - since, 1),
                "git_commit": this_machine.git_commit(),
            }
        right &= part["ok"]
        if not ("skipped" in part and name in results["parts"]):
            results["parts"][name] = part
        verdict = "ok" if part["ok"] else "skipped" if "skipped" in part else "FAILED"
        print(f"{name}: {verdict}, {time.monotonic() - since:.1f} s", flush=True)
        files.write_json(path, results)
    return right


def _one(part: Part, device: torch.device, tiny: bool) -> dict[str, Any]:
    # As a run has it, whatever the part before has left behind.
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        return {"ok": True, **plain(part(device, tiny))}
    except Exception:  # one part must not cost the others their time on a borrowed machine; it is told and counted
        traceback.print_exc()
        return {"ok": False, "error": traceback.format_exc()}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def result_path(*, tiny: bool) -> Path:
    """Where the figures go; those of --tiny are nobody's, and stay out of the repository."""
    folder = os.environ.get("OUT") or (tempfile.gettempdir() if tiny else RESULTS)
    return Path(folder) / ("gpu-tiny.json" if tiny else "gpu.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="Small networks and views: proves the path, nothing else.")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="Some of the parts, added to the file that is there.")
    parser.add_argument("--budget-s", type=float, default=500.0, help="Seconds after which no other part begins.")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here: run this on one, or prove the path with --device cpu --tiny.", file=sys.stderr)
        return 1
    path = result_path(tiny=arguments.tiny)
    print(heading("GPU figures"), flush=True)
    try:
        right = take(
            arguments.only or list(PARTS),
            device,
            tiny=arguments.tiny,
            budget_s=arguments.budget_s,
            path=path,
            keep=bool(arguments.only),
        )
    except ValueError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    print(f"written to {path}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
