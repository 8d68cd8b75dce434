"""Make weak-lensing mass maps with known truth: `python data/mass_maps.py OUT --train 2000 --val 100 --test 1000`.

A map is the convergence kappa of a patch of flat sky, 128 x 128 pixels of 2 arcmin, periodic. It is lognormal (or, with
`--gaussian`, Gaussian with the same two-point function). Galaxies measure its shear with noise, more of them here than
there, none behind the survey's border and bright stars. The Wiener filter, which is optimal among linear filters and
for Gaussian maps among all, gives a first estimate from the shear, for a network to better.

Written are `train/`, `val/` and `test/` with a FITS file for each map, and `other/` with other masks and another
skewness. In a file lie KAPPA, the truth (NaN where masked), WIENER, ROOTINVN, one over the noise of a pixel in units of
the deepest, MASK (1 where nothing was measured) and, with `--shear`, GAMMA1 and GAMMA2. `maps.csv` lists the maps. No
seed occurs in two parts; the same seed gives the same bytes, in any number of processes, and what is there stays.

The toy of Jeffrey et al. 2020 (DeepMass, arXiv:1908.00543), without the survey's cosmology: not to be compared number
by number.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from densepred.errors import InputError
from densepred.files import atomic_path, atomic_write, sweep_parts, writable_folder
from densepred.progress import progress

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

ARCMIN = np.pi / 180 / 60
SHAPE_NOISE = 0.26  # of the ellipticity, per component
BORDER, HOLES, RADII = 6, 25, (1.0, 4.0)  # pixels without galaxies: the survey's border, stars and their radii
DEPTH, COARSE = 0.1, 8.0  # relative spread of the density of galaxies, and its scale in pixels
ITERATIONS = 40  # of conjugate gradients
AT_ONCE = 16  # maps filtered together
SEEDS = {"train": 0, "val": 1_000_000, "test": 2_000_000, "other": 3_000_000}
"""Where the seeds of each part begin; a set of another seed begins ten millions further on."""
SURVEY, OTHER_SURVEY = 9_000_000, 9_000_001
"""Added to the seed's ten millions: mask and depth of the first three parts, and of the first map of `other`."""
OTHER_KAPPA0 = 0.03


@dataclass(frozen=True)
class Setting:
    """What a set of maps is like.

    Attributes:
        size: N, pixels along both axes.
        pixel: side of a pixel in arcmin.
        n_gal: galaxies per square arcmin.
        kappa0: kappa is above -kappa0; the smaller, the more skewed.
        gaussian: a Gaussian map with the same two-point function instead.
    """

    size: int = 128
    pixel: float = 2.0
    n_gal: float = 30.0
    kappa0: float = 0.02
    gaussian: bool = False


@dataclass(frozen=True)
class Survey:
    """Where and how well shear is measured, arrays (Y, X).

    Attributes:
        mask: true where it is not.
        inverse_variance: of each component of the shear, zero where masked.
    """

    mask: NDArray[np.bool_]
    inverse_variance: Array

    @property
    def depth(self) -> Array:
        """One over the noise, the largest 1."""
        root = np.sqrt(self.inverse_variance)
        return root / root.max()


@dataclass(frozen=True)
class Maps:
    """Maps (B, Y, X) of some seeds: the truth, and shear with noise, zero where masked."""

    kappa: Array
    shear: Complex


def wave_numbers(setting: Setting) -> tuple[Array, Array]:
    """Angular wave numbers ly, lx in rad^-1 on the half plane (N, N // 2 + 1) of a real transform."""
    step = setting.pixel * ARCMIN
    ly, lx = np.fft.fftfreq(setting.size, step), np.fft.rfftfreq(setting.size, step)
    return tuple(np.meshgrid(2 * np.pi * ly, 2 * np.pi * lx, indexing="ij"))  # type: ignore[return-value]


def power(setting: Setting) -> Array:
    """Variance that each mode adds to a pixel, times N^2: C_l / pixel^2 (N, N // 2 + 1), zero at l = 0.

    The dimensionless power l^2 C_l / (2 pi) is 6e-5 (l/1000)^0.7 / [(1 + (150/l)^2) (1 + (l/6000)^1.5)].
    """
    ly, lx = wave_numbers(setting)
    ell = np.hypot(ly, lx)
    ell[0, 0] = 1
    dimensionless = 6e-5 * (ell / 1000) ** 0.7 / ((1 + (150 / ell) ** 2) * (1 + (ell / 6000) ** 1.5))
    out: Array = 2 * np.pi * dimensionless / ell**2 / (setting.pixel * ARCMIN) ** 2
    out[0, 0] = 0
    return out


def shear_kernel(setting: Setting) -> tuple[Array, Array]:
    """What turns kappa's modes into those of gamma 1 and 2 (Kaiser & Squires 1993); both zero at l = 0."""
    ly, lx = wave_numbers(setting)
    square = lx**2 + ly**2
    square[0, 0] = 1
    return (lx**2 - ly**2) / square, 2 * lx * ly / square


def _transform(maps: Array) -> Complex:
    return np.fft.rfft2(maps)


def _back(modes: Complex, setting: Setting) -> Array:
    return np.fft.irfft2(modes, s=(setting.size, setting.size))


def convergence(setting: Setting, seed: int) -> Array:
    """One map kappa (N, N): kappa0 (exp(g - var(g) / 2) - 1) of a Gaussian field g, whose correlations are such that
    kappa's are those of `power`."""
    white = _transform(np.random.default_rng(seed).normal(size=(setting.size, setting.size)))
    if setting.gaussian:
        return _back(white * np.sqrt(power(setting)), setting)
    correlation = np.log1p(_back(power(setting).astype(complex), setting) / setting.kappa0**2)
    spectrum = np.maximum(_transform(correlation).real, 0)
    field = _back(white * np.sqrt(spectrum), setting)
    variance = _back(spectrum.astype(complex), setting)[0, 0]
    out: Array = setting.kappa0 * (np.exp(field - variance / 2) - 1)
    return out


def survey(setting: Setting, seed: int) -> Survey:
    """Mask and noise: Poisson numbers of galaxies of a smoothly varying density, a border and holes without any."""
    rng, size = np.random.default_rng(seed), setting.size
    ly, lx = wave_numbers(setting)
    smooth = np.exp(-((np.hypot(ly, lx) * COARSE * setting.pixel * ARCMIN) ** 2) / 2)
    relief = _back(_transform(rng.normal(size=(size, size))) * smooth, setting)
    density = np.exp(DEPTH * (relief - relief.mean()) / relief.std())
    galaxies = rng.poisson(setting.n_gal * setting.pixel**2 * density / density.mean())
    mask = np.ones((size, size), bool)
    mask[BORDER : size - BORDER, BORDER : size - BORDER] = False
    rows, columns = np.indices(mask.shape)
    for (y, x), radius in zip(rng.uniform(0, size, (HOLES, 2)), rng.uniform(*RADII, HOLES), strict=True):
        mask |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    mask |= galaxies == 0
    return Survey(mask, np.where(mask, 0, galaxies / SHAPE_NOISE**2))


def observe(setting: Setting, seen: Survey, seeds: list[int]) -> Maps:
    """The maps of these seeds and their shear with noise in a survey."""
    kappa = np.stack([convergence(setting, seed) for seed in seeds])
    modes = _transform(kappa)
    first, second = (_back(kernel * modes, setting) for kernel in shear_kernel(setting))
    noise = np.stack([np.random.default_rng([seed, 1]).normal(size=(2, *kappa.shape[1:])) for seed in seeds])
    sigma = np.divide(1, np.sqrt(seen.inverse_variance), out=np.zeros(kappa.shape[1:]), where=~seen.mask)
    shear = first + 1j * second + sigma * (noise[:, 0] + 1j * noise[:, 1])
    return Maps(kappa, np.where(seen.mask, 0, shear))


def kaiser_squires(setting: Setting, shear: Complex) -> Array:
    """The direct inversion (B, Y, X), which knows neither noise nor mask."""
    first, second = shear_kernel(setting)
    return _back(first * _transform(shear.real) + second * _transform(shear.imag), setting)


def wiener(setting: Setting, seen: Survey, shear: Complex, iterations: int = ITERATIONS) -> Array:
    """The Wiener filter's kappa (B, Y, X): (1 + S^1/2 A^T N^-1 A S^1/2) x = S^1/2 A^T N^-1 d, kappa = S^1/2 x.

    Solved by conjugate gradients for the modes of x, each map for itself; A is `shear_kernel`, S `power`.
    """
    root, (first, second) = np.sqrt(power(setting)), shear_kernel(setting)
    twice = np.full(root.shape, 2.0)  # the half plane stands for both halves
    twice[:, 0] = 1
    if setting.size % 2 == 0:
        twice[:, -1] = 1

    def adjoint(one: Array, two: Array) -> Complex:
        weighted = (_transform(seen.inverse_variance * part) for part in (one, two))
        out: Complex = root * sum(kernel * modes for kernel, modes in zip((first, second), weighted, strict=True))
        return out

    def apply(x: Complex) -> Complex:
        return x + adjoint(*(_back(kernel * root * x, setting) for kernel in (first, second)))

    def inner(a: Complex, b: Complex) -> Array:
        return (twice * (a * b.conj()).real).sum((-2, -1), keepdims=True)

    residual = adjoint(shear.real, shear.imag)
    x, direction, norm = np.zeros_like(residual), residual, inner(residual, residual)
    for _ in range(iterations):
        image = apply(direction)
        step = norm / np.maximum(inner(direction, image), np.finfo(float).tiny)
        x, residual = x + step * direction, residual - step * image
        before, norm = norm, inner(residual, residual)
        direction = residual + norm / np.maximum(before, np.finfo(float).tiny) * direction
    return _back(root * x, setting)


@dataclass(frozen=True)
class Job:
    """Some maps to make, all in one survey."""

    folder: Path
    setting: Setting
    survey_seed: int
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    shear: bool


def make(job: Job) -> int:
    """Write the maps of a job that are not there yet; how many the job has."""
    wanted = [(name, seed) for name, seed in zip(job.names, job.seeds, strict=True) if not _path(job, name).exists()]
    if wanted:
        seen = survey(job.setting, job.survey_seed)
        maps = observe(job.setting, seen, [seed for _, seed in wanted])
        filtered = wiener(job.setting, seen, maps.shear)
        for (name, seed), kappa, shear, estimate in zip(wanted, maps.kappa, maps.shear, filtered, strict=True):
            planes = {"KAPPA": np.where(seen.mask, np.nan, kappa), "WIENER": estimate, "ROOTINVN": seen.depth}
            if job.shear:
                planes |= {"GAMMA1": shear.real, "GAMMA2": shear.imag}
            _write(_path(job, name), planes, seen.mask, job.setting, seed)
    return len(job.names)


def _path(job: Job, name: str) -> Path:
    return job.folder / f"{name}.fits"


def _write(path: Path, planes: dict[str, Array], mask: NDArray[np.bool_], setting: Setting, seed: int) -> None:
    cards = [
        ("PIXEL", setting.pixel, "[arcmin] side of a pixel"),
        ("NGAL", setting.n_gal, "[arcmin-2] galaxies"),
        ("KAPPA0", setting.kappa0, "kappa is above -KAPPA0"),
        ("GAUSSIAN", setting.gaussian, "a Gaussian map"),
        ("SEED", seed, "of the random numbers"),
    ]
    images = [fits.ImageHDU(plane.astype(np.float32), name=name) for name, plane in planes.items()]
    units = [fits.PrimaryHDU(header=fits.Header(cards)), *images, fits.ImageHDU(mask.astype(np.uint8), name="MASK")]
    with atomic_path(path) as part:
        fits.HDUList(units).writeto(part)


def jobs(out: Path, setting: Setting, counts: dict[str, int], seed: int, shear: bool) -> Iterator[Job]:
    """The work, in portions; each map of `other` has a survey of its own."""
    base = seed * 10_000_000
    for part, number in counts.items():
        other = part == "other"
        here = replace(setting, kappa0=OTHER_KAPPA0) if other else setting
        at_once = 1 if other else AT_ONCE
        for start in range(0, number, at_once):
            numbers = range(start, min(start + at_once, number))
            names = tuple(f"{part}_{index:05d}" for index in numbers)
            seeds = tuple(base + SEEDS[part] + index for index in numbers)
            yield Job(out / part, here, base + (OTHER_SURVEY + start if other else SURVEY), names, seeds, shear)


def write_set(
    out: Path, setting: Setting, counts: dict[str, int], seed: int = 0, workers: int = 1, shear: bool = False
) -> None:
    """Write the parts with so many maps each, and `maps.csv`.

    Raises:
        InputError: the folder holds maps of other settings.
    """
    said, kept = json.dumps(asdict(setting) | {"seed": seed, "shear": shear}), writable_folder(out) / "setting.json"
    if kept.exists() and kept.read_text() != said:
        raise InputError(f"holds maps of other settings: {kept.read_text()}", "choose another folder", out)
    atomic_write(kept, said)
    for part in counts:
        sweep_parts(writable_folder(out / part))
    work = list(jobs(out, setting, counts, seed, shear))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "part", "file", "seed", "n_gal", "kappa0", "gaussian"])
    for job in work:
        for name, number in zip(job.names, job.seeds, strict=True):
            part, here = job.folder.name, job.setting
            writer.writerow([name, part, f"{part}/{name}.fits", number, here.n_gal, here.kappa0, here.gaussian])
    atomic_write(out / "maps.csv", table.getvalue())
    with progress(sum(counts.values()), "maps") as advance:
        if workers < 2:
            for job in work:
                advance(make(job))
            return
        with ProcessPoolExecutor(workers) as pool:
            for done in pool.map(make, work):
                advance(done)


def main() -> None:
    """Parse the command line and write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write to")
    for part, number in {"train": 2000, "val": 100, "test": 1000, "other": 0}.items():
        parser.add_argument(f"--{part}", type=int, default=number, help=f"maps of this part (default {number})")
    parser.add_argument("--n", type=int, default=128, help="pixels along both axes (default 128)")
    parser.add_argument("--n-gal", type=float, default=30.0, help="galaxies per square arcmin (default 30)")
    parser.add_argument("--kappa0", type=float, default=0.02, help="the smaller, the more skewed (default 0.02)")
    parser.add_argument("--gaussian", action="store_true", help="Gaussian maps, for which Wiener's filter is optimal")
    parser.add_argument("--shear", action="store_true", help="write the shear too")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another survey and other maps")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    given = parser.parse_args()
    counts = {part: number for part in SEEDS if (number := getattr(given, part))}
    setting = Setting(given.n, n_gal=given.n_gal, kappa0=given.kappa0, gaussian=given.gaussian)
    try:
        write_set(given.out, setting, counts, given.seed, given.workers, given.shear)
    except InputError as error:
        raise SystemExit(str(error)) from error
    print(f"{sum(counts.values())} maps in {given.out}")


if __name__ == "__main__":
    main()
