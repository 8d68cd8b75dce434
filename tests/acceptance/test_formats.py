"""The whole road on other files than NIfTI: FITS with a distorted WCS, and TIFF with voxels in micrometres."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from astropy.wcs import WCS

from densepred import config as configuration
from densepred.evaluation import evaluate
from densepred.inference.batch import predict
from densepred.training.loop import train
from densepred.volumes import Volume, open_volume

RECIPE = """
data: {{images: "images/*{suffix}", labels: "labels/{{id}}{suffix}", classes: {{0: sky, 1: source}}, folds: 3}}
model: {{channels: [4, 8], dims: {dims}}}
patch: {{size: {size}, batch: 4}}
optimizer: {{name: adamw, lr: 0.01, ema: 0.9}}
training: {{epochs: 1, steps: 80, tensorboard: false}}
"""


def scene(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright box in noise, and where it is."""
    generator = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(start, start + n // 2) for n in shape for start in [int(generator.integers(0, n // 2))])] = 1
    return (label * 2 + generator.normal(0, 0.5, shape)).astype(np.float32), label


def trained(root: Path, suffix: str, size: list[int], steps: int = 80) -> Path:
    path = root / "recipe.yaml"
    path.write_text(RECIPE.format(suffix=suffix, dims=len(size), size=size))
    return train(configuration.load(path, [f"data.root={root}", f"training.steps={steps}"]), root / "run").path


def header() -> fits.Header:
    made = fits.Header()
    made.update(CTYPE1="RA---TAN-SIP", CTYPE2="DEC--TAN-SIP", CRVAL1=150.1, CRVAL2=2.2, CRPIX1=12.5, CRPIX2=-3.0)
    made.update(CD1_1=-5e-5, CD1_2=1e-6, CD2_1=1e-6, CD2_2=5e-5, A_ORDER=2, B_ORDER=2, A_2_0=1e-6, B_0_2=-2e-6)
    made.update(OBJECT="field", FILTER="r", BUNIT="electron/s")
    return made


def test_fits_images_give_fits_labels_at_the_same_place_on_the_sky(tmp_path: Path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(6):
        for folder, array in zip(("images", "labels"), scene((40, 36), number), strict=True):
            fits.PrimaryHDU(array, header()).writeto(tmp_path / folder / f"c{number}.fits")
    run = trained(tmp_path, ".fits", [32, 32])
    result = predict(run, [tmp_path / "images"], tmp_path / "out")
    assert sorted(result.done) == [f"c{n}" for n in range(6)]
    with fits.open(tmp_path / "out" / "c0.fits.fz", checksum=True) as file:
        found = next(hdu for hdu in file if hdu.data is not None)
        assert (found.data.shape, found.data.dtype.kind) == ((40, 36), "u")
        assert (found.header["BUNIT"], file[0].header.get("OBJECT", found.header.get("OBJECT"))) == ("", "field")
        pixels = np.array([[0.0, 0.0], [35.0, 0.0], [0.0, 39.0], [35.0, 39.0], [17.0, 20.0]])
        sky = WCS(header()).all_pix2world(pixels, 0)
        assert np.array_equal(WCS(found.header).all_pix2world(pixels, 0), sky)
    assert evaluate(tmp_path / "out", tmp_path / "labels").mean_dice > 0.9


def test_tiff_stacks_keep_their_micrometres(tmp_path: Path):
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 1.0}
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(6):
        for folder, array in zip(("images", "labels"), scene((10, 24, 20), number), strict=True):
            path = tmp_path / folder / f"c{number}.ome.tif"
            tifffile.imwrite(path, array, ome=True, photometric="minisblack", metadata={"axes": "ZYX", **sizes})
    run = trained(tmp_path, ".ome.tif", [8, 16, 16])
    predict(run, [tmp_path / "images"], tmp_path / "out")
    written = sorted((tmp_path / "out").glob("*.tif"))
    assert len(written) == 6
    with tifffile.TiffFile(written[0]) as file:
        assert file.asarray().shape == (10, 24, 20)
        assert 'PhysicalSizeX="0.25"' in (file.ome_metadata or "")
        assert 'PhysicalSizeZ="1.0"' in (file.ome_metadata or "")
    assert evaluate(tmp_path / "out", tmp_path / "labels").mean_dice > 0.9


@pytest.mark.parametrize("suffix", [".fits"])
def test_a_damaged_file_fails_alone(tmp_path: Path, suffix: str):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(6):
        for folder, array in zip(("images", "labels"), scene((40, 36), number), strict=True):
            fits.PrimaryHDU(array, header()).writeto(tmp_path / folder / f"c{number}{suffix}")
    run = trained(tmp_path, suffix, [32, 32], steps=1)
    path = tmp_path / "images" / f"c3{suffix}"
    path.write_bytes(path.read_bytes()[:4000])
    result = predict(run, [tmp_path / "images"], tmp_path / "out")
    assert (len(result.done), list(result.failed)) == (5, ["c3"])
    assert result.exit_code == 3


def trained_on_noise(root: Path, dims: int) -> Path:
    """A run of one step, for tests of what goes in and comes out."""
    shape = (12, 20, 16)[-dims:]
    for number in range(3):
        for folder, array in zip(("images", "labels"), scene(shape, number), strict=True):
            (root / folder).mkdir(exist_ok=True)
            Volume.from_array(array, (1.0,) * dims, labels=folder == "labels").save(root / folder / f"c{number}.nrrd")
    return trained(root, ".nrrd", [8] * dims, steps=1)


def test_stores_and_series_are_cases(tmp_path: Path, real_data: Path):
    run = trained_on_noise(tmp_path, 3)
    (tmp_path / "in").mkdir()
    volume = Volume.from_array(scene((12, 20, 16), 5)[0], (2.0, 0.5, 0.5))
    volume.save(tmp_path / "in" / "store.zarr")
    shutil.copytree(real_data / "other_formats" / "dicom_series", tmp_path / "in" / "series")
    result = predict(run, [tmp_path / "in"], tmp_path / "out")
    assert (sorted(result.done), result.failed) == (["series", "store"], {})
    with open_volume(tmp_path / "out" / "store.zarr") as found:
        assert (found.shape, found.spacing) == (volume.shape, volume.spacing)
    with open_volume(tmp_path / "out" / "series.nii.gz") as found, open_volume(tmp_path / "in" / "series") as source:
        assert found.shape == source.shape
        assert np.allclose(found.affine, source.affine, atol=1e-4)
    again = predict(run, [tmp_path / "in"], tmp_path / "out")
    assert sorted(again.skipped) == ["series", "store"]
    (tmp_path / "in" / "series" / "IMG0001.dcm").unlink()
    third = predict(run, [tmp_path / "in" / "series"], tmp_path / "out")
    assert (third.skipped, [*third.done, *third.failed]) == ([], ["series"])


def multi_extension(path: Path, seed: int) -> None:
    """A FITS file with image, data quality and weight, as from a telescope."""
    image, label = scene((40, 36), seed)
    quality, weight = np.zeros((40, 36), np.int16), np.ones((40, 36), np.float32)
    image[5:9, 5:9], quality[5:9, 5:9] = 1e6, 256  # would wreck the normalisation if it counted
    quality[0, 0] = 2  # a flag that does no harm
    weight[30:33] = 0
    sci = fits.ImageHDU(image, header(), name="SCI")
    planes = [fits.ImageHDU(quality, header(), name="DQ"), fits.ImageHDU(weight, header(), name="WHT")]
    truth = fits.ImageHDU(label, header(), name="TRUTH")
    fits.HDUList([fits.PrimaryHDU(), sci, *planes, truth]).writeto(path)


MASKED = """
data:
  images: "{id}_flt.fits[SCI]"
  labels: "{id}_flt.fits[TRUTH]"
  validity: {mask: "{id}_flt.fits[DQ]", bits: [SATURATED], flags: {SATURATED: 256}, weight: "{id}_flt.fits[WHT]",
    channel: true}
  classes: {0: sky, 1: source}
  ignore: [255]
  folds: 3
model: {channels: [4, 8], dims: 2}
patch: {size: [32, 32], batch: 4}
optimizer: {name: adamw, lr: 0.01, ema: 0.9}
training: {epochs: 1, steps: 80, tensorboard: false}
inference: {outputs: [labels, probabilities]}
"""


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on images of which a part is flagged or without weight; the images lie in its parent folder."""
    root = tmp_path_factory.mktemp("masked")
    for number in range(6):
        multi_extension(root / f"c{number}_flt.fits", number)
    (root / "recipe.yaml").write_text(MASKED)
    return train(configuration.load(root / "recipe.yaml", [f"data.root={root}"]), root / "run").path


def test_flagged_pixels_count_nowhere(masked_run: Path, tmp_path: Path):
    root, out = masked_run.parent, tmp_path / "out"
    result = predict(masked_run, [root], out)
    assert (sorted(result.done), result.failed) == ([f"c{n}" for n in range(6)], {})
    bad = np.zeros((40, 36), bool)
    bad[5:9, 5:9] = bad[30:33] = True
    labels = fits.getdata(out / "c0.fits.fz", 1)
    assert np.array_equal(labels == 255, bad)
    with fits.open(out / "probabilities" / "c0.fits.fz", checksum=True) as file:
        maps = {hdu.name: hdu.data for hdu in file if hdu.name.startswith("PROB_")}
        assert list(maps) == ["PROB_sky", "PROB_source"]
        assert np.array_equal(np.isnan(maps["PROB_sky"]), bad)
        assert np.allclose((maps["PROB_sky"] + maps["PROB_source"])[~bad], 1, atol=1e-6)
        assert np.array_equal((maps["PROB_source"] > maps["PROB_sky"])[~bad], labels[~bad] == 1)
        card, read = file["PROB_sky"].header, "c0_flt.fits[SCI] c0_flt.fits[DQ] c0_flt.fits[WHT]"
        assert (card["DPMODEL"], card["DPINPUT"], card["DPTILE"]) == ("run", read, "32x32")
        assert not any(str(root) in str(value) for value in card.values())
    scores = evaluate(out, str(root / "{id}_flt.fits[TRUTH]"))
    assert scores.mean_dice > 0.9
    assert [one.unpredicted for one in scores.results] == [bad.sum()] * 6
    assert sum(int(one.confusion.sum()) for one in scores.results) == 6 * (~bad).sum()


def test_a_file_brings_its_planes_or_fails(masked_run: Path, tmp_path: Path):
    result = predict(masked_run, [masked_run.parent / "c1_flt.fits"], tmp_path / "out")
    assert result.done == ["c1"]
    assert (fits.getdata(tmp_path / "out" / "c1.fits.fz", 1) == 255).sum() == 4 * 4 + 3 * 36
    fits.PrimaryHDU(scene((40, 36), 9)[0], header()).writeto(tmp_path / "alone.fits")
    alone = predict(masked_run, [tmp_path / "alone.fits"], tmp_path / "out2")
    assert "no mask: the model was trained with one" in alone.failed["alone"].what
    free = predict(masked_run, [tmp_path / "alone.fits"], tmp_path / "out3", ["inference.planes=optional"])
    assert free.done == ["alone"]
