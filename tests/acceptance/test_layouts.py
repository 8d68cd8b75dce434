"""Sets as they come: nnU-Net's names, several files a case, odd label values; used without renaming anything."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import densepred as dp
from densepred import config as configuration
from densepred.config import Config
from densepred.evaluation import evaluate
from densepred.inference.batch import predict
from densepred.training.loop import train

PLAIN = '{images: "images/*.nii.gz", labels: "labels/{id}.nii.gz", classes: {0: background, 1: box}}'
SHORT = """
model: {channels: [4, 8]}
patch: {size: [8, 16, 16], batch: 2}
optimizer: {name: adamw, lr: 0.01, ema: 0.9}
training: {epochs: 1, steps: 60, tensorboard: false}
"""


def cases(count: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """Volumes (Z, Y, X) of a bright box in noise, and where the box is (1), on thick slices."""
    made = []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        label = np.zeros((9, 20, 18), np.int16)
        z, y, x = (int(generator.integers(0, n)) for n in (4, 10, 8))
        label[z : z + 5, y : y + 10, x : x + 10] = 1
        made.append((label * 2 + generator.normal(0, 0.5, label.shape).astype(np.float32), label))
    return made


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.T, np.diag([1.0, 1.0, 4.0, 1.0])), path)


def recipe(root: Path, data: str) -> Config:
    path = root / "recipe.yaml"
    path.write_text(f"data: {data}\n{SHORT}")
    return configuration.load(path, [f"data.root={root}", "data.folds=3"])


def test_nnunet_names_with_two_channels(tmp_path: Path):
    for number, (image, label) in enumerate(cases()):
        save(tmp_path / "imagesTr" / f"c{number}_0000.nii.gz", image)
        save(tmp_path / "imagesTr" / f"c{number}_0001.nii.gz", -image)
        save(tmp_path / "labelsTr" / f"c{number}.nii.gz", label)
    content = {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "box": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"numTraining": 6}))
    train(recipe(tmp_path, "{dataset: dataset.json}"), tmp_path / "run")
    result = predict(tmp_path / "run", [tmp_path / "imagesTr"], tmp_path / "out")
    assert sorted(result.done) == [f"c{n}" for n in range(6)]
    scores = evaluate(tmp_path / "out", tmp_path / "labelsTr")
    assert len(scores.results) == 6
    assert scores.mean["box"]["dice"] > 0.8


def test_a_folder_a_case_and_labels_named_otherwise(tmp_path: Path):
    for number, (image, label) in enumerate(cases()):
        save(tmp_path / "sub" / f"s{number}" / "t1.nii.gz", image)
        save(tmp_path / "truth" / f"seg_s{number}.nii.gz", label)
    data = '{images: "sub/{id}/t1.nii.gz", labels: "truth/seg_{id}.nii.gz", classes: {0: background, 1: box}}'
    train(recipe(tmp_path, data), tmp_path / "run")
    assert len(predict(tmp_path / "run", [tmp_path], tmp_path / "out").done) == 6
    scores = evaluate(tmp_path / "out", str(tmp_path / "truth" / "seg_{id}.nii.gz"))
    assert len(scores.results) == 6
    assert scores.mean["box"]["dice"] > 0.8


def test_merged_and_ignored_label_values_are_scored_as_trained(tmp_path: Path):
    for number, (image, label) in enumerate(cases()):
        save(tmp_path / "images" / f"c{number}.nii.gz", image)
        odd = np.where(label == 1, 3, 0)
        odd[:, :, :9] = np.where(odd[:, :, :9] == 3, 7, 0)  # the left half of the box has another value
        odd[0] = 9  # nobody looked at the first slice
        save(tmp_path / "labels" / f"c{number}.nii.gz", odd.astype(np.int16))
    data = PLAIN.replace("{0: background, 1: box}", "{0: background, 3: box, 7: box}, ignore: [9]")
    train(recipe(tmp_path, data), tmp_path / "run")
    predict(tmp_path / "run", [tmp_path / "images"], tmp_path / "out")
    scores = evaluate(tmp_path / "out", tmp_path / "labels")
    assert scores.classes == {0: "background", 3: "box"}
    assert scores.mean["box"]["dice"] > 0.8
    for (_, label), result in zip(cases(), scores.results, strict=True):
        assert result.confusion.sum() == label[1:].size
        assert result.confusion[1].sum() == label[1:].sum()


@pytest.mark.parametrize("spacing", ["median", (2.0, 1.0, 2.0)])
def test_a_resampled_model_labels_the_right_places(tmp_path: Path, spacing: str | tuple[float, ...]):
    for number, (image, label) in enumerate(cases()):
        save(tmp_path / "images" / f"c{number}.nii.gz", image)
        save(tmp_path / "labels" / f"c{number}.nii.gz", label)
    config = recipe(tmp_path, PLAIN)
    changed = config.data.model_copy(update={"spacing": spacing})
    train(config.model_copy(update={"data": changed}), tmp_path / "run")
    predictor = dp.load(tmp_path / "run")
    found = [predictor.predict(tmp_path / "images" / f"c{n}.nii.gz").numpy()[0] for n in range(6)]
    overlap = sum(int(((a == 1) & (b == 1)).sum()) for a, (_, b) in zip(found, cases(), strict=True))
    sizes = sum(int((a == 1).sum() + (b == 1).sum()) for a, (_, b) in zip(found, cases(), strict=True))
    assert 2 * overlap / sizes > 0.75


def test_two_dimensions(tmp_path: Path):
    for number, (image, label) in enumerate(cases()):
        save(tmp_path / "images" / f"c{number}.nii.gz", image[4])
        save(tmp_path / "labels" / f"c{number}.nii.gz", label[4].astype(np.int16))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {PLAIN}\n{SHORT}")
    config = configuration.load(
        path,
        [
            f"data.root={tmp_path}",
            "data.folds=3",
            "model.dims=2",
            "patch.size=[16, 16]",
            "augment.rotation.probability=1",
        ],
    )
    train(config, tmp_path / "run")
    assert len(predict(tmp_path / "run", [tmp_path / "images"], tmp_path / "out").done) == 6
    assert evaluate(tmp_path / "out", tmp_path / "labels").mean["box"]["dice"] > 0.75
