"""The whole road on other files than NIfTI: FITS with a distorted WCS, and TIFF with voxels in micrometres."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from astropy.wcs import WCS

from densepred import config as configuration
from densepred.errors import InputError
from densepred.evaluation import evaluate
from densepred.inference.batch import predict
from densepred.training.loop import train

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


def trained(root: Path, suffix: str, size: list[int]) -> Path:
    path = root / "recipe.yaml"
    path.write_text(RECIPE.format(suffix=suffix, dims=len(size), size=size))
    return train(configuration.load(path, [f"data.root={root}"]), root / "run").path


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
    run = trained(tmp_path, suffix, [32, 32])
    path = tmp_path / "images" / f"c3{suffix}"
    path.write_bytes(path.read_bytes()[:4000])
    result = predict(run, [tmp_path / "images"], tmp_path / "out")
    assert (len(result.done), list(result.failed)) == (5, ["c3"])
    assert result.exit_code == 3


def test_what_batches_do_not_take_is_said(tmp_path: Path):
    for folder in ("images", "labels", "series"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        for folder, array in zip(("images", "labels"), scene((40, 36), number), strict=True):
            fits.PrimaryHDU(array, header()).writeto(tmp_path / folder / f"c{number}.fits")
    run = trained(tmp_path, ".fits", [32, 32])
    (tmp_path / "series" / "1.dcm").touch()
    with pytest.raises(InputError, match="of a DICOM series, which batches do not take"):
        predict(run, [tmp_path / "series"], tmp_path / "out")
