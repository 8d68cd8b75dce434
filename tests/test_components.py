"""Only the largest components are kept: against a plain reading of the rule, and in every way a prediction is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.special import softmax

from densepred import load, open_volume
from densepred.cases.plan import Plan
from densepred.errors import InputError
from densepred.inference.batch import predict
from densepred.inference.components import KeepLargest, keep_largest
from densepred.inference.engines.local import Local
from tests.untrained_runs import noise, run_of

CLASSES = {0: "sky", 2: "star", 7: "trail"}


def by_hand(labels: np.ndarray, values: list[int]) -> np.ndarray:
    """Every component in turn, over the whole array."""
    found, count = ndimage.label(np.isin(labels, values), np.ones((3,) * labels.ndim))
    sizes = [(found == number).sum() for number in range(1, count + 1)]
    out = labels.copy()
    for number in range(1, count + 1):
        if number != 1 + int(np.argmax(sizes)):
            out[found == number] = 0
    return out


@pytest.mark.parametrize("shape", [(40, 33), (12, 20, 17)])
@pytest.mark.parametrize("values", [[2, 7], [2], [7]])
def test_against_every_component_in_turn(shape: tuple[int, ...], values: list[int]) -> None:
    generator = np.random.default_rng(len(shape))
    smooth = ndimage.gaussian_filter(generator.normal(size=shape), 1.5)
    labels = np.zeros(shape, np.uint8)
    labels[smooth > 0.1], labels[smooth < -0.12] = 2, 7
    expected, before = by_hand(labels, values), labels.copy()
    changed = keep_largest(labels, values, 0)
    np.testing.assert_array_equal(labels, expected)
    assert changed == (expected != before).sum() > 0
    assert keep_largest(labels, values, 0) == 0  # nothing is left to do


def test_corners_connect_and_the_first_of_equals_stays() -> None:
    labels = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]], np.uint8)
    assert keep_largest(labels, [1], 0) == 2
    assert labels.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert keep_largest(np.zeros((3, 3), np.uint8), [1], 0) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("components"), ".nii.gz", CLASSES)


KEEP = "inference.keep_largest=['*', star]"


def expected_of(run: Path, image: np.ndarray) -> np.ndarray:
    labels = load(run).predict(image).numpy()[0]
    return by_hand(by_hand(labels, [2, 7]), [2])


def test_predictions_in_memory_and_in_files(run: Path, tmp_path: Path) -> None:
    images = sorted((run.parent / "set").glob("c?.nii.gz"))
    expected = {}
    for path in images:
        with open_volume(path) as volume:
            expected[path.name] = expected_of(run, volume.numpy()[0])
            raw = load(run).predict(volume).numpy()[0]
        assert (raw != expected[path.name]).any()
    overrides = [KEEP, "inference.outputs=[labels, entropy]"]
    predictor = load(run, [KEEP])
    for name, engine in (("one", None), ("two", Local(["cpu", "cpu"]))):
        assert predict(run, images, tmp_path / name, overrides, engine=engine).exit_code == 0
        for path in images:
            with open_volume(tmp_path / name / path.name) as found:
                np.testing.assert_array_equal(found.numpy()[0], expected[path.name])
            assert (tmp_path / name / path.name).read_bytes() == (tmp_path / "one" / path.name).read_bytes()
            np.testing.assert_array_equal(predictor.predict(path).numpy()[0], expected[path.name])
    many = predictor.predict_many([noise(0), noise(1)])
    for volume, seed in zip(many, (0, 1), strict=True):
        np.testing.assert_array_equal(volume["labels"].numpy()[0], expected_of(run, noise(seed)))
    assert (tmp_path / "one" / "entropy" / images[0].name).exists()


def test_ranges_of_one_image_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """Several workers share a large volume, cut into planes."""
    import nibabel

    drawn = np.random.default_rng(3).normal(size=(40, 24, 24)).astype(np.float32)
    path = tmp_path / "large.nii.gz"
    nibabel.save(nibabel.Nifti1Image(drawn.T, np.eye(4)), path)
    overrides = [KEEP, "inference.slices=0"]
    for name, devices in (("one", ["cpu"]), ("three", ["cpu"] * 3)):
        assert predict(run, [path], tmp_path / name, overrides, engine=Local(devices)).exit_code == 0
    assert (tmp_path / "one" / path.name).read_bytes() == (tmp_path / "three" / path.name).read_bytes()
    with open_volume(tmp_path / "one" / path.name) as found:
        labels = found.numpy()[0]
    raw = load(run, ["inference.slices=0"]).predict(path).numpy()[0]
    np.testing.assert_array_equal(labels, by_hand(by_hand(raw, [2, 7]), [2]))


def test_what_was_predicted_before_these_settings_is_done(run: Path) -> None:
    plain = load(run)
    assert load(run, ["inference.temperature=1", "inference.keep_largest=[]"]).config_hash == plain.config_hash
    assert load(run, [KEEP]).config_hash != plain.config_hash
    assert load(run, ["inference.temperature=1.5"]).config_hash != plain.config_hash


def test_the_invalid_value_is_no_component(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    plan = json.loads((copied / "plan.json").read_text())
    (copied / "plan.json").write_text(json.dumps(plan | {"ignore": [9]}))
    image = noise(0)
    image[:12] = np.nan
    overrides = [KEEP, "data.validity.least=0.1"]
    found = load(copied, overrides).predict(image).numpy()[0]
    raw = load(copied, overrides[1:]).predict(image).numpy()[0]
    assert (raw[:12] == 9).all()
    np.testing.assert_array_equal(found, by_hand(by_hand(raw, [2, 7]), [2]))


def test_unknown_classes_and_cutouts_are_refused(run: Path) -> None:
    with pytest.raises(InputError, match="'planet' is no class"):
        load(run, ["inference.keep_largest=[planet]"])
    with pytest.raises(InputError, match="'sky' is no class"):
        KeepLargest.of(Plan.load(run / "plan.json"), ["sky"])
    with pytest.raises(InputError, match="cut-out need not be"):
        load(run, [KEEP, "inference.cutout='0:8,0:8'"])


def test_temperature_cools_probabilities_and_entropy_and_no_labels(run: Path) -> None:
    from scipy.special import softmax

    image = noise(3, 30)
    kinds = ["labels", "logits", "probabilities", "entropy"]
    plain, cool = (load(run, text).predict(image, outputs=kinds) for text in ([], ["inference.temperature=2.5"]))
    np.testing.assert_array_equal(plain["labels"].numpy(), cool["labels"].numpy())
    np.testing.assert_array_equal(plain["logits"].numpy(), cool["logits"].numpy())
    shares = softmax(plain["logits"].numpy().astype(np.float64) / 2.5, axis=0)
    np.testing.assert_allclose(cool["probabilities"].numpy(), shares, atol=1e-6)
    np.testing.assert_allclose(cool["entropy"].numpy()[0], -(shares * np.log(shares)).sum(0), atol=1e-5)
    blocks = load(run, ["inference.temperature=2.5", "inference.bin=2"]).predict(image, outputs="probabilities")
    expected = shares.reshape(len(shares), 15, 2, 15, 2).mean((2, 4))
    np.testing.assert_allclose(blocks.numpy(), expected, atol=1e-6)
    (many,) = load(run, ["inference.temperature=2.5"]).predict_many([noise(3, 12)], ["probabilities"])
    small = load(run).predict(noise(3, 12), outputs="logits").numpy()
    np.testing.assert_allclose(many["probabilities"].numpy(), softmax(small / 2.5, axis=0), atol=1e-5)


def test_the_variance_is_that_of_the_cooled_probabilities(run: Path) -> None:
    image, plain = noise(3, 12), load(run)
    views = plain.predict(image, outputs="logits"), plain.predict(image[::-1].copy(), outputs="logits")
    shares = [softmax(one / 3, axis=0) for one in (views[0].numpy(), views[1].numpy()[:, ::-1])]
    cool = load(run, ["inference.mirror=[0]", "inference.temperature=3"])
    found = cool.predict(image, outputs="variance").numpy()[0]
    np.testing.assert_allclose(found, np.var(shares, axis=0).mean(0), rtol=1e-3, atol=1e-7)
    assert found.max() > 1e-4
