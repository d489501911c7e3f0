"""Which numbers may stand in one column, and what is said of their differences."""

import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import make_record, runs

from twist.compare.statistics import differences, holm, p_text
from twist.compare.table import TASKS, Cell, Measured, Table, build_table
from twist.compare.writers import render
from twist.contracts.errors import UsageError, UserError
from twist.contracts.published import PublishedRow, load_published
from twist.contracts.record import RunRecord

KNN = "knn_top1_percent"
OTHER = {KNN: 51.0}
OURS = {"pretrain_config_hash": "c" * 64, "pretrain_seed": 0}


PRINTED = PublishedRow(
    method="byol", architecture="resnet50", epochs=None, variant="", protocol="knn", beside=None, task="classification",
    metrics={KNN: 66.6}, sd={}, trials=None, source="a paper, Table 1", read="primary", note="",
)  # fmt: skip


def published(**changes: Any) -> PublishedRow:
    return PRINTED.model_copy(update=changes)


def labels(table: Table) -> list[str]:
    return [row.label for row in table.rows]


def cell(table: Table, label: str, column: int = 0) -> Cell:
    return table.cells[labels(table).index(label), column]


def measured(records: list[RunRecord], **options: Any) -> Measured:
    found = build_table(records, **options).cells[0, 0].measured
    assert found is not None
    return found


def full(method: str, values: list[float], **others: object) -> list[RunRecord]:
    return runs(method, values, protocol="knn", scale="full", **others)


# ── Cells ──


def test_mean_spread_and_absence() -> None:
    table = build_table(
        [*runs("twist", [50.0, 51.0, 53.0]), *runs("byol", [40.0], "nmi_percent", protocol="sample-cluster")]
    )
    assert table.cells.keys() == {(0, 0), (1, 1)}, "absent is no zero"
    three, one = cell(table, "TWIST", 1).measured, cell(table, "BYOL").measured
    assert three is not None
    assert one is not None
    # Around the mean: 16/9 + 1/9 + 25/9 = 42/9, over n - 1 = 2.
    assert (three.mean, three.sd, three.n) == (pytest.approx(154 / 3), pytest.approx((42 / 18) ** 0.5), 3)
    assert (one.sd, one.n) == (None, 1)


BASE = [40.0, 40.5, 41.0]


@pytest.mark.parametrize(
    ("values", "baseline", "value", "p_value", "said"),
    [
        # By hand: t 3.6626 at 2.851 degrees of freedom. Student's pooled test gives 0.0099: another number.
        ([50.1, 51.3, 49.7, 50.9], [47.0, 48.8, 46.1], 3.2, 0.0382838, "2.9 degrees of freedom"),
        ([41.1, 41.6, 42.1], BASE, 1.1, 0.054314, "not significant, p = 0.054"),
        ([41.2, 41.7, 42.2], BASE, 1.2, 0.042415, "significant, p = 0.042"),
        (BASE, [50.0, 51.0], -10.0, None, "n too small for a test: 2 where 3"),
        # Equal values whose mean is rounded have no spread either; one constant side is no obstacle.
        ([0.1 + 0.2] * 7, [1 / 3] * 7, 0.3 - 1 / 3, None, "neither side varies"),
        ([50.0] * 3, BASE, 9.5, 0.00092, "significant, p < 0.001"),
    ],
)
def test_a_difference_in_numbers(
    values: list[float], baseline: list[float], value: float, p_value: float | None, said: str
) -> None:
    (got,) = differences([(values, baseline)])
    assert got.value == pytest.approx(value)
    assert got.p_value == got.p_holm == (None if p_value is None else pytest.approx(p_value, rel=1e-2))
    assert said in got.said
    assert got.significant is (None if p_value is None else p_value < 0.05)


def test_holms_correction_in_numbers() -> None:
    # By hand: 4 × .005, 3 × .01, 2 × .03, and .04 that may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    pairs = [([value + 1.2 for value in BASE], BASE), ([50.0], BASE), ([value + 9 for value in BASE], BASE)]
    one, untested, other = differences(pairs)
    assert (one.p_holm, untested.p_holm, other.p_holm) == (one.p_value, None, pytest.approx(2 * (other.p_value or 0)))
    assert "(Holm's correction for 2 comparisons; Welch's t" in one.said
    assert [p_text(p) for p in (0.00004, 0.0312, 0.42)] == ["p < 0.001", "p = 0.031", "p = 0.42"]


def test_differences_to_a_baseline() -> None:
    records = [*runs("random", BASE), *runs("twist", [50.0, 50.5, 51.0]), *runs("byol", [40.1, 40.6, 41])]
    table = build_table(records, baseline="random")
    twist, byol = cell(table, "TWIST").difference, cell(table, "BYOL").difference
    assert twist is not None
    assert byol is not None
    assert twist.value == pytest.approx(10)
    assert (twist.significant, byol.significant) == (True, False)
    assert cell(table, "random init").difference is None
    assert table.comparisons == 2


def test_a_baseline_is_called_as_the_record_or_the_table_does_and_is_one_measured_row() -> None:
    records = [*runs("random", [40.0, 41.0]), *runs("moco-v2", [60.0, 61.0])]
    assert [build_table(records, baseline=name).baseline for name in ("moco-v2", "moco V2")] == [1, 1]
    with pytest.raises(UsageError, match='Did you mean "random"'):
        build_table(runs("random", [40.0]), baseline="randon")
    two = [make_record(weights={"sha256": name * 64, "name": name}) for name in "ab"]
    with pytest.raises(UsageError, match='"TWIST · a", "TWIST · b"'):
        build_table(two, baseline="twist")
    assert build_table(two, baseline="TWIST · a").baseline == 0
    with pytest.raises(UsageError, match="no measured row"):
        build_table(full("twist", [70.0, 71.0]), published=[published()], baseline="byol")


# ── Columns ──


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (
            {"recipe": {"k": 20, "optim": {"lr": 0.1}}},
            {"recipe": {"k": 20, "optim": {"lr": 0.2}}},
            r"optim.lr = 0.1\] against \[optim.lr = 0.2.*--strict",
        ),
        ({}, {"scale": "reduced"}, "scale reduced"),
        ({"data": "coco 1"}, {"data": "coco 2"}, r"\[data coco 1\] against \[data coco 2\]"),
    ],
    ids=["recipe", "scale", "data"],
)
def test_different_runs_are_refused_with_what_differs(one: dict[str, Any], other: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_table([make_record(**one), make_record("byol", **other)], strict=True)
    further = [make_record(protocol="sample-linear", **one), make_record("byol", "sample-linear", **other)]
    with pytest.raises(UserError, match=r"sample-knn \(and 1 more\) come from 2 recipes"):
        build_table([make_record(**one), make_record("byol", **other), *further], strict=True)


def test_mixed_recipes_stand_in_columns_apart_and_marked() -> None:
    table = build_table([make_record(recipe={"lr": 0.1}), make_record("byol", recipe={"lr": 0.2})])
    assert [column.mixed for column in table.columns] == ["lr = 0.1", "lr = 0.2"]
    assert table.cells.keys() == {(0, 1), (1, 0)}


def test_a_record_that_does_not_name_its_data_joins_those_of_one_set_alone() -> None:
    whole, half, older = make_record(data="coco 1"), make_record("byol", data="coco 2"), make_record("moco-v2")
    table = build_table([whole, half, older])
    assert sorted(column.mixed for column in table.columns) == ["data coco 1", "data coco 2", "data not said"]
    assert all(len([place for place in table.cells if place[1] == column]) == 1 for column in range(3))
    assert len(build_table([whole, older]).columns) == 1


KEYS = st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 2), st.sampled_from(["full", "sample"]))


def test_networks_of_one_recipe_share_a_column_which_says_the_recipe_without_them() -> None:
    def record(network: str, **recipe: Any) -> RunRecord:
        return make_record(
            recipe={"architecture": network, "k": 30, **recipe}, weights={"architecture": network, "name": network}
        )

    resnet, vit = record("resnet50"), record("vit_small_patch16")
    (column,) = build_table([resnet]).columns
    assert column.recipe_hash == resnet.recipe_hash, "one network: as the record says"
    table = build_table([resnet, vit])
    (column,) = table.columns
    assert (column.mixed, [row.label for row in table.rows]) == ("", ["TWIST · R50", "TWIST · ViT-S/16"])
    assert column.recipe_hash not in (resnet.recipe_hash, vit.recipe_hash)
    assert len(build_table([resnet, record("vit_small_patch16", k=20)]).columns) == 2


@given(st.lists(KEYS, unique_by=lambda key: key[:3], max_size=10), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_column_never_holds_two_recipes_and_order_is_nothing(
    keys: list[tuple[str, int, int, str]], shuffler: random.Random
) -> None:
    records = [
        make_record(method, seed=seed, recipe={"lr": lr}, scale=scale, metrics={KNN: 50.0 + seed})
        for method, seed, lr, scale in keys
    ]
    table = build_table(records)
    assert sum(c.measured.n for c in table.cells.values() if c.measured) == len(records)
    for (_, index), entry in table.cells.items():
        for record in entry.measured.records:  # type: ignore[union-attr]
            assert (record.recipe_hash, record.scale) == (table.columns[index].recipe_hash, table.columns[index].scale)
    shuffled = list(records)
    shuffler.shuffle(shuffled)
    assert build_table(shuffled) == table


def test_two_records_of_one_run_that_differ_are_refused_with_both_files() -> None:
    records, paths = [make_record(), make_record(metrics=OTHER)], [Path("a/knn/x.json"), Path("b/knn/x.json")]
    said = r"sample-knn, seed 0, recipe \w+\) differ in knn_top1_percent: a/knn/x.json and b/knn/x.json; .*remove one"
    with pytest.raises(UserError, match=said):
        build_table(records, paths=paths)


def test_of_two_records_of_one_run_that_agree_the_older_is_kept() -> None:
    records = [make_record(created="2026-02-02T00:00:00+00:00", notes=("again",)), make_record(), make_record(seed=1)]
    paths = [Path(f"/home/somebody/{name}/knn/x.json") for name in ("again", "first", "seed1")]
    table = build_table(records, paths=paths)
    assert [(run.seed, run.notes) for run in measured(records, paths=paths).records] == [(0, ()), (1, ())]
    assert table.left_out == {0}
    for name in ("table", "markdown", "latex", "json"):
        assert "1 record left out: it repeats an older one of the same run" in render(table, name)
    backwards = build_table(records[::-1], paths=paths[::-1])
    assert (backwards.cells, backwards.notes) == (table.cells, table.notes)
    assert build_table(records[1:]).notes == ()
    assert build_table(records * 2).notes[0].startswith("4 records left out: each repeats")


@pytest.mark.parametrize(
    ("first", "second"),
    [*[({**OURS, "pretrain_images_sha256": "d" * 64},) * 2, ({"source_sha256": "e" * 64, "branch": "momentum"},) * 2],
     ({}, {"source_sha256": "a" * 64})],
    ids=["ours", "another's", "a checkpoint and its artefact"],
)  # fmt: skip
def test_an_artefact_that_was_written_again_is_the_same_run(first: dict[str, Any], second: dict[str, Any]) -> None:
    records = [
        make_record(weights={**first, "sha256": "a" * 64}),
        make_record(weights={**second, "sha256": "b" * 64}, metrics=OTHER),
    ]
    with pytest.raises(UserError, match="Two records of one run"):
        build_table(records)


# ── Rows ──


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (
            {"sha256": "a" * 64, "epochs": 200},
            {"sha256": "b" * 64, "epochs": 800},
            ["TWIST · 200 ep", "TWIST · 800 ep"],
        ),
        ({**OURS, "pretrain_images_sha256": "1" * 64}, {**OURS, "pretrain_images_sha256": "2" * 64}, None),
        (OURS, {**OURS, "branch": "teacher"}, None),
        ({"architecture": "vit_small_patch16"}, {}, ["TWIST · R50", "TWIST · ViT-S/16"]),
        ({"architecture": "resnet18"}, {"architecture": None}, ["TWIST", "TWIST"]),
    ],
    ids=["length", "images", "branch", "ViT", "not known"],
)
def test_other_weights_are_another_row(one: dict[str, Any], other: dict[str, Any], wanted: list[str] | None) -> None:
    found = labels(build_table([make_record(weights=one), make_record(weights=other)]))
    assert found == wanted if wanted else len(set(found)) == 2


def test_rows_without_a_method_or_an_architecture_of_the_weights() -> None:
    (row,) = build_table(runs("unknown", [50.0])).rows
    assert row.label != "unknown"
    networks = ("resnet18", "resnet50")
    records = [make_record("random", recipe={"architecture": n}, weights={"architecture": None}) for n in networks]
    assert labels(build_table(records)) == ["random init · R18", "random init · R50"]


# ── What n counts ──


@pytest.mark.parametrize(
    ("method", "weights", "values", "n", "pretrainings"),
    [
        ("twist", [{**OURS, "sha256": "a" * 64}, {**OURS, "sha256": "b" * 64, "pretrain_seed": 1}], [50.0, 50.0], 2, 2),
        # Equal values of several initialisations are three results, not one repeated.
        ("random", [{}, {}, {}], [50.0] * 3, 3, 3),
        # One file is one initialisation whatever the seed.
        ("random", [{"sha256": "r" * 64}] * 2, [40.0, 41.0], 2, 1),
        ("random", [{"sha256": "r" * 64}, {"sha256": "r" * 64}, {}], [40.0, 41.0, 50.0], 2, 2),
    ],
)
def test_what_n_counts(
    method: str, weights: list[dict[str, Any]], values: list[float], n: int, pretrainings: int
) -> None:
    records = [
        make_record(method, seed=seed, weights=of, metrics={KNN: value})
        for seed, (of, value) in enumerate(zip(weights, values, strict=True))
    ]
    found = measured(records)
    assert (found.n, found.pretrainings, found.repeated) == (n, pretrainings, False)


def test_a_result_that_no_seed_changes_counts_once_and_is_never_starred() -> None:
    table = build_table([*runs("random", [40.0, 40.5, 41.0]), *runs("twist", [67.3] * 3)], baseline="random")
    twist = cell(table, "TWIST")
    assert twist.measured is not None
    assert twist.difference is not None
    assert (twist.measured.n, twist.measured.sd, len(twist.measured.records)) == (1, None, 3)
    assert twist.difference.value == pytest.approx(26.8)
    assert twist.difference.significant is None


@pytest.mark.parametrize(
    ("levels", "values", "repeated"),
    [
        ([[50.0, 52.0, 54.0], [60.0, 61.0, 62.0]], (52.0, 61.0), False),
        ([[60.0] * 3, [61.0] * 3, [62.0] * 3], (60.0, 61.0, 62.0), True),
    ],
)
def test_of_several_pretrainings_each_counts_once_by_its_mean(
    levels: list[list[float]], values: tuple[float, ...], repeated: bool
) -> None:
    """Six runs of two pretrainings are no six independent results: the spread is that of the pretrainings' means."""
    found = measured(
        [
            make_record(weights={**OURS, "pretrain_seed": pretraining}, seed=seed, metrics={KNN: value})
            for pretraining, level in enumerate(levels)
            for seed, value in enumerate(level)
        ]
    )
    assert (found.values, found.n, found.pretrainings) == (values, len(levels), len(levels))
    assert found.sd == pytest.approx(statistics.stdev(values))
    assert sorted(found.run_values) == sorted(value for level in levels for value in level)
    assert found.repeated == repeated


# ── Published numbers ──


def test_a_published_value_joins_the_full_scale_column_of_its_protocol() -> None:
    table = build_table(full("twist", [70.0]), published=[published()])
    assert len(table.columns) == 1
    assert cell(table, "BYOL").published[0].value == 66.6
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
def test_a_published_value_has_a_column_of_its_own_else(records: list[RunRecord]) -> None:
    table = build_table(records, published=[published()])
    (place,) = [column for (_, column), entry in table.cells.items() if entry.published]
    assert table.columns[place].recipe_hash is None
    assert not any(entry.measured for (_, column), entry in table.cells.items() if column == place)


def test_measured_rows_stand_before_published_ones() -> None:
    rows = [published(method="random"), published(method="supervised"), published(method="twist", epochs=800)]
    table = build_table([*full("twist", [70.0]), *full("vicreg", [60.0])], published=rows)
    assert labels(table) == ["TWIST", "VICReg", "random init", "supervised", "TWIST · 800 ep"]


def test_published_rows_of_the_measured_protocols_alone() -> None:
    rows = [published(), published(protocol="foreign:their-knn", beside="knn"), published(protocol="linear")]
    table = build_table(full("twist", [70.0]), published=rows)
    assert [column.protocol for column in table.columns] == ["knn", "foreign:their-knn"]
    assert len(build_table([], published=rows).columns) == 3


def test_the_whole_collection_makes_a_table_with_our_protocols_and_their_neighbours_first() -> None:
    rows = load_published()
    table = build_table([], published=rows)
    assert sum(len(c.published) for c in table.cells.values()) == sum(len(row.metrics) for row in rows)
    keys = [(c.protocol, c.metric) for c in table.columns]
    assert len(keys) == len(set(keys))
    beside = {row.protocol: row.beside for row in rows}
    for task in TASKS:
        alone = [beside[c.protocol] is None and c.protocol[:8] == "foreign:" for c in table.columns if c.task == task]
        assert alone == sorted(alone), task
