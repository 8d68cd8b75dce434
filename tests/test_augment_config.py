"""The forms of the augment section, its recipes and its faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from densepred import config as configuration
from densepred.config import AugmentConfig
from densepred.config.transforms import RECIPES, TRANSFORMS
from densepred.errors import InputError

OLD = {
    "flip": [2],
    "rotation": {"probability": 0.5, "range": [-20, 20]},
    "scaling": {"probability": 0, "range": [1, 1]},
    "noise": {"probability": 0, "range": [0, 0]},
    "brightness": {"probability": 0, "range": [1, 1]},
    "contrast": {"probability": 0, "range": [1, 1]},
    "gamma": {"probability": 0, "range": [1, 1]},
}
"""The only form there was once; it stands in the folders of trainings."""


@pytest.fixture
def load(tmp_path: Path):
    def read(augment: object, *overrides: str) -> AugmentConfig:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"data": {"dataset": "d.json"}, "augment": augment}))
        return configuration.load(path, overrides).augment

    return read


def names(config: AugmentConfig) -> list[str]:
    return [name for name, _ in config.named()]


def test_names_lists_and_mappings_say_the_same(load):
    assert load("nnunet") == load({"recipe": "nnunet"}) == load(RECIPES["nnunet"])
    assert load({}) == load("light") == AugmentConfig() == configuration.Config().augment
    assert load([{"flip": [2]}, {"noise": None}]) == load([{"flip": {"axes": [2]}}, {"noise": {}}])
    assert load("none") == load([])


def test_a_mapping_changes_leaves_out_and_adds(load):
    changed = load({"recipe": "nnunet", "rotation": {"probability": 0.7}, "blur": None, "cutout": {"boxes": 2}})
    settings = dict(changed.named())
    assert settings["rotation"].probability == 0.7
    assert settings["rotation"].range == "auto", "what is not named stays the recipe's"
    assert "blur" not in settings
    assert names(changed)[-1] == "cutout"
    assert load(OLD) == load({"recipe": "light", **OLD})
    assert dict(load(OLD).named())["rotation"].range == (-20, 20)


def test_order_and_repetition_are_kept(load):
    entries = [{"noise": {}}, {"cutout": {}}, {"noise": {"range": [1, 2]}}]
    assert names(load(entries)) == ["noise", "cutout", "noise"]


def test_overrides_reach_into_recipes(load):
    for start in ("nnunet", {"recipe": "nnunet"}):
        assert dict(load(start, "augment.rotation.probability=1").named())["rotation"].probability == 1
    assert load("nnunet", "augment=none").transforms == ()
    assert names(load({}, "augment.blur.probability=0.3"))[-1] == "blur"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dump_reads_back(load, recipe):
    whole = configuration.Config(data={"dataset": "d.json"}, augment=AugmentConfig.model_validate(recipe))
    assert load(yaml.safe_load(configuration.dump(whole))["augment"]) == whole.augment


def test_the_recipe_nnunet_has_nnunets_numbers():
    found = {name: settings.model_dump() for name, settings in AugmentConfig.model_validate("nnunet").named()}
    expected = {
        "rotation": (0.2, "auto"),
        "scaling": (0.2, (0.7, 1.4)),
        "noise": (0.1, (0.0, 0.1)),
        "blur": (0.2, (0.5, 1.0)),
        "brightness": (0.15, (0.75, 1.25)),
        "contrast": (0.15, (0.75, 1.25)),
        "low_resolution": (0.25, (0.5, 1.0)),
        "inverted_gamma": (0.1, (0.7, 1.5)),
        "gamma": (0.3, (0.7, 1.5)),
    }
    assert {name: (found[name]["probability"], found[name]["range"]) for name in expected} == expected
    assert set(found) == {*expected, "flip", "dummy_2d"}
    assert found["noise"]["of"] == "variance"
    assert found["blur"]["channels"] == found["low_resolution"]["channels"] == 0.5
    assert found["flip"] == {"probability": 0.5, "axes": (0, 1, 2)}
    assert found["dummy_2d"]["ratio"] == 3


@pytest.mark.parametrize(
    ("augment", "place", "says"),
    [
        ("nnunnet", "augment.recipe", "did you mean 'nnunet'?"),
        ({"recipe": 3}, "augment.recipe", "one of light"),
        ([{"flipp": {}}], "augment.0.flipp", "did you mean 'flip'?"),
        ([{"flip": {}}, {"noise": {"rnge": 1}}], "augment.1.noise.rnge", "did you mean 'range'?"),
        ({"blurr": {}}, "augment.blurr", "did you mean 'blur'?"),
        ([3], "augment.0", "one transform"),
        ([{"flip": {}, "noise": {}}], "augment.0", "one transform"),
        (7, "augment", "a list of transforms"),
        ({"noise": {"probability": 1.5}}, "augment.noise.probability", "less than or equal to 1"),
        ({"gamma": {"range": [2, 1]}}, "augment.gamma.range", "the smallest comes first"),
        ({"scaling": {"range": [0, 1]}}, "augment.scaling.range", "greater than 0"),
        ({"noise": {"range": [-1, 1]}}, "augment.noise.range", "0 or more"),
        ([{"crop": {"range": [0.5, 1.5]}}], "augment.0.crop.range", "at most 1"),
        ([{"elastic": {"range": [0, 0.6]}}], "augment.0.elastic.range", "fold"),
        ([{"shear": {"range": [0, 90]}}], "augment.0.shear.range", "80 degrees"),
        ([{"albumentations": {"name": "os.system"}}], "augment.0.albumentations.name", "pattern"),
        ([{"albumentations": {"name": "Rotate"}}], "augment", "for 2D"),
    ],
)
def test_faults_name_their_place(load, augment, place, says):
    with pytest.raises(InputError) as error:
        load(augment)
    (line,) = error.value.what.splitlines()[1:]
    assert f": {place}: " in line
    assert says in line


def test_every_transform_and_setting_is_described():
    for kind in TRANSFORMS.values():
        assert kind.__doc__
        assert all(field.description for field in kind.model_fields.values()), kind


def test_overrides_reach_into_lists(load):
    changed = load([{"flip": [2]}, {"cutout": {"boxes": 2}}], "augment.flip.probability=1")
    assert names(changed) == ["flip", "cutout"]
    flip = dict(changed.named())["flip"]
    assert (flip.axes, flip.probability) == ((2,), 1)
    assert names(load([{"flip": [2]}, {"noise": None}], "augment.blur={}", "augment.flip=null")) == ["noise", "blur"]
    with pytest.raises(InputError, match="each one transform, listed once"):
        load([{"noise": {}}, {"noise": {}}], "augment.noise.probability=1")
