"""Tables as text, and the tables of a README that stay current."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from made_records import make_record, runs

from twist.compare.blocks import footnote_mark, printed_text
from twist.compare.markers import check_markers, update_markers
from twist.compare.render import render
from twist.compare.table import Table, build_table
from twist.compare.text import plain
from twist.contracts.errors import UsageError, UserError
from twist.contracts.published import load_published
from twist.contracts.record import write_record


@pytest.fixture
def table() -> Table:
    records = [
        *runs("random", [40.0, 40.5, 41.0], protocol="knn", scale="full"),
        *runs("twist", [50.0, 50.5, 51.0], protocol="knn", scale="full"),
        *runs("byol", [45.0], protocol="knn", scale="full"),
        *runs("byol", [33.0], "nmi_percent", protocol="sample-cluster", task="clustering"),
    ]
    return build_table(records, published=load_published(), baseline="random")


def test_terminal(table: Table) -> None:
    text = render(table, "table")
    lines = text.splitlines()
    twist = next(line for line in lines if line.startswith("TWIST"))
    assert "50.5 ± 0.5 (3) [+10.0*]" in twist
    assert any("45.0 (1) [+4.5?]" in line for line in lines)
    assert any("“67.5”" in line and line.startswith("DINO") for line in lines)
    assert "not corrected" in text
    assert "DINO repository, README.md" in text
    # Absent is a dash, never zero.
    assert twist.rstrip().endswith("–")
    assert " 0.0 " not in text


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_terminal_is_filled_and_not_overrun(width: int) -> None:
    names = ("coco_box_ap_percent", "coco_box_ap50_percent", "coco_box_ap75_percent")
    given = {"protocol": "coco-mrcnn-fpn-1x", "task": "instance-segmentation"}
    whole = [make_record("twist", seed=seed, metrics=dict.fromkeys(names, 50.0 + seed), **given) for seed in (0, 1)]
    lines = plain(build_table(whole), width=width).split("\n\nMeasured")[0].splitlines()
    assert max(map(len, lines)) <= width
    # Every number once, whatever the cut, and the protocol over each piece.
    assert sum(line.count("±") for line in lines) == 3
    pieces = {30: 3, 80: 1, 200: 1}[width]
    assert sum("coco-mrcnn-fpn-1x" in line for line in lines) == pieces


def test_markdown(table: Table) -> None:
    text = render(table, "markdown")
    assert "| TWIST | 50.5 ± 0.5 (3) [+10.0\\*] | – |" in text
    mark = re.search(r"\*67\.5\*<sup>(\w)</sup>", text)
    assert mark is not None
    assert f"<sup>{mark[1]}</sup> DINO repository, README.md" in text
    heads = [line for line in text.splitlines() if line.startswith("| method")]
    for head in heads:
        rows = text[text.index(head) :].split("\n\n")[0].splitlines()
        assert {row.count(" | ") for row in rows if not row.startswith("|---")} == {head.count(" | ")}


def test_csv(table: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    twist = next(row for row in rows if row["method"] == "twist")
    assert float(twist["value"]) == 50.5
    assert (twist["n"], twist["kind"], twist["baseline"]) == ("3", "measured", "random init")
    assert float(twist["p_value"]) < 0.05
    printed = [row for row in rows if row["kind"] == "published"]
    assert printed
    assert all(row["source"] and row["value"] and not row["recipe_hash"] for row in printed)


def test_json(table: Table) -> None:
    values = json.loads(render(table, "json"))
    assert values["rows"][values["baseline"]]["method"] == "random"
    cell = next(c for c in values["cells"] if values["rows"][c["row"]]["method"] == "twist")
    assert [run["seed"] for run in cell["measured"]["runs"]] == [0, 1, 2]
    assert cell["measured"]["values"] == [50.0, 50.5, 51.0]


def test_latex(table: Table) -> None:
    text = render(table, "latex")
    assert text.count("\\toprule") == text.count("\\bottomrule") == text.count("\\end{tabular}")
    assert "TWIST & 50.5 $\\pm$ 0.5 (3) {[$+10.0^{*}$]} & -- \\\\" in text
    assert re.search(r"\\textit\{67\.5\}\$\^\{\w\}\$", text)


def test_latex_escapes_what_a_record_says() -> None:
    text = render(build_table([make_record("50%_of_a&b")]), "latex")
    assert "50\\%\\_of\\_a\\&b" in text


def test_markdown_escapes_what_a_record_says() -> None:
    records = [make_record("a|b <i>", seed=seed, metrics={"knn_top1_percent": 50.0 + seed}) for seed in (0, 1)]
    text = render(build_table(records), "markdown")
    assert text.count("a\\|b &lt;i>") == 2  # in its row, and in the note that says what n counts
    assert "<i>" not in text


def test_mixed_columns_are_marked_everywhere() -> None:
    table = build_table([make_record(recipe={"lr": 0.1}), make_record("byol", recipe={"lr": 0.2})], allow_mixed=True)
    assert "{[}mixed: lr = 0.1{]}" in render(table, "latex")
    for text in (render(table, "table"), render(table, "markdown")):
        assert "[mixed: lr = 0.1]" in text
        assert "do not compare across" in text
    assert {row["mixed"] for row in csv.DictReader(io.StringIO(render(table, "csv")))} == {"lr = 0.1", "lr = 0.2"}


def test_what_is_mixed_is_told_once_over_each_protocol() -> None:
    metrics = {"knn_top1_percent": 50.0, "knn_top5_percent": 80.0}
    records = [
        make_record(method, metrics=metrics, recipe={"lr": lr}) for method, lr in (("twist", 0.1), ("byol", 0.2))
    ]
    table = build_table(records, allow_mixed=True)
    for name in ("table", "markdown", "latex"):
        text = render(table, name)
        assert text.count("mixed: lr = 0.1") == text.count("mixed: lr = 0.2") == 1, name
    assert "| sample-knn · k-NN top-5 [mixed] |" in render(table, "markdown")


def test_foreign_protocols_are_called_by_a_title_and_keep_their_key() -> None:
    table = build_table([], published=load_published())
    for name in ("table", "markdown", "latex"):
        assert "foreign:" not in render(table, name)
        assert "Cityscapes, protocol not stated" in render(table, name)
    rows = csv.DictReader(io.StringIO(render(table, "csv")))
    assert "foreign:cityscapes-protocol-not-found" in {row["protocol"] for row in rows}
    titles = {column["protocol"]: column["title"] for column in json.loads(render(table, "json"))["columns"]}
    assert titles["foreign:adelaidet-fcos"] == "COCO FCOS, AdelaiDet"
    assert titles["linear"] == "linear"


def test_a_long_title_makes_a_terminal_go_on_below() -> None:
    rows = [row for row in load_published() if row.protocol.startswith("foreign:mmseg-zoo")]
    text = plain(build_table([], published=rows), width=100)
    assert max(map(len, text.split("\n\na: ")[0].splitlines())) <= 100


ONE = "Several runs of one pretraining show the spread of the transfer alone: TWIST."
REPEATED = "Runs that repeat a result exactly count once: BYOL."
OWN = "Every run has a random initialisation of its own: random init."


@pytest.fixture
def repeats() -> Table:
    byol = runs("byol", [45.0, 45.0, 45.0])
    moco = [
        make_record(
            "moco-v2", weights={"pretrain_config_hash": "c" * 64, "pretrain_seed": seed}, metrics=byol[0].metrics
        )
        for seed in range(2)
    ]
    records = [*runs("random", [40.0, 40.5, 41.0]), *runs("twist", [50.0, 50.5, 51.0]), *byol, *moco]
    return build_table(records, baseline="random")


def test_every_text_says_how_many_pretrainings_are_behind_n(repeats: Table) -> None:
    for name in ("table", "markdown", "latex"):
        text = render(repeats, name)
        assert all(note in text for note in (ONE, REPEATED, OWN)), name
        assert "n counts pretrainings, each by the mean of its runs: MoCo v2." in text
        assert "45.0 (1)" in text
    (byol,) = [line for line in render(repeats, "table").splitlines() if line.startswith("BYOL")]
    assert byol.endswith(" 45.0 (1) [+4.5?]")
    # One run of one pretraining has no spread to speak of.
    assert "pretraining" not in render(build_table(runs("twist", [50.0])), "table")


def test_data_formats_count_runs_and_pretrainings_apart(repeats: Table) -> None:
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(render(repeats, "csv")))}
    counted = {method: (row["n"], row["runs"], row["pretrainings"]) for method, row in rows.items()}
    assert counted == {
        "random": ("3", "3", "3"), "twist": ("3", "3", "1"), "byol": ("1", "3", "1"), "moco-v2": ("2", "2", "2")
    }  # fmt: skip
    values = json.loads(render(repeats, "json"))
    byol = next(c for c in values["cells"] if values["rows"][c["row"]]["method"] == "byol")["measured"]
    assert (byol["values"], byol["repeated"], [run["value"] for run in byol["runs"]]) == ([45.0], True, [45.0] * 3)


def test_what_a_source_says_of_its_numbers_is_in_every_footnote() -> None:
    rows = [row for row in load_published() if row.source.startswith("MoCo repository, commit 132aea9, detection")]
    table = build_table([], published=rows)
    caveat = "detection/README.md; mean of 5 runs, standard deviation 0.{}. The standard deviations are the README's"
    for name in ("table", "markdown", "latex"):
        text = render(table, name)
        assert caveat.format(2) in text, name
        assert caveat.format(4) in text, name
    # AP and AP50 have one footnote, AP75 the other.
    assert "“57.4”a  “82.5”a  “64.0”b" in re.sub(r" +", "  ", render(table, "table")).replace("MoCo  v2", "MoCo v2")


def test_nothing_to_show() -> None:
    for name in ("table", "markdown", "latex"):
        assert "No records" in render(build_table([]), name)


def test_an_unknown_format_is_refused(table: Table) -> None:
    with pytest.raises(UsageError, match='Did you mean "markdown"'):
        render(table, "markdwn")


def test_marks_and_printed_numbers() -> None:
    assert [footnote_mark(i) for i in (0, 25, 26, 27, 702)] == ["a", "z", "aa", "ab", "aaa"]
    assert [printed_text(v) for v in (47.0, 67.55, 49.9)] == ["47.0", "67.55", "49.9"]


# ── A README's tables ──


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    for record in [*runs("random", [40.0, 40.5]), *runs("twist", [50.0, 50.5])]:
        write_record(record, tmp_path / "results")
    path = tmp_path / "README.md"
    path.write_text(
        "# Title\n\n<!-- twist compare results --baseline random -->\n<!-- end -->\n\nAfter.\n\n"
        "```\n<!-- twist compare results/absent -->\n```\n"
    )
    return path


def test_a_stale_table_is_found_rewritten_and_then_current(readme: Path) -> None:
    marker = "<!-- twist compare results --baseline random -->"
    assert check_markers(readme) == [marker]
    assert update_markers(readme) == [marker]
    text = readme.read_text()
    assert "| TWIST | 50.2 ± 0.4 (2) [+10.0\\*] |" in text
    assert text.startswith("# Title\n\n<!-- twist")
    assert "After.\n\n```\n<!-- twist compare results/absent -->\n```\n" in text
    assert check_markers(readme) == []
    before = readme.stat().st_mtime_ns
    assert update_markers(readme) == []
    assert readme.stat().st_mtime_ns == before


def test_a_new_record_or_an_edited_number_makes_it_stale(readme: Path) -> None:
    update_markers(readme)
    readme.write_text(readme.read_text().replace("50.2", "60.2"))
    assert len(check_markers(readme)) == 1
    update_markers(readme)
    write_record(make_record(seed=7), readme.parent / "results")
    assert len(check_markers(readme)) == 1


def test_a_text_without_markers_is_current(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here\n<!-- end -->\n")
    assert check_markers(tmp_path / "README.md") == []


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("<!-- twist compare results -->\n", UserError, "line 1: the marker has no <!-- end --> line"),
        (
            "<!-- twist compare results -->\n<!-- twist compare results -->\n<!-- end -->\n",
            UserError,
            "before the next",
        ),
        ("<!-- twist compare results --colour -->\n<!-- end -->\n", UsageError, "unrecognized arguments: --colour"),
        ("<!-- twist compare elsewhere -->\n<!-- end -->\n", UserError, "no record or folder of records at"),
        ("<!-- twist compare results --published-only -->\n<!-- end -->\n", UsageError, "reads no records"),
        ("<!-- twist compare --published-only --no-published -->\n<!-- end -->\n", UsageError, "nothing to show"),
    ],
)
def test_a_marker_that_cannot_be_followed(readme: Path, text: str, error: type[Exception], said: str) -> None:
    readme.write_text(text)
    with pytest.raises(error, match=said):
        check_markers(readme)
    with pytest.raises(UserError, match="no file"):
        check_markers(readme.parent / "absent.md")
    with pytest.raises(UserError, match=r"Cannot read .*results \(Is a directory\)"):
        check_markers(readme.parent / "results")
    readme.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"Cannot read .* \(it is not UTF-8\)"):
        check_markers(readme)


def test_published_rows_can_be_left_out_or_kept_to_the_measured_methods(tmp_path: Path) -> None:
    for record in runs("swav", [65.0, 66.0], protocol="knn", scale="full"):
        write_record(record, tmp_path / "results")
    readme = tmp_path / "README.md"
    found = {}
    for choice in ("--published", "--same-methods", "--no-published"):
        readme.write_text(f"<!-- twist compare results {choice} -->\n<!-- end -->\n")
        update_markers(readme)
        found[choice] = readme.read_text()
    assert "DINO" in found["--published"]
    assert "DINO" not in found["--same-methods"]
    assert "lightly" in found["--same-methods"]
    assert "*" not in found["--no-published"]


def test_a_record_brings_no_line_break_or_terminal_code_into_a_table() -> None:
    text = render(build_table([make_record("unknown", weights={"name": "evil\x1b[31m\n| x"})]), "markdown")
    assert "\x1b" not in text
    assert len([line for line in text.splitlines() if "evil" in line and "50.0 (1)" in line]) == 1
