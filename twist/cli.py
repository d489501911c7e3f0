"""`twist`: one command a stage, each a few lines that read the arguments and call the room that does the work.

Nothing heavy is imported before a command runs, so `twist --help` answers at once. Exit status: 0 done, 1 it failed or
a proof did not hold, 2 wrong usage, 75 stopped by a signal and ready to be started again with --resume, 130 and 143
stopped at once by Ctrl-C and by SIGTERM.
"""

import functools
import importlib.metadata
import json
import os
import pkgutil
import re
import signal
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer import Argument, Option

from twist import converters
from twist.contracts.errors import MOST_SEED, UsageError, missing_package, printable, require
from twist.contracts.failures import describe

app = typer.Typer(
    name="twist",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="TWIST pretraining, conversion of any self-supervised checkpoint, transfer runs and comparison tables.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make the sample; prepare and check data sets.")
app.add_typer(data_app, name="data")
zoo_app = typer.Typer(invoke_without_command=True)
app.add_typer(zoo_app, name="zoo")

TableFormat = Literal["table", "markdown", "csv", "json", "latex", "html"]
DataRoot = Annotated[Path | None, Argument(show_default=False, help="Default: $DETECTRON2_DATASETS.")]
Overrides = Annotated[list[str] | None, Argument(metavar="[key=value …]", show_default=False)]
Data = Annotated[Path | None, Option(help="Folder with the data sets, or a data card; default $DETECTRON2_DATASETS.")]
Seed = Annotated[int, Option(min=0, max=MOST_SEED)]
TimmName = Annotated[
    str | None,
    Option(metavar="timm:NAME", help="The network that timm builds by this name, where the file does not say."),
]
Heads = Annotated[int | None, Option(min=1, help="Attention heads of a ViT whose file does not say them.")]
Layout = Annotated[str | None, Option("--from", help="Source layout, when it should not be detected.")]
Branch = Annotated[str | None, Option(help="Branch of the source, for example momentum or teacher.")]
Entry = Annotated[str | None, Option(metavar="PATH", help="Entry of the file with the state dict: model, a/b.")]
Prefix = Annotated[str | None, Option(help="Prefix of the network's names there, such as backbone.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show the plan, and stop.")]
Method = Annotated[str | None, Option(help="Method of the weights, where the file does not say it.")]
# A target is a file of its name; importing them all would take a second.
TARGETS = ", ".join(file.name for file in pkgutil.iter_modules([f"{room}/targets" for room in converters.__path__]))
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Resume = Annotated[bool, Option("--resume", help="Continue what the run folder holds.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"twist-suite {importlib.metadata.version('twist-suite')}")
        raise typer.Exit


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2)


@app.callback()
def options(
    debug: Annotated[bool, Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[  # noqa: ARG001
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Show no progress and no plans.")] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Show the frameworks' own logs.")] = False,
) -> None:
    for name, asked in (("DEBUG", debug), ("QUIET", quiet), ("VERBOSE", verbose)):
        if asked:
            os.environ[f"TWIST_{name}"] = "1"


@app.command()
def pretrain(
    config: Annotated[Path, Argument(metavar="CONFIG", help="A TOML file, or the name of one of ours.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, Option(help="Run folder; default runs/<config's name>.")] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    slurm: Annotated[list[str] | None, Option(help="Submit to SLURM: --slurm partition=… --slurm nodes=…")] = None,
    show_views: Annotated[int | None, Option(help="Write a PNG with the views of N images, and stop.")] = None,
) -> None:
    """Pretrain a backbone with TWIST.

    On many GPUs: torchrun … -m twist pretrain …
    """
    require("pretrain")
    from twist.contracts.config import find_config, load_config
    from twist.pretrain.config import PretrainConfig

    config = find_config(config, "pretrain")
    settings = load_config(config, PretrainConfig, overrides or [])
    folder = output or Path("runs") / config.stem
    if show_views is not None:
        from twist.pretrain.data.preview import contact_sheet

        print(contact_sheet(settings, show_views, folder / "views.png"))
    elif slurm:
        from twist.pretrain.slurm import submit

        print(submit(config, overrides or [], output=folder, options=slurm))
    else:
        from twist.pretrain.train import pretrain as run
        from twist.pretrain.train import print_plan

        if dry_run:
            print_plan(settings)
        else:
            run(settings, output=folder, resume=resume)


@app.command()
def inspect(
    checkpoint: Path,
    layout: Layout = None,
    entry: Entry = None,
    prefix: Prefix = None,
    heads: Heads = None,
    architecture: TimmName = None,
    as_json: AsJson = False,
) -> None:
    """Say what is in a checkpoint.

    Method, architecture, layout, branches, problems. Nothing from the file is ever run.
    """
    require("convert")
    from twist.converters import inspect as inspection

    how = {"layout": layout, "entry": entry, "prefix": prefix, "heads": heads, "architecture": architecture}
    found = inspection.inspect(checkpoint, **how)  # type: ignore[arg-type]
    print(json_text(found.to_json()) if as_json else inspection.inspection_text(found))


@app.command()
def features(
    paths: Annotated[list[Path], Argument(metavar="WEIGHTS… IMAGES", help="Checkpoints, then a folder.")],
    pca: Annotated[bool, Option("--pca", help="Draw the first three principal components as colours.")] = False,
    output: Annotated[Path | None, Option(help="Default features.png, or features.npz without --pca.")] = None,
    size: Annotated[int, Option(min=16, help="Pixels of the longer side.")] = 448,
) -> None:
    """Dense features of your own pictures: as arrays, or as colours, several weights side by side."""
    require("convert")
    from twist.transfer import features as dense

    *weights, pictures = paths
    if not weights or (len(weights) > 1 and not pca):
        raise UsageError("Give WEIGHTS and IMAGES, in this order; several WEIGHTS with --pca.")
    images = dense.find_images(pictures)
    if pca:
        print(dense.draw_features(weights, images, output or Path("features.png"), size=size))
    else:
        print(dense.save_features(weights[0], images, output or Path("features.npz"), size=size))


@app.command()
def convert(
    checkpoint: Annotated[Path | None, Argument(show_default=False)] = None,
    to: Annotated[str | None, Option(metavar="TARGET", help=f"One of {TARGETS}.")] = None,
    layout: Layout = None,
    branch: Branch = None,
    entry: Entry = None,
    prefix: Prefix = None,
    heads: Heads = None,
    architecture: TimmName = None,
    method: Method = None,
    output: Annotated[Path | None, Option(help="Folder to write.")] = None,
    no_verify: Annotated[bool, Option("--no-verify", help="Skip the proof.")] = False,
    pkl: Annotated[bool, Option("--pkl", help="Detectron2: also a .pkl of plain arrays.")] = False,
    allow_nan: Annotated[bool, Option("--allow-nan", help="Convert weights that hold NaN.")] = False,
    check_config: Annotated[Path | None, Option(help="Check your own framework config against --weights.")] = None,
    weights: Annotated[Path | None, Option(help="With --check-config: the weights it is to load.")] = None,
) -> None:
    """Convert any checkpoint, with settings and proof.

    Writes weights and the settings they imply, once the target network computes the same features.
    """
    require("convert")
    from twist.converters.sources import Reading

    reading = Reading(
        layout=layout, branch=branch, entry=entry, prefix=prefix, heads=heads, architecture=architecture, method=method
    )  # fmt: skip
    if check_config is not None:
        from twist.converters import check_config as own

        file = weights or checkpoint
        if file is None:
            raise UsageError("--check-config needs the weights too: add --weights FILE.")
        mismatches = own.check_config(check_config, file, **reading)
        print(own.mismatch_text(mismatches))
        raise typer.Exit(1 if mismatches else 0)
    if checkpoint is None or to is None:
        raise UsageError("Say what to convert and for whom: twist convert CHECKPOINT --to detectron2.")
    from twist.converters import convert as conversion

    done = conversion.convert(
        checkpoint, to=to, output=output, verify=not no_verify, pkl=pkl, allow_nan=allow_nan, **reading
    )
    print(conversion.conversion_text(done))


@app.command()
def transfer(
    protocol: Annotated[str | None, Argument(show_default=False)] = None,
    overrides: Overrides = None,
    weights: Annotated[str | None, Option(help="A checkpoint, `zoo:NAME`, `random`, or `torchvision:FILE`.")] = None,
    data: Data = None,
    seed: Seed = 0,
    gpus: Annotated[int | None, Option(min=0, help="Default the recipe's, at most those here; 0: CPU.")] = None,
    output: Annotated[Path | None, Option(help="Run folder; default runs/<protocol>/….")] = None,
    results: Annotated[Path | None, Option(help="Folder of the record; default <run folder>/results.")] = None,
    method: Annotated[str | None, Option(help="Row of the table; default what the weights say.")] = None,
    layout: Layout = None,
    branch: Branch = None,
    entry: Entry = None,
    prefix: Prefix = None,
    heads: Heads = None,
    resume: Resume = False,
    eval_only: Annotated[bool, Option("--eval-only", help="Evaluate the finished run in the folder.")] = False,
    dry_run: DryRun = False,
    list_protocols: Annotated[bool, Option("--list", help="Print the protocols, or those of a name or word.")] = False,
    as_json: Annotated[bool, Option("--json", help="With --list: JSON.")] = False,
) -> None:
    """Run one transfer protocol and write one record.

    PROTOCOL is a name of --list; `--list NAME` shows one whole, `--list dense vit` a line for each that is both (also
    frozen, resnet, detection, segmentation, a data set, an engine, full, sample). key=value goes to the framework's own
    config, or is one of ours: architecture and width (of random weights), keep_batch, iterations, nodes, node_rank,
    master.
    """
    from twist.transfer import protocols

    if list_protocols:
        words = [*filter(None, [protocol]), *(overrides or ())]
        rows = [asdict(row) for row in protocols.select_protocols(words)] if as_json else []
        print(json_text(rows) if as_json else protocols.list_protocols(words))
        return
    if protocol is None or weights is None:
        raise UsageError("Say which protocol and which weights: twist transfer PROTOCOL --weights FILE (see --list).")
    require("transfer")
    from twist.converters.sources import Reading
    from twist.transfer.run import plan
    from twist.transfer.run import transfer as run

    said = (plan if dry_run else run)(
        protocol,
        weights=weights,
        data=data,
        seed=seed,
        gpus=gpus,
        output=output,
        results=results,
        resume=resume,
        eval_only=eval_only,
        overrides=overrides or [],
        **Reading(layout=layout, branch=branch, entry=entry, prefix=prefix, heads=heads, method=method),
    )
    if dry_run:
        print(said)


@app.command()
def predict(
    run: Annotated[Path, Argument(help="The folder of a finished transfer run.")],
    images: Annotated[list[Path], Argument(help="Pictures, or folders with pictures.")],
    output: Annotated[Path, Option(help="Folder to write.")] = Path("predictions"),
) -> None:
    """What a finished detection, segmentation or probe run says of your own pictures.

    Writes predictions.json (COCO's boxes and masks, or classes with scores), index masks, and drawn pictures.
    """
    require("transfer")
    from twist.transfer import predict as prediction

    prediction.predict(run, images, output)
    print(output / prediction.PREDICTIONS)


@data_app.command("sample")
def data_sample(root: Path, size: Literal["tiny", "small", "medium"] = "small", seed: Seed = 0) -> None:
    """Write a small world in the real layouts: images, COCO, VOC, Cityscapes, ImageNet-like."""
    require("transfer", "PIL")
    from twist.catalog.sample.make import make_sample

    sample = make_sample(root, size=size, seed=seed)
    print(sample.summary())


@data_app.command("prepare")
def data_prepare(dataset: str, root: DataRoot = None, overrides: Overrides = None) -> None:
    """Build what derives from the originals. Never downloads, never touches them.

    voc: trainaug (sbd=FOLDER). cityscapes: the trainIds. imagenet: the 1 % and 10 % lists (lists=FOLDER). coco, ade20k:
    nothing.
    A data card: lists that take a part of its training images as val (split=0.2 seed=0).
    """
    require("transfer", "PIL")
    from twist.catalog.card import find_card
    from twist.catalog.card_data import prepare_card
    from twist.catalog.prepare import prepare
    from twist.contracts.config import parse_override

    if root is not None and "=" in str(root) and not root.exists():  # the root was left out: this is the first option
        root, overrides = None, [str(root), *(overrides or [])]
    options = {".".join(keys): value for keys, value in map(parse_override, overrides or [])}
    card = find_card(Path(dataset))
    for path in prepare(dataset, root, **options) if card is None else prepare_card(card, **options):
        print(path)


@data_app.command("card")
def data_card(
    folder: Path, output: Annotated[Path | None, Option(help="The card's file; default FOLDER/card.toml.")] = None
) -> None:
    """Write the data card that a folder suggests.

    FOLDER holds COCO, VOC or YOLO boxes, images and masks, class folders, Parquet files, or pictures alone. What cannot
    be known is a comment in the card.
    """
    require("transfer", "PIL")
    from twist.catalog.card_guess import write_card

    path = write_card(folder, output)
    print(path.read_text(), path, sep="\n")


@data_app.command("check")
def data_check(dataset: str, root: DataRoot = None, as_json: AsJson = False) -> None:
    """Say everything that is missing or wrong in a data set, at once.

    DATASET is a data card, coco, voc, cityscapes, imagenet, sample, or folders: images of your own, in
    ROOT/train/<class>/ and ROOT/val/<class>/, on which the ImageNet-style protocols run; or images: a folder of
    pictures without labels, of which ROOT/../<folder>-contact-sheet.png shows some.
    """
    require("transfer", "PIL")
    from twist.catalog.card import find_card
    from twist.catalog.check import check, check_card, check_images, has_errors, render
    from twist.catalog.data_sets import find_root

    if (card := find_card(Path(dataset))) is not None:
        findings = check_card(card)
    elif dataset == "images" and root is not None:
        sheet = root.resolve().with_name(f"{root.resolve().name}-contact-sheet.png")
        findings = check_images(root, sheet=sheet)
    else:
        findings = check(dataset, find_root(None) if root is None else root)
    print(json_text([asdict(finding) for finding in findings]) if as_json else render(findings))
    raise typer.Exit(1 if has_errors(findings) else 0)


@app.command()
def suite(
    file: Annotated[Path, Argument(metavar="SUITE", help="A TOML file, or the name of one of ours.")],
    data: Data = None,
    executor: Annotated[Literal["local", "slurm", "ray"], Option(help="ray: of $RAY_ADDRESS, else here.")] = "local",
    output: Annotated[Path, Option(help="Folder for the runs.")] = Path("runs/suite"),
    results: Annotated[Path, Option(help="Folder for the records.")] = Path("results"),
    gpus: Annotated[str | None, Option(help="local: devices, as 0,1; default all. Empty: the CPU.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run weights × protocols × seeds, then the table.

    Resumable; what is done is skipped.
    """
    require("transfer")
    from twist.comparing import suite_table
    from twist.contracts.config import find_config
    from twist.transfer.suite.run import run_suite

    file = find_config(file, "suites")
    folders = {"results": results, "output": output}
    devices = None if gpus is None else _device_numbers(gpus)
    records, failure = run_suite(file, executor=executor, dry_run=dry_run, gpus=devices, data=data, **folders)
    if records:
        print(suite_table(records))
    if failure is not None:
        raise failure


@app.command()
def compare(
    records: Annotated[list[Path] | None, Argument(show_default=False)] = None,
    baseline: Annotated[str | None, Option(help="Method to which differences are taken.")] = None,
    table_format: Annotated[TableFormat | None, Option("--format", help="Default: by --output's ending.")] = None,
    output: Annotated[Path | None, Option(help="File to write instead of the terminal.")] = None,
    strict: Annotated[bool, Option("--strict", help="Refuse several recipes of a protocol.")] = False,
    cost: Annotated[bool, Option("--cost", help="Add a column of wall hours × devices.")] = False,
    published: Annotated[bool | None, Option("--published/--no-published", help="With full-scale runs alone.")] = None,
    same_methods: Annotated[bool, Option("--same-methods", help="Published rows of measured methods only.")] = False,
    metric: Annotated[list[str] | None, Option(help="Only this metric (may be repeated).")] = None,
    pretrain_runs: Annotated[list[Path] | None, Option("--pretrain-run", help="HTML: draw its curves.")] = None,
    title: Annotated[str | None, Option(help="HTML: headline of the page.")] = None,
    note: Annotated[Path | None, Option(help="HTML: a text file, your own words about the numbers.")] = None,
    picture: Annotated[list[str] | None, Option(metavar="CAPTION=FILE", help="HTML: one more picture.")] = None,
    published_only: Annotated[bool, Option("--published-only", help="Published numbers, no records.")] = False,
    correlate: Annotated[
        bool, Option("--correlate", help="Which protocol ranks backbones as which; --output FILE.png draws it.")
    ] = False,
    check: Annotated[Path | None, Option(help="Fail when this file's tables are stale.")] = None,
    update: Annotated[Path | None, Option(help="Rewrite this file's tables.")] = None,
) -> None:
    """Records → comparison tables, or an HTML page.

    RECORDS are files, folders of records or of runs; default results, else runs.
    """
    require("compare")
    from twist import comparing
    from twist.compare.comparison import Choice
    from twist.compare.page import HEADLINE, PageOptions

    if readme := check or update:
        raise typer.Exit(comparing.refresh_tables(readme, write=check is None))
    if correlate:
        comparing.correlate(records or [], output)
        return
    choice = Choice(baseline, strict, cost, published, published_only, same_methods, tuple(metric or ()))
    pictures = [_captioned(text) for text in picture or []]
    options = PageOptions(title or HEADLINE, note, pretrain_runs or [], pictures)
    comparing.compare(records or [], choice, table_format=table_format, output=output, page=options)


@zoo_app.callback()
def zoo(
    context: typer.Context,
    match: Annotated[list[str] | None, Option("--match", metavar="WORD", help="Only rows with it.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON: everything that is known of each.")] = False,
) -> None:
    """List published weights, which go by name: --weights zoo:NAME.

    Words are looked for in name, method, architecture, images and licence.
    """
    if context.invoked_subcommand is None:
        from twist.converters.zoo import select, zoo_text

        rows = select(match or [])
        print(json_text([row.model_dump(mode="json") for row in rows]) if as_json else zoo_text(rows))


@zoo_app.command("verify")
def zoo_verify(name: str) -> None:
    """Fetch the real file, convert it with proof, and print what its row should say."""
    require("convert")
    from twist.converters.zoo import verify

    print(verify(name))


@app.command()
def fetch(names: Annotated[list[str], Argument(metavar="NAME …")]) -> None:
    """Download published weights into the cache.

    A download that was cut goes on; a file with another digest than the published one is refused.
    """
    from twist.converters.zoo import fetched_text, find

    for row in [find(name) for name in names]:
        print(fetched_text(row))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this environment can do, and how to change it."""
    from twist.doctor import examine, render

    checks = examine()
    print(json_text([asdict(check) for check in checks]) if as_json else render(checks))
    raise typer.Exit(1 if any(check.broken for check in checks) else 0)


@app.command()
def demo(
    fast: Annotated[bool, Option("--fast", help="A quarter of the time: too little training to learn.")] = False,
    output: Annotated[Path, Option(help="Folder for everything that the demo makes.")] = Path("demo"),
) -> None:
    """Run the whole chain on the built-in sample.

    Sample → pretrain → convert → detection, segmentation, k-NN → table and page.
    """
    require("transfer")
    from twist.transfer.engines import all_engines

    require("transfer", *(package for engine in all_engines().values() for package in engine.packages))
    from twist.demo import run_demo

    def step(arguments: list[str]) -> None:
        if status := app(arguments, standalone_mode=False):  # 130, Ctrl-C, comes back as a value
            raise typer.Exit(status)

    run_demo(output, twist=step, fast=fast)


def main() -> None:
    """Run the command; a user's mistake is one sentence on stderr, a traceback only with --debug."""
    try:
        _refuse_empty(sys.argv[1:])
        signal.signal(signal.SIGTERM, functools.partial(_end, os.getpid()))
        # Without click's standalone mode `Exit` comes back as the returned status, and usage errors reach us.
        returned = app(standalone_mode=False)
        status = returned if isinstance(returned, int) else 0
        if status == 130:  # what typer makes of Ctrl-C
            print("Stopped.", file=sys.stderr)
    except typer.Exit as stop:
        status = stop.exit_code
    except Exception as error:
        # Typer hides an `EOFError`, of an empty file, in an `Abort`.
        hidden = error.__cause__ if isinstance(error, typer.Abort) else None
        shown = hidden if isinstance(hidden, Exception) else error
        status = _explain(missing_package(shown) or shown)
    sys.exit(status)


def _end(own: int, number: int, _frame: object) -> NoReturn:
    """SIGTERM ends the process `own` as an exception does: temporary folders go, a suite ends its runs."""
    # `timeout` and schedulers may send it twice. Not `print`: the signal may have come in the middle of one.
    signal.signal(number, signal.SIG_IGN if os.getpid() == own else signal.SIG_DFL)
    if os.getpid() != own:  # a data worker, forked from us
        signal.raise_signal(number)
    os.write(2, b"\nStopped.\n")
    raise SystemExit(128 + number)


def _refuse_empty(words: list[str]) -> None:
    """An empty word, most often of a variable that is not set: as a path it would mean the working directory."""
    for before, word in pairwise(["", *words]):
        name = before if word == "" else word.removesuffix("=") if re.fullmatch("--[a-z-]+=", word) else None
        if name is not None and name not in ("--gpus", "--title"):
            place = name if name.startswith("-") else "One of the arguments"
            raise UsageError(f'{place} is empty (""): give a value, or leave it out; the working directory is ".".')


def _explain(error: Exception) -> int:
    """Print `error` as a sentence and return the exit status."""
    if os.environ.get("TWIST_DEBUG"):
        raise error
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own usage errors
        error.show()
        return int(error.exit_code)
    # A user's mistake, or a run that stopped on a signal and is ready to be requeued, says all there is to say.
    sentence = str(error) if hasattr(error, "exit_status") else describe(error)
    if sentence is None:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        sentence = (
            f"unexpected error ({type(error).__name__}: {reason}). "
            "Run the command again as `twist --debug …` for the traceback, and please report it."
        )
    print(f"twist: {printable(sentence)}", file=sys.stderr)
    return int(getattr(error, "exit_status", 1))


def _device_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise UsageError(f"--gpus {text}: write device numbers with commas, as --gpus 0,1 (empty: the CPU).") from None


def _captioned(text: str) -> tuple[str, Path]:
    caption, _, file = text.partition("=")
    if not caption or not file:
        raise UsageError(f"--picture {text}: write a caption and a file, as --picture 'What it sees=views.png'.")
    return caption, Path(file)
