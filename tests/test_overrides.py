"""What a record says of a user's overrides: everything that can change the number, and nothing where there are none."""

import copy
from typing import Any

import pytest

from twist.contracts.errors import UsageError
from twist.contracts.files import sha256_json
from twist.transfer.recipe import departures, read_override, recorded

BEFORE: dict[str, Any] = {
    "model": {"width": 1, "mean": [0.5, 0.5], "style": "a"},
    "steps": [{"type": "crop", "size": 8}, {"type": "flip", "prob": 0.5}],
    "solver": {"rate": 0.1, "workers": 4},
}


def recipe_of(config: dict[str, Any]) -> dict[str, Any]:
    """As an engine's: renamed, and without what is the weights' and the machine's."""
    return {
        "width": config["model"]["width"],
        "rate": config["solver"]["rate"],
        "crop": config["steps"][0],
    }


def changed(**changes: Any) -> dict[str, Any]:
    after = copy.deepcopy(BEFORE)
    for name, value in changes.items():
        section, key = name.split("__")
        after[section][int(key) if key.isdigit() else key] = value
    return after


def record(after: dict[str, Any]) -> dict[str, Any]:
    return recorded(BEFORE, after, recipe_of=recipe_of, harmless=("solver.workers",))


def test_without_overrides_the_recipe_is_itself() -> None:
    assert record(BEFORE) == recipe_of(BEFORE)


def test_what_the_recipe_holds_is_not_said_twice() -> None:
    after = changed(model__width=2, solver__rate=0.2, steps__0={"type": "crop", "size": 9})
    assert record(after) == recipe_of(after)


def test_what_the_recipe_leaves_out_is_said_once_it_is_overridden() -> None:
    after = changed(model__mean=[0.0, 0.5], steps__1={"type": "flip", "prob": 1.0}, model__width=2)
    assert record(after) == {**recipe_of(after), "overrides": {"model.mean": [0.0, 0.5], "steps.1.prob": 1.0}}
    assert after == changed(model__mean=[0.0, 0.5], steps__1={"type": "flip", "prob": 1.0}, model__width=2), "untouched"


def test_other_values_are_other_recipes_and_workers_are_none() -> None:
    recipes = [record(changed(model__style=style)) for style in ("b", "c")]
    assert len({sha256_json(recipe) for recipe in [*recipes, record(BEFORE)]}) == 3
    assert record(changed(solver__workers=0)) == recipe_of(BEFORE)


def test_departures_name_what_is_not_free() -> None:
    after = changed(model__mean=[0.0, 0.5], solver__rate=1.0, steps__1={"type": "flip", "prob": 1.0})
    assert departures(BEFORE, after, free=("solver", "steps.*.size")) == [
        "changed from the protocol: model.mean [0.5, 0.5] → [0.0, 0.5]",
        "changed from the protocol: steps.1.prob 0.5 → 1.0",
    ]
    assert departures(BEFORE, after, free=("sol*", "steps.*.prob", "model.mean")) == []
    assert len(departures(BEFORE, after, free=("solver.rat", "prob", "steps.prob", "model.mean.0"))) == 3


def test_what_an_option_decides_is_refused_with_the_option() -> None:
    config, options = {"val_loader": {"root": "/a", "roots": "/a"}, "root": "/a"}, {"*_loader.root": "--data"}
    with pytest.raises(UsageError, match=r'^"val_loader.root=/x": .* --data alone; pass --data in its place\.$'):
        read_override("val_loader.root=/x", config, options)
    assert read_override("val_loader.roots=/x", config, options) == ("val_loader.roots", "/x")
    assert read_override("root=/x", config, options) == ("root", "/x")


CONFIG = {"on": True, "size": (1, 2), "steps": [{"type": "a"}, {"prob": 0.5}], "name": "x"}


@pytest.mark.parametrize(
    ("override", "value"),
    [("on=False", False), ("on=true", True), ("size=[3, 4]", (3, 4)), ("steps.1.prob=1", 1), ("name=word", "word")],
)
def test_a_value_has_the_type_of_what_it_replaces(override: str, value: Any) -> None:
    assert read_override(override, CONFIG, {})[1] == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("on=no", "on is True; write true or false"),
        ("on=0", "on is True; write true or false"),
        ("steps.1.prob=true", r"steps\.1\.prob is 0\.5, a number"),
        ("steps.7.prob=1", r"no key steps\.7"),
        ("steps.1=2", "is a section"),
        ("sizes=1", 'Did you mean "size"'),
        ("keep_batc=1", 'Did you mean "keep_batch"'),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(override: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        read_override(override, CONFIG, {})
