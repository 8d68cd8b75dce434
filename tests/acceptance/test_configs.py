"""Every recipe we ship trains one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from densepred import config as configuration
from densepred.training.loop import train
from tests.acceptance.helpers import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_trains_one_step(path: Path, dataset: Path, tmp_path: Path):
    data = [f"data.root={dataset}", "data.dataset=dataset.json", "data.splits=null", "data.folds=4", "data.images=null"]
    small = ["training.epochs=1", "training.steps=1", "patch.batch=1", "data.labels=null", "data.classes={}"]
    config = configuration.load(path, [*data, *small])
    run = train(config, tmp_path / "run")
    assert len(run.rows) == 1
    assert 0 < run.rows[0]["loss"] < 10
    assert 0 <= run.rows[0]["dice_mean"] <= 1


def test_there_are_recipes():
    assert RECIPES
