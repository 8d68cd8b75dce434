"""`evaluate` of maps of numbers and of probabilities: from files to tables and pictures."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from scipy.stats import pearsonr
from typer.testing import CliRunner

from densepred.cli import app
from densepred.errors import InputError, UnsafeError
from densepred.evaluation import draw_curves, draw_spectra, evaluate_values
from densepred.figures import color_of
from densepred.metrics import Calibration, Ranking, Spectra
from densepred.volumes import Volume

SHAPE = (5, 12, 9)
NOISES = (("clean", 0.2), ("noisy", 1.0))


def save(folder: Path, case: str, array: np.ndarray) -> None:
    """Write (C, Z, Y, X)."""
    folder.mkdir(parents=True, exist_ok=True)
    Volume.from_array(array, spacing=(1.0, 1.0, 1.0)).save(folder / f"{case}.nii.gz")


@pytest.fixture
def maps(tmp_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Truths with holes, and predictions, by case."""
    rng = np.random.default_rng(0)
    pairs = {}
    for case in "abc":
        truth = rng.normal(3, 1, (1, *SHAPE)).astype(np.float32)
        prediction = (0.8 * truth + rng.normal(0, 0.3, truth.shape)).astype(np.float32)
        truth[rng.random(truth.shape) < 0.1] = np.nan
        save(tmp_path / "truth", case, truth)
        save(tmp_path / "maps", case, prediction)
        pairs[case] = truth, prediction
    return pairs


def test_errors_of_maps(maps: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path):
    names = ["mse", "mae", "pearson", "bias"]
    scores = evaluate_values(tmp_path / "maps", tmp_path / "truth", names, tmp_path / "out")
    rows = {row["case"]: row for row in scores.cases}
    known = {case: np.isfinite(truth) for case, (truth, _) in maps.items()}
    for case, (truth, prediction) in maps.items():
        error = (prediction - truth)[known[case]]
        assert rows[case]["mse"] == pytest.approx((error**2).mean(), rel=1e-5)
        assert rows[case]["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
        expected = pearsonr(truth[known[case]], prediction[known[case]]).statistic
        assert rows[case]["pearson"] == pytest.approx(expected, rel=1e-5)
    every = np.concatenate([(prediction - truth)[known[case]] for case, (truth, prediction) in maps.items()])
    summary = scores.summary["value"]["mse"]
    assert summary["pooled"] == pytest.approx((every**2).mean(), rel=1e-5)
    assert summary["mean"] == pytest.approx(np.mean([row["mse"] for row in scores.cases]))
    assert summary["low"] <= summary["mean"] <= summary["high"]
    stored = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert stored["summary"]["value"]["bias"]["pooled"] == pytest.approx(every.mean(), rel=1e-4)
    assert draw_curves(scores, tmp_path / "out") == []


@pytest.fixture
def probabilities(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of two cases, (2, 3, ...) probabilities and labels 0, 4, 7 with some of 9, which is not known, and 5 (as 4)."""
    rng = np.random.default_rng(1)
    labels = rng.choice([0, 4, 5, 7, 9], (2, *SHAPE), p=[0.5, 0.15, 0.1, 0.15, 0.1]).astype(np.uint8)
    index = np.select([labels == 0, (labels == 4) | (labels == 5), labels == 7], [0, 1, 2], rng.integers(0, 3))
    logits = rng.normal(size=(2, 3, *SHAPE)) + 1.5 * (np.arange(3)[None, :, None, None, None] == index[:, None])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for case, number in zip("ab", range(2), strict=True):
        save(tmp_path / "out" / "probabilities", case, shares[number].astype(np.float32))
        save(tmp_path / "labels", case, labels[number][None])
    meaning = {"classes": {"0": "back", "4": "a", "7": "b"}, "merged": {"5": 4}, "ignore": [9]}
    (tmp_path / "out" / "labels.json").write_text(json.dumps(meaning))
    return shares.astype(np.float32), np.where(labels == 9, -1, index)


def test_probabilities(probabilities: tuple[np.ndarray, np.ndarray], tmp_path: Path):
    shares, index = probabilities
    names = ["auc", "average_precision", "tpr@0.1", "ece", "brier"]
    scores = evaluate_values(tmp_path / "out" / "probabilities", tmp_path / "labels", names, tmp_path / "s")
    rows = {(row["case"], row["of"]): row for row in scores.cases}
    assert set(rows) == {(case, name) for case in "ab" for name in ("all classes", "a", "b")}
    for number, case in enumerate("ab"):
        truth = Calibration.of(shares[number], index[number])
        assert rows[case, "all classes"]["ece"] == pytest.approx(truth.error)
        assert rows[case, "all classes"]["brier"] == pytest.approx(truth.brier)
        assert math.isnan(rows[case, "all classes"]["auc"])
        for channel, name in ((1, "a"), (2, "b")):
            inside = np.where(index[number] < 0, -1, index[number] == channel)
            exact = Ranking.of(shares[number, channel], inside)
            assert rows[case, name]["auc"] == pytest.approx(exact.auc, abs=scores.sums[case][name].auc_error)
            assert rows[case, name]["average_precision"] == pytest.approx(exact.average_precision, abs=0.01)
            assert rows[case, name]["tpr@0.1"] == pytest.approx(exact.tpr_at(0.1), abs=0.02)
    stored = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert 0 < stored["auc_error"]["a"] < 1e-3
    with open(tmp_path / "s" / "curves.csv", newline="") as file:
        curve = [row for row in csv.DictReader(file) if row["of"] == "a"]
    false, true = (np.array([float(row[key]) for row in curve]) for key in ("fpr", "tpr"))
    assert np.trapezoid(true, false) == pytest.approx(scores.summary["a"]["auc"]["pooled"])
    (picture,) = draw_curves(scores, tmp_path / "s")
    assert imread(picture).std() > 0.05


def test_confident_probabilities_keep_their_curves(tmp_path: Path):
    """Nearly all lie within 1e-3 of 0 or 1, where equal bins of probability would join them."""
    rng = np.random.default_rng(2)
    labels = (rng.random((1, 40, 40, 40)) < 0.1).astype(np.uint8)
    logits = rng.normal(12.0 * labels[0] - 9, 4)
    shares = np.stack([1 / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits))]).astype(np.float32)
    save(tmp_path / "p", "a", shares)
    save(tmp_path / "l", "a", labels)
    scores = evaluate_values(tmp_path / "p", tmp_path / "l", ["auc", "tpr@0.05"], tmp_path / "s")
    exact = Ranking.of(shares[1], labels[0])
    found = scores.pooled["1"]
    assert isinstance(found, Ranking)
    assert abs(found.auc - exact.auc) <= found.auc_error < 2e-4 < Ranking.of(shares[1], labels[0], 4096).auc_error
    assert scores.cases[1]["tpr@0.05"] == pytest.approx(exact.tpr_at(0.05), abs=2e-3)
    with open(tmp_path / "s" / "curves.csv", newline="") as file:
        curve = [
            {key: float(value or "nan") for key, value in row.items() if key != "of"} for row in csv.DictReader(file)
        ]
    assert [row["threshold"] for row in (curve[0], curve[-1])] == [math.inf, 0]
    for row in curve[100:4000:300]:
        called = shares[1] >= row["threshold"]
        assert called[labels[0] == 1].mean() == pytest.approx(row["tpr"], abs=2e-3)
        assert called[labels[0] == 0].mean() == pytest.approx(row["fpr"], abs=2e-3)
        assert labels[0][called].mean() == pytest.approx(row["precision"], abs=5e-3)


def test_spectra_are_drawn(tmp_path: Path):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(64, 64))
    spectra = {name: Spectra.of(truth, truth + rng.normal(0, noise, truth.shape), 1e-3) for name, noise in NOISES}
    for count in (1, 2):
        draw_spectra(dict(list(spectra.items())[:count]), tmp_path / f"{count}.png")
    one, two = (imread(tmp_path / f"{count}.png")[..., :3] for count in (1, 2))
    drawn = [(np.abs(one - to_rgb(color_of(index))).max(-1) < 0.02).sum() for index in (0, 1)]
    assert drawn[0] > 500
    assert drawn[1] == 0
    assert (np.abs(two - to_rgb(color_of(1))).max(-1) < 0.02).sum() > 500


def test_from_the_command_line(maps: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path):
    save(tmp_path / "maps", "c", np.zeros((2, *SHAPE), np.float32))
    words = ["evaluate", str(tmp_path / "maps"), str(tmp_path / "truth"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--metrics", "mse,pearson"])
    assert result.exit_code == 3
    assert "2 cases scored; 1 failed" in result.output
    with open(tmp_path / "out" / "failures.tsv", newline="") as file:
        (failure,) = csv.DictReader(file, delimiter="\t")
    assert failure["what"] == "the prediction has 2 channels, its truth 1"


def test_faults_are_named(probabilities: tuple[np.ndarray, np.ndarray], tmp_path: Path):
    places = tmp_path / "out" / "probabilities", tmp_path / "labels"
    for metrics, words in (
        (["mse", "auc"], "metrics of numbers and of probabilities do not go together"),
        (["mse", "hd95"], "metrics of labels and of numbers do not go together"),
        (["hd95"], "no metrics of numbers or probabilities: hd95"),
        (["tpr@2"], "a false positive rate lies within 0..1"),
        (["tpr@x"], "could not convert"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate_values(*places, metrics)
    (tmp_path / "out" / "labels.json").write_text('{"classes": {"0": "back", "4": "a", "7": "b"}}')
    scores = evaluate_values(*places, ["auc"])
    assert scores.failures[0].what == "values that are no classes of the prediction: [5, 9]"
    (tmp_path / "out" / "labels.json").write_text('{"classes": {"0": "back", "4": "a"}}')
    assert "3 channels, but labels.json" in evaluate_values(*places, ["auc"]).failures[0].what
    logits = {"a": tmp_path / "logits" / "a.nii.gz"}
    save(tmp_path / "logits", "a", np.full((3, *SHAPE), 2.0, np.float32))
    scores = evaluate_values(logits, {"a": tmp_path / "labels" / "a.nii.gz"}, ["ece"])
    assert scores.exit_code == 4


def test_a_map_of_numbers_that_failed_is_not_scored(tmp_path: Path):
    """It is left of an earlier run; and what has no partner is told."""
    ones = np.ones((1, *SHAPE), np.float32)
    for case in "abc":
        save(tmp_path / "truth", case, ones)
        save(tmp_path / "out" / "regression", case.replace("c", "d"), ones)
    (tmp_path / "out" / "manifest.jsonl").write_text("")
    (tmp_path / "out" / "failures.tsv").write_text("case\tfile\twhat\tfix\na\tx\tdamaged\tcopy\n")
    scores = evaluate_values(tmp_path / "out" / "regression", tmp_path / "truth", ["mse"])
    assert (list(scores.sums), [one.case for one in scores.failures], scores.exit_code) == (["b"], ["a"], 3)
    assert (scores.unlabelled, scores.unpredicted) == (["d"], ["c"])
    for case in "abc":  # another method, whose maps lie beside, has not failed
        save(tmp_path / "out" / "wiener", case, ones)
    assert evaluate_values(tmp_path / "out" / "wiener", tmp_path / "truth", ["mse"]).exit_code == 0
    with pytest.raises(UnsafeError, match="would pass for that of the predictions"):
        evaluate_values(tmp_path / "out" / "regression", tmp_path / "truth", ["mse"], tmp_path / "out")
