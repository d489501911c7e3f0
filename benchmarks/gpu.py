"""Everything that needs a GPU, in one call: first that it is right, then every GPU figure, each written as it is found.

    OUT=results/gpu python -m benchmarks.gpu                       on one H100
    OUT=out         python -m benchmarks.gpu --device cpu --tiny  the same path on a CPU, to see that it works

Needs this repository, Python ≥ 3.11, torch 2.11, torchvision, timm, fvcore, pydantic, rich, safetensors, numpy and
Pillow; no network, no data. A part that fails is reported with its traceback and the others still run; the exit status
is then 1.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import lars, loss, step
from benchmarks.side_by_side import Times, heading, machine
from contracts import atomic
from pretrain.batch_norm import SynchronisedBatchNorm
from pretrain.loss import twist_loss
from pretrain.model import build_model
from pretrain.optim import LARS

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
CASES = ("two-views", "multi-crop")


# --- is it right? -----------------------------------------------------------------------------------------------------


def check_loss(device: torch.device, _: bool) -> dict[str, Any]:
    """The published values and gradients, on this device in float64."""
    with np.load(GOLDENS / "loss_multicrop_2ranks.npz") as file:
        values = {name: torch.from_numpy(np.asarray(file[name])) for name in file}
    logits = values["logits"].to(device).requires_grad_()
    terms = twist_loss(logits, **{name: float(values[name]) for name in ("lam1", "lam2", "tau", "eps")})
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


def check_compiled(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The compiled backbone's logits against the plain one's, float32."""
    config = step.case("multi-crop", batch=4, tiny=True, run__precision="fp32")
    compiled = step.case("multi-crop", batch=4, tiny=True, run__precision="fp32", run__compile=True)
    views = step.random_views(config, device)
    with torch.no_grad():
        plain, fast = (build_model(c, device=device)[0](views) for c in (config, compiled if not tiny else config))
    worst = float((plain - fast).abs().max())
    assert worst < 5e-2, worst  # TF32 and other orders of summation, on logits of unit variance
    return {"largest_logit_difference": worst, "compiled": not tiny}


def check_batch_norm(device: torch.device, _: bool) -> dict[str, Any]:
    """Our batch norm on one rank against torch's on this device."""
    x = torch.randn(8, 6, 5, 5, device=device)
    ours, torchs = SynchronisedBatchNorm(6).to(device), nn.BatchNorm2d(6).to(device)
    worst = float((ours(x) - torchs(x)).abs().max())
    assert worst < 1e-5, worst
    return {"largest_difference": worst}


# --- how fast? --------------------------------------------------------------------------------------------------------


def time_loss(device: torch.device, tiny: bool) -> dict[str, Any]:
    views, batch, classes = (4, 8, 64) if tiny else (14, 128, 4096)
    return loss.figures(views=views, batch=batch, classes=classes, device=str(device), rounds=5)


def time_lars(device: torch.device, tiny: bool) -> dict[str, Any]:
    return lars.figures(device=str(device), rounds=5, architecture="resnet18" if tiny else "resnet50")


def time_step(name: str, *, compiled: bool) -> Callable[[torch.device, bool], dict[str, Any]]:
    def run(device: torch.device, tiny: bool) -> dict[str, Any]:
        batch = 4 if tiny else 256 if name == "two-views" else 128  # the published images a GPU
        config = step.case(name, batch=batch, tiny=tiny, run__compile=compiled and not tiny)
        found = step.figures(config, device=device, rounds=5, calls=1 if tiny else 5)
        print(step.render(name, found))
        return found

    return run


def measure_memory(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Peak memory at two batch sizes: bytes an image (from their difference), and the largest batch this card holds."""
    if device.type != "cuda":
        return {"measured": False}
    small, large = (4, 8) if tiny else (32, 64)
    found: dict[str, Any] = {"measured": True, "card_bytes": torch.cuda.get_device_properties(device).total_memory}
    for checkpointing in (False, True):
        peaks = []
        for batch in (small, large):
            config = step.case("multi-crop", batch=batch, tiny=tiny, model__activation_checkpointing=checkpointing)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run_step = step.our_step(config, step.random_views(config, device), device)
            for _ in range(2):
                run_step()
            peaks.append(torch.cuda.max_memory_allocated())
            del run_step
        an_image = (peaks[1] - peaks[0]) / (large - small)
        fixed = peaks[0] - small * an_image
        found["activation_checkpointing" if checkpointing else "plain"] = {
            "bytes_an_image": an_image,
            "fixed_bytes": fixed,
            "largest_batch_by_extrapolation": int((0.95 * found["card_bytes"] - fixed) / an_image),
        }
    return found


PARTS: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    "check_loss": check_loss,
    "check_lars": check_lars,
    "check_batch_norm": check_batch_norm,
    "check_no_waiting": check_no_waiting,
    "check_skipping": check_skipping,
    "check_compiled": check_compiled,
    "loss": time_loss,
    "lars": time_lars,
    **{f"step_{name}": time_step(name, compiled=False) for name in CASES},
    **{f"step_{name}_compiled": time_step(name, compiled=True) for name in CASES},
    "memory": measure_memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="Small networks and views: proves the path, nothing else.")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="Some of the parts.")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here: run this on one, or prove the path with --device cpu --tiny.", file=sys.stderr)
        return 1
    path = Path(os.environ.get("OUT", "results/gpu")) / ("gpu-tiny.json" if arguments.tiny else "gpu.json")
    results: dict[str, Any] = {"machine": machine(), "tiny": arguments.tiny, "parts": {}}
    print(heading("GPU figures"), flush=True)
    for name in arguments.only or PARTS:
        began = time.monotonic()
        try:
            results["parts"][name] = {"ok": True, **_plain(PARTS[name](device, arguments.tiny))}
        except Exception:  # one part must not cost the others their time on a borrowed machine; it is told and counted
            results["parts"][name] = {"ok": False, "error": traceback.format_exc()}
            traceback.print_exc()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(
            f"{name}: {'ok' if results['parts'][name]['ok'] else 'FAILED'}, {time.monotonic() - began:.1f} s",
            flush=True,
        )
        atomic.write_json(path, results)
    print(f"written to {path}")
    return 0 if all(part["ok"] for part in results["parts"].values()) else 1


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    times: dict[str, Times] = figures.get("times", {})
    return {**figures, **({"times": {name: asdict(t) for name, t in times.items()}} if times else {})}


if __name__ == "__main__":
    sys.exit(main())
