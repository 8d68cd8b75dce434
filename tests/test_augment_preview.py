"""`densepred preview`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from densepred import config as configuration
from densepred.augment.preview import preview
from densepred.augment.volume import Augmenter
from densepred.cli import app
from densepred.config import AugmentConfig, Config
from densepred.config.transforms import NAMES
from tests.test_augment import ALONE, recipe, sample


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(5):
        label = np.zeros((40, 40), np.uint8)
        label[10:30, 5 + number : 20] = 1
        Image.fromarray((label * 90 + rng.integers(0, 60, label.shape)).astype(np.uint8)).save(
            tmp_path / f"images/{number}.png"
        )
        Image.fromarray(label).save(tmp_path / f"labels/{number}.png")
    data = {
        "root": str(tmp_path),
        "images": "images/*.png",
        "labels": "labels/{id}.png",
        "classes": {0: "sky", 1: "$x"},
    }
    return Config(data=data, model={"dims": 2}, patch={"size": (32, 32)}, augment="microscopy")


def test_a_grid_of_cases_and_draws_with_captions(config):
    figure = preview(config, cases=3, draws=2)
    panels = figure.axes
    assert len(panels) == 9
    captions = [axes.get_xlabel() for axes in panels]
    assert captions[::3] == ["original"] * 3
    known = {name.replace("_", " ") for name in NAMES.values()} | {"unchanged"}
    said = {part for text in captions for part in text.replace("\n", " ").rstrip(",").split(", ")} - {"original"}
    assert said <= known
    assert len({axes.get_ylabel() for axes in panels[::3]}) == 3
    images = [axes.get_images()[0].get_array() for axes in panels]
    assert not np.array_equal(images[0], images[1])
    assert all(len(axes.collections) for axes in panels), "outlines"


def test_the_command_writes_a_picture(config, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(configuration.dump(config))
    out = tmp_path / "new" / "picture.png"
    done = CliRunner().invoke(app, ["preview", str(path), "augment=light", "--out", str(out), "--cases", "2"])
    assert done.exit_code == 0, done.output
    assert str(out) in done.output
    assert Image.open(out).size[0] > 800
    assert not list(tmp_path.glob("new/*.part"))


@pytest.mark.parametrize("name", [*ALONE, "cutmix", "mixup"])
def test_what_is_said_to_happen_happens(name):
    image, label = sample(2, 12)
    settings = {"probability": 0.5}
    augment = Augmenter(AugmentConfig.model_validate([{name: settings}]), 3)
    out, _ = augment(image, label, range(12))
    said = [augment.happened(seed, image) == [name.replace("_", " ")] for seed in range(12)]
    changed = [not np.array_equal(a, b) for a, b in zip(out, image, strict=True)]
    assert said == changed
    assert 0 < sum(changed) < 12 or name == "flip"
    assert augment.happened(1, image) == augment.happened(1, image)
    assert Augmenter(recipe("noise"), 3).happened(0, image) == ["noise"]
