"""`twist compare`, the tables of a README and the end of `twist suite`, as a user of a clone meets them."""

from pathlib import Path

import pytest
from made_records import make_record, runs

from twist import comparing
from twist.cli import app
from twist.compare.comparison import compare_records
from twist.contracts.errors import UsageError, UserError
from twist.contracts.record import RunRecord, find_records, write_record
from twist.transfer.suite import run

ROOT = Path(__file__).resolve().parent.parent
STUDIES = [path for path in (ROOT / "results").iterdir() if path.is_dir() and any(find_records([path]))]


def twist(*arguments: str | Path) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for record in [*runs("random", [40.0, 40.5, 41.0]), *runs("twist", [50.0, 50.5, 51.0])]:
        write_record(record, tmp_path / "results")
    return tmp_path / "results"


# ── The committed tree ──


def test_without_arguments_each_committed_study_has_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert len(STUDIES) > 1
    twist("compare", "--format", "markdown")
    text = capsys.readouterr().out
    assert all(f"### `results/{study.name}`" in text for study in STUDIES)
    assert "results/benchmarks" not in text
    assert "No records" not in text


# ── What is asked for ──


def test_a_path_without_records_is_a_sentence_and_not_the_published_collection(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run records under .*--published-only"):
        twist("compare", tmp_path)
    with pytest.raises(UserError, match="no record or folder of records at"):
        twist("compare", tmp_path / "absent")


def test_without_results_the_runs_are_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no record or folder of records at results"):
        twist("compare")
    for seed in (0, 1):
        run = tmp_path / "runs" / "sample-knn" / f"twist-seed{seed}"
        write_record(make_record(seed=seed, metrics={"knn_top1_percent": 50.0 + seed}), run / "results")
        (run / "run.json").write_text("{}")
    twist("compare")
    printed = capsys.readouterr()
    assert "50.5 ± 0.7 (2)" in printed.out
    assert "━━" not in printed.out
    assert printed.err == "There is no results: these are the records under runs.\n"
    write_record(make_record("byol"), tmp_path / "results")
    twist("compare")
    assert "TWIST" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("knn_top5", 'Did you mean "knn_top5_percent"'),
        ("miou_percent", r"Known: knn_top1_percent, top1_percent\.$"),
        # The published rows of a protocol are not here as long as they are not shown.
        ("top5_percent", r"Known: knn_top1_percent, top1_percent\.$"),
    ],
)
def test_a_metric_that_is_none_or_not_here_is_refused(results: Path, asked: str, said: str) -> None:
    write_record(make_record(protocol="linear", scale="reduced", metrics={"top1_percent": 9.0}), results)
    with pytest.raises(UsageError, match=rf'metric "{asked}"\. {said}'):
        twist("compare", results, "--metric", asked)


def test_a_metric_of_one_study_leaves_out_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(make_record(), tmp_path / "a")
    write_record(make_record(protocol="sample-linear", metrics={"top1_percent": 60.0}), tmp_path / "b")
    twist("compare", tmp_path, "--metric", "top1_percent")
    text = capsys.readouterr().out
    assert "60.0 (1)" in text
    assert "No records" not in text


def test_published_numbers_stand_beside_runs_at_full_scale_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*options: str) -> str:
        twist("compare", tmp_path, "--format", "markdown", *options)
        return capsys.readouterr().out

    write_record(make_record(protocol="knn", scale="reduced"), tmp_path)
    note = "Published numbers of knn are left out: no record of it is at full scale"
    assert note in shown()
    assert "DINO" not in shown()
    assert note not in shown("--no-published")
    asked = shown("--published")
    assert "DINO" in asked
    assert note not in asked
    write_record(make_record(protocol="linear", scale="full", metrics={"top1_percent": 70.0}), tmp_path)
    both = shown()
    assert "SwAV" in both
    assert note in both
    assert "lightly repository" not in both.split("k-NN top-1")[1].split("\n\n")[0]


def test_the_published_numbers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    twist("compare", "--published-only", "--metric", "miou_percent")
    assert "“67.16”" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--published-only"):
        twist("compare", "--published-only", "results")


def test_another_programs_json_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "knn" / "one"
    write_record(make_record(), run / "results")
    for path in (run / "run.json", tmp_path / "runs" / "mine" / "metrics.json", run / "results" / "knn" / "other.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"method": "sgd", "metrics": {"loss": 1}}')
    twist("compare", tmp_path / "runs")
    assert "50.0 (1)" in capsys.readouterr().out
    with pytest.raises(UserError):
        twist("compare", tmp_path / "runs" / "mine" / "metrics.json")


def test_one_table_formats_take_one_study(tmp_path: Path) -> None:
    for study in "ab":
        write_record(make_record(), tmp_path / study)
    for name in ("csv", "json", "html"):
        with pytest.raises(UsageError, match=f"The format {name} holds one table, and there are 2 studies"):
            twist("compare", tmp_path, "--format", name)


# ── Where it is written ──


@pytest.mark.parametrize(
    ("name", "begins"),
    [("new/t.md", "| method |"), ("t.csv", "method,row,"), ("t.tex", "% needs"), ("T.HTML", "<!doctype"), ("t", " ")],
)
def test_the_suffix_of_the_output_is_its_format(results: Path, tmp_path: Path, name: str, begins: str) -> None:
    twist("compare", results, "--output", tmp_path / name)
    assert (tmp_path / name).read_text().startswith(begins)


def test_a_suffix_that_contradicts_the_format_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"t\.md is markdown by its name, and --format says csv"):
        twist("compare", results, "--format", "csv", "--output", tmp_path / "t.md")
    assert not (tmp_path / "t.md").exists()
    twist("compare", results, "--format", "csv", "--output", tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_text().startswith("method,row,")


# ── A README's tables ──


@pytest.fixture
def readme(results: Path) -> Path:
    path = results.parent / "README.md"
    path.write_text(
        "# Title\n\n<!-- twist compare results --baseline random -->\n<!-- end -->\n\nAfter.\n\n"
        "```\n<!-- twist compare results/absent -->\n```\n\n<!-- twist compare results --no-published -->\n<!-- end -->"
    )
    return path


def test_stale_tables_are_found_rewritten_and_then_current(readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert comparing.refresh_tables(readme, write=False) == 1
    said = capsys.readouterr().out
    assert "`twist compare results --baseline random` is stale; run `twist compare --update" in said
    assert said.count("is stale") == 2
    assert comparing.refresh_tables(readme, write=True) == 0
    text = readme.read_text()
    assert text.count("| TWIST | 50.5 ± 0.5 (3)") == 2
    assert text.startswith("# Title\n\n<!-- twist")
    assert "After.\n\n```\n<!-- twist compare results/absent -->\n```\n" in text
    assert comparing.refresh_tables(readme, write=False) == 0
    before = readme.stat().st_mtime_ns
    assert comparing.refresh_tables(readme, write=True) == 0
    assert readme.stat().st_mtime_ns == before


def test_an_edited_number_makes_a_table_stale_and_no_table_is_said(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparing.refresh_tables(readme, write=True)
    readme.write_text(readme.read_text().replace("50.5", "60.5", 1))
    assert comparing.refresh_tables(readme, write=False) == 1
    readme.write_text("nothing here\n<!-- end -->\n")
    for write in (False, True):
        assert comparing.refresh_tables(readme, write=write) == (0 if write else 1)
        assert "README.md: 0 tables found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("<!-- twist compare results -->\n", UserError, "line 1: the marker has no <!-- end --> line"),
        ("<!-- twist compare results --output=x -->\n<!-- end -->\n", UsageError, "takes no --output=x"),
        ("<!-- twist compare elsewhere -->\n<!-- end -->\n", UserError, "no record or folder of records at"),
    ],
)
def test_a_marker_that_cannot_be_followed(readme: Path, text: str, error: type[Exception], said: str) -> None:
    readme.write_text(text)
    with pytest.raises(error, match=said):
        comparing.refresh_tables(readme, write=False)
    with pytest.raises(UserError, match=r"absent\.md cannot be read"):
        comparing.refresh_tables(readme.parent / "absent.md", write=False)


# ── The end of a suite ──


def test_a_suite_ends_with_differences_to_random_or_supervised_weights_or_nothing() -> None:
    ours = runs("twist", [50.0, 50.5, 51.0])
    text = comparing.suite_table([*runs("random", [40.0, 40.5, 41.0]), *ours])
    assert "50.5 ± 0.5 (3) [+10.0*]" in text
    assert "In brackets the difference to random init" in text
    assert "the difference to supervised" in comparing.suite_table([*runs("supervised", [40.0]), *ours])
    assert "[" not in comparing.suite_table([*runs("byol", [40.0]), *ours])


def test_the_table_of_what_was_made_comes_before_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[RunRecord] = [*runs("random", [40.0, 40.5, 41.0]), *runs("twist", [50.0, 50.5, 51.0])]

    failed = (made, UserError("1 of 5 runs failed: …"))
    monkeypatch.setattr(run, "run_suite", lambda *_, **__: failed)
    with pytest.raises(UserError, match="1 of 5 runs failed"):
        twist("suite", "quick", "--data", tmp_path)
    assert "[+10.0*]" in capsys.readouterr().out


def test_in_python_the_table_is_a_frame_with_a_row_for_each_value() -> None:
    frame = compare_records(ROOT / "results" / "study", baseline="random", published=False)
    (cell,) = frame[(frame.method == "twist") & (frame.metric == "knn_top1_percent")].to_dict("records")
    assert (cell["n"], round(cell["value"], 1), round(cell["difference"], 1)) == (3, 55.4, 21.9)  # as in the README
    assert cell["p_value"] < 0.05
    assert frame[frame.method == "random"].difference.isna().all()
