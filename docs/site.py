"""What MkDocs asks for when it builds the site: the pages that are the README's, or that the tables say."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from twist.contracts.metrics import METRICS
from twist.transfer.protocols import PROTOCOLS, Protocol

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\[(?P<text>!\[[^\]]*\]\([^)]*\)|[^\]]*)\]\((?P<target>[^)\s]+)\)")  # a badge is an image in a link
_SITE = {"README.md": "index.md", "results/README.md": "results.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and nothing else."""
    for page, text in {
        "index.md": _moved(ROOT / "README.md"),
        "results.md": _moved(ROOT / "results" / "README.md"),
        "protocols.md": protocols_page(),
    }.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The links of our own pages into the repository, which the site does not hold, become plain text."""
    source = page.file.abs_src_path
    return _relinked(markdown, Path(source).parent) if source else markdown


def _moved(path: Path) -> str:
    return _relinked(path.read_text(), path.parent)


def _relinked(text: str, folder: Path) -> str:
    """Links from a file in `folder` as they are from the site's pages; what is not on the site is its name alone."""

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or "://" in target:
            return match[0]
        inside = (folder / target).resolve().relative_to(ROOT).as_posix()
        page = _SITE.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        if page is None:
            return match["text"]
        return f"[{match['text']}]({page}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(link, text)


def protocols_page() -> str:
    """Every protocol in one table, full recipes first, and the recipe of each."""
    parts = [
        "# Protocols",
        "`twist transfer NAME --weights FILE --data ROOT` runs one; `twist transfer --list NAME` prints all of it, and "
        "the numbers published under its name. The sample's protocols are the same engines and evaluators, small "
        "enough for a laptop.",
    ]
    for title, scale in (("Full protocols", "full"), ("On the built-in sample", "sample")):
        rows = [row for row in PROTOCOLS.values() if row.scale == scale]
        parts += [f"## {title}", "| protocol | task | data | devices | metrics |\n|---|---|---|---|---|"]
        parts[-1] += "".join(f"\n| {' | '.join(_cells(row))} |" for row in rows)
    parts += ["## Recipes", *(f"**`{row.name}`**: {row.recipe}" for row in PROTOCOLS.values() if row.scale == "full")]
    return "\n\n".join(parts) + "\n"


def _cells(row: Protocol) -> list[str]:
    devices = f"{row.gpus} GPUs" if row.gpus > 1 else "1 GPU" if row.gpus else "CPU"
    return [f"`{row.name}`", row.task, ", ".join(row.data), devices, ", ".join(METRICS[n].label for n in row.metrics)]
