"""Every recipe we ship trains one step, on data of its own kind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from densepred import config as configuration
from densepred.training.loop import train
from tests.acceptance.helpers import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SYNTHETIC = ["data.dataset=dataset.json", "data.splits=null", "data.folds=4"]


def generate(script: str, *arguments: object) -> None:
    """Run a generator of data/."""
    command = [sys.executable, ROOT / "data" / script, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def cosmic_rays(root: Path) -> list[str]:
    generate("cosmic_rays.py", root, "--train", 4, "--test", 0, "--size", 96)
    return [f"data.root={root / 'train'}", "data.folds=4"]


def survey(root: Path) -> list[str]:
    """Scenes of three cut-outs with a bright source each, one of them with pixels without weight."""
    rng = np.random.default_rng(0)
    for number in range(3):
        image = rng.normal(100, 5, (96, 96)).astype(np.float32)
        image[40:46, 50:56] += 200
        quality, weight = np.zeros((96, 96), np.int32), np.full((96, 96), 0.04, np.float32)
        if number == 0:
            quality[:, 10], weight[:, 10] = 1, 0
        for name, array in (("ooi", image), ("ood", quality), ("oow", weight)):
            hdus = fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(array, name="CCD1")])
            hdus.writeto(root / f"cam{number}_{name}_r.CCD1.fits")
    generate("survey_scenes.py", root, root / "scenes", "--scenes", 2)
    return [f"data.root={root / 'scenes'}", "data.folds=3"]


OWN_DATA: dict[str, Callable[[Path], list[str]]] = {"cosmic_rays_unet2d": cosmic_rays, "fits_sources_unet2d": survey}
"""Recipe -> what makes its data; the others take the synthetic volumes."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_trains_one_step(path: Path, dataset: Path, tmp_path: Path):
    maker = OWN_DATA.get(path.stem)
    data = [f"data.root={dataset}", *SYNTHETIC] if maker is None else maker(tmp_path)
    config = configuration.load(path, [*data, "training.epochs=1", "training.steps=1", "patch.batch=1"])
    run = train(config, tmp_path / "run")
    assert len(run.rows) == 1
    assert 0 < run.rows[0]["loss"] < 10
    assert 0 <= run.rows[0]["dice_mean"] <= 1


def test_implanted_artefacts_are_flagged_and_labelled(tmp_path: Path):
    survey(tmp_path)
    folder, found = tmp_path / "scenes", 0
    for path in sorted(folder.glob("*_ooi.fits")):
        planes = {n: fits.getdata(str(path).replace("_ooi", f"_{n}"), 1) for n in ("ooi", "ood", "oow", "labels")}
        source = fits.getdata(tmp_path / f"{path.name.split('_')[0]}_ooi_r.CCD1.fits", 1)
        artefact = planes["labels"] == 2
        assert np.array_equal(artefact, (planes["ood"] & 64) != 0)
        changed = np.abs(planes["ooi"] - source)
        assert changed[artefact].min() > 3 * 4.5  # three times the noise of 5, within its own error
        assert changed[~artefact].max() < 3 * 5.5
        assert (planes["labels"][41:45, 51:55] != 0).all()
        assert (planes["oow"] > 0).all() or (planes["ood"][planes["oow"] == 0] & 1).all()
        found += int(artefact.sum())
    assert found > 100
