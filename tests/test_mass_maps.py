"""The mass maps: their two-point function, the filters' errors as known from elsewhere, and their files."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from astropy.io import fits

from densepred.errors import InputError
from densepred.files import sha256

SCRIPT = Path(__file__).parent.parent / "data" / "mass_maps.py"
SEEDS = list(range(500, 540))


@pytest.fixture(scope="module")
def maps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mass_maps", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mass_maps"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("gaussian", [False, True])
def test_maps_have_the_power_and_the_skewness_that_were_asked_for(maps: ModuleType, gaussian: bool) -> None:
    setting = maps.Setting(gaussian=gaussian)
    kappa = np.stack([maps.convergence(setting, seed) for seed in range(120)])
    modes = np.abs(np.fft.rfft2(kappa)) ** 2 / setting.size**2
    ell, wanted = np.hypot(*maps.wave_numbers(setting)), maps.power(setting)
    for low, high in [(200, 500), (500, 1000), (1000, 2000), (2000, 4000), (4000, 8000)]:
        ring = (ell > low) & (ell < high)
        assert modes[:, ring].mean() / wanted[ring].mean() == pytest.approx(1, abs=0.06)
    assert kappa.std() == pytest.approx(0.0145, rel=0.01)
    skewness = ((kappa - kappa.mean()) ** 3).mean() / kappa.std() ** 3
    assert skewness == pytest.approx(0 if gaussian else 2.5, abs=0.25)
    assert gaussian or kappa.min() > -setting.kappa0


def test_shear_without_noise_is_inverted_exactly(maps: ModuleType) -> None:
    setting = maps.Setting(size=32)
    kappa = maps.convergence(setting, 3)[None]
    modes = np.fft.rfft2(kappa)
    first, second = (np.fft.irfft2(kernel * modes) for kernel in maps.shear_kernel(setting))
    found, nyquist = maps.kaiser_squires(setting, first + 1j * second), np.zeros((32, 17), bool)
    nyquist[16], nyquist[:, 16], nyquist[0, 0] = True, True, True  # waves whose sign the grid does not show, and none
    difference = np.fft.rfft2(found[0] - kappa[0])
    assert np.abs(difference[~nyquist]).max() < 1e-10
    full = np.fft.fft2(kappa[0])
    frequency = np.fft.fftfreq(32)
    ly, lx = frequency[:, None], frequency[None]
    kernel = np.divide((lx + 1j * ly) ** 2, lx**2 + ly**2, out=np.zeros((32, 32), complex), where=lx**2 + ly**2 > 0)
    inside = np.ones((32, 32), bool)
    inside[16], inside[:, 16] = False, False
    shear = np.fft.fft2(first[0] + 1j * second[0])
    assert np.abs(shear - kernel * full)[inside].max() < 1e-10


@pytest.mark.parametrize(
    ("n_gal", "kappa0", "direct", "optimal", "correlation"),
    [(30, 0.02, 5.5e-4, 1.202e-4, 0.659), (10, 0.03, 16.7e-4, 1.580e-4, 0.502)],
)
def test_filters_err_as_measured_elsewhere(
    maps: ModuleType, n_gal: float, kappa0: float, direct: float, optimal: float, correlation: float
) -> None:
    setting = maps.Setting(n_gal=n_gal, kappa0=kappa0)
    seen = maps.survey(setting, 9)
    known, drawn = ~seen.mask, maps.observe(setting, seen, SEEDS)
    truth, filtered = drawn.kappa[:, known], maps.wiener(setting, seen, drawn.shear)[:, known]
    assert (truth**2).mean() == pytest.approx(2.12e-4, rel=0.03)
    assert ((maps.kaiser_squires(setting, drawn.shear)[:, known] - truth) ** 2).mean() == pytest.approx(
        direct, rel=0.05
    )
    assert ((filtered - truth) ** 2).mean() == pytest.approx(optimal, rel=0.025)
    assert np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(filtered, truth, strict=True)]) == pytest.approx(
        correlation, abs=0.01
    )


def test_the_wiener_filter_solves_its_equation(maps: ModuleType) -> None:
    """Against S A^T (A S A^T + N)^-1 d with whole matrices, without mask."""
    setting = maps.Setting(size=8)
    seen = maps.survey(maps.Setting(size=40), 1)
    noise = maps.Survey(np.zeros((8, 8), bool), seen.inverse_variance[16:24, 16:24] + 500)
    unit = np.eye(64).reshape(64, 8, 8)
    modes = np.fft.rfft2(unit)

    def matrix(kernel: np.ndarray) -> np.ndarray:
        return np.fft.irfft2(kernel * modes, s=(8, 8)).reshape(64, 64).T

    response = np.concatenate([matrix(kernel) for kernel in maps.shear_kernel(setting)])
    covariance = matrix(maps.power(setting))
    data = np.random.default_rng(0).normal(size=128) * 0.05
    total = response @ covariance @ response.T + np.diag(np.tile(1 / noise.inverse_variance.ravel(), 2))
    wanted = covariance @ response.T @ np.linalg.solve(total, data)
    shear = (data[:64] + 1j * data[64:]).reshape(1, 8, 8)
    found = maps.wiener(setting, noise, shear, iterations=128)
    np.testing.assert_allclose(found.ravel(), wanted, atol=1e-8 * np.abs(wanted).max())


def test_files_are_the_same_in_any_number_of_processes_and_after_an_interruption(
    maps: ModuleType, tmp_path: Path
) -> None:
    counts, setting = {"train": 20, "other": 2}, maps.Setting(size=32)
    maps.write_set(tmp_path / "one", setting, counts)
    command = [
        sys.executable,
        SCRIPT,
        tmp_path / "two",
        "--n",
        32,
        "--train",
        20,
        "--val",
        0,
        "--test",
        0,
        "--other",
        2,
    ]
    subprocess.run([*map(str, command), "--workers", "2"], check=True, capture_output=True)
    gone = tmp_path / "two" / "train" / "train_00007.fits"
    gone.unlink()
    kept = (tmp_path / "two" / "train" / "train_00008.fits").stat().st_mtime_ns
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert (tmp_path / "two" / "train" / "train_00008.fits").stat().st_mtime_ns == kept
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 24
    assert [sha256(tmp_path / "one" / f) for f in files] == [sha256(tmp_path / "two" / f) for f in files]
    with fits.open(tmp_path / "one" / "train" / "train_00000.fits") as opened:
        assert [unit.name for unit in opened[1:]] == ["KAPPA", "WIENER", "ROOTINVN", "MASK"]
        assert np.array_equal(np.isnan(opened["KAPPA"].data), opened["MASK"].data == 1)
        assert np.array_equal(opened["ROOTINVN"].data == 0, opened["MASK"].data == 1)
        assert opened["ROOTINVN"].data.max() == 1


def test_maps_of_other_settings_are_not_mixed_in(maps: ModuleType, tmp_path: Path) -> None:
    maps.write_set(tmp_path, maps.Setting(size=32), {"train": 1})
    maps.write_set(tmp_path, maps.Setting(size=32), {"train": 2})
    for setting, seed in ((maps.Setting(size=32, gaussian=True), 0), (maps.Setting(size=32), 1)):
        with pytest.raises(InputError, match="holds maps of other settings"):
            maps.write_set(tmp_path, setting, {"train": 3}, seed)
    assert len(list((tmp_path / "train").iterdir())) == 2


def test_no_seed_occurs_in_two_parts(maps: ModuleType, tmp_path: Path) -> None:
    counts = {"train": 40, "val": 3, "test": 17, "other": 3}
    work = list(maps.jobs(tmp_path, maps.Setting(), counts, 1, False))
    seeds = [seed for job in work for seed in job.seeds] + [maps.SURVEY + 10_000_000]
    assert len(set(seeds)) == sum(counts.values()) + 1
    surveys = {job.folder.name: {one.survey_seed for one in work if one.folder == job.folder} for job in work}
    assert len(surveys["train"] | surveys["val"] | surveys["test"]) == 1
    assert len(surveys["other"] - surveys["test"]) == 3
