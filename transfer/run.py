"""One transfer run: a protocol, a checkpoint, a data root → one run record.

check the data → take the folder → convert the weights, with proof → plan → train and evaluate → record
"""

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Required, Unpack

import torch

from twist.catalog.card import find_card
from twist.catalog.card_data import require_card_data
from twist.catalog.check import identify_data, require_data
from twist.catalog.data_sets import find_root
from twist.contracts import files, run_folder, states
from twist.contracts.errors import UsageError, UserError, require
from twist.contracts.files import sha256_file
from twist.contracts.machine import git_commit, hardware, software
from twist.contracts.networks import build_backbone
from twist.contracts.progress import is_quiet
from twist.contracts.record import RunRecord, WeightsProvenance, check_label, read_record
from twist.contracts.weights import RESNETS, Backbone, is_vit, read_header, stem_of, write_backbone
from twist.converters.convert import convert, name_of
from twist.converters.read import load_artefact
from twist.converters.sources import Place
from twist.converters.zoo import located
from twist.transfer.end import print_end, publish
from twist.transfer.engines.framework import frameworks_quiet
from twist.transfer.protocols import Protocol, find_protocol
from twist.transfer.request import RANDOM_FILE, Controls, Request, Resolved, Result, Weights, split_overrides

RANDOM, SUPERVISED = "random", "supervised"
TORCHVISION = "torchvision:"
# In a shared conversion: its files and what their tensors mean.
CONVERTED = "converted.json"
CONTINUED = "continued from a checkpoint: wall_s counts this start alone"


class Options(Place, total=False):
    """What `transfer` takes; the keys of `Place` say how the checkpoint is read, as for `twist convert`."""

    weights: Required[str]
    data: Required[Path | None]
    seed: int
    gpus: int | None
    output: Path | None
    results: Path | None
    resume: bool
    eval_only: bool
    overrides: Sequence[str]
    method: str | None


def transfer(protocol: str, **options: Unpack[Options]) -> RunRecord:
    """Run `protocol` on `weights` and write one record.

    Args:
        weights: `random`, `zoo:NAME`, `torchvision:FILE`, a checkpoint of any layout, or a run folder.
        data: the data root or card; None takes `DETECTRON2_DATASETS`.
        seed: of random weights, and of the training.
        gpus: GPUs of this node; None takes those of the recipe that are here, 0 one process on the CPU.
        output: the run folder; None makes `runs/<protocol>/<method>-<weights>-seed<seed>`.
        results: where records go, with pictures and curves; None takes `<output>/results`.
        resume: continue what the folder holds; of a run that is done, take its record.
        eval_only: evaluate the last checkpoint of the run in the folder, without training.
        overrides: `key=value` on the engine's own config, or on `twist.transfer.request.Controls`.
        method: what the record calls the method; None takes what the weights say.
        layout, branch, entry, prefix, heads: how the checkpoint is read; its content says what is left out.

    Raises:
        UsageError: an unknown protocol or layout, an unknown or impossible override.
        UserError: data, weights or run folder that are not what they should be; memory that ran out.
    """
    request = _ask(protocol, **options)
    # The other nodes of one run write beside the first, which holds the folder for all.
    with run_folder.locked(request.output) if request.leads else contextlib.nullcontext():
        return _measure(request)


def plan(protocol: str, **options: Unpack[Options]) -> str:
    """What `transfer` with these arguments would do, as text; the weights are converted, and no folder is written."""
    with tempfile.TemporaryDirectory() as folder:
        options |= {"output": Path(folder), "results": None}
        request = _ask(protocol, **options)
        resolved = _resolve(request, prepare_weights(request))
    hours = "not measured here" if request.protocol.hours is None else f"{request.protocol.hours:.3g}"
    devices = f"{request.protocol.gpus} GPUs" if request.protocol.gpus else "a CPU"
    return f"{resolved.plan}\nhours of the whole recipe on {devices}: {hours}"


def _ask(
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
    **reading: Unpack[Place],
) -> Request:
    """Everything that is known before the weights are read; nothing is written."""
    row = find_protocol(protocol)
    require("transfer", *row.engine_row.packages)
    controls, rest = split_overrides(overrides, in_epochs=row.engine_row.target is None)
    own = sample = None
    if (card := find_card(data, root=controls.root)) is not None:
        root, own = card.path, require_card_data(card, row.task)
        data_name: str | None = own.name
    else:
        root = find_root(data)
        sample = require_data(row.data, root, task=row.task, scale=row.scale)
        data_name = identify_data(row.data, root, subset=row.subset)
    given = find_weights(weights, row, controls, method=method, seed=seed, **reading)
    output = (output or default_output(row, given, seed, card=card.name if card else None)).resolve()
    return Request(
        row, root, output, **given, seed=seed, gpus=_choose_gpus(gpus, row), overrides=rest, controls=controls,
        resume=resume, eval_only=eval_only, own=own, data_name=data_name, sample=sample,
        results=(results or output / "results").resolve(),
    )  # fmt: skip


def _resolve(request: Request, weights: Weights) -> Resolved:
    with frameworks_quiet():
        resolved: Resolved = importlib.import_module(request.protocol.engine_row.module).resolve(request, weights)
    return resolved


def _measure(request: Request) -> RunRecord:
    """Train and evaluate in the run's folder, which this process holds, and write the record."""
    row, output, own = request.protocol, request.output, request.own
    began = time.monotonic()
    with run_folder.removed_on_failure(output):
        run = describe_run(request)
        earlier = take_folder(request, run)
        ready = prepare_weights(request)
        plan = _resolve(request, ready)
        run["recipe"] = plan.recipe
        if earlier is not None:
            run_folder.refuse_other_transfer(output, earlier, run)
            if (done := finished_record(request, ready, earlier)) is not None:
                return done
        if not is_quiet():
            print(plan.plan, file=sys.stderr)
        # Whatever becomes of an evaluation, the run stays as finished as it was.
        if request.leads and not request.eval_only:
            run_folder.write_run(output, run, state=run_folder.RUNNING)
        result: Result = importlib.import_module(row.engine_row.module).run(request, ready, plan)

    # What is not trained has no checkpoints, and is measured from the beginning.
    continued = (CONTINUED,) if earlier is not None and result.curves else ()
    # The engine's recipe with what makes two numbers comparable: the same network, and the same sample or own data.
    # Mean, std, channel order and stride belong to the weights: rows of other weights must meet.
    recipe = {**result.recipe, "architecture": ready.header.display_name}
    if request.sample is not None:
        recipe["sample"] = {key: request.sample.get(key) for key in ("source", "size", "seed", "format_version")}
    if own is not None:
        recipe["card"] = {"name": own.card.name, "sha256": own.sha256}
    record, path = publish(
        RunRecord(
            method=request.method or ready.header.method,
            protocol=row.name,
            task=row.task,
            scale="own" if own else "sample" if row.scale == "sample" else "reduced" if plan.reduced else "full",
            seed=request.seed,
            metrics=result.metrics,
            weights=_provenance(request, ready.header, result.loaded),
            recipe=recipe,
            data=request.data_name,
            software=software(),
            hardware={**hardware(), "gpus_used": request.gpus, "nodes": request.controls.nodes},
            wall_s=round(time.monotonic() - began, 1),
            git_commit=git_commit(),
            notes=(*result.notes, *continued),
        ),
        request.results,
        media=result.media,
        curves=result.curves,
    )
    if request.leads:
        run_folder.write_run(output, run, state=run_folder.DONE, record=path)
    print_end(record, row, ready.header, path)
    return record


# ── What was asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def _choose_gpus(gpus: int | None, row: Protocol) -> int:
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is None:
        return min(here, max(row.gpus, 1))
    if gpus < 0 or gpus > here:
        raise UserError(f"--gpus {gpus}, but this machine shows {here}: pass at most that, or 0 for the CPU.")
    return gpus


def find_weights(
    weights: str,
    row: Protocol,
    controls: Controls,
    *,
    method: str | None = None,
    seed: int = 0,
    **reading: Unpack[Place],
) -> dict[str, Any]:
    """The fields of a `Request` that say which weights are meant, and how."""
    if method is not None:
        check_label(method)
    if weights == RANDOM:
        if any(reading.values()):
            raise UsageError(
                "--from, --branch, --entry, --prefix and --heads read a checkpoint; --weights random reads none."
            )
        architecture = controls.architecture or row.network
        if architecture not in RESNETS and controls.width not in (None, 1):
            raise UsageError(f"width={controls.width} is for ResNets: leave it out with architecture={architecture}.")
        form = {"stem": stem_of(architecture), "width": controls.width or 1}
        form |= {"image_size": 224} if is_vit(architecture) else {}
        network = Backbone(architecture=architecture, method=RANDOM, seed=seed, **form)
        return {"name": RANDOM, "random": network, "method": method or RANDOM}
    if controls.architecture or controls.width:
        raise UserError("architecture and width are for --weights random: a checkpoint says its own.")
    if weights.startswith(TORCHVISION):
        if (layout := reading.get("layout")) not in (None, "torchvision"):
            raise UsageError(f"{TORCHVISION}FILE is read as torchvision's: leave out the prefix, or --from {layout}.")
        reading["layout"] = "torchvision"
    named = os.path.expanduser(weights.removeprefix(TORCHVISION))
    path, how = located(named, **reading, method=method, epochs=None)
    if not path.is_file():
        raise UserError(
            f"There is no weights file at {path.absolute()}: check the path, or pass random, zoo:NAME or "
            "torchvision:FILE."
        )
    said = {"method": how.pop("method") or (SUPERVISED if how.get("layout") == "torchvision" else None)}
    said["epochs"] = how.pop("epochs")
    return {"checkpoint": path.resolve(), "name": name_of(path), "sha256": sha256_file(path), "reading": how, **said}


def default_output(row: Protocol, given: dict[str, Any], seed: int, *, card: str | None = None) -> Path:
    """`runs/<protocol>/…`, with a data card's name, and the network where random weights are not of the usual one."""
    network, reading = given.get("random"), given.get("reading", {})
    parts = [card, given["method"] or given["name"], (given.get("sha256") or "")[:8]]
    parts += [reading.get(key) for key in ("branch", "entry", "prefix")]
    parts += [reading.get("heads") and f"heads{reading['heads']}"]
    parts += [network.display_name if network and network.display_name != row.network else None]
    return Path("runs") / row.name / "-".join([*filter(None, parts), f"seed{seed}"]).replace("/", ".")


# ── The run folder ────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_run(request: Request) -> dict[str, Any]:
    """What `run.json` says of the run before its recipe is known."""
    weights: dict[str, Any] = {"name": request.name, "sha256": request.sha256}
    # Another branch of the file, or the same tensors in another number of heads, is another run.
    weights |= {key: value for key, value in request.reading.items() if key != "layout" and value is not None}
    if request.random is not None:  # nothing but their network tells two runs of random weights apart
        weights |= {"architecture": request.random.architecture, "width": request.random.width}
    return {"protocol": request.protocol.name, "seed": request.seed, "weights": weights, "data": request.data_name}


def take_folder(request: Request, run: dict[str, Any]) -> dict[str, Any] | None:
    """The earlier start of this run in the folder; None in a new folder, which says from now on whose it is."""
    output = request.output
    if not request.leads:
        return None
    earlier = run_folder.read_run(output)
    if earlier is None:
        if request.eval_only:
            raise UserError(f"{output} holds no run to evaluate: run the protocol first, or check --output.")
        run_folder.write_run(output, run, state=run_folder.STARTED)  # a kill leaves a folder that --resume knows
        return None
    weights = earlier.get("weights", {})
    if request.random is not None and weights.get("name") == RANDOM and "architecture" not in weights:
        # An earlier version did not note the network: the file with the weights says it.
        began = read_header(output / RANDOM_FILE) if (output / RANDOM_FILE).is_file() else request.random
        earlier["weights"] = {**weights, "architecture": began.architecture, "width": began.width}
    if run["data"] is None and earlier.get("data"):
        raise UserError(
            f"{output} holds a run on {earlier['data']}, and {request.data} has no readable "
            f"{' and '.join(request.protocol.data)}: pass the --data of then (`twist data check` says what is missing)."
        )
    run_folder.refuse_other_transfer(output, earlier, run)
    if not (request.resume or request.eval_only):
        run_folder.refuse_second_start(output, earlier)
    run_folder.remove_leftovers(output)
    return earlier


def finished_record(request: Request, weights: Weights, earlier: dict[str, Any]) -> RunRecord | None:
    """The record of a run that is done, shown again; None where it is to be measured."""
    # The other nodes wait for the first, which therefore measures again.
    if request.eval_only or request.controls.nodes > 1:
        return None
    path = run_folder.record_of(request.output, earlier, results=request.results)
    if path is None or (record := read_record(path)).method != (request.method or weights.header.method):
        return None
    print(f"{request.output} is done: this is its record; --eval-only measures it again.", file=sys.stderr)
    print_end(record, request.protocol, weights.header, path)
    return record


# ── The weights ───────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare_weights(request: Request) -> Weights:
    """The weights as the engine takes them: converted for its framework, with proof, or read as tensors."""
    artefact, framework = request.checkpoint or _write_random(request), request.protocol.engine_row.target
    if framework is None:
        tensors, header = load_artefact(artefact, **request.reading)
        return Weights(header, tensors=tensors)

    def converted(target: Path) -> Weights:
        if target.exists():  # a continued run: the conversion is deterministic, so it is made anew rather than trusted
            shutil.rmtree(target)
        with frameworks_quiet():
            done = convert(artefact, to=framework, output=target, **request.reading)
        return Weights(done.backbone, done.weights, done.overlay)

    if request.controls.shared is None:
        node = "" if request.leads else f"-node{request.controls.node_rank}"
        return converted(request.output / "weights" / f"{framework}{node}")
    given = {key: value for key, value in request.reading.items() if value is not None}
    name = files.sha256_json([sha256_file(artefact), given])[:12]
    target = Path(request.controls.shared).absolute() / framework / name
    with run_folder.alone(target.with_suffix(".lock")):
        if (kept := _kept_conversion(target)) is not None:
            return kept
        made = converted(target)
        of_files = [{"name": path.name, **states.description(path)} for path in (made.file, made.overlay) if path]
        states.write_manifest(target / CONVERTED, {"files": of_files, "backbone": made.header.model_dump(mode="json")})
    return made


def _kept_conversion(folder: Path) -> Weights | None:
    """What another run converted into `folder`; None where it is not there as it was written."""
    try:
        fields, _ = states.read_manifest(folder / CONVERTED)
    except (OSError, ValueError):
        return None
    if any(states.damage(folder / one["name"], one) for one in fields["files"]):
        return None
    weights, *overlay = (folder / one["name"] for one in fields["files"])
    return Weights(Backbone.model_validate(fields["backbone"]), weights, overlay[0] if overlay else None)


def _write_random(request: Request) -> Path:
    assert request.random is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        network = build_backbone(request.random.architecture, width=request.random.width)
    return write_backbone(request.output / RANDOM_FILE, network.state_dict(), request.random)


# ── The record ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _provenance(request: Request, header: Backbone, loaded: str | None) -> WeightsProvenance:
    if request.random is not None:
        return WeightsProvenance(name=RANDOM, loaded_sha256=loaded)
    return WeightsProvenance(
        name=request.name,
        sha256=request.sha256,
        architecture=header.display_name,
        epochs=header.epochs or request.epochs,
        layout=header.source_layout,
        pretrain_config_hash=header.config_hash,
        pretrain_seed=header.seed,
        branch=header.source_branch,
        source_sha256=header.source_sha256,
        pretrain_images_sha256=header.images_sha256,
        loaded_sha256=loaded,
    )
