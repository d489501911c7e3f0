"""What the framework engines share: a config's way to a run, silence, the proof of loaded weights, the evaluation."""

import contextlib
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from twist.catalog.data_sets import find_data_set
from twist.contracts import files, states
from twist.contracts.curves import CURVES, Curves
from twist.contracts.errors import UsageError, UserError
from twist.contracts.failures import raise_reported
from twist.contracts.machine import code_sha256, software
from twist.contracts.progress import Progress
from twist.contracts.ranks import require_equal
from twist.contracts.trackers import Logger
from twist.contracts.weights import difference, tensors_digest
from twist.transfer import recipe
from twist.transfer.pictures import plot_losses
from twist.transfer.recipe import Schedule, Tree
from twist.transfer.request import Request, Resolved, Result, Weights

# A schedule of a few dozen pictures of one's own would end before its warm-up has.
FEWEST_OWN = 500
_EVALUATION, _LOADED = "evaluation.json", "loaded.json"
# Known and harmless; every other warning passes.
_NOISE = (
    "pkg_resources is deprecated",  # detectron2.model_zoo imports it
    "torch.meshgrid: in an upcoming release",  # detectron2's anchor generator
    "Importing from timm.models.layers is deprecated",  # detectron2's ViT
    "Fail to import ``MultiScaleDeformableAttention``",  # mmcv without compiled operators: none is needed here
    "Default ``avg_non_ignore`` is False",  # mmseg's cross entropy, as every published recipe has it
    "The given NumPy array is not writable",
)
_LOGGERS = ("detectron2", "fvcore", "mmengine", "current", "torch.fx._symbolic_trace")


class FrameworkConfig(Protocol):
    """The config of a run in a framework's own form, read from the protocol's file and the weights' overlay.

    `schedule` is what it says for so many processes and `set_schedule` writes it; `override` sets a key that exists;
    `tree` is the config as JSON has it; `recipe` is what of such a tree decides the number, for any weights and data;
    `place` sets what is the machine's and the run's own: devices, workers, folders, seed, weights.
    """

    # Keys that an option of the command line decides, with the option; overridden, they would be ignored.
    options: ClassVar[dict[str, str]]
    # What cannot change the number: how the machine works, how often something is shown or saved.
    harmless: ClassVar[tuple[str, ...]]
    # What an override may change without making the run another protocol's, as long as `leaves_protocol` is empty.
    schedule_keys: ClassVar[tuple[str, ...]]
    # Keys, with their values, of a backbone that learns.
    unfrozen: ClassVar[str]
    # Sections whose values others have copied, which an unknown key is not looked for in.
    copied: ClassVar[tuple[str, ...]] = ()
    # GPUs for which the recipe is stated, 0 for any number.
    reference: int
    config: Any

    def schedule(self, *, processes: int) -> Schedule: ...
    def set_schedule(self, schedule: Schedule, *, processes: int) -> None: ...
    def override(self, key: str, value: Any) -> None: ...
    def tree(self) -> Tree: ...
    def recipe(self, tree: Tree, processes: int) -> Tree: ...
    def is_frozen(self) -> bool: ...
    def is_synchronised(self) -> bool: ...
    def place(self, request: Request, weights: Weights) -> None: ...

    def nested(self) -> Any:
        """The config as dicts and lists that an override's key is looked up in."""
        return self.config

    def about_data(self) -> list[str]:
        """What the data decided, a line each, for the plan and the record."""
        return []

    def more_departures(self) -> list[str]:
        """What else makes the run another protocol's."""
        return []


def resolve(read: Callable[[Request, Weights], FrameworkConfig], request: Request, weights: Weights) -> Resolved:
    """Config, plan and recipe of `request`; nothing is built and nothing is written.

    Order, later wins: the framework's config, ours, the weights' overlay, the linear rule, `key=value` overrides (taken
    as written: the rule does not scale them again).
    """
    kind: Literal["resnet", "vit"] = "vit" if weights.header.is_vit else "resnet"
    if kind not in request.protocol.networks:
        raise UserError(
            f"{weights.header.display_name} is no backbone of {request.protocol.name}: `twist transfer --list {kind}` "
            "names the protocols for it."
        )
    run = read(request, weights)
    frozen = run.is_frozen()
    processes, reference, own = request.processes, run.reference, request.own
    published = run.schedule(processes=reference or 1)
    rule = recipe.choose_rule(processes=processes, reference=reference, keep_batch=request.controls.keep_batch)
    run.set_schedule(_planned(request, published, rule, reference), processes=processes)

    before, ruled = run.tree(), run.schedule(processes=processes)
    for text in request.overrides:
        key, value = recipe.read_override(text, run.nested(), run.options, copied=run.copied)
        try:
            run.override(key, value)
        except (ValueError, AssertionError) as error:
            raise UsageError(f'"{text}" does not fit: {str(error).splitlines()[0].rstrip(".")}.') from None
    after, planned = run.tree(), run.schedule(processes=processes)
    if run.is_frozen() and not frozen and (request.method or weights.header.method) != "supervised":
        raise UsageError(
            "Frozen batch norm or frozen stages do not go with self-supervised or random weights: their feature scales "
            f"are not those the statistics were tuned for (MoCo, arXiv 1911.05722, section 4.2); keep {run.unfrozen}."
        )
    if processes > 1 and not request.gpus:
        raise UsageError("Several processes need GPUs: synchronised batch norm does not run on CPUs.")
    if planned.images_per_step < processes or planned.images_per_step % processes:
        raise UsageError(f"{planned.images_per_step} images a step do not divide over {processes} processes.")
    if planned.iterations < 1:
        raise UsageError("A run needs at least one iteration.")
    run.place(request, weights)

    changed = [] if own is not None else recipe.leaves_protocol(published, planned)
    changed += recipe.departures(before, after, free=(*run.schedule_keys, *run.harmless))
    changed += run.more_departures()
    about = run.about_data()
    if own is not None:
        passes = planned.images_seen / own.count("train")
        about.insert(0, f"{own.summary()}; {planned.iterations} iterations see each {passes:.1f} times")
    notes, rate = [*about], planned.learning_rate
    if rule != "as published" and request.protocol.scale == "full":
        notes.append(f"{rule}: {planned.images_per_step} images a step, lr {rate:g}, {planned.iterations} iterations")
    if request.gpus == 0 and run.is_synchronised():  # not in the recipe: over one process both use the same statistics
        notes.append("one process on the CPU: synchronised batch norm is plain batch norm there")
    if rate != ruled.learning_rate:  # stays within the protocol
        notes.append(f"lr {rate:g} by an override; the protocol's is {ruled.learning_rate:g} here")
    where = {"rule": rule, "processes": processes, "gpus": request.gpus, "reference": reference}
    return Resolved(
        run.config,
        recipe.recorded(before, after, recipe_of=lambda tree: run.recipe(tree, processes), harmless=run.harmless),
        recipe.render_plan(published, planned, **where, changed=[*about, *changed]),  # type: ignore[arg-type]
        reduced=bool(changed),
        notes=(*notes, *changed),
    )


def _planned(request: Request, published: Schedule, rule: recipe.Rule, reference: int) -> Schedule:
    """`published` by the rule, at the length that was asked for.

    On a user's own images: over as many passes as the recipe makes over its own, or as the user says.
    """
    iterations, epochs = request.controls.iterations, request.controls.epochs
    planned = published
    if rule == "linear rule":
        planned = recipe.linear_rule(published, processes=request.processes, reference=reference)
    if request.own is not None and not iterations:
        rows = [find_data_set(name) for name in request.protocol.data]
        whole = sum(s.count or 0 for row in rows for s in row.run_splits().values() if s.role == "train")
        wanted, fewest = epochs, 1
        if epochs is None and whole and request.protocol.scale == "full":  # a sample's is for any small set
            wanted, fewest = published.images_seen / whole, FEWEST_OWN
        if wanted:
            iterations = max(round(wanted * request.own.count("train") / planned.images_per_step), fewest)
    elif epochs and request.own is None:
        raise UsageError("epochs counts passes over a data card's images: on a data root pass iterations=N.")
    return recipe.stretch(planned, iterations) if iterations else planned


def prove_loaded(title: str, tensors: Mapping[str, Any], state: Mapping[str, Any], *, expected: set[str]) -> str:
    """`UserError` unless all `tensors` are in a model's `state` bit for bit, as or at the end of a name, and no name of
    `expected` is left over: the frameworks only print a warning. Gives the SHA-256 of what the model holds of them."""
    given, placed = {}, {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "dtype") and not name.endswith("num_batches_tracked"):
            places = [name] if name in state else [key for key in state if key.endswith(f".{name}")]
            placed[name] = places[0] if len(places) == 1 else name
            given[placed[name]] = tensor
    names = {*given, *(name for name in expected if not name.endswith("num_batches_tracked"))}
    reason = difference(given, {name: state[name] for name in sorted(names) if name in state})
    if reason is not None:
        raise UserError(
            f"{title} did not take the weights into its model: {reason}; extra tensors were left at random: convert "
            "them again."
        )
    return tensors_digest({name: state[place] for name, place in placed.items()})


def agree(output: Path, digests: Sequence[str], *, leads: bool) -> None:
    """`UserError` unless every process begins with the same weights; the first one notes the digest for the record."""
    if len(set(digests)) > 1:
        raise UserError(
            f"The {len(digests)} processes of this run began with different weights: give every node the same file, "
            "and start in a new folder."
        )
    if leads:
        files.write_json(output / _LOADED, {"sha256": digests[0], "processes": len(digests)})


class TrainingLog:
    """Curves and progress of a training from step `start` to `total`, in the first process of a run."""

    def __init__(self, output: Path, *, start: int, total: int, logger: Logger | None = None) -> None:
        self.every = max(1, min(20, total // 50))
        self._total = total
        self._curves = Curves(output / CURVES, start=start + 1, logger=logger)
        self._progress = Progress("train", total=total, unit="step", start=start).__enter__()

    def step(self, done: int, values: Callable[[], Mapping[str, float]]) -> None:
        """After a step: every few of them `values`, losses and lr by name, are read and written."""
        if done % self.every and done != self._total:
            return
        numbers = values()
        loss = numbers.get("loss", math.nan)
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} at iteration {done}")
        self._curves.add(done, numbers)
        self._curves.plot(done, numbers)
        self._progress.advance(done - self._progress.done, loss=loss)
        if self.finished:  # the evaluation that follows shows its own
            self._progress.__exit__(None, None, None)

    @property
    def finished(self) -> bool:
        return self._progress.done >= self._total

    def close(self) -> None:
        self._curves.close()


def require_one_run(request: Request) -> None:
    """In a worker of a run on several nodes: `UserError` on all unless they run the same code on the same data."""
    if request.controls.nodes > 1:
        described: dict[str, Any] = {
            "protocol": request.protocol.name,
            "weights": request.random.model_dump(mode="json") if request.random else request.sha256,
            "seed": request.seed,
            "gpus": request.gpus,
            "data": request.data_name,
            "overrides": list(request.overrides),
            "software": software(),
            "twist": code_sha256("contracts", "measure", "catalog", "converters", "transfer"),
        }
        require_equal(lambda: described)


def seal(checkpoint: Path) -> None:
    """Vouch for a file that the framework has just saved, by a manifest; those of files that it removed go."""
    states.seal(checkpoint)
    for manifest in checkpoint.parent.glob(f"{checkpoint.stem.partition('_')[0]}_*.json"):
        if not manifest.with_suffix(checkpoint.suffix).exists():
            manifest.unlink()


@contextlib.contextmanager
def processes_of(request: Request, prefix: str) -> Iterator[Request]:
    """The request as a run's processes get it; what one of them reports is raised.

    A run that is continued goes on from `newest_checkpoint`; without manifests the framework's own note stays.
    """
    if request.resume or request.eval_only:
        found = newest_checkpoint(request.output, prefix, quiet=not request.leads)
        if found is not None:
            files.write_text(request.output / "last_checkpoint", found.name)  # where both frameworks look
    with raise_reported(request.output):
        yield replace(request, own=None)  # they read what was written of it


def newest_checkpoint(output: Path, prefix: str, *, quiet: bool = False) -> Path | None:
    """The newest `<prefix>_….pth` that is as it was saved, None without manifests; `UserError` where none is whole."""

    def iteration(checkpoint: Path) -> float:
        number = checkpoint.stem.rpartition("_")[2]
        return int(number) if number.isdecimal() else math.inf  # Detectron2's model_final

    saved = [path.with_suffix(".pth") for path in output.glob(f"{prefix}_*.json")]
    newest_first = sorted(saved, key=iteration, reverse=True)
    return states.first_whole(newest_first, say=lambda text: None if quiet else print(text, file=sys.stderr))


def require_finished(output: Path, *, done: int, of: int) -> None:
    """Refuse to evaluate a run before its end, a state that the protocol never measures."""
    if done < of:
        raise UserError(
            f"{output} stands at iteration {done} of {of}: --eval-only measures finished runs, so finish this one with "
            "--resume."
        )


def leave(output: Path, **measured: Any) -> None:
    """In a worker: write metrics, images (how many of each set), media (files in `output`), notes, names of classes."""
    files.write_json(output / _EVALUATION, measured)


def evaluation(output: Path) -> dict[str, Any]:
    """What `leave` wrote; empty in a run that wrote nothing."""
    path = output / _EVALUATION
    return files.read_json(path) if path.exists() else {}


def collect(request: Request, resolved: Resolved) -> Result:
    """In the caller: metrics, recipe with the sizes of the data, pictures, the plot of losses."""
    values, loaded = evaluation(request.output), request.output / _LOADED
    media, curves = [request.output / name for name in values["media"]], request.output / CURVES
    if curves.exists() and curves.stat().st_size:
        media.append(plot_losses(curves, request.output / "losses.png", title=request.protocol.name))
    return Result(
        metrics={name: values["metrics"][name] for name in request.protocol.metrics if name in values["metrics"]},
        recipe={**resolved.recipe, "data": values["images"]},
        media=media,
        curves=curves if curves.exists() else None,  # None on a node that is not the first, in a folder of its own
        notes=[*resolved.notes, *values.get("notes", ())],
        loaded=files.read_json(loaded)["sha256"] if loaded.exists() else None,
    )


@contextlib.contextmanager
def frameworks_quiet(log: Path | None = None) -> Iterator[None]:
    """Inside, the frameworks' loggers write to `log` (nowhere when None), prints and known warnings go nowhere.

    With `twist -v` the loggers write to stderr too."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    handler = logging.NullHandler() if log is None else logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler, *([logging.StreamHandler()] if os.environ.get("TWIST_VERBOSE") else [])]
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for text in _NOISE:
                warnings.filterwarnings("ignore", message=r"\s*" + re.escape(text))
            yield
    finally:
        handler.close()
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = handlers
