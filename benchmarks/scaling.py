"""Collectives and bytes of a training step, counted from the config, and a model on paper of what they cost.

    python -m benchmarks.scaling [CONFIG.toml] [--step-s S] [--nvlink-gb-s 370.8] [--card-gb-s 50] [--json FILE]

The counts, collectives and bytes of each kind, are those of a real run: `tests/test_scaling.py` listens to one. Two
things are left out, which nobody waits for: the vote on stopping (4 bytes over gloo, answered a step later), and the
log's mean every `run.log_every_steps` steps.

The times are a model, not a measurement: NCCL's own estimate (`benchmarks/nccl_time.py`, where its inputs stand with
their origin), one collective after the other. The step that they are compared with is one GPU's, measured: without
--step-s that of 14 views, compiled, in results/benchmarks/gpu.json. Batch norms, bunch norm and loss stop the step for
as long as they take. Gradients are sent while the backward pass goes on, and what is lost is what exceeds it.
ASSUMPTIONS: the backward pass is two thirds of the step, as it has two of three matrix products; sending beside it
slows nothing down; the last bucket, which is ready when the backward pass ends, is not counted by itself.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_summary import parts
from benchmarks.nccl_time import Cluster, all_gather_s, all_reduce_s
from benchmarks.side_by_side import write
from twist.contracts.config import load_config
from twist.contracts.errors import UserError
from twist.contracts.networks import Head, build_backbone
from twist.pretrain.config import PretrainConfig
from twist.pretrain.distributed import ranks_per_bunch

FLOAT = 4  # bytes: statistics, loss and gradients are float32
# DistributedDataParallel's defaults: the first bucket is small, so that sending begins early.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
BACKWARD_SHARE = 2 / 3  # of a step
ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "pretrain" / "r50_multicrop_850ep.toml"
GPU_RECORD = ROOT / "results" / "benchmarks" / "gpu.json"
MEASURED = "step_multi-crop_compiled"


@dataclass(frozen=True)
class Traffic:
    """All-reduces and all-gathers that a rank takes part in during one step, each as the bytes it puts in."""

    reduced: tuple[int, ...]
    gathered: tuple[int, ...] = ()

    @property
    def collectives(self) -> int:
        return len(self.reduced) + len(self.gathered)

    @property
    def bytes(self) -> int:
        return sum(self.reduced) + sum(self.gathered)


def traffic(config: PretrainConfig) -> dict[str, Traffic]:
    """By kind: batch norms of backbone and hidden layers (both ways), the bunch's, the loss's, and the gradients.

    A batch norm gathers two statistics a channel (2·C) forwards and reduces two sums (2·C) backwards, once for each
    resolution that passes through it; the head sees all views at once. The bunch's counts are of a bunch that is
    shared; where it is one rank's own, `seconds` is zero.
    """
    with torch.device("meta"):
        backbone = build_backbone(config.model.backbone, width=config.model.width, image_size=config.views.global_size)
        head = Head(int(backbone.num_features), config.model.hidden_dim, config.model.classes, activation="relu")  # type: ignore[arg-type]
    resolutions = 2 if config.views.local_count else 1
    views = 2 + config.views.local_count
    widths = [m.num_features for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)] * resolutions
    widths += [m.num_features for m in head.hidden.modules() if isinstance(m, nn.BatchNorm1d)]
    # Gradients come in about the opposite order of the parameters' use.
    sizes = [p.numel() * FLOAT for module in (head, backbone) for p in reversed(list(module.parameters()))]
    return {
        "batch norms": _both_ways(widths),
        "bunch norm": _both_ways([config.model.classes]),
        "loss": Traffic(((2 + views * config.model.classes) * FLOAT,)),
        "gradients": Traffic(tuple(buckets(sizes))),
    }


def _both_ways(widths: list[int]) -> Traffic:
    sizes = tuple(2 * width * FLOAT for width in widths)
    return Traffic(reduced=sizes, gathered=sizes)


def buckets(sizes: Iterable[int]) -> list[int]:
    """Bytes of the buckets that DistributedDataParallel fills with gradients of these sizes, in the order they come.

    A bucket is closed by the gradient that reaches its limit, and no gradient is cut: a large matrix is a bucket.
    """
    closed: list[int] = []
    filled = 0
    for size in sizes:
        filled += size
        if filled >= (BUCKET if closed else FIRST_BUCKET):
            closed.append(filled)
            filled = 0
    return closed + ([filled] if filled else [])


def seconds(kind: Traffic, *, ranks: int, cluster: Cluster) -> float:
    """The model's time of all collectives of a kind among `ranks`, one after the other."""
    reducing = sum(all_reduce_s(bytes_, ranks=ranks, cluster=cluster) for bytes_ in kind.reduced)
    return reducing + sum(all_gather_s(bytes_, ranks=ranks, cluster=cluster) for bytes_ in kind.gathered)


def model_ms(config: PretrainConfig, *, ranks: int, cluster: Cluster) -> dict[str, float]:
    """The model's milliseconds a step by kind, each by itself.

    Raises:
        UserError: a run with so many ranks would be refused, because the bunch does not divide over them.
    """
    bunch = ranks_per_bunch(config.model.bunch_size, batch_size=config.run.batch_size, world_size=ranks)
    return {
        name: 1000 * seconds(kind, ranks=bunch if name == "bunch norm" else ranks, cluster=cluster)
        for name, kind in traffic(config).items()
    }


def lost(alone_ms: dict[str, float], *, step_s: float) -> dict[str, dict[str, float]]:
    """By kind, and in `all`, the milliseconds that a step gets longer and their share of the longer step.

    Args:
        alone_ms: what `model_ms` gives. step_s: the step on one GPU.
    """
    hidden_ms = 1000 * BACKWARD_SHARE * step_s
    ms = {name: max(0.0, time - hidden_ms) if name == "gradients" else time for name, time in alone_ms.items()}
    ms["all"] = sum(ms.values())
    return {name: {"ms": time, "share_of_step": time / (1000 * step_s + ms["all"])} for name, time in ms.items()}


def measured_step_s(record: Path) -> float | None:
    """Seconds of the compiled step of 14 views in the GPU's record; None when it has none."""
    found = parts(json.loads(record.read_text()), MEASURED) if record.exists() else {}
    return found[MEASURED]["times"]["ours"]["median_s"] if found else None


def main() -> None:
    assumed = Cluster()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG)
    parser.add_argument("--step-s", type=float, help="Measured time of the step on one GPU.")
    parser.add_argument("--nvlink-gb-s", type=float, default=assumed.nvlink_bytes_s / 1e9)
    parser.add_argument("--card-gb-s", type=float, default=assumed.card_bytes_s / 1e9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    step_s, origin = arguments.step_s, "--step-s"
    if step_s is None:
        if arguments.config.resolve() != CONFIG:
            parser.error("the measured step is that of the default config: give --step-s for another one")
        step_s, origin = measured_step_s(GPU_RECORD), f"{GPU_RECORD.name}, {MEASURED}"
    if step_s is None:
        parser.error(f"{GPU_RECORD} has no {MEASURED}: give --step-s")
    cluster = Cluster(nvlink_bytes_s=arguments.nvlink_gb_s * 1e9, card_bytes_s=arguments.card_gb_s * 1e9)
    config = load_config(arguments.config, PretrainConfig)
    result: dict[str, Any] = {
        "config": arguments.config.name,
        "computed": "a model on paper, nothing of it measured but the step on one GPU",
        "step_s": step_s,
        "step_from": origin,
        "backward_share_of_step": BACKWARD_SHARE,
        "cluster": asdict(cluster),
        "counts": {},
        "model": {},
    }
    print(f"{arguments.config.name}: a step of one rank (counted)")
    for name, kind in traffic(config).items():
        print(f"  {name:<14}{kind.collectives:5d} collectives {kind.bytes / 1e6:10.2f} MB")
        result["counts"][name] = {
            "reduces": len(kind.reduced),
            "reduced_bytes": sum(kind.reduced),
            "gathers": len(kind.gathered),
            "gathered_bytes": sum(kind.gathered),
        }
    print(
        f"Model, not measured: NVLink {arguments.nvlink_gb_s:g} GB/s a GPU, {cluster.gpus_a_node} GPUs and as many "
        f"cards of {arguments.card_gb_s:g} GB/s a node; a step of {1000 * step_s:.1f} ms on one GPU ({origin})"
    )
    for ranks in (8, 64, 256):
        try:
            alone_ms = model_ms(config, ranks=ranks, cluster=cluster)
        except UserError as error:
            print(f"  {ranks:3d} GPUs: {error}")
            continue
        of_step = lost(alone_ms, step_s=step_s)
        result["model"][str(ranks)] = {"alone_ms": alone_ms, "lost": of_step}
        print(
            f"  {ranks:3d} GPUs: lost {of_step['all']['ms']:.2f} ms, {of_step['all']['share_of_step']:.1%} of the step"
        )
        for name, alone in alone_ms.items():
            one = of_step[name]
            beside = f" of {alone:.2f} ms beside the backward pass" if name == "gradients" else ""
            print(f"    {name:<14}{one['ms']:8.2f} ms {one['share_of_step']:7.2%}{beside}")
    write(arguments.json, result)


if __name__ == "__main__":
    main()
