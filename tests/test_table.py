"""Which numbers may stand in one column, and what is said of their differences."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import make_record, runs

from twist.compare.render import render
from twist.compare.report_table import legend
from twist.compare.statistics import difference, p_text
from twist.compare.table import TASKS, Cell, Table, build_table, short_architecture
from twist.contracts.errors import UsageError, UserError
from twist.contracts.published import PublishedRow, load_published

KNN = "knn_top1_percent"


def published(method: str = "byol", protocol: str = "knn", **others: object) -> PublishedRow:
    values = {
        "method": method,
        "architecture": "resnet50",
        "epochs": None,
        "variant": "",
        "protocol": protocol,
        "beside": None,
        "task": "classification",
        "metrics": {KNN: 66.6},
        "sd": {},
        "trials": None,
        "source": "a paper, Table 1",
        "read": "primary",
        "note": "",
    }
    return PublishedRow.model_validate({**values, **others})


def cell(table: Table, label: str, column: int = 0) -> Cell | None:
    row = [row.label for row in table.rows].index(label)
    return table.cells.get((row, column))


def full(method: str, values: list[float], **others: object) -> list:  # type: ignore[type-arg]
    return runs(method, values, protocol="knn", scale="full", **others)


# ── Cells ──


def test_mean_and_sample_standard_deviation() -> None:
    table = build_table(runs("twist", [50.0, 51.0, 53.0]))
    measured = table.cells[0, 0].measured
    assert measured is not None
    assert measured.mean == pytest.approx(154 / 3)
    # Around the mean: 16/9 + 1/9 + 25/9 = 42/9, over n - 1 = 2.
    assert measured.sd == pytest.approx((42 / 18) ** 0.5)
    assert measured.n == 3


def test_one_run_has_no_spread_and_absent_is_no_zero() -> None:
    table = build_table([*runs("twist", [50.0]), *runs("byol", [40.0], "nmi_percent", protocol="sample-cluster")])
    assert table.cells.keys() == {(0, 0), (1, 1)}
    assert [entry.measured.sd for entry in table.cells.values() if entry.measured] == [None, None]


def test_welch_equals_scipys() -> None:
    a, b = [50.1, 51.3, 49.7, 50.9], [47.0, 48.8, 46.1]
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    got = difference(a, b)
    assert got.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert f"{expected.df:.1f} degrees of freedom" in got.said
    assert got.value == pytest.approx(sum(a) / 4 - sum(b) / 3)
    # Student's pooled test is another number: a wrong variant must not pass.
    assert got.p_value != pytest.approx(scipy.stats.ttest_ind(a, b).pvalue, rel=1e-3)


@pytest.mark.parametrize(
    ("shift", "said"), [(1.1, "not significant, p = 0.054"), (1.2, "significant, p = 0.042"), (-1.2, "significant, p")]
)
def test_significant_is_a_p_below_five_percent(shift: float, said: str) -> None:
    got = difference([40.0 + shift, 40.5 + shift, 41.0 + shift], [40.0, 40.5, 41.0])
    assert got.said.startswith(said)
    assert got.significant is said.startswith("significant")


@pytest.mark.parametrize("values", [([50.0], [40.0, 41.0]), ([50.0, 51.0], [40.0])])
def test_too_few_runs_are_said_plainly(values: tuple[list[float], list[float]]) -> None:
    got = difference(*values)
    assert got.p_value is None
    assert got.significant is None
    assert "n too small for a test: 1 run" in got.said


@pytest.mark.parametrize(("value", "baseline"), [(50.0, 40.0), (90 / 7, 10.0), (0.1 + 0.2, 1 / 3)])
@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_no_spread_is_no_test(value: float, baseline: float, n: int) -> None:
    """Equal values whose mean is rounded have no spread either."""
    got = difference([value] * n, [baseline] * n)
    assert got.value == pytest.approx(value - baseline)
    assert got.p_value is None
    assert "varies" in got.said


def test_weights_of_no_known_method_are_told_by_their_name() -> None:
    (row,) = build_table(runs("unknown", [50.0])).rows
    assert row.label != "unknown"


def test_p_values_are_printed_as_papers_do() -> None:
    assert [p_text(p) for p in (0.00004, 0.0312, 0.42)] == ["p < 0.001", "p = 0.031", "p = 0.42"]


def test_a_baseline_is_called_as_the_record_or_as_the_table_does() -> None:
    records = [*runs("random", [40.0, 41.0]), *runs("moco-v2", [60.0, 61.0])]
    for name in ("moco-v2", "MoCo v2", "moco V2"):
        assert build_table(records, baseline=name).baseline == 1


def test_differences_to_a_baseline() -> None:
    records = [*runs("random", [40.0, 40.5, 41.0]), *runs("twist", [50.0, 50.5, 51.0]), *runs("byol", [40.1, 40.6, 41])]
    table = build_table(records, baseline="random")
    twist, byol = cell(table, "TWIST"), cell(table, "BYOL")
    assert twist.difference.value == pytest.approx(10)  # type: ignore[union-attr]
    assert twist.difference.significant is True  # type: ignore[union-attr]
    assert byol.difference.significant is False  # type: ignore[union-attr]
    assert cell(table, "random init").difference is None  # type: ignore[union-attr]
    assert table.comparisons == 2


def test_a_baseline_that_is_nowhere() -> None:
    with pytest.raises(UsageError, match='Did you mean "random"'):
        build_table(runs("random", [40.0]), baseline="randon")


# ── Columns ──


def test_different_recipes_are_refused_with_what_differs() -> None:
    records = [
        make_record(recipe={"k": 20, "optim": {"lr": 0.1}}),
        make_record("byol", recipe={"k": 20, "optim": {"lr": 0.2}}),
    ]
    with pytest.raises(UserError, match=r"optim.lr = 0.1\] against \[optim.lr = 0.2.*--allow-mixed"):
        build_table(records)


def test_what_differs_is_said_in_short() -> None:
    records = [
        make_record(method, protocol, recipe={**dict.fromkeys("abcd", number), "e": f"{number}" * 40})
        for protocol in ("sample-knn", "sample-linear")
        for number, method in enumerate(("twist", "byol"))
    ]
    with pytest.raises(UserError, match=r"sample-knn \(and 1 more protocol\) .*\[a = 0, b = 0, c = 0, 2 more\]"):
        build_table(records)
    names = [make_record("twist", recipe={"e": "1" * 40}), make_record("byol", recipe={"e": "2" * 40})]
    with pytest.raises(UserError, match=f'e = "{"1" * 30}…] against .*: they may not share'):
        build_table(names)


def test_different_scales_are_refused() -> None:
    with pytest.raises(UserError, match="scale reduced"):
        build_table([make_record(), make_record("byol", scale="reduced")])


def test_other_mixed_protocols_are_counted() -> None:
    def mixed(*protocols: str) -> list:  # type: ignore[type-arg]
        return [make_record(protocol=name, recipe={"lr": lr}) for name in protocols for lr in (0.1, 0.2)]

    with pytest.raises(UserError, match=r"of a \(and 1 more protocol\) come from"):
        build_table(mixed("a", "b"))
    with pytest.raises(UserError, match=r"of a \(and 2 more protocols\) come from"):
        build_table(mixed("a", "b", "c"))


def test_mixed_recipes_stand_in_columns_apart_and_marked() -> None:
    records = [make_record(recipe={"lr": 0.1}), make_record("byol", recipe={"lr": 0.2})]
    table = build_table(records, allow_mixed=True)
    assert [column.mixed for column in table.columns] == ["lr = 0.1", "lr = 0.2"]
    assert cell(table, "TWIST", 1) is None
    assert cell(table, "BYOL", 0) is None


KEYS = st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 2), st.sampled_from(["full", "sample"]))


@given(st.lists(KEYS, unique_by=lambda key: key[:3], max_size=10), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_column_never_holds_two_recipes_and_order_is_nothing(
    keys: list[tuple[str, int, int, str]], shuffler: random.Random
) -> None:
    records = [
        make_record(method, seed=seed, recipe={"lr": lr}, scale=scale, metrics={KNN: 50.0 + seed})
        for method, seed, lr, scale in keys
    ]
    table = build_table(records, allow_mixed=True)
    assert sum(c.measured.n for c in table.cells.values() if c.measured) == len(records)
    for (_, index), entry in table.cells.items():
        for record in entry.measured.records:  # type: ignore[union-attr]
            assert (record.recipe_hash, record.scale) == (table.columns[index].recipe_hash, table.columns[index].scale)
    shuffled = list(records)
    shuffler.shuffle(shuffled)
    assert build_table(shuffled, allow_mixed=True) == table


OTHER = {KNN: 51.0}


def test_two_records_of_one_run_that_differ_are_refused_with_both_files() -> None:
    records, paths = [make_record(), make_record(metrics=OTHER)], [Path("a/knn/x.json"), Path("b/knn/x.json")]
    with pytest.raises(UserError, match=r"Two records of one run \(twist, sample-knn, seed 0"):
        build_table(records)
    with pytest.raises(
        UserError, match=r"differ in knn_top1_percent: a/knn/x.json and b/knn/x.json; a run counts once"
    ):
        build_table(records, paths=paths)


def test_of_two_records_of_one_run_that_agree_the_older_is_kept() -> None:
    records = [make_record(created="2026-02-02T00:00:00+00:00", notes=("again",)), make_record(), make_record(seed=1)]
    paths = [Path(f"/home/somebody/{name}/knn/x.json") for name in ("again", "first", "seed1")]
    table = build_table(records, paths=paths)
    measured = table.cells[0, 0].measured
    assert measured is not None
    assert [(run.seed, run.notes) for run in measured.records] == [(0, ()), (1, ())]
    assert table.left_out == {0}
    (note,) = table.notes
    # The files are told apart, and the machine's folders are nobody's business.
    assert note.endswith("in every metric (again/knn/x.json, kept first/knn/x.json).")
    for name in ("table", "markdown", "latex", "json"):
        assert "1 record left out: it repeats an older one" in render(table, name)
    assert "1 record left out" in legend(table)
    backwards = build_table(records[::-1], paths=paths[::-1])
    assert (backwards.cells, backwards.notes) == (table.cells, table.notes)
    assert build_table(records[1:]).notes == ()


def test_a_note_on_many_repeated_records_names_a_few() -> None:
    records = [make_record(seed=seed) for seed in range(5)] * 2
    paths = [Path(f"{folder}/{seed}.json") for folder in "ab" for seed in range(5)]
    (note,) = build_table(records, paths=paths).notes
    assert note.startswith("5 records left out: each repeats an older one")
    assert "b/2.json, kept a/2.json, and 2 more)" in note


OURS = {"pretrain_config_hash": "c" * 64, "pretrain_seed": 0}


@pytest.mark.parametrize(
    "provenance",
    [
        OURS,
        {**OURS, "pretrain_images_sha256": "d" * 64, "branch": "backbone"},
        {"source_sha256": "e" * 64, "branch": "momentum"},
        {"source_sha256": "e" * 64, "pretrain_config_hash": "c" * 64},
    ],
    ids=["our run", "our run, with its images", "another's checkpoint", "our run, its seed not known"],
)
def test_an_artefact_that_was_written_anew_is_the_same_run(provenance: dict[str, object]) -> None:
    metrics = {"a": None, "b": OTHER}
    records = [make_record(weights={**provenance, "sha256": x * 64}, metrics=made) for x, made in metrics.items()]
    with pytest.raises(UserError, match=r"Two records of one run .* the same pretraining"):
        build_table(records)


def test_a_checkpoint_and_its_artefact_are_the_same_weights() -> None:
    direct = make_record(weights={"sha256": "e" * 64})
    converted = make_record(weights={"sha256": "f" * 64, "source_sha256": "e" * 64}, metrics=OTHER)
    with pytest.raises(UserError, match="Two records of one run"):
        build_table([direct, converted])


def test_metrics_choose_the_columns() -> None:
    record = make_record(metrics={KNN: 50.0, "knn_top5_percent": 80.0})
    assert [c.metric for c in build_table([record], metrics=["knn_top5_percent"]).columns] == ["knn_top5_percent"]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("knn_top5", "knn_top5_percent"),
        ("top1", "top1_percent"),
        ("mIoU", "miou_percent"),
        ("box AP", "coco_box_ap_percent"),
    ],
)
def test_a_metric_may_be_called_without_its_unit_or_as_its_column_and_is_then_suggested(asked: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f'There is no metric "{asked}". Did you mean "{meant}"'):
        build_table([make_record()], metrics=[asked])


def test_a_metric_that_is_like_no_other_brings_the_ones_that_are_here() -> None:
    with pytest.raises(UsageError, match=r'There is no metric "zzz"\. What is here has knn_top1_percent\.$'):
        build_table([make_record()], metrics=["zzz"])


# ── Rows ──


def test_weights_of_other_length_are_another_row() -> None:
    records = [
        make_record("moco-v2", weights={"sha256": "a" * 64, "epochs": 200}),
        make_record("moco-v2", weights={"sha256": "b" * 64, "epochs": 800}),
    ]
    assert [row.label for row in build_table(records).rows] == ["MoCo v2 · 200 ep", "MoCo v2 · 800 ep"]


def test_other_files_of_one_method_are_never_pooled() -> None:
    records = [
        make_record("twist", weights={"sha256": "a" * 64, "name": "mine"}),
        make_record("twist", weights={"sha256": "b" * 64, "name": "theirs"}),
    ]
    table = build_table(records)
    assert [row.label for row in table.rows] == ["TWIST · mine", "TWIST · theirs"]
    with pytest.raises(UsageError, match='"TWIST · mine", "TWIST · theirs"'):
        build_table(records, baseline="twist")
    assert build_table(records, baseline="TWIST · mine").baseline == 0


def test_pretraining_seeds_of_one_config_are_repeats() -> None:
    records = [
        make_record(weights={"sha256": letter * 64, "pretrain_config_hash": "c" * 64, "pretrain_seed": seed})
        for seed, letter in enumerate("ab")
    ]
    measured = build_table(records).cells[0, 0].measured
    assert (measured.n, measured.pretrainings) == (2, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("other", [{"pretrain_images_sha256": "2" * 64}, {"branch": "teacher"}])
def test_other_images_or_another_branch_are_never_pooled(other: dict[str, str]) -> None:
    first = {**OURS, "pretrain_images_sha256": "1" * 64, "branch": "backbone", "name": "a"}
    records = [make_record(weights=first), make_record(weights={**first, **other, "name": "b"})]
    assert [row.label for row in build_table(records).rows] == ["TWIST · a", "TWIST · b"]
    same_name = [make_record(weights={**first, **change, "name": "a"}) for change in ({}, other)]
    assert len({row.label for row in build_table(same_name).rows}) == 2


def test_two_branches_of_anothers_checkpoint_are_never_pooled() -> None:
    records = [make_record(weights={"source_sha256": "e" * 64, "branch": branch}) for branch in ("query", "momentum")]
    assert len(build_table(records).rows) == 2


def test_runs_on_other_data_share_no_column() -> None:
    """The same recipe on another COCO (half of it, another year's) is another measurement."""
    whole, half, older = make_record(data="coco 1"), make_record("byol", data="coco 2"), make_record("moco-v2")
    with pytest.raises(UserError, match=r"2 recipes, scales or data, \[data coco 1\] against \[data coco 2\]"):
        build_table([whole, half])
    table = build_table([whole, half, older], allow_mixed=True)
    assert sorted(column.mixed for column in table.columns) == ["data coco 1", "data coco 2", "data not said"]
    assert all(len([place for place in table.cells if place[1] == column]) == 1 for column in range(3))
    # A record from before this was kept stands beside those of one kind.
    assert len(build_table([whole, older]).columns) == 1


@pytest.mark.parametrize("weights", [{}, {"sha256": "r" * 64}], ids=["drawn by the run", "from a file"])
def test_random_initialisations_are_repeats(weights: dict[str, str]) -> None:
    files = [{name: f"{value}{seed}" for name, value in weights.items()} for seed in range(3)]
    records = [make_record("random", seed=seed, weights=file) for seed, file in enumerate(files)]
    measured = build_table(records).cells[0, 0].measured
    # Equal values of several initialisations are three results, not one repeated.
    assert (measured.n, measured.pretrainings, measured.repeated) == (3, 3, False)  # type: ignore[union-attr]


def test_one_random_file_is_one_initialisation_whatever_the_seed() -> None:
    file = {"sha256": "r" * 64}
    records = [make_record("random", seed=seed, metrics={KNN: 40.0 + seed}, weights=file) for seed in range(2)]
    measured = build_table(records).cells[0, 0].measured
    assert (measured.n, measured.pretrainings) == (2, 1)  # type: ignore[union-attr]
    drawn = build_table([*records, make_record("random")]).cells[0, 0].measured
    assert (drawn.n, drawn.pretrainings) == (2, 2)  # type: ignore[union-attr]


def test_an_architecture_is_the_recipes_where_the_weights_have_none() -> None:
    records = [
        make_record("random", recipe={"architecture": name}, weights={"architecture": None})
        for name in ("resnet18", "resnet50")
    ]
    table = build_table(records, allow_mixed=True)
    assert [row.label for row in table.rows] == ["random init · R18", "random init · R50"]
    unknown = [make_record("random", weights={"architecture": name}) for name in ("resnet18", None)]
    assert [row.architecture for row in build_table(unknown).rows] == [None, "resnet18"]


# ── What n counts ──


def test_a_result_that_no_seed_changes_counts_once_and_is_never_starred() -> None:
    table = build_table([*runs("random", [40.0, 40.5, 41.0]), *runs("twist", [67.3] * 3)], baseline="random")
    twist = cell(table, "TWIST")
    assert twist is not None
    assert twist.measured is not None
    assert (twist.measured.n, twist.measured.sd, len(twist.measured.records)) == (1, None, 3)
    assert twist.difference is not None
    assert twist.difference.value == pytest.approx(26.8)
    assert twist.difference.significant is None


def test_one_metric_that_agrees_by_chance_is_no_repeat() -> None:
    records = [make_record(seed=seed, metrics={KNN: 50.0, "knn_top5_percent": 80.0 + seed}) for seed in range(3)]
    measured = build_table(records, metrics=[KNN]).cells[0, 0].measured
    assert (measured.n, measured.sd, measured.repeated) == (3, 0.0, False)  # type: ignore[union-attr]


def test_of_several_pretrainings_each_counts_once() -> None:
    levels = {0: [50.0, 52.0, 54.0], 1: [60.0, 61.0, 62.0]}
    records = [
        make_record(weights={**OURS, "pretrain_seed": pretraining}, seed=seed, metrics={KNN: value})
        for pretraining, values in levels.items()
        for seed, value in enumerate(values)
    ]
    measured = build_table(records).cells[0, 0].measured
    assert measured is not None
    # Six runs are no six independent results: the spread is that of the two pretrainings' means, 52 and 61.
    assert (measured.values, measured.n, measured.pretrainings) == ((52.0, 61.0), 2, 2)
    assert measured.sd == pytest.approx((2 * 4.5**2) ** 0.5)
    assert sorted(measured.run_values) == [50, 52, 54, 60, 61, 62]


def test_repeats_of_several_pretrainings_are_one_result_each() -> None:
    records = [
        make_record(weights={**OURS, "pretrain_seed": pretraining}, seed=seed, metrics={KNN: 60.0 + pretraining})
        for pretraining in range(3)
        for seed in range(3)
    ]
    measured = build_table(records).cells[0, 0].measured
    assert (measured.values, measured.repeated) == ((60.0, 61.0, 62.0), True)  # type: ignore[union-attr]


def test_architectures_are_named_where_they_differ() -> None:
    records = [make_record(), make_record("byol", weights={"architecture": "resnet50w2"})]
    assert [row.label for row in build_table(records).rows] == ["BYOL · R50w2", "TWIST · R50"]
    assert short_architecture("vit_small_patch16") == "ViT-S/16"


# ── Published numbers ──


def test_a_published_value_joins_the_full_scale_column_of_its_protocol() -> None:
    table = build_table(full("twist", [70.0]), published=[published()])
    assert len(table.columns) == 1
    assert cell(table, "BYOL").published[0].value == 66.6  # type: ignore[union-attr]
    assert table.sources[0].text == "a paper, Table 1"


@pytest.mark.parametrize(
    "records",
    [
        runs("twist", [70.0], protocol="knn", scale="reduced"),
        full("twist", [70.0], weights={"architecture": "resnet18"}),
        [*full("twist", [70.0]), *full("byol", [69.0], recipe={"k": 200})],
    ],
    ids=["another scale", "another architecture", "several recipes"],
)
def test_a_published_value_has_a_column_of_its_own_else(records: list) -> None:  # type: ignore[type-arg]
    table = build_table(records, published=[published()], allow_mixed=True)
    places = [column for (_, column), entry in table.cells.items() if entry.published]
    assert len(places) == 1
    assert table.columns[places[0]].recipe_hash is None
    assert not any(entry.measured for (_, column), entry in table.cells.items() if column == places[0])


def test_measured_rows_stand_before_published_ones() -> None:
    rows = [published("random"), published("supervised"), published("twist", epochs=800)]
    table = build_table([*full("twist", [70.0]), *full("vicreg", [60.0])], published=rows)
    assert [row.label for row in table.rows] == ["TWIST", "VICReg", "random init", "supervised", "TWIST · 800 ep"]


def test_a_published_row_is_no_baseline_for_a_test() -> None:
    with pytest.raises(UsageError, match="no measured row"):
        build_table(full("twist", [70.0, 71.0]), published=[published()], baseline="byol")


def test_published_rows_of_the_measured_protocols_alone() -> None:
    rows = [published(), published(protocol="foreign:their-knn", beside="knn"), published(protocol="linear")]
    table = build_table(full("twist", [70.0]), published=rows)
    assert [column.protocol for column in table.columns] == ["knn", "foreign:their-knn"]
    assert len(build_table([], published=rows).columns) == 3


def test_our_protocols_and_their_neighbours_stand_before_the_others() -> None:
    table = build_table([], published=load_published())
    beside = {row.protocol: row.beside for row in load_published()}
    for task in TASKS:
        alone = [
            beside[c.protocol] is None and c.protocol.startswith("foreign:") for c in table.columns if c.task == task
        ]
        assert alone == sorted(alone), task


def test_the_whole_collection_makes_a_table() -> None:
    rows = load_published()
    table = build_table([], published=rows)
    assert sum(len(c.published) for c in table.cells.values()) == sum(len(row.metrics) for row in rows)
    keys = [(c.protocol, c.metric) for c in table.columns]
    assert len(keys) == len(set(keys))
