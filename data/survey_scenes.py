"""Make labelled scenes of survey images: `python data/survey_scenes.py FOLDER OUT --scenes 8`.

FOLDER holds cut-outs as survey pipelines write them, three files each with the same name but for `ooi` (image), `ood`
(data quality, 0 where good) and `oow` (weight, 0 where the value is not to be trusted). Pipelines give what they flag
no weight, and often replace it by interpolation: it counts as invalid here, and is too little to learn from. Artefacts
to learn from are therefore implanted, as MaxiMask does it: hot pixels, bad columns, cosmic rays and trails of
satellites, each in units of the local noise, into `--scenes` copies of every cut-out.

A scene has four files with the header, and so the world coordinates, of its cut-out: `ID_ooi.fits`, `ID_oow.fits` as it
was, `ID_ood.fits` with the pipeline's flags and 64 where an artefact was implanted, and `ID_labels.fits`: 0 sky, 1
source, 2 artefact. A source is what stands out by 3 sigma in the smoothed cut-out over 5 connected pixels or more.

Reference: Paillassa et al. 2020, A&A 634, A48 (MaxiMask), section 3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from astropy.io import fits
from cosmic_rays import cosmic_rays
from numpy.typing import NDArray
from scipy import ndimage

from densepred.cases.normalize import fit
from densepred.config.normalize import Background
from densepred.errors import InputError
from densepred.files import atomic_path, writable_folder
from densepred.volumes import Volume

Array = NDArray[np.float64]

SKY, SOURCE, ARTEFACT = 0, 1, 2
IMPLANTED = 64
"""The flag of implanted artefacts."""
SMOOTHING, DETECTION, LEAST = 1.2, 3.0, 5  # pixels, sigma, pixels
VISIBLE = 3.0  # sigma from which an implanted pixel is an artefact
MESH = 48  # pixels of a box of the background


def background(image: Array, valid: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Local background and noise (Y, X) of an image, from its valid pixels."""
    volume = Volume.from_array(np.where(valid, image, np.nan), (1.0, 1.0))
    fitted = fit(volume, [Background(mesh=MESH)])
    whole = tuple(slice(0, size) for size in image.shape)
    level = fitted.inverse(np.zeros((1, *image.shape)), whole)[0]
    return level, fitted.inverse(np.ones((1, *image.shape)), whole)[0] - level


def sources(image: Array, valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where sources are (Y, X): connected pixels above DETECTION in the image smoothed like the seeing."""
    level, noise = background(image, valid)
    significance = np.where(valid, (image - level) / noise, 0)
    impulse = np.zeros((31, 31))
    impulse[15, 15] = 1
    shrink = np.sqrt(np.square(ndimage.gaussian_filter(impulse, SMOOTHING)).sum())  # of independent noise
    found, count = ndimage.label(ndimage.gaussian_filter(significance, SMOOTHING) > DETECTION * shrink, np.ones((3, 3)))
    sizes = np.bincount(found.ravel(), minlength=count + 1)
    return (found > 0) & (sizes[found] >= LEAST)


def artefacts(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """What is added to an image, in units of its noise (Y, X)."""
    added = cosmic_rays(rng, shape, exposure=rng.uniform(0.5, 2)) / 30  # electrons; a noise of 30 is a bright sky's
    hot = rng.uniform(size=shape) < 5e-4
    added[hot] += 10 ** rng.uniform(1, 2.3, int(hot.sum()))
    for column in rng.integers(0, shape[1], rng.poisson(1.0)):
        first = int(rng.integers(0, shape[0] // 2))
        added[first : first + int(rng.integers(shape[0] // 4, shape[0])), column] += rng.choice((-1, 1)) * rng.uniform(
            5, 40
        )
    for _ in range(rng.poisson(0.4)):
        added += trail(rng, shape)
    return added


def trail(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """A satellite: a straight line through the field with a Gaussian profile, in units of the noise (Y, X)."""
    angle, (y0, x0) = rng.uniform(0, np.pi), rng.uniform(0, shape)
    y, x = np.ogrid[: shape[0], : shape[1]]
    distance = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
    return rng.uniform(4, 20) * np.exp(-0.5 * (distance / rng.uniform(1, 2)) ** 2)


def make_scene(image: Array, quality: NDArray[np.int32], weight: Array, seed: int) -> dict[str, np.ndarray]:
    """One scene of a cut-out: its planes `ooi`, `ood`, `oow` and `labels`, all (Y, X)."""
    valid = (quality == 0) & (weight > 0)
    added = artefacts(np.random.default_rng(seed), image.shape)
    noise = background(image, valid)[1]
    labels = np.where(sources(image, valid), SOURCE, SKY).astype(np.uint8)
    labels[np.abs(added) > VISIBLE] = ARTEFACT
    flags = quality | np.where(labels == ARTEFACT, np.int32(IMPLANTED), np.int32(0))
    return {"ooi": (image + added * noise).astype(np.float32), "ood": flags, "oow": weight, "labels": labels}


def write_scenes(folder: Path, out: Path, scenes: int, seed: int) -> int:
    """Write the scenes of every cut-out below `folder`; returns how many cut-outs there are.

    Raises:
        InputError: two have one name.
    """
    writable_folder(out)
    images = sorted(folder.rglob("*_ooi_*.fits"))
    names = [path.name.split("_ooi_")[0] for path in images]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        what = f"several cut-outs are called {', '.join(twice)}"
        raise InputError(what, "give each another name before _ooi_", folder)
    for number, path in enumerate(images):
        planes = {name: path.with_name(path.name.replace("_ooi_", f"_{name}_")) for name in ("ooi", "ood", "oow")}
        arrays = {name: fits.getdata(file, 1) for name, file in planes.items()}
        header = fits.getheader(path, 1)
        quality, weight = arrays["ood"].astype(np.int32), arrays["oow"].astype(np.float32)
        for scene in range(scenes):
            made = make_scene(arrays["ooi"].astype(np.float64), quality, weight, seed + 1000 * number + scene)
            for name, array in made.items():
                target = out / f"{names[number]}_{scene:02d}_{name}.fits"
                with atomic_path(target) as part:
                    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(array, header)]).writeto(
                        part, output_verify="silentfix"
                    )
    return len(images)


def main() -> None:
    """Parse the command line and write the scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the cut-outs are, in folders of any depth")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--scenes", type=int, default=8, help="copies of every cut-out (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other artefacts (default 0)")
    arguments = parser.parse_args()
    try:
        count = write_scenes(arguments.folder, arguments.out, arguments.scenes, arguments.seed)
    except InputError as error:
        raise SystemExit(str(error)) from error
    if not count:
        parser.error(f"no *_ooi_*.fits below {arguments.folder}")
    print(f"{count * arguments.scenes} scenes of {count} cut-outs in {arguments.out}")


if __name__ == "__main__":
    main()
