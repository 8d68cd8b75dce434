"""As a new user would: from a folder as it is to scores, by `plan`, `train`, `predict` and `evaluate` alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import densepred as dp
from densepred import config as configuration
from densepred.cli import app
from densepred.errors import InputError
from densepred.evaluation import evaluate
from densepred.inference.batch import predict
from densepred.planning import trial
from densepred.planning.planner import Wish, plan
from densepred.planning.trial import Trial
from tests.case_files import save, save_json

SPACING = (2.0, 1.0, 1.0)
FAST = ("training.epochs=2", "training.steps=3", "training.validate_every=2", "training.tensorboard=false")


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright box (1) with a dark one beside it (2) in noise, `(Z, Y, X)`."""
    generator = np.random.default_rng(seed)
    label = np.zeros((8, 14, 13 + seed % 3), np.uint8)
    z, y, x = (int(generator.integers(1, n)) for n in (3, 4, 4))
    label[z : z + 4, y : y + 6, x : x + 4] = 1
    label[z : z + 4, y : y + 6, x + 4 : x + 8] = 2
    image = 1000 + 200 * (label == 1) - 200 * (label == 2) + generator.normal(0, 30, label.shape)
    return image.astype(np.int16), label


def nnunet(root: Path) -> Path:
    """nnU-Net's layout."""
    for number in range(6):
        image, label = case(number)
        save(root / f"imagesTr/c{number}_0000.nii.gz", image, SPACING)
        save(root / f"labelsTr/c{number}.nii.gz", label, SPACING)
    labels = {"background": 0, "bright": 1, "dark": 2}
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 6, "file_ending": ".nii.gz"}
    save_json(root, content)
    return root


def loose(root: Path) -> Path:
    """Images beside their labels."""
    for number in range(6):
        image, label = case(number)
        save(root / f"c{number}.nii.gz", image, SPACING)
        save(root / f"c{number}_seg.nii.gz", label, SPACING)
    return root


def road(recipe: Path, images: Path, labels: Path | str, tmp_path: Path) -> None:
    """Train two short epochs, predict and evaluate."""
    dp.train(recipe, tmp_path / "run", FAST)
    result = predict(tmp_path / "run", [images], tmp_path / "out")
    assert sorted(result.done) == [f"c{number}" for number in range(6)]
    evaluate(tmp_path / "out", labels, tmp_path / "scores")
    assert len((tmp_path / "scores/scores.csv").read_text().splitlines()) >= 6


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started for trials."""
    monkeypatch.setattr(trial, "run", lambda *_: Trial(0.1, 3 * 10**8, 5 * 10**8, 1e-7, 5.0, "cpu"))


def test_from_nnunets_layout_to_scores(tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch):
    """With a real trial, in its process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = nnunet(tmp_path / "set")
    before = sorted(path.name for path in root.rglob("*"))
    made = plan(root, tmp_path / "plan/recipe.yaml")
    assert (made.chosen.name, made.fingerprint.names) == ("3d_fullres", ("background", "bright", "dark"))
    assert made.config == configuration.load(made.path)
    assert made.cost.step > 0
    assert 1e8 < made.cost.memory < 4e9
    voxels = sum(case(number)[0].size for number in range(6))
    assert 1 < made.cost.disk / voxels < 50
    fingerprint = json.loads((tmp_path / "plan/fingerprint.json").read_text())
    assert (fingerprint["cases"], fingerprint["median_spacing"]) == (6, list(SPACING))
    road(made.path, root / "imagesTr", root / "labelsTr", tmp_path)
    assert before == sorted(path.name for path in root.rglob("*"))


def test_an_image_without_a_label_does_not_stop_planning(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
):
    """With a real trial."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = nnunet(tmp_path / "set")
    (root / "labelsTr/c3.nii.gz").unlink()
    made = plan(root, tmp_path / "plan/recipe.yaml")
    assert [fault.case for fault in made.fingerprint.faults if fault.severity == "error"] == ["c3"]
    assert made.path.is_file()


def test_a_csv_without_classes_gets_them(canned: None, tmp_path: Path):
    root = loose(tmp_path / "set")
    rows = [f"c{number},c{number}.nii.gz,c{number}_seg.nii.gz" for number in range(6)]
    (root / "cases.csv").write_text("\n".join(["id,image,label", *rows]))
    (tmp_path / "data.yaml").write_text(f"data: {{root: '{root}', dataset: cases.csv}}\n")
    made = plan(tmp_path / "data.yaml", tmp_path / "recipe.yaml")
    assert made.config.data.classes == {0: "background", 1: "class_1", 2: "class_2"}


def test_from_loose_files_to_scores(canned: None, tmp_path: Path, one_thread: None):
    root = loose(tmp_path / "set")
    made = plan(root, tmp_path / "recipe.yaml", Wish(rules="nnunet"))
    assert made.config.data.classes == {0: "background", 1: "class_1", 2: "class_2"}
    road(made.path, root, f"{root}/{{id}}_seg.nii.gz", tmp_path)


def test_what_the_command_says(canned: None, tmp_path: Path):
    root, recipe = loose(tmp_path / "set"), tmp_path / "recipe.yaml"
    broken = root / "c3.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    done = CliRunner().invoke(app, ["plan", str(root), "--out", str(recipe), "--budget", "1h", "--memory", "2GB"])
    assert done.exit_code == 3
    assert "ERROR c3: " in done.stderr
    assert str(broken) in done.stderr
    for said in ("median shape", "8 x 14 x 14", "class class_2", "memory", "disk", "a step", "all", str(recipe)):
        assert said in done.stdout
    assert "from 5 cases (1 faults" in recipe.read_text()
    assert configuration.load(recipe).training.budget == "3600s"


@pytest.mark.parametrize(
    ("wrong", "said"), [(("--memory", "much"), "much"), (("--budget", "soon"), "soon"), ((), "nowhere.yaml")]
)
def test_mistakes_on_the_command_line(wrong: tuple[str, ...], said: str, tmp_path: Path):
    source = tmp_path / ("set" if wrong else "nowhere.yaml")
    done = CliRunner().invoke(app, ["plan", str(source), "--out", str(tmp_path / "recipe.yaml"), *wrong])
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
