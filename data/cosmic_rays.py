"""Make telescope images with cosmic rays and their labels: `python data/cosmic_rays.py OUT --train 160 --test 40`.

An image is one exposure in electrons. Stars are Moffat profiles, galaxies elliptical exponentials; the sky and they
come with Poisson noise, the read-out with Gaussian noise. Cosmic rays are straight tracks of few to many pixels, with a
fluctuating charge that diffuses by a third of a pixel, and know nothing of the point spread function. Of three kinds of
field, `sparse` holds some galaxies and stars, `crowded` 600 stars per 256 x 256 pixels, and `nebular` a resolved galaxy
of 10,000 faint stars in glowing gas. The training set takes turns between them, at random exposure times and skies.

A label is 1 where cosmic rays left more than three times the noise that the pixel has without them, 0 elsewhere, and
255 where nothing can be said: at saturated and hot pixels and in bad columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy import ndimage, signal, special

from densepred.files import atomic_path, writable_folder

Array = NDArray[np.float64]

SKY, READ_NOISE, EXPOSURE = 60.0, 5.0, 900.0  # electrons per pixel, electrons, seconds
FULL_WELL = 10_000.0  # electrons; what is above reads so
FWHM, BETA = 2.2, 2.5  # pixels, the slope of Moffat's wings
ALPHA = FWHM / (2 * np.sqrt(2 ** (1 / BETA) - 1))
TRACKS, FIELD = 60, 256**2  # cosmic rays in an exposure of EXPOSURE over so many pixels
LAYER, LONGEST, STEP = 7.5, 30.0, 0.25  # pixels: thickness of the sensitive layer, limit and step of a track
DIFFUSION = 0.35  # pixels
THRESHOLD = 3.0  # of the local noise
SKY_SHARE, EXPOSURES = (-0.9, 3.0), (0.5, 2.0)  # training: a in (1 + a) SKY; times as long, log-uniform
RAY, IGNORED = 1, 255
SEEDS = {"train": 0, "sparse": 1_000_000, "crowded": 2_000_000, "nebular": 3_000_000}
"""Where the seeds of each part begin; a set of another seed begins ten millions further on."""


@dataclass(frozen=True)
class Scene:
    """One exposure, arrays (Y, X) in electrons.

    Attributes:
        image: what is read out, float32.
        label: uint8, 0 for none, 1 for cosmic rays, 255 for unknown.
        expected: sky and sources without noise.
        charge: what the cosmic rays left.
        exposure: times as long as EXPOSURE.
        kind: of the field.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    expected: Array
    charge: Array
    exposure: float
    kind: str


def make_scene(kind: str, seed: int, size: int = 256, augment: bool = False) -> Scene:
    """One exposure; the same arguments give the same bits.

    Args:
        kind: sparse, crowded or nebular.
        seed: of every random number.
        size: pixels along both axes.
        augment: draw the exposure time and the sky; otherwise they are EXPOSURE and SKY.
    """
    rng, shape = np.random.default_rng(seed), (size, size)
    exposure = float(np.exp(rng.uniform(*np.log(EXPOSURES)))) if augment else 1.0
    sky = SKY * (1 + rng.uniform(*SKY_SHARE)) if augment else SKY
    expected = exposure * (sky + FIELDS[kind](rng, shape))
    charge = cosmic_rays(rng, shape, exposure)
    hot, gain = defects(rng, shape)
    electrons = rng.poisson(expected * gain + exposure * hot) + charge * gain
    image = np.minimum(electrons + rng.normal(0, READ_NOISE, shape), FULL_WELL)
    label = (charge > THRESHOLD * noise(expected)).astype(np.uint8) * RAY
    label[(image >= FULL_WELL) | (hot > 0) | (gain != 1)] = IGNORED
    return Scene(image.astype(np.float32), label, expected, charge, exposure, kind)


def noise(expected: Array) -> Array:
    """Standard deviation in electrons of pixels that expect so many (*any): Poisson's and the read-out's."""
    return np.sqrt(expected + READ_NOISE**2)


def cosmic_rays(rng: np.random.Generator, shape: tuple[int, int], exposure: float) -> Array:
    """The charge (Y, X) of the tracks that hit the field, some from outside.

    Directions are isotropic through a plane (the cosine of the incidence is the root of a uniform number), charges
    lognormal around 900 electrons, shared along the track with a tail that falls as the square, like Landau's.
    """
    margin = LONGEST + 4
    area = (shape[0] + 2 * margin) * (shape[1] + 2 * margin)
    number = rng.poisson(TRACKS * exposure * area / FIELD)
    cosine = np.sqrt(rng.uniform(size=number))
    length = np.minimum(LAYER * np.sqrt(1 - cosine**2) / cosine, LONGEST)
    steps = np.maximum(np.ceil(length / STEP).astype(int), 1)
    track = np.repeat(np.arange(number), steps)
    along = np.concatenate([(np.arange(n) + 0.5) / n for n in steps] or [np.zeros(0)]) * length[track]
    angle = rng.uniform(0, 2 * np.pi, number)[track]
    start = rng.uniform(-margin, np.array(shape) + margin, (number, 2))[track]
    weight = 1 + rng.pareto(1, len(track))
    energy = 900 * np.exp(rng.normal(0, 0.8, number))
    share = weight / np.bincount(track, weight, number)[track]
    return deposit(
        shape, start[:, 0] + along * np.sin(angle), start[:, 1] + along * np.cos(angle), energy[track] * share
    )


def deposit(shape: tuple[int, int], y: Array, x: Array, charge: Array) -> Array:
    """Charge (n,) at the points (y, x), (n,) each, diffused and collected by the pixels: (Y, X).

    A pixel collects the exact integral of a Gaussian of DIFFUSION; pixel (0, 0) reaches from -0.5 to 0.5.
    """
    reach = np.arange(-2, 3)

    def collect(position: Array) -> tuple[NDArray[np.int64], Array]:
        pixels = np.rint(position).astype(np.int64)[:, None] + reach
        edges = special.ndtr((np.stack([pixels - 0.5, pixels + 0.5]) - position[:, None]) / DIFFUSION)
        return pixels, edges[1] - edges[0]

    (rows, down), (columns, across) = collect(y), collect(x)
    inside = ((rows >= 0) & (rows < shape[0]))[:, :, None] & ((columns >= 0) & (columns < shape[1]))[:, None, :]
    place = rows[:, :, None] * shape[1] + columns[:, None, :]
    amount = charge[:, None, None] * down[:, :, None] * across[:, None, :]
    return np.bincount(place[inside], amount[inside], shape[0] * shape[1]).reshape(shape).astype(np.float64)


def stars(rng: np.random.Generator, shape: tuple[int, int], number: float, decades: tuple[float, float]) -> Array:
    """Stars (Y, X), `number` per 256 x 256 pixels on average, with fluxes log-uniform between powers of ten."""
    image, count = np.zeros(shape), rng.poisson(number * shape[0] * shape[1] / FIELD)
    positions, fluxes = rng.uniform(-0.5, np.array(shape) - 0.5, (count, 2)), 10 ** rng.uniform(*decades, count)
    for position, flux in zip(positions, fluxes, strict=True):
        peak = flux * (BETA - 1) / (np.pi * ALPHA**2)
        radius = int(ALPHA * (peak / 0.05) ** (1 / (2 * BETA))) + 2  # beyond, a twentieth of an electron
        first = np.maximum(np.rint(position).astype(int) - radius, 0)
        cut = tuple(slice(a, max(int(p) + radius + 2, 0)) for a, p in zip(first, position, strict=True))
        window = image[cut]
        dy, dx = (np.arange(n) + a - p for n, a, p in zip(window.shape, first, position, strict=True))
        window += peak * (1 + (dy[:, None] ** 2 + dx**2) / ALPHA**2) ** -BETA
    return image


def galaxies(rng: np.random.Generator, shape: tuple[int, int], number: float) -> Array:
    """Elliptical exponential discs (Y, X), half-light radii of 2 to 10 pixels, blurred like the stars."""
    image = np.zeros(shape)
    for _ in range(rng.poisson(number * shape[0] * shape[1] / FIELD)):
        centre, flux, radius = rng.uniform(0, shape), 10 ** rng.uniform(2.5, 5), rng.uniform(2, 10)
        image += flux * _disc(shape, centre, radius, rng.uniform(0.3, 1), rng.uniform(0, np.pi))
    return _blur(image)


def _disc(shape: tuple[int, int], centre: Array, radius: float, axis_ratio: float, angle: float) -> Array:
    """An exponential disc of total flux 1 with the half-light radius along its long axis, in the middle of pixels."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    dy, dx = y - centre[0], x - centre[1]
    long, short = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    scale = radius / 1.678347  # half of the light lies within so many scale lengths
    return np.exp(-np.hypot(long, short / axis_ratio) / scale) / (2 * np.pi * axis_ratio * scale**2)


def _blur(image: Array) -> Array:
    """Convolved with the point spread function, its wings cut at 12 pixels; what lies beyond the edges is mirrored."""
    y, x = np.ogrid[-12:13, -12:13]
    kernel = (1 + (y**2 + x**2) / ALPHA**2) ** -BETA
    return signal.oaconvolve(np.pad(image, 12, "reflect"), kernel / kernel.sum(), "valid")


def nebula(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Glowing gas with filaments (Y, X), over a disc that is larger than the field, and 10,000 faint stars."""
    clumps = np.zeros(shape)
    for scale in (2, 5, 12, 30):
        wave = ndimage.gaussian_filter(rng.normal(size=shape), scale, mode="wrap")
        clumps += (wave - wave.mean()) / wave.std() * np.sqrt(scale / 49)
    centre = rng.uniform(0.25, 0.75, 2) * shape
    disc = _disc(shape, centre, rng.uniform(60, 120), rng.uniform(0.4, 1), rng.uniform(0, np.pi))
    return 100 * disc / disc.max() * _blur(np.exp(clumps)) + stars(rng, shape, 10_000, (1.0, 3.0))


FIELDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "sparse": lambda rng, shape: galaxies(rng, shape, 15) + stars(rng, shape, 15, (2, 5)),
    "crowded": lambda rng, shape: stars(rng, shape, 600, (2, 5)),
    "nebular": lambda rng, shape: nebula(rng, shape) + stars(rng, shape, 15, (2, 5)),
}
"""Electrons (Y, X) in an exposure of EXPOSURE, without sky, by the kind of field."""


def defects(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Array, Array]:
    """The sensor's (Y, X): electrons that hot pixels add in EXPOSURE, and the share of the light that a pixel reads."""
    hot = np.where(rng.uniform(size=shape) < 2e-4, 10 ** rng.uniform(2, 4, shape), 0.0)
    gain = np.ones(shape)
    gain[:, rng.integers(0, shape[1], rng.poisson(0.5 * shape[1] / 256))] = 0.3
    return hot, gain


def write_set(out: Path, train: int, test: int, size: int, seed: int) -> None:
    """Write the folders `train` and, for each kind of field, `test/KIND`, each with `images` and `labels`."""
    kinds = list(FIELDS)
    parts = {"train": train, **dict.fromkeys(kinds, test)}
    for part, number in parts.items():
        folder = out / part if part == "train" else out / "test" / part
        for name in ("images", "labels"):
            writable_folder(folder / name)
        for index in range(number):
            kind = kinds[index % len(kinds)] if part == "train" else part
            scene_seed = seed * 10_000_000 + SEEDS[part] + index
            scene = make_scene(kind, scene_seed, size, augment=part == "train")
            _save(folder / "images" / f"{part}_{index:04d}.fits", scene.image, _cards(scene, scene_seed))
            _save(folder / "labels" / f"{part}_{index:04d}.fits", scene.label, fits.Header([("SEED", scene_seed)]))


def _cards(scene: Scene, seed: int) -> fits.Header:
    """What the image's header says."""
    cards = [
        ("BUNIT", "electron", "sky not subtracted"),
        ("GAIN", 1.0, "electrons per unit of the image"),
        ("RDNOISE", READ_NOISE, "[electron] read-out noise"),
        ("SATURATE", FULL_WELL, "[electron] saturated from here"),
        ("EXPTIME", scene.exposure * EXPOSURE, "[s] exposure time"),
        ("OBJECT", scene.kind, "kind of the field"),
        ("SEED", seed, "of the random numbers"),
    ]
    return fits.Header(cards)


def _save(path: Path, array: NDArray[np.float32] | NDArray[np.uint8], header: fits.Header) -> None:
    with atomic_path(path) as part:
        fits.PrimaryHDU(array, header).writeto(part, checksum=False)


def main() -> None:
    """Parse the command line and write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--train", type=int, default=160, help="training images (default 160)")
    parser.add_argument("--test", type=int, default=40, help="test images of each kind of field (default 40)")
    parser.add_argument("--size", type=int, default=256, help="pixels along both axes (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images (default 0)")
    arguments = parser.parse_args()
    write_set(arguments.out, arguments.train, arguments.test, arguments.size, arguments.seed)
    print(f"{arguments.train} training images and {arguments.test} test images of each kind in {arguments.out}")


if __name__ == "__main__":
    main()
