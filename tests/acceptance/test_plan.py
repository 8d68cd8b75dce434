"""As a new user would: from a folder as it is to scores, by `plan`, `train`, `predict` and `evaluate` alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from densepred import config as configuration
from tests.acceptance.helpers import densepred
from tests.case_files import save, save_json

SPACING = (2.0, 1.0, 1.0)


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright box (1) with a dark one beside it (2) in noise, `(Z, Y, X)`."""
    generator = np.random.default_rng(seed)
    label = np.zeros((12, 20, 18 + seed % 3), np.uint8)
    z, y, x = (int(generator.integers(1, n)) for n in (4, 5, 5))
    label[z : z + 5, y : y + 7, x : x + 5] = 1
    label[z : z + 5, y : y + 7, x + 5 : x + 10] = 2
    image = 1000 + 200 * (label == 1) - 200 * (label == 2) + generator.normal(0, 30, label.shape)
    return image.astype(np.int16), label


def nnunet(root: Path) -> str:
    """nnU-Net's layout; the pattern of its labels."""
    for number in range(6):
        image, label = case(number)
        save(root / f"imagesTr/c{number}_0000.nii.gz", image, SPACING)
        save(root / f"labelsTr/c{number}.nii.gz", label, SPACING)
    labels = {"background": 0, "bright": 1, "dark": 2}
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 6, "file_ending": ".nii.gz"}
    save_json(root, content)
    return "labelsTr/{id}.nii.gz"


def loose(root: Path) -> str:
    """Images beside their labels."""
    for number in range(6):
        image, label = case(number)
        save(root / f"c{number}.nii.gz", image, SPACING)
        save(root / f"c{number}_seg.nii.gz", label, SPACING)
    return "{id}_seg.nii.gz"


@pytest.mark.parametrize(("make", "rules"), [(nnunet, "densepred"), (loose, "nnunet")])
def test_from_a_folder_to_scores(make, rules: str, tmp_path: Path):
    root, recipe = tmp_path / "set", tmp_path / "plan/recipe.yaml"
    labels = make(root)
    before = sorted(path.name for path in root.rglob("*"))
    one = {"OMP_NUM_THREADS": "1"}
    made = densepred("plan", root, "--out", recipe, "--rules", rules, **one)
    assert made.returncode == 0, made.stderr
    for said in ("median shape", "a step", "memory", "disk", "all", str(recipe)):
        assert said in made.stdout
    fingerprint = json.loads((recipe.parent / "fingerprint.json").read_text())
    assert (fingerprint["cases"], fingerprint["median_spacing"]) == (6, list(SPACING))
    assert configuration.load(recipe).patch.size[1] >= 20
    fast = ("training.epochs=2", "training.steps=3", "training.validate_every=2", "training.tensorboard=false")
    trained = densepred("train", recipe, *fast, "--run", tmp_path / "run", **one)
    assert trained.returncode == 0, trained.stderr
    images = root / ("imagesTr" if make is nnunet else ".")
    predicted = densepred("predict", tmp_path / "run", images, "--out", tmp_path / "out", **one)
    assert predicted.returncode == 0, predicted.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"c{n}.nii.gz" for n in range(6)]
    judged = densepred("evaluate", tmp_path / "out", root / labels, "--out", tmp_path / "scores", **one)
    assert judged.returncode == 0, judged.stderr
    assert len((tmp_path / "scores/scores.csv").read_text().splitlines()) >= 6
    assert before == sorted(path.name for path in root.rglob("*"))


def test_a_faulty_case_is_named_and_the_recipe_is_made(tmp_path: Path):
    loose(tmp_path / "set")
    broken = tmp_path / "set/c3.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    made = densepred("plan", tmp_path / "set", "--out", tmp_path / "recipe.yaml", OMP_NUM_THREADS="1")
    assert made.returncode == 3
    assert "ERROR c3: " in made.stderr
    assert str(broken) in made.stderr
    assert "from 5 cases (1 faults" in (tmp_path / "recipe.yaml").read_text()
    again = densepred("plan", tmp_path / "set", "--out", tmp_path / "recipe.yaml")
    assert (again.returncode, "there already" in again.stderr) == (2, True)


def test_mistakes_on_the_command_line(tmp_path: Path):
    loose(tmp_path / "set")
    for wrong in (("--memory", "much"), ("--budget", "soon"), ("--rules", "auto3dseg")):
        done = densepred("plan", tmp_path / "set", "--out", tmp_path / "recipe.yaml", *wrong)
        assert done.returncode == 2
        assert wrong[1] in done.stderr
    done = densepred("plan", tmp_path / "nowhere.yaml", "--out", tmp_path / "recipe.yaml")
    assert (done.returncode, "nowhere.yaml" in done.stderr) == (2, True)
