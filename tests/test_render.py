"""Tables as text, for readers and for programs."""

import csv
import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from made_records import make_record, runs

from twist.compare.table import Table, build_table
from twist.compare.writers import footnote_mark, plain, protocol_words, render
from twist.contracts.published import load_published

TEXTS = ("table", "markdown", "latex")


def csv_rows(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render(table, "csv"))))


def cell_of(values: dict[str, Any], method: str) -> dict[str, Any]:
    return next(c for c in values["cells"] if values["rows"][c["row"]]["method"] == method)


@pytest.fixture(scope="module")
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
    assert "Holm's correction for the table's 1 comparison;" in text
    assert "Holm" not in render(build_table(runs("twist", [50.0]), baseline="twist"), "table")
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


def test_latex(table: Table) -> None:
    text = render(table, "latex")
    assert text.count("\\toprule") == text.count("\\bottomrule") == text.count("\\end{tabular}")
    assert "TWIST & 50.5 $\\pm$ 0.5 (3) {[$+10.0^{*}$]} & -- \\\\" in text
    assert re.search(r"\\textit\{67\.5\}\$\^\{\w\}\$", text)


@pytest.mark.parametrize("method", ["=1+1", "+1", "-1", "@SUM(A1)", "＝1"])
def test_no_field_of_csv_is_a_formula(method: str) -> None:
    rows = csv_rows(build_table([make_record(method), make_record("twist")]))
    assert {row["method"] for row in rows} == {f"'{method}", "twist"}
    assert all(float(row["value"]) >= 0 for row in rows)


def test_csv(table: Table) -> None:
    rows = csv_rows(table)
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
    measured = cell_of(values, "twist")["measured"]
    assert [run["seed"] for run in measured["runs"]] == [0, 1, 2]
    assert measured["values"] == [50.0, 50.5, 51.0]


def test_names_in_a_record_are_harmless_in_every_text() -> None:
    records = [make_record("50%_of_a&b|<i>", seed=seed, metrics={"knn_top1_percent": 50.0 + seed}) for seed in (0, 1)]
    assert render(build_table(records), "latex").count("50\\%\\_of\\_a\\&b") == 2
    markdown = render(build_table(records), "markdown")
    assert markdown.count("\\|&lt;i>") == 2  # in its row, and in the note that says what n counts
    assert "<i>" not in markdown
    evil = make_record("unknown", weights={"name": "evil \n\\| [a](b) `c` ~~d~~ _e_ f_g &lt;"})
    lines = [line for line in render(build_table([evil]), "markdown").splitlines() if "evil" in line]
    assert r"evil \\\| [a]\(b) \`c\` \~\~d\~\~ \_e\_ f_g &amp;lt;" in lines[0]
    assert "50.0 (1)" in lines[0]


def test_mixed_columns_are_marked_once_over_each_protocol() -> None:
    metrics = {"knn_top1_percent": 50.0, "knn_top5_percent": 80.0}
    records = [
        make_record(method, metrics=metrics, recipe={"lr": lr}) for method, lr in (("twist", 0.1), ("byol", 0.2))
    ]
    table = build_table(records)
    for name in TEXTS:
        text = render(table, name).replace("{[}", "[").replace("{]}", "]")
        assert text.count("[mixed: lr = 0.1]") == text.count("[mixed: lr = 0.2]") == 1, name
        assert "do not compare across" in text
    assert "| sample-knn · k-NN top-5 [mixed] |" in render(table, "markdown")
    assert {row["mixed"] for row in csv_rows(table)} == {"lr = 0.1", "lr = 0.2"}


def test_cost_is_wall_hours_times_devices_of_each_run_once() -> None:
    both = {"knn_top1_percent": 50.0, "knn_top5_percent": 80.0}
    gpus = {"gpus_used": 8, "nodes": 2}
    records = [make_record(seed=seed, metrics=both, wall_s=1800.0, hardware=gpus) for seed in (0, 1)]
    records.append(make_record("byol", wall_s=360.0))
    table = replace(build_table(records, published=load_published()), cost=True)
    assert (table.device_hours(1, [0, 1]), table.device_hours(0, [0])) == (16.0, 0.1)
    for name, row in {"markdown": r"\| TWIST \| 16.0 \|", "latex": "TWIST & 16.0 &", "table": "TWIST +16.0 "}.items():
        text = render(table, name)
        assert re.search(row, text)
        assert text.count("device hours") == 1
    assert csv_rows(table)[0]["device_hours"] == "0.1"


def test_latex_heads_are_words() -> None:
    words = {"coco-mrcnn-fpn-1x": "COCO Mask R-CNN FPN 1× schedule", "semi-1pct": "Semi-supervised 1 % of labels"}
    words |= {"knn": "k-NN", "foreign:adelaidet-fcos": "COCO FCOS, AdelaiDet"}
    assert {key: protocol_words(key) for key in words} == words


def test_foreign_protocols_are_called_by_a_title_and_keep_their_key() -> None:
    table = build_table([], published=load_published())
    for name in TEXTS:
        text = render(table, name)
        assert "foreign:" not in text
        assert "Cityscapes, protocol" in text
    assert "foreign:cityscapes-protocol-not-found" in {row["protocol"] for row in csv_rows(table)}
    titles = {column["protocol"]: column["title"] for column in json.loads(render(table, "json"))["columns"]}
    assert titles["foreign:adelaidet-fcos"] == "COCO FCOS, AdelaiDet"
    assert titles["linear"] == "linear"


@pytest.fixture(scope="module")
def repeats() -> Table:
    byol = runs("byol", [45.0, 45.0, 45.0])
    provenance = [{"pretrain_config_hash": "c" * 64, "pretrain_seed": seed} for seed in range(2)]
    moco = [make_record("moco-v2", weights=weights, metrics=byol[0].metrics) for weights in provenance]
    records = [*runs("random", [40.0, 40.5, 41.0]), *runs("twist", [50.0, 50.5, 51.0]), *byol, *moco]
    return build_table(records, baseline="random")


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_says_how_many_pretrainings_are_behind_n(repeats: Table, name: str) -> None:
    text = render(repeats, name)
    for note in (
        "Several runs of one pretraining show the spread of the transfer alone: TWIST.",
        "Runs that repeat a result exactly count once: BYOL.",
        "Every run has a random initialisation of its own: random init.",
        "n counts pretrainings, each by the mean of its runs: MoCo v2.",
    ):
        assert note in text
    assert "45.0 (1)" in text
    # One run of one pretraining has no spread to speak of.
    assert "pretraining" not in render(build_table(runs("twist", [50.0])), name)


def test_data_formats_count_runs_and_pretrainings_apart(repeats: Table) -> None:
    counted = {row["method"]: (row["n"], row["runs"], row["pretrainings"]) for row in csv_rows(repeats)}
    assert counted == {
        "random": ("3", "3", "3"), "twist": ("3", "3", "1"), "byol": ("1", "3", "1"), "moco-v2": ("2", "2", "2")
    }  # fmt: skip
    byol = cell_of(json.loads(render(repeats, "json")), "byol")["measured"]
    assert (byol["values"], byol["repeated"], [run["value"] for run in byol["runs"]]) == ([45.0], True, [45.0] * 3)


def test_what_a_source_says_of_its_numbers_is_in_every_footnote() -> None:
    rows = [row for row in load_published() if row.source.startswith("MoCo repository, commit 132aea9, detection")]
    table = build_table([], published=rows)
    caveat = "detection/README.md; mean of 5 runs, standard deviation 0.{}. The standard deviations are the README's"
    for name in TEXTS:
        text = render(table, name)
        assert caveat.format(2) in text, name
        assert caveat.format(4) in text, name
    # AP and AP50 have one footnote, AP75 the other.
    assert re.search(r"“57.4”a +“82.5”a +“64.0”b", render(table, "table"))


def test_nothing_to_show_and_footnotes_after_z() -> None:
    assert all("No records" in render(build_table([]), name) for name in TEXTS)
    assert [footnote_mark(i) for i in (0, 25, 26, 27, 702)] == ["a", "z", "aa", "ab", "aaa"]
