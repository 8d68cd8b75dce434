"""Every recipe we ship trains one step, on data of its own kind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from PIL import Image

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


def mass_maps(root: Path) -> list[str]:
    generate("mass_maps.py", root, "--n", 32, "--train", 6, "--val", 0, "--test", 0)
    return [f"data.root={root / 'train'}", "data.folds=3", "patch.size=[32,32]"]


def digits(root: Path) -> list[str]:
    """Squares and bars in place of the digits, which scikit-learn has."""
    rng, rows = np.random.default_rng(0), ["id,image,digit"]
    for number in range(8):
        image = rng.integers(0, 30, (8, 8)).astype(np.uint8)
        image[1:7, 2:6] += 200 * (number % 2)
        Image.fromarray(image).save(root / f"d{number}.png")
        rows.append(f"d{number},d{number}.png,{number % 2}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return [f"data.root={root}", "data.fold=0", "data.folds=4"]


def nuclei(root: Path) -> list[str]:
    """Discs numbered one by one, in two kinds of images."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for number in range(6):
        label = np.zeros((64, 72), np.uint16)
        rows, columns = np.indices(label.shape)
        for which, (y, x) in enumerate(rng.uniform(8, 56, (5, 2)), start=1):
            label[(rows - y) ** 2 + (columns - x) ** 2 < 30] = which
        dark = number % 2 == 0
        grey = np.where(label > 0, 200 if dark else 90, 20 if dark else 220) + rng.integers(0, 20, label.shape)
        image = np.stack([grey, grey, grey, np.full_like(grey, 255)], -1).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"n{number}.png")
        Image.fromarray(label).save(root / "labels" / f"n{number}.png")
    generate("nuclei_kinds.py", root)
    kinds = (root / "kinds.csv").read_text().split()
    assert [row.split(",")[1] for row in kinds[1:]] == ["fluorescence", "stained"] * 3
    return [f"data.root={root}", "data.folds=3", "patch.size=[64,64]"]


NARROW = {
    "fcn8s_vgg16": ["model.width=8", "model.fc_channels=32"],
    "deconvnet_vgg16": ["model.width=8", "model.fc_channels=32"],
    "unet_resnet34_nuclei": ["model.width=8", "model.decoder_channels=null"],
    "unet_convnext_nuclei": ["model.width=12", "model.decoder_channels=null"],
    "unet3d": ["model.channels=[8,16,32]", "model.deep_supervision=1"],
    "massmap_unet2d": ["model.channels=[8,16,32]"],
    "unet2d": ["model.channels=[8,16,32]"],
    "nuclei_joint": ["model.channels=[8,16,32]"],
}
"""Recipe -> what makes it quick."""
OWN_DATA: dict[str, Callable[[Path], list[str]]] = {
    "cosmic_rays_unet2d": cosmic_rays,
    "fits_sources_unet2d": survey,
    "massmap_unet2d": mass_maps,
    "digits_lenet5": digits,
    **dict.fromkeys(("unet2d", "fcn8s_vgg16", "deconvnet_vgg16", "nuclei_joint"), nuclei),
    **dict.fromkeys(("unet_resnet34_nuclei", "unet_convnext_nuclei"), nuclei),
}
"""Recipe -> what makes its data; the others take the synthetic volumes."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_trains_one_step(path: Path, dataset: Path, tmp_path: Path):
    maker = OWN_DATA.get(path.stem)
    data = [f"data.root={dataset}", *SYNTHETIC] if maker is None else maker(tmp_path)
    short = ["training.epochs=1", "training.steps=1", "patch.batch=1", *NARROW.get(path.stem, [])]
    run = train(configuration.load(path, [*data, *short]), tmp_path / "run")
    assert len(run.rows) == 1
    assert 0 < run.rows[0]["loss"] < 10
    scores = [run.rows[0].get(name) for name in ("dice_mean", "accuracy_digit", "accuracy_kind")]
    assert all(0 <= score <= 1 for score in scores if score is not None)
    assert any(score is not None for score in scores) or np.isfinite(run.rows[0]["mse_kappa"])


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
