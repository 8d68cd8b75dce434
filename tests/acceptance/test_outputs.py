"""What predictions write: cut-outs, blocks, several images in one file, BIDS derivatives."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.stats
from astropy.io import fits
from astropy.wcs import WCS

from densepred import config as configuration
from densepred import load
from densepred.cases.case import collect
from densepred.cases.reading import Reading
from densepred.config import DataConfig
from densepred.inference.batch import predict
from densepred.training.loop import train
from densepred.volumes import Volume
from tests.acceptance.helpers import densepred

RECIPE = """
data: {{images: "images/*{suffix}", labels: "labels/{{id}}{suffix}", classes: {{0: sky, 1: source}}, folds: 3}}
model: {{channels: [4, 8], dims: {dims}}}
patch: {{size: {size}, batch: 2}}
optimizer: {{name: adamw, lr: 0.01, ema: 0.5}}
training: {{epochs: 1, steps: 10, tensorboard: false}}
inference: {{outputs: [labels, probabilities], precision: float32}}
"""


def sky(scale: float = 1.0) -> fits.Header:
    header = fits.Header()
    header.update(CTYPE1="RA---TAN-SIP", CTYPE2="DEC--TAN-SIP", CRVAL1=150.1, CRVAL2=2.2, CRPIX1=20.0, CRPIX2=16.0)
    header.update(
        CD1_1=-5e-5 * scale, CD1_2=1e-6, CD2_1=1e-6, CD2_2=5e-5, A_ORDER=2, B_ORDER=2, A_2_0=1e-6, B_0_2=-2e-6
    )
    return header


def scene(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    return (label * 2 + generator.normal(0, 0.5, shape)).astype(np.float32), label


def trained(root: Path, suffix: str, shape: tuple[int, ...]) -> Path:
    for number in range(3):
        for folder, array in zip(("images", "labels"), scene(shape, number), strict=True):
            (root / folder).mkdir(exist_ok=True)
            path = root / folder / f"c{number}{suffix}"
            if suffix == ".fits":
                fits.PrimaryHDU(array, sky()).writeto(path)
            else:
                Volume.from_array(array, (1.0,) * len(shape), labels=folder == "labels").save(path)
    (root / "recipe.yaml").write_text(RECIPE.format(suffix=suffix, dims=len(shape), size=[16] * len(shape)))
    return train(configuration.load(root / "recipe.yaml", [f"data.root={root}"]), root / "run").path


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2D run on FITS; its images lie beside it."""
    return trained(tmp_path_factory.mktemp("flat"), ".fits", (40, 36))


@pytest.fixture(scope="module")
def solid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3D run on NIfTI."""
    return trained(tmp_path_factory.mktemp("solid"), ".nii.gz", (16, 20, 18))


def labels_of(path: Path) -> tuple[np.ndarray, fits.Header]:
    with fits.open(path, checksum=True) as file:
        found = next(hdu for hdu in file if hdu.is_image and hdu.data is not None)
        return found.data, found.header


def test_a_cutout_lies_where_it_was_cut(flat: Path, tmp_path: Path):
    image = flat.parent / "images" / "c0.fits"
    done = densepred("predict", flat, image, "--out", tmp_path / "part", "--cutout", "4:30,10:36")
    assert done.returncode == 0, done.stderr
    labels, header = labels_of(tmp_path / "part" / "c0.fits.fz")
    assert labels.shape == (26, 26)
    pixels = np.array([[0, 0], [25, 0], [0, 25], [25, 25], [12, 13]], float)
    corner = np.array([10, 4])
    expected = WCS(fits.getheader(image)).all_pix2world(pixels + corner, 0)
    moved = WCS(fits.getheader(image)).all_world2pix(WCS(header).all_pix2world(pixels, 0), 0) - pixels - corner
    assert np.abs(moved).max() < 1e-6
    assert np.allclose(WCS(header).all_pix2world(pixels, 0), expected, rtol=0, atol=1e-12)
    on_sky = ",".join(f"{value:.9f}" for value in WCS(header).all_pix2world([[12.5, 12.5]], 0)[0])
    predict(flat, [image], tmp_path / "sky", [f"inference.cutout='{on_sky},4.68arcsec'"])
    again, same = labels_of(tmp_path / "sky" / "c0.fits.fz")
    assert np.array_equal(again, labels)
    assert (same["CRPIX1"], same["CRPIX2"]) == (header["CRPIX1"], header["CRPIX2"])


def test_a_cutout_is_normalised_as_the_whole(flat: Path):
    """A window that lies within the cut-out gives what the whole gives there."""
    predictor = load(flat, ["inference.cutout='0:16,0:36'", "inference.overlap=0"])
    whole = load(flat, ["inference.overlap=0", "inference.window=[16, 36]"])
    cut = load(flat, ["inference.cutout='0:16,0:36'", "inference.overlap=0", "inference.window=[16, 36]"])
    image = fits.getdata(flat.parent / "images" / "c1.fits").astype(np.float32)
    image[30:] += 50  # far away, and yet it decides on mean and deviation
    assert predictor.predict(image).shape == (1, 16, 36)
    first = next(iter(whole.stream(Volume.from_array(image, (1.0, 1.0)))))
    part = next(iter(cut.stream(Volume.from_array(image, (1.0, 1.0)))))
    rows = min(first.logits.shape[1], 8)
    assert np.allclose(first.logits[:, :rows], part.logits[:, :rows], atol=1e-5)


def test_blocks_hold_the_mean_probability(flat: Path, tmp_path: Path):
    image = flat.parent / "images" / "c0.fits"
    predict(flat, [image], tmp_path / "fine")
    assert densepred("predict", flat, image, "--out", tmp_path / "coarse", "--bin", "3").returncode == 0
    with (
        fits.open(tmp_path / "fine" / "probabilities" / "c0.fits.fz") as fine,
        fits.open(tmp_path / "coarse" / "probabilities" / "c0.fits.fz") as coarse,
    ):
        for name in ("PROB_sky", "PROB_source"):
            means = fine[name].data[:39].reshape(13, 3, 12, 3).mean((1, 3))
            assert np.allclose(coarse[name].data, means, atol=1e-6)
        labels, header = labels_of(tmp_path / "coarse" / "c0.fits.fz")
        assert np.array_equal(labels, coarse["PROB_source"].data > coarse["PROB_sky"].data)
    centres = np.array([[0, 0], [11, 0], [0, 12], [11, 12], [5, 6]], float)
    back = WCS(fits.getheader(image)).all_world2pix(WCS(header).all_pix2world(centres, 0), 0)
    assert np.abs(back - (3 * centres + 1)).max() < 1e-6


def test_invalid_pixels_do_not_count_in_blocks(flat: Path, tmp_path: Path):
    image = fits.getdata(flat.parent / "images" / "c0.fits")
    image[:4, :4] = np.nan  # one block and parts of its neighbours
    fits.PrimaryHDU(image, sky()).writeto(tmp_path / "hole.fits")
    predict(flat, [tmp_path / "hole.fits"], tmp_path / "fine")
    predict(flat, [tmp_path / "hole.fits"], tmp_path / "coarse", ["inference.bin=3"])
    with (
        fits.open(tmp_path / "fine" / "probabilities" / "hole.fits.fz") as fine,
        fits.open(tmp_path / "coarse" / "probabilities" / "hole.fits.fz") as coarse,
    ):
        blocks = fine["PROB_source"].data[:39].reshape(13, 3, 12, 3).swapaxes(1, 2).reshape(13, 12, 9)
        assert np.isnan(coarse["PROB_source"].data).sum() == 1
        assert np.isnan(coarse["PROB_source"].data[0, 0])
        assert np.allclose(coarse["PROB_source"].data[0, 1:], np.nanmean(blocks[0, 1:], 1), atol=1e-6)


def telescope(path: Path, planes: tuple[str, ...] = ("SCI", "DQ")) -> None:
    """Two chips in one file, as Hubble's cameras write them."""
    hdus: list[fits.ImageHDU | fits.PrimaryHDU] = [fits.PrimaryHDU(header=fits.Header({"TELESCOP": "HST"}))]
    for version, seed in ((1, 5), (2, 6)):
        for name in planes:
            array = scene((40, 36), seed)[0] if name == "SCI" else scene((40, 36), seed)[1].astype(np.int16)
            hdus.append(fits.ImageHDU(array, sky(version), name=name, ver=version))
    fits.HDUList(hdus).writeto(path)


def test_all_images_of_a_file_come_back_in_one(flat: Path, tmp_path: Path):
    telescope(tmp_path / "x_flc.fits")
    result = predict(flat, [f"{tmp_path}/x_flc.fits[SCI,all]"], tmp_path / "out")
    assert (result.done, result.failed) == (["x_flc"], {})
    with fits.open(tmp_path / "out" / "x_flc.fits.fz", checksum=True) as file:
        chips = [hdu for hdu in file if hdu.name == "SCI"]
        assert [(hdu.name, hdu.ver) for hdu in chips] == [("SCI", 1), ("SCI", 2)]
        assert file[0].header["TELESCOP"] == "HST"
        assert [hdu.header["CD1_1"] for hdu in chips] == [-5e-5, -1e-4]
        for version in (1, 2):
            alone = load(flat).predict(f"{tmp_path}/x_flc.fits[SCI,{version}]")
            assert np.array_equal(file["SCI", version].data, alone[0])
    names = [
        (h.name, h.ver) for h in fits.open(tmp_path / "out" / "probabilities" / "x_flc.fits.fz") if h.name[:4] == "PROB"
    ]
    assert sorted(names) == sorted((f"PROB_{c}", v) for c in ("sky", "source") for v in (1, 2))


def test_the_entropy_of_all_images_of_a_file(flat: Path, tmp_path: Path):
    telescope(tmp_path / "x_flc.fits")
    overrides = ["inference.outputs=[labels, probabilities, entropy]"]
    assert predict(flat, [f"{tmp_path}/x_flc.fits[SCI,all]"], tmp_path / "out", overrides).failed == {}
    with (
        fits.open(tmp_path / "out" / "entropy" / "x_flc.fits.fz", checksum=True) as entropy,
        fits.open(tmp_path / "out" / "probabilities" / "x_flc.fits.fz") as shares,
    ):
        for version in (1, 2):
            header, values = entropy["SCI", version].header, entropy["SCI", version].data
            both = [shares[f"PROB_{name}", version].data.astype(np.float64) for name in ("sky", "source")]
            assert np.allclose(values, scipy.stats.entropy(both, axis=0), rtol=0, atol=1e-6)
            assert (header["BUNIT"], header["CD1_1"]) == ("nat", -5e-5 * version)


def test_kinds_of_a_volume_lie_beside_its_labels(solid: Path, tmp_path: Path):
    image, kinds = solid.parent / "images" / "c1.nii.gz", "inference.outputs=[labels, probabilities, entropy, variance]"
    done = densepred("predict", solid, image, "--out", tmp_path, kinds, "inference.mirror=[0]")
    assert done.returncode == 0, done.stderr
    found = {kind: nibabel.load(tmp_path / kind / "c1.nii.gz") for kind in ("probabilities", "entropy", "variance")}
    labels = nibabel.load(tmp_path / "c1.nii.gz")
    shares = np.asanyarray(found["probabilities"].dataobj).astype(np.float64)
    assert np.array_equal(np.asanyarray(labels.dataobj), shares.argmax(-1))
    entropy = np.asanyarray(found["entropy"].dataobj)
    assert np.allclose(entropy, scipy.stats.entropy(shares, axis=-1), rtol=0, atol=1e-6)
    assert 0 < np.asanyarray(found["variance"].dataobj).max() < 0.25
    assert all(np.array_equal(file.affine, labels.affine) for file in found.values())
    assert sorted(json.loads(line)["id"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()) == ["c1"]


def test_every_image_of_a_file_is_a_training_case(tmp_path: Path):
    telescope(tmp_path / "a_flc.fits")
    telescope(tmp_path / "b_flc.fits")
    data = DataConfig(root=str(tmp_path), images="{id}_flc.fits[SCI,all]", labels="{id}_flc.fits[DQ,all]")
    cases = collect(data)
    assert [(case.id, case.group) for case in cases] == [("a_0", "a"), ("a_1", "a"), ("b_0", "b"), ("b_1", "b")]
    for case, seed in zip(cases[:2], (5, 6), strict=True):
        with Reading().open_case(case) as image:
            assert np.array_equal(image[0], scene((40, 36), seed)[0])


def test_frames_are_predicted_one_by_one(solid: Path, tmp_path: Path):
    frames = np.stack([scene((16, 20, 18), seed)[0] for seed in range(3)])
    image = nibabel.Nifti1Image(frames.T, np.diag([2.0, 2, 3, 1]))
    image.header["pixdim"][4] = 1.5
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "bold.nii.gz")
    result = predict(solid, [tmp_path / "bold.nii.gz"], tmp_path / "out")
    assert "`axes: xyzt`" in str(result.failed["bold"])
    run_of_frames = tmp_path / "run"
    run_of_frames.mkdir()
    for path in solid.iterdir():
        if path.suffix in (".safetensors", ".yaml", ".json"):
            (run_of_frames / path.name).write_bytes(path.read_bytes())
    plan = json.loads((run_of_frames / "plan.json").read_text())
    plan["reading"]["axes"] = "xyzt"
    (run_of_frames / "plan.json").write_text(json.dumps(plan))
    predict(run_of_frames, [tmp_path / "bold.nii.gz"], tmp_path / "out2")
    found = nibabel.load(tmp_path / "out2" / "bold.nii.gz")
    assert (found.shape, found.header["pixdim"][4]) == ((18, 20, 16, 3), 1.5)
    for number, frame in enumerate(frames):
        alone = load(solid).predict(frame, (3.0, 2.0, 2.0))
        assert np.array_equal(np.asanyarray(found.dataobj)[..., number].T, alone[0])


def test_bids_derivatives(solid: Path, tmp_path: Path):
    for subject in ("01", "02"):
        folder = tmp_path / "study" / f"sub-{subject}" / "anat"
        folder.mkdir(parents=True)
        Volume.from_array(scene((16, 20, 18), int(subject))[0], (1.0,) * 3).save(folder / f"sub-{subject}_T1w.nii.gz")
    (tmp_path / "study" / "dataset_description.json").write_text('{"Name": "study", "BIDSVersion": "1.8.0"}')
    pattern = f"{tmp_path}/study/sub-*/anat/*_T1w.nii.gz"
    done = densepred("predict", solid, pattern, "--out", tmp_path / "study", "--bids")
    assert done.returncode == 0, done.stderr
    root = tmp_path / "study" / "derivatives" / "densepred-run"
    files = sorted(str(path.relative_to(root)) for path in root.rglob("sub-*_*"))
    stem = "sub-01/anat/sub-01_seg-run"
    expected = [
        f"{stem}_dseg.json",
        f"{stem}_dseg.nii.gz",
        f"{stem}_dseg.tsv",
        f"{stem}_probseg.json",
        f"{stem}_probseg.nii.gz",
    ]
    assert files == expected + [name.replace("01", "02") for name in expected]
    assert json.loads((root / f"{stem}_dseg.json").read_text())["Sources"] == [
        "bids:source:sub-01/anat/sub-01_T1w.nii.gz"
    ]
    assert json.loads((root / "dataset_description.json").read_text())["DatasetType"] == "derivative"
    about = nibabel.load(root / f"{stem}_dseg.nii.gz").header["descrip"].item().decode()
    assert about.endswith(", model run")
    again = predict(solid, [pattern], tmp_path / "study", bids=True)
    assert len(again.skipped) == 2
