"""Kinds of output: from the network to arrays and to files of every format."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from astropy.io import fits

from densepred import Predictor, load
from densepred import config as configuration
from densepred.cases.plan import Plan
from densepred.config import Config, InferenceConfig, ModelConfig, PatchConfig
from densepred.config.normalize import NoNormalization
from densepred.errors import DensepredError, InputError
from densepred.inference.batch import predict
from densepred.inference.outputs import KINDS, Predicted, reduced
from densepred.models.build import create_model
from densepred.models.dense import Model
from densepred.models.heads import Regression, Segmentation
from densepred.volumes import Volume, open_volume
from tests.untrained_runs import run_of

CLASSES = {0: "sky", 3: "star", 200: "trail"}
AXES = {".fits": "cyx", ".nii.gz": "xyc"}
"""What tells a file's channels from its space, where the format does not."""
OF_CLASSES = ("labels", "probabilities", "logits", "entropy", "variance")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("kinds"), ".fits", CLASSES)


def scene(*shape: int) -> np.ndarray:
    image = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    image[2:4, 5:7] = np.nan
    return image


def predictor_of(model: Model, **inference: object) -> Predictor:
    settings = InferenceConfig.model_validate({"device": "cpu", "precision": "float32", "batch": 2} | inference)
    config = Config(model=ModelConfig(dims=2), patch=PatchConfig(size=(16, 16)), inference=settings)
    plan = Plan(
        dims=2,
        channels=("a",),
        classes=("background", "thing"),
        values=(0, 1),
        label_map={0: 0, 1: 1},
        normalize=(NoNormalization(),),
    )
    return Predictor(model, config, plan, "")


def test_all_kinds_follow_from_the_logits(run: Path) -> None:
    predictor = load(run, ["inference.mirror=[0, 1]"])
    image = scene(40, 37)
    found = predictor.predict(image, outputs=OF_CLASSES)
    assert list(found) == list(OF_CLASSES)
    invalid = np.isnan(image)
    logits = found["logits"].numpy()
    valid = logits[:, ~invalid].astype(np.float64)
    assert found["labels"].dtype == np.uint8
    assert np.array_equal(found["labels"].numpy()[0][~invalid], np.array(list(CLASSES))[valid.argmax(0)])
    assert (found["labels"].numpy()[0][invalid] == 0).all()
    shares = scipy.special.softmax(valid, axis=0)
    np.testing.assert_allclose(found["probabilities"].numpy()[:, ~invalid], shares, atol=1e-6)
    np.testing.assert_allclose(found["entropy"].numpy()[0][~invalid], scipy.stats.entropy(shares, axis=0), atol=1e-6)
    for kind in OF_CLASSES[1:]:
        values = found[kind].numpy()
        assert (values.dtype, values.shape) == (np.float32, (3 if KINDS[kind].wide else 1, 40, 37))
        assert np.array_equal(np.isnan(values), np.broadcast_to(invalid, values.shape))
    assert found["entropy"].unit == "nat"
    assert found["probabilities"].classes == {0: "sky", 1: "star", 2: "trail"}
    assert np.array_equal(predictor.predict(image).numpy(), found["labels"].numpy())
    alone = predictor.predict(image, outputs="entropy")
    np.testing.assert_allclose(alone.numpy(), found["entropy"].numpy(), atol=1e-6)


def test_the_variance_is_that_over_the_mirrored_views(run: Path) -> None:
    """One window holds the image: the views of the whole image are those of the window."""
    image = np.nan_to_num(scene(16, 16))
    both = load(run, ["inference.mirror=[1]", "inference.window=[16, 16]"])
    network = load(run).model
    normal = torch.from_numpy((image - image.mean(dtype=np.float64)) / image.std(dtype=np.float64)).float()[None, None]
    with torch.inference_mode():
        views = [network(normal), network(normal.flip(3)).flip(3)]
    shares = scipy.special.softmax(torch.stack(views)[:, 0].double().numpy(), axis=1)
    found = both.predict(image, outputs="variance").numpy()[0]
    np.testing.assert_allclose(found, shares.var(0).mean(0), rtol=1e-3, atol=1e-9)
    assert found.max() > 1e-6


def test_resampling_keeps_the_variance_apart(run: Path) -> None:
    predictor = load(run, ["inference.mirror=[1]"])
    predictor.plan = predictor.plan.model_copy(update={"spacing": (2.0, 2.0)})
    found = predictor.predict(scene(40, 37), outputs=["logits", "variance"])
    assert [volume.shape for volume in found.values()] == [(3, 40, 37), (1, 40, 37)]
    assert 0 <= np.nanmin(found["variance"].numpy()) <= np.nanmax(found["variance"].numpy()) < 0.25


@pytest.mark.parametrize("suffix", [".fits", ".nii.gz", ".zarr", ".tif", ".h5"])
def test_every_format_holds_every_kind(run: Path, tmp_path: Path, suffix: str) -> None:
    image = Volume.from_array(scene(40, 37), (1.0, 1.0))
    image.save(tmp_path / f"x{suffix}")
    overrides = [f"inference.outputs=[{', '.join(OF_CLASSES)}]", "inference.mirror=[0]"]
    result = predict(run, [tmp_path / f"x{suffix}"], tmp_path / "out", overrides)
    assert result.failed == {}
    expected = load(run, overrides).predict(tmp_path / f"x{suffix}", outputs=OF_CLASSES)
    (labels,) = (path for path in (tmp_path / "out").iterdir() if path.name.startswith("x."))
    for kind in OF_CLASSES:
        path = labels if kind == "labels" else tmp_path / "out" / kind / labels.name
        if kind == "probabilities" and suffix == ".fits":  # an HDU for each class
            with fits.open(path) as file:
                values = np.stack([file[f"PROB_{name}"].data for name in CLASSES.values()])
        else:
            with open_volume(path, AXES.get(suffix) if KINDS[kind].wide else None) as volume:
                values = volume.numpy()
        assert np.array_equal(values, expected[kind].numpy(), equal_nan=kind != "labels"), kind


def test_files_say_what_they_hold(run: Path, tmp_path: Path) -> None:
    for suffix in (".fits", ".nii"):
        Volume.from_array(scene(40, 37), (1.0, 1.0)).save(tmp_path / f"x{suffix}")
        predict(run, [tmp_path / f"x{suffix}"], tmp_path / suffix, ["inference.outputs=[entropy, logits]"])
    with fits.open(tmp_path / ".fits" / "entropy" / "x.fits.fz") as file:
        header = next(hdu.header for hdu in file if hdu.is_image and hdu.data is not None)
        assert (header["BUNIT"], header["BTYPE"], header["DPMODEL"]) == ("nat", "ENTROPY", "run")
    with fits.open(tmp_path / ".fits" / "logits" / "x.fits.fz") as file:
        header = next(hdu.header for hdu in file if hdu.is_image and hdu.data is not None)
        assert (header["BTYPE"], header["CHAN1"], header["NAXIS"]) == ("LOGIT", "star", 3)
    header = nibabel.load(tmp_path / ".nii" / "entropy" / "x.nii.gz").header
    assert header["intent_name"].item() == b"entropy"
    assert b"model run" in header["descrip"].item()
    assert not (tmp_path / ".nii" / "x.nii.gz").exists()


def test_numbers_are_given_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(1)
    heads = {"depth": Regression(outputs=2, unit="mm", variance=True, deviation=3.0), "mask": Segmentation(2)}
    model = create_model(channels=(4, 8), dims=2, heads=heads)
    predictor, image = predictor_of(model), scene(16, 16)
    found = predictor.predict(image, outputs=("regression", "logits", "noise"))
    with torch.inference_mode():
        expected = model(torch.from_numpy(np.nan_to_num(image))[None, None])["depth"][0].numpy()
    expected[:, np.isnan(image)] = np.nan
    np.testing.assert_allclose(found["logits"].numpy(), expected, atol=1e-5)
    mean, log_variance = np.split(found["logits"].numpy(), 2)
    np.testing.assert_allclose(found["regression"].numpy(), 3 * mean, rtol=1e-6)
    np.testing.assert_allclose(found["noise"].numpy(), 3 * np.exp(log_variance / 2), rtol=1e-5)
    assert found["regression"].unit == found["noise"].unit == "mm"
    assert predictor.predict(image).shape == (2, 16, 16)
    for kind in ("labels", "probabilities", "entropy", "variance"):
        with pytest.raises(InputError, match=f"{kind} cannot be made of a regression head") as caught:
            predictor.predict(image, outputs=kind)
        assert caught.value.fix == "choose of logits, regression, noise"
    settings = predictor.config.inference.model_copy(update={"skip": 0.5})
    config = predictor.config.model_copy(update={"inference": settings})
    with pytest.raises(InputError, match="skip above 0 is held to by comparing class probabilities"):
        Predictor(model, config, predictor.plan, "").predict(image, outputs="regression")


def test_what_a_model_does_not_predict_is_refused(run: Path) -> None:
    predictor = load(run)
    for kind, message in (
        ("regression", "regression cannot be made of a segmentation head"),
        ("variance", "variance needs several predictions of each voxel"),
        ("label", "no output 'label'"),
    ):
        with pytest.raises(InputError, match=message):
            predictor.predict(scene(20, 20), outputs=kind)
    certain = predictor_of(create_model(channels=(4, 8), dims=2, heads={"depth": Regression()}))
    with pytest.raises(InputError, match="did not learn the noise"):
        certain.predict(scene(20, 20), outputs="noise")
    regions = predictor_of(create_model(channels=(4, 8), dims=2, heads={"organs": Segmentation(2, regions=True)}))
    assert regions.predict(scene(20, 20), outputs="logits").shape == (2, 20, 20)
    with pytest.raises(InputError, match="regions that may overlap"):
        regions.predict(scene(20, 20))


def test_blocks_have_the_entropy_of_their_mean(run: Path) -> None:
    image, whole = scene(40, 36), load(run)
    coarse = load(run, ["inference.bin=4"])
    shares = np.nan_to_num(whole.predict(image, outputs="probabilities").numpy())
    valid = np.isfinite(image).reshape(10, 4, 9, 4).sum((1, 3))
    means = shares.reshape(3, 10, 4, 9, 4).sum((2, 4)) / valid
    entropy = coarse.predict(image, outputs="entropy").numpy()[0]
    np.testing.assert_allclose(entropy, scipy.stats.entropy(means.astype(np.float64), axis=0), atol=1e-5)
    with pytest.raises(InputError, match="logits of blocks of pixels is not known"):
        coarse.predict(image, outputs="logits")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inference.outputs=[regression]"], "regression writes maps of numbers, and data.targets has none"),
        (["inference.outputs=[logits]", "inference.bin=2"], r"\['logits'\] of blocks of pixels"),
        (["inference.outputs=[labels, labels]"], "each kind stands once"),
    ],
)
def test_recipes_refuse_what_cannot_be(run: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(DensepredError, match=message):
        configuration.load(run / "config.yaml", overrides)


def test_bids_names_no_entropy(tmp_path: Path) -> None:
    run = run_of(tmp_path, ".nii.gz", CLASSES)
    folder = tmp_path / "study" / "sub-1" / "anat"
    folder.mkdir(parents=True)
    Volume.from_array(scene(24, 24), (1.0, 1.0)).save(folder / "sub-1_T1w.nii.gz")
    with pytest.raises(InputError, match=r"not for entropy"):
        predict(run, [folder / "sub-1_T1w.nii.gz"], tmp_path, ["inference.outputs=[labels, entropy]"], bids=True)
    assert not (tmp_path / "derivatives").exists()


def test_reducing_leaves_the_planes_as_they_are(run: Path) -> None:
    logits, invalid = torch.zeros(3, 1, 4), np.array([[True, False, False, False]])
    planes = Predicted(0, 1, logits, invalid)
    assert np.isnan(reduced("logits", planes, load(run).plan, Segmentation(3))[:, 0, 0]).all()
    assert not logits.isnan().any()
