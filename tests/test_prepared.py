"""Cases that are prepared plane by plane: what comes out, how much is held, and that prediction does the same."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from densepred.cases.cache import prepare
from densepred.cases.case import Case
from densepred.cases.plan import make_plan
from densepred.cases.preprocess import normalized, preprocess
from densepred.cases.regrid import kernels_for
from densepred.cases.resample import resample, resample_labels, resampled_shape
from densepred.config import Config, ModelConfig, PatchConfig
from densepred.errors import InputError
from densepred.inference.predictor import Predictor
from densepred.volumes import Volume
from tests.case_files import CLASSES, by_patterns, case_of, make_set, plan, save
from tests.test_resample_stream import predictor

SHAPE, SPACING = (11, 24, 20), (5.0, 0.8, 1.0)


def drawn(shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(100, 10, shape).astype(np.float32), generator.integers(0, 3, shape).astype(np.uint8)


def spaced(root: Path, spacing: tuple[float, ...] = SPACING) -> Case:
    image, label = drawn()
    return Case("a", (save(root / "a.nii", image, spacing),), save(root / "a_label.nii", label, spacing))


@pytest.mark.parametrize("resampling", ["linear", "cubic", "nnunet"])
@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (2.0, 2.0, 2.0), (5.0, 0.8, 1.0)])
def test_what_is_streamed_is_the_whole_resampled(
    tmp_path: Path, resampling: str, spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, (image, label) = spaced(tmp_path), drawn()
    settings = plan(spacing=spacing, resampling=resampling)
    seen = ((image - image.mean(dtype=np.float64)) / image.std(dtype=np.float64)).astype(np.float32)
    shape = resampled_shape(SHAPE, SPACING, spacing)
    monkeypatch.setattr("densepred.cases.preprocess.slab_thickness", lambda _: 2)
    found, classes = preprocess(case, settings)
    expected = resample(seen[np.newaxis], shape, kernels_for(resampling, SPACING, spacing))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    truth = resample_labels(label.astype(np.int16), shape, kernels_for(resampling, SPACING, spacing, labels=True))
    assert classes is not None
    assert np.array_equal(classes, truth)
    entry = prepare([case], settings, tmp_path / "cache")[0]
    assert np.array_equal(entry.image, found)
    assert np.array_equal(entry.label, classes)
    assert entry.spacing == spacing


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_are_resampled_along_their_own_axes(tmp_path: Path, axis: int) -> None:
    case, (_, label) = spaced(tmp_path), drawn()
    entry = prepare([case], plan(dims=2, slices=axis, spacing=(2.0, 2.0)), tmp_path / "cache")[0]
    target = tuple(own if number == axis else 2.0 for number, own in enumerate(SPACING))
    assert entry.shape[1:] == resampled_shape(SHAPE, SPACING, target)
    assert entry.spacing == pytest.approx(target)
    assert np.array_equal(entry.label, resample_labels(label.astype(np.int16), entry.shape[1:]))
    whole = prepare([case], plan(dims=2, slices="all"), tmp_path / "cache")[0]
    assert np.array_equal(whole.label, label)


def test_only_volumes_have_planes(tmp_path: Path) -> None:
    image, label = drawn((8, 9))
    with pytest.raises(InputError, match=r"ERROR flat: .*2 spatial axes, and patch.axis is for volumes"):
        prepare([case_of(tmp_path, image, label, "flat")], plan(dims=2, slices=0), tmp_path / "cache")
    with pytest.raises(InputError, match=r"ERROR a: .*3 spatial axes, the model has 2"):
        prepare([spaced(tmp_path)], plan(dims=2), tmp_path / "cache")


def test_a_plan_for_planes(tmp_path: Path) -> None:
    make_set(tmp_path, 2)
    case = spaced(tmp_path)
    for axis, expected in ((0, (0.8, 1.0)), (1, (5.0, 1.0)), (2, (5.0, 0.8)), ("all", None)):
        spacing = None if axis == "all" else "median"
        data = by_patterns(tmp_path, classes=CLASSES, spacing=spacing, resampling="cubic")
        patch = PatchConfig(size=(8, 8), axis=axis)  # type: ignore[arg-type]
        made = make_plan(Config(data=data, model=ModelConfig(dims=2), patch=patch), [case])
        assert (made.slices, made.resampling, made.spacing) == (axis, "cubic", made.typical_spacing)
        assert made.spacing == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("resampling", ["cubic", "nnunet"])
@pytest.mark.parametrize("own", [(3.0, 1.0, 1.0), (6.0, 1.3, 0.7)])
def test_prediction_resamples_as_training_does(resampling: str, own: tuple[float, ...]) -> None:
    image = drawn((14, 24, 20))[0][np.newaxis]
    plain = predictor(own, 8)
    model = Predictor(plain.model, plain.config, plain.plan.model_copy(update={"resampling": resampling}), "")
    found = torch.cat([part.logits for part in model.stream(Volume.from_array(image, SPACING))], 1).numpy()
    seen = normalized(Volume.from_array(image, SPACING), model.plan)[:, :]
    shape = resampled_shape(image.shape[1:], SPACING, own)
    moved = resample(seen, shape, kernels_for(resampling, SPACING, own))
    logits = model.inferer(model.model, torch.from_numpy(moved)).numpy()
    expected = resample(logits, image.shape[1:], kernels_for(resampling, SPACING, own, labels=True))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_what_is_held_does_not_grow_with_the_case(tmp_path: Path) -> None:
    """Arrays of numpy; what torch holds for resampling is bounded in test_resample_stream."""
    peaks = []
    for depth in (64, 192):
        image = np.random.default_rng(0).random((depth, 256, 256), np.float32)
        case = case_of(tmp_path, image, (image > 0.9).astype(np.uint8), f"of_{depth}")
        del image
        tracemalloc.start()
        entry = prepare([case], plan(spacing=(1.3, 0.8, 1.0)), tmp_path / "cache")[0]
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
        assert entry.shape[2:] == (320, 256)
    assert peaks[1] < 1.05 * peaks[0] + 1, peaks
