"""One transfer run: a protocol, a checkpoint, a data root → one run record.

    check the data → convert the weights, with proof → plan → train and evaluate in the framework → record

Any checkpoint that `twist convert` reads will do. `random` (a seeded random initialisation) and `torchvision:FILE`
(supervised) are the baselines; `random` is written as an artefact first, so everything after is one path for all.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from contracts import atomic
from contracts.errors import UsageError, UserError
from contracts.hashing import sha256_file
from contracts.metrics import METRICS
from contracts.provenance import git_commit, hardware, software
from contracts.record import RunRecord, Scale, WeightsProvenance, check_label, name_in, write_record
from contracts.weights import Backbone, weights_file, write_backbone
from converters.output_folder import name_of
from transfer import folder
from transfer.data.identity import identify_data
from transfer.preflight import check_data, find_root
from transfer.protocols import Neighbour, Protocol, find_neighbours, find_protocol
from transfer.quiet import frameworks_quiet
from transfer.request import Controls, Request, split_overrides
from transfer.result import EngineResult

RANDOM, SUPERVISED = "random", "supervised"
TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Source:
    """The weights as given: a file (None for random), the layout when it is told, and what the record calls them."""

    path: Path | None
    layout: str | None
    branch: str | None
    name: str
    sha256: str | None


def transfer(
    protocol: str,
    *,
    weights: str,
    data: Path | None,
    seed: int = 0,
    gpus: int | None = None,
    output: Path | None = None,
    results: Path | None = None,
    resume: bool = False,
    eval_only: bool = False,
    overrides: Sequence[str] = (),
    method: str | None = None,
    layout: str | None = None,
    branch: str | None = None,
) -> RunRecord:
    """Run `protocol` on `weights` and write one record.

    Args:
        weights: `random`, `torchvision:FILE`, a checkpoint of any layout, or a run folder (of a run with a
            teacher, the teacher).
        data: the data root; None takes `DETECTRON2_DATASETS`.
        gpus: GPUs of this node; None takes those of the recipe that are here, 0 one process on the CPU.
        output: the run folder; None makes `runs/<protocol>/<method>-<weights>-seed<seed>`.
        results: where records go, `<results>/<protocol>/<run>.json` with pictures and curves beside; None takes
            `<output>/results`.
        resume: continue what the folder holds. eval_only: evaluate its last checkpoint, without training.
        overrides: `key=value` on the engine's own config, or on `transfer.request.Controls`.
        method: what the record calls the method; None takes what the weights say.
        layout, branch: of the checkpoint, as for `twist convert`; None finds them by its content.

    Raises:
        UsageError: an unknown protocol or layout, an unknown or impossible override.
        UserError: data, weights or run folder that are not what they should be; memory that ran out.
    """
    row = find_protocol(protocol)
    controls, rest = split_overrides(overrides)
    root = find_root(data)
    sample, data_name = check_data(row, root), identify_data(row, root)
    gpus = _choose_gpus(gpus, row)
    source = _find_weights(weights, layout=layout, branch=branch)
    if method is not None:
        check_label(method)
    label = method or (SUPERVISED if source.layout == "torchvision" else RANDOM if source.path is None else None)
    output = (output or _default_output(row, source, label, seed)).resolve()
    began = time.monotonic()

    # On several machines the first one keeps the folder's account; the others work in it, or in one of their own.
    leads = controls.node_rank == 0
    earlier = folder.earlier_run(output, resume=resume or eval_only) if leads else None
    if eval_only and leads and earlier is None:
        raise UserError(f"{output} holds no run to evaluate: run the protocol first, or check --output.")
    with folder.taken(output):
        # Another branch of the file is another run; where none was asked for, nothing says so (older folders resume).
        branch_asked = {} if source.branch is None else {"branch": source.branch}
        weights_given = {"name": source.name, "sha256": source.sha256, **branch_asked}
        run = {"protocol": row.name, "seed": seed, "weights": weights_given, "data": data_name}
        if leads and earlier is None:  # a kill during the conversion then leaves a folder that --resume knows
            folder.note_run(output, run, state=folder.STARTED)
        artefact = _artefact(source, controls, row, seed=seed, output=output)
        if row.engine == "imagenet":
            from converters.read import load_artefact
            from transfer.imagenet import engine as imagenet

            if controls.iterations or controls.nodes > 1:
                raise UserError(
                    f"{row.name} is counted in epochs on one machine: iterations and nodes are no keys of it."
                )
            tensors, backbone = load_artefact(artefact, layout=source.layout, branch=source.branch)
            planned = imagenet.resolve(row, backbone, data=root, overrides=rest, gpus=gpus, eval_only=eval_only)
            print(planned.plan, file=sys.stderr)
            run = {**run, "recipe": planned.recipe}
            if earlier is not None:
                folder.check_same_run(output, _identity(earlier), run)
            # Whatever becomes of an evaluation, the run stays as finished as it was.
            if not eval_only:
                folder.note_run(output, run, state=folder.RUNNING)
            result = imagenet.run(planned, tensors, seed=seed, output=output, resume=resume)
            scale: Scale = "sample" if row.scale == "sample" else "reduced" if planned.reduced else "full"
        else:
            file, overlay, backbone = _convert(row, source, artefact, output=output, node=controls.node_rank)
            request = Request(
                row, root, output, file, overlay, backbone, label or backbone.method, seed, gpus, rest, controls,
                resume=resume, eval_only=eval_only,
            )  # fmt: skip
            engine = _engine(row)
            with frameworks_quiet():
                resolved = engine.resolve(request)
            print(resolved.plan, file=sys.stderr)
            run = {**run, "recipe": resolved.recipe}
            if earlier is not None:
                folder.check_same_run(output, _identity(earlier), run)
            if leads and not eval_only:
                folder.note_run(output, run, state=folder.RUNNING)
            result = engine.run(request, resolved)
            scale = "sample" if row.scale == "sample" else "reduced" if resolved.reduced else "full"

    record = RunRecord(
        method=label or backbone.method,
        protocol=row.name,
        task=row.task,
        scale=scale,
        seed=seed,
        metrics=result.metrics,
        weights=_provenance(source, backbone),
        recipe=_recipe(result, backbone, sample),
        data=data_name,
        software=software(),
        hardware={**hardware(), "gpus_used": gpus, "nodes": controls.nodes},
        wall_s=round(time.monotonic() - began, 1),
        git_commit=git_commit(),
        notes=(*result.notes, *(("continued from a checkpoint: wall_s counts this start alone",) if earlier else ())),
    )
    record = _publish(record, result, (results or output / "results").resolve())
    if leads:
        folder.note_run(output, run, state=folder.DONE)
    print(render_end(record, row, backbone), file=sys.stderr)
    return record


def render_end(record: RunRecord, row: Protocol, backbone: Backbone) -> str:
    """Measured metrics, beside what was published for the same method and network under this protocol."""
    neighbours = (
        find_neighbours(row, record.method, backbone.epochs, backbone.display_name) if record.scale == "full" else []
    )
    lines = [f"{row.name} · {record.method} · {record.weights.name} · seed {record.seed} · {record.wall_s:.0f} s"]
    for name in row.metrics:
        if name in record.metrics:
            lines.append(f"  {METRICS[name].label:22} {record.metrics[name]:6.2f} {METRICS[name].unit}")
            lines += [f"    {text}" for neighbour in neighbours for text in _against(name, record, neighbour)]
    if record.scale == "full" and not neighbours:
        lines.append(
            f"  nothing published for {record.method} on a {backbone.display_name} under this protocol is known here"
        )
    elif record.scale != "full":
        lines.append(f"  {record.scale} scale: not comparable with published numbers")
    return "\n".join(lines)


def _against(name: str, record: RunRecord, neighbour: Neighbour) -> list[str]:
    if name not in neighbour.values:
        return []
    difference = record.metrics[name] - neighbour.values[name]
    epochs = f", {neighbour.epochs} ep" if neighbour.epochs else ""
    if neighbour.differs:
        return [
            f"published under another recipe ({neighbour.differs}) {neighbour.values[name]:.1f}{epochs}: "
            f"{difference:+.2f} [{neighbour.source}]"
        ]
    verdict = "within" if abs(difference) <= neighbour.tolerance else "OUTSIDE"
    return [
        f"published {neighbour.values[name]:.1f} ± {neighbour.tolerance:g}{epochs}: {difference:+.2f}, {verdict} "
        f"[{neighbour.source}]"
    ]


# ---------------------------------------------------------------------------------------------------------------------


def _choose_gpus(gpus: int | None, row: Protocol) -> int:
    import torch

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is None:
        return min(here, max(row.gpus, 1))
    if gpus < 0 or gpus > here:
        raise UserError(f"--gpus {gpus}, but this machine shows {here}: pass at most that, or 0 for the CPU.")
    return gpus


def _find_weights(weights: str, *, layout: str | None, branch: str | None) -> Source:
    if weights == RANDOM:
        if layout or branch:
            raise UsageError("--from and --branch say how a checkpoint is read, and --weights random reads none.")
        return Source(None, None, None, RANDOM, None)
    if weights.startswith(TORCHVISION):
        if layout not in (None, "torchvision"):
            raise UsageError(f"{TORCHVISION}FILE is read as torchvision's: leave out the prefix, or --from {layout}.")
        layout = "torchvision"
    path = Path(weights.removeprefix(TORCHVISION)).expanduser().absolute()
    path = weights_file(path)
    if not path.is_file():
        raise UserError(f"There is no weights file at {path}: check the path, or pass random or torchvision:FILE.")
    return Source(path.resolve(), layout, branch, name_of(path), sha256_file(path))


def _default_output(row: Protocol, source: Source, label: str | None, seed: int) -> Path:
    weights = f"-{source.sha256[:8]}" if source.sha256 else ""
    branch = f"-{source.branch}" if source.branch else ""
    return Path("runs") / row.name / f"{label or source.name}{weights}{branch}-seed{seed}"


def _artefact(source: Source, controls: Controls, row: Protocol, *, seed: int, output: Path) -> Path:
    """The file that is converted: the one given, or a random initialisation written as an artefact."""
    if source.path is not None:
        if controls.architecture or controls.width:
            raise UserError("architecture and width are for --weights random: a checkpoint says its own.")
        return source.path
    import torch

    from contracts.networks import build_backbone

    architecture = controls.architecture or ("resnet18" if row.scale == "sample" else "resnet50")
    vit = architecture.startswith("vit_")
    if vit and controls.width not in (None, 1):
        raise UsageError(f"width={controls.width} is for ResNets: leave it away with architecture={architecture}.")
    header = Backbone(
        architecture=architecture,
        width=controls.width or 1,
        stem="patch16" if vit else "conv7x7",
        image_size=224 if vit else None,
        method=RANDOM,
        seed=seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_backbone(header.architecture, width=header.width)
    return write_backbone(output / "weights" / "random.safetensors", network.state_dict(), header)


def _convert(row: Protocol, source: Source, artefact: Path, *, output: Path, node: int) -> tuple[Path, Path, Backbone]:
    """Weights and overlay for the protocol's framework, the proof held on the way."""
    from converters.convert import convert

    target = output / "weights" / (row.engine if node == 0 else f"{row.engine}-node{node}")
    if target.exists():  # a continued run: the conversion is deterministic, so it is made anew rather than trusted
        shutil.rmtree(target)
    with frameworks_quiet():
        done = convert(
            artefact,
            target=row.engine,  # type: ignore[arg-type]
            layout=source.layout,
            branch=source.branch,
            output=target,
        )
    assert done.overlay is not None, row.engine
    return Path(done.weights), Path(done.overlay), done.backbone


def _engine(row: Protocol) -> ModuleType:
    with frameworks_quiet():
        return importlib.import_module(f"transfer.{row.engine}_engine")


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "state"}


def _provenance(source: Source, backbone: Backbone) -> WeightsProvenance:
    if source.path is None:
        return WeightsProvenance(name=RANDOM)
    return WeightsProvenance(
        name=source.name,
        sha256=source.sha256,
        architecture=backbone.display_name,
        epochs=backbone.epochs,
        layout=backbone.source_layout,
        pretrain_config_hash=backbone.config_hash,
        pretrain_seed=backbone.seed,
        branch=backbone.source_branch,
        source_sha256=backbone.source_sha256,
        pretrain_images_sha256=backbone.images_sha256,
    )


def _recipe(result: EngineResult, backbone: Backbone, sample: dict[str, Any] | None) -> dict[str, Any]:
    """The engine's recipe with what makes two numbers comparable: the same network, and the same sample.

    Mean, std, channel order and stride belong to the weights, not to the recipe: rows of other weights must meet.
    """
    recipe = {**result.recipe, "architecture": backbone.display_name}
    if sample is not None:
        recipe["sample"] = {key: sample.get(key) for key in ("source", "size", "seed", "format_version")}
    return recipe


def _publish(record: RunRecord, result: EngineResult, results: Path) -> RunRecord:
    """Write the record with pictures and curves beside it, so that a folder of records can be moved and committed."""
    beside = results / record.protocol / name_in(record, results)
    names = []
    for path in [*result.media, *([result.curves] if result.curves else [])]:
        with atomic.atomic_path(beside / path.name) as temporary:
            shutil.copyfile(path, temporary)
        names.append(os.path.relpath(beside / path.name, results / record.protocol))
    curves = names.pop() if result.curves else None
    record = record.model_copy(update={"media": tuple(names), "curves": curves})
    write_record(record, results)
    return record
