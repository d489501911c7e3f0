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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from twist.catalog.roots import find_root
from twist.contracts import files
from twist.contracts import run_folder as folder
from twist.contracts.errors import UsageError, UserError
from twist.contracts.files import sha256_file
from twist.contracts.machine import git_commit, hardware, software
from twist.contracts.record import RunRecord, Scale, WeightsProvenance, check_label, name_in, read_record, write_record
from twist.contracts.weights import Architecture, Backbone, read_header, weights_file, write_backbone
from twist.converters.output_folder import name_of
from twist.transfer.end import render_end, render_places
from twist.transfer.identity import identify_data
from twist.transfer.preflight import check_data
from twist.transfer.protocols import Protocol, find_protocol
from twist.transfer.quiet import frameworks_quiet
from twist.transfer.request import Controls, Request, split_overrides
from twist.transfer.result import EngineResult

if TYPE_CHECKING:
    from twist.transfer.engines.imagenet import engine as imagenet
    from twist.transfer.evaluation import Resolved

RANDOM, SUPERVISED = "random", "supervised"
TORCHVISION = "torchvision:"
# In the run folder: the random initialisation that the run starts from.
RANDOM_FILE = Path("weights") / "random.safetensors"
CONTINUED = "continued from a checkpoint: wall_s counts this start alone"


@dataclass(frozen=True)
class Source:
    """The weights as given: a file (None for random), the layout when it is told, and what the record calls them."""

    path: Path | None
    layout: str | None
    branch: str | None
    name: str
    sha256: str | None


@dataclass(frozen=True)
class _Asked:
    """A run as it is asked for, before its engine has looked at it; `network` is that of random weights, else None."""

    row: Protocol
    data: Path
    source: Source
    network: Backbone | None
    controls: Controls
    overrides: tuple[str, ...]
    seed: int
    gpus: int
    output: Path
    label: str | None
    resume: bool
    eval_only: bool


# What a run is, before it starts: the weights' header, recipe and plan, and what starts it.
_Planned = tuple[Backbone, "Resolved | imagenet.Resolved", Callable[[], EngineResult]]


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
        output: the run folder; None makes `runs/<protocol>/<method>-<weights>-seed<seed>`, with the network in it where
            random weights are not of the protocol's usual one.
        results: where records go, `<results>/<protocol>/<run>.json` with pictures and curves beside; None takes
            `<output>/results`.
        resume: continue what the folder holds; of a run that is done, its record is taken. eval_only: evaluate its
            last checkpoint, without training.
        overrides: `key=value` on the engine's own config, or on `twist.transfer.request.Controls`.
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
    network = _random_network(source, controls, row, seed=seed)
    output = (output or _default_output(row, source, label, seed, network)).resolve()
    results = (results or output / "results").resolve()
    began = time.monotonic()

    # On several machines the first one keeps the folder's account; the others work in it, or in one of their own.
    leads = controls.node_rank == 0
    earlier = _earlier_run(output, network) if leads else None
    if eval_only and leads and earlier is None:
        raise UserError(f"{output} holds no run to evaluate: run the protocol first, or check --output.")
    goes_on = resume or eval_only
    with folder.removed_on_failure(output):
        # Another branch of the file is another run; where none was asked for, nothing says so (older folders resume).
        branch_asked = {} if source.branch is None else {"branch": source.branch}
        # Of random weights nothing but their network tells two runs apart.
        drawn = {} if network is None else {"architecture": network.architecture, "width": network.width}
        weights_given = {"name": source.name, "sha256": source.sha256, **branch_asked, **drawn}
        run = {"protocol": row.name, "seed": seed, "weights": weights_given, "data": data_name}
        if leads and earlier is None:  # a kill during the conversion then leaves a folder that --resume knows
            folder.write_run(output, run, state=folder.STARTED)
        asked = _Asked(
            row, root, source, network, controls, rest, seed, gpus, output, label, resume=resume, eval_only=eval_only
        )  # fmt: skip
        if earlier is not None:  # before anything in the folder is replaced
            folder.refuse_other_transfer(output, earlier, run)
            if row.engine != "imagenet" and not goes_on:
                # The recipe of these is known only after a conversion, too long for a refusal.
                folder.refuse_second_start(output, earlier)
        backbone, planned, start = (_plan_imagenet if row.engine == "imagenet" else _plan_framework)(asked)
        run = {**run, "recipe": planned.recipe}
        if earlier is not None:
            folder.refuse_other_transfer(output, earlier, run)
            if not goes_on:
                folder.refuse_second_start(output, earlier)
        # Other nodes have no account of the run and wait for the first, which therefore measures again.
        if earlier is not None and not eval_only and controls.nodes == 1:
            there = folder.record_of(output, earlier, results=results)
            if there is not None and (record := read_record(there)).method == (label or backbone.method):
                print(f"{output} is done: this is its record; --eval-only measures it again.", file=sys.stderr)
                _print_end(record, row, backbone, there)
                return record
        print(planned.plan, file=sys.stderr)
        # Whatever becomes of an evaluation, the run stays as finished as it was.
        if leads and not eval_only:
            folder.write_run(output, run, state=folder.RUNNING)
        result = start()
    scale: Scale = "sample" if row.scale == "sample" else "reduced" if planned.reduced else "full"

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
        # What is not trained has no checkpoints, and is measured from the beginning.
        notes=(*result.notes, *((CONTINUED,) if earlier is not None and result.curves else ())),
    )
    record, path = _publish(record, result, results)
    if leads:
        folder.write_run(output, run, state=folder.DONE, record=path)
    _print_end(record, row, backbone, path)
    return record


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


def _default_network(row: Protocol) -> Architecture:
    return "resnet18" if row.scale == "sample" else "resnet50"


def _default_output(row: Protocol, source: Source, label: str | None, seed: int, network: Backbone | None) -> Path:
    weights = f"-{source.sha256[:8]}" if source.sha256 else ""
    branch = f"-{source.branch}" if source.branch else ""
    other = f"-{network.display_name}" if network and network.display_name != _default_network(row) else ""
    return Path("runs") / row.name / f"{label or source.name}{weights}{branch}{other}-seed{seed}"


def _random_network(source: Source, controls: Controls, row: Protocol, *, seed: int) -> Backbone | None:
    """The header of the network that `--weights random` stands for; None where a checkpoint is given."""
    if source.path is not None:
        if controls.architecture or controls.width:
            raise UserError("architecture and width are for --weights random: a checkpoint says its own.")
        return None
    architecture = controls.architecture or _default_network(row)
    vit = architecture.startswith("vit_")
    if vit and controls.width not in (None, 1):
        raise UsageError(f"width={controls.width} is for ResNets: leave it away with architecture={architecture}.")
    return Backbone(
        architecture=architecture,
        width=controls.width or 1,
        stem="patch16" if vit else "conv7x7",
        image_size=224 if vit else None,
        method=RANDOM,
        seed=seed,
    )


def _earlier_run(output: Path, network: Backbone | None) -> dict[str, Any] | None:
    """What the folder says of the run in it, with the network of random weights also where an earlier version noted
    none: the file with its weights says it, and without one nothing contradicts."""
    earlier = folder.read_run(output)
    weights = (earlier or {}).get("weights", {})
    if earlier is None or network is None or weights.get("name") != RANDOM or "architecture" in weights:
        return earlier
    began_with = read_header(output / RANDOM_FILE) if (output / RANDOM_FILE).is_file() else network
    drawn = {"architecture": began_with.architecture, "width": began_with.width}
    return {**earlier, "weights": {**weights, **drawn}}


def _artefact(asked: _Asked) -> Path:
    """The file that is converted: the one given, or a random initialisation written as an artefact."""
    if asked.network is None:
        assert asked.source.path is not None
        return asked.source.path
    import torch

    from twist.contracts.networks import build_backbone

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        network = build_backbone(asked.network.architecture, width=asked.network.width)
    return write_backbone(asked.output / RANDOM_FILE, network.state_dict(), asked.network)


def _plan_imagenet(asked: _Asked) -> _Planned:
    from twist.converters.read import load_artefact
    from twist.transfer.engines.imagenet import engine as imagenet

    row, controls, source = asked.row, asked.controls, asked.source
    if controls.iterations or controls.nodes > 1:
        raise UserError(f"{row.name} is counted in epochs on one machine: iterations and nodes are no keys of it.")
    if asked.network is None:
        tensors, backbone = load_artefact(_artefact(asked), layout=source.layout, branch=source.branch)
    else:
        tensors, backbone = {}, asked.network
    planned = imagenet.resolve(
        row, backbone, data=asked.data, overrides=asked.overrides, gpus=asked.gpus, eval_only=asked.eval_only
    )

    def start() -> EngineResult:
        # Random weights are drawn and written only now: a run that is refused leaves the folder as it was.
        given = tensors or load_artefact(_artefact(asked))[0]
        return imagenet.run(planned, given, seed=asked.seed, output=asked.output, resume=asked.resume)

    return backbone, planned, start


def _plan_framework(asked: _Asked) -> _Planned:
    row, source, output, controls = asked.row, asked.source, asked.output, asked.controls
    file, overlay, backbone = _convert(row, source, _artefact(asked), output=output, node=controls.node_rank)
    request = Request(
        row, asked.data, output, file, overlay, backbone, asked.label or backbone.method, asked.seed, asked.gpus,
        asked.overrides, controls, resume=asked.resume, eval_only=asked.eval_only,
    )  # fmt: skip
    engine = _engine(row)
    with frameworks_quiet():
        resolved: Resolved = engine.resolve(request)
    return backbone, resolved, lambda: engine.run(request, resolved)


def _convert(row: Protocol, source: Source, artefact: Path, *, output: Path, node: int) -> tuple[Path, Path, Backbone]:
    """Weights and overlay for the protocol's framework, the proof held on the way."""
    from twist.converters.convert import convert

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
        return importlib.import_module(f"twist.transfer.engines.{row.engine}.engine")


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


def _publish(record: RunRecord, result: EngineResult, results: Path) -> tuple[RunRecord, Path]:
    """Write the record with pictures and curves beside it, so that a folder of records can be moved and committed."""
    beside = results / record.protocol / name_in(record, results)
    names = []
    for path in [*result.media, *([result.curves] if result.curves else [])]:
        with files.atomic_path(beside / path.name) as temporary:
            shutil.copyfile(path, temporary)
        names.append(os.path.relpath(beside / path.name, results / record.protocol))
    curves = names.pop() if result.curves else None
    record = record.model_copy(update={"media": tuple(names), "curves": curves})
    return record, write_record(record, results)


def _print_end(record: RunRecord, row: Protocol, backbone: Backbone, path: Path) -> None:
    print(render_end(record, row, backbone), file=sys.stderr)
    print(render_places(record, path), file=sys.stderr)
