"""What hostile files do to whoever reads them: nothing. A sentence that names the file, little memory, little time.

Every reader that takes a user's or a stranger's file is tried through the command line, one file a forked child. The
files are made by the generators beside this file; `python -m pytest tests/hostile -k NAME` takes one kind, and
HOSTILE_CASE=PART of a case's name one file.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import archives
import pickles
import pictures
import pytest
import texts
from cases import NEVER_RUN, Case
from forked import Command, Ended, Server
from trees import Trees

pytestmark = [pytest.mark.slow, pytest.mark.hostile]
# Of processor time; the clock's limit is for what waits for ever.
SECONDS, PATIENCE_S = 20.0, 120.0
MOST_BYTES = int(1.5 * 2**30)
# A sentence of this many characters is no sentence, and what a stranger's file says fills no terminal.
LONGEST = 2000
KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "pickle": pickles.bare_pickles,
    "haiku": pickles.haiku_pickles,
    "torch-stream": pickles.torch_streams,
    "torch-zip": archives.torch_zips,
    "safetensors": archives.safetensors_files,
    "npz": archives.npz_files,
    "record": texts.records,
    "curves": texts.pages_of_curves,
    "run-json": texts.run_accounts,
    "manifest": texts.manifests,
    "coco": texts.coco_files,
    "voc-xml": texts.voc_files,
    "lists-and-polygons": texts.lists_of_names,
    "card": texts.cards,
    "toml": texts.configs,
    "class-folder-picture": pictures.class_folders,
    "pretraining-picture": pictures.pretraining_pictures,
    "data-set-picture": pictures.data_sets,
}
# No message of ours has these words unless something went wrong that should have been refused before.
NEVER_SAID = re.compile(
    "Traceback|did not foresee|unexpected error|Segmentation fault|memory ran out|does not fit into memory|MemoryError"
    "|[Cc](?:an't|annot) allocate memory|Unable to allocate"
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def trees(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Trees:
    return Trees(server, tmp_path_factory.mktemp("trees"))


def faults_of(case: Case, ended: Ended, folder: Path) -> Iterator[str]:
    """What went wrong when `case` was read, in words; nothing is how it should be."""
    if ended.out_of_time or ended.cpu_s > SECONDS:
        yield f"{ended.cpu_s:.1f} s of processor time in {ended.seconds:.0f} s"
    elif ended.status not in (0, 1, 2):
        yield f"exit status {ended.status}"
    if ended.peak_bytes > MOST_BYTES:
        yield f"{ended.peak_bytes / 2**30:.1f} GiB"
    yield from (f"says “{found.group()}”" for found in NEVER_SAID.finditer(ended.said))
    if found := CONTROL.search(ended.said):
        yield f"prints the control character {found.group()!r}"
    if "--json" not in case.command and any(len(line) > LONGEST for line in ended.said.splitlines()):
        yield "prints a line of thousands of characters"
    if (folder / NEVER_RUN).exists():
        yield "RAN CODE OF THE FILE"
    if ended.status in (1, 2) and not any(name in ended.said for name in (Path(case.file).name, *case.named)):
        yield "does not name the file"
    if ended.status == 0 and case.refused:
        yield "is taken for good"


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_refused(kind: str, server: Server, trees: Trees, tmp_path: Path) -> None:
    chosen, count, failed = os.environ.get("HOSTILE_CASE", ""), 0, []
    for case in KINDS[kind]():
        if chosen not in case.name:
            continue
        folder = tmp_path / str(count)
        folder.mkdir()
        if case.tree is not None:
            trees.copy(case.tree, folder / "tree")
        case.write(folder)
        command = Command(case.command, str(folder), seconds=PATIENCE_S, setup=case.setup)
        (ended,) = server.run(command)
        count += 1
        if faults := list(faults_of(case, ended, folder)):
            said = " ".join(ended.said.split())[-160:]
            failed.append(f"{case.name[:70]:70}  {'; '.join(faults)}  [{ended.status}, {ended.cpu_s:.1f} s]  {said!r}")
        shutil.rmtree(folder)
    if failed:
        pytest.fail(f"{len(failed)} of {count} files of the kind {kind}:\n" + "\n".join(failed), pytrace=False)
