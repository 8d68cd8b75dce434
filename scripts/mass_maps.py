"""Mass maps: make them, train the recipe on them, and compare with the Wiener filter it starts from.

    python scripts/mass_maps.py --out runs/massmap --train 10000 --workers 8

Once more on Gaussian maps of the same power, for which no method can beat the filter: what is gained there beyond one
per cent would be a leak, and what is lost a network that has not learnt enough to prove anything. Writes `table.md`,
`scores.json`, `spectra.png` and `maps.png`. Errors are over the pixels that were observed, of test maps whose seeds no
training saw. The exit status is 1 where a demand of the table's last lines fails. The maps are a lognormal toy: not to
be compared with published numbers one to one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from densepred import config as configuration
from densepred.figures import COLORS, INK, new_figure, save_png
from densepred.files import atomic_write, writable_folder
from densepred.metrics import MapErrors, Spectra

ROOT = Path(__file__).parent.parent
GAIN, LEAK = 0.15, 0.01
"""How far below the filter's the mean squared error must be; and how near to it on Gaussian maps."""
RINGS = np.geomspace(80, 5400, 13)
"""Edges of the rings of multipoles."""
ARCMIN = np.pi / 180 / 60
METHODS = ("Wiener filter", "U-Net")
Map = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What is found over the test maps, by method.

    Attributes:
        errors: of each method, over all pixels.
        each: of each method the mean squared error of each map.
        correlations: of each method the mean over the maps of Pearson's r.
        spectra: of each method.
        example: truth, the filter's map and the network's, of the first.
    """

    errors: dict[str, MapErrors]
    each: dict[str, list[float]]
    correlations: dict[str, float]
    spectra: dict[str, Spectra]
    example: list[Map]

    @property
    def gain(self) -> float:
        """By what share the network's mean squared error is below the filter's."""
        return 1 - self.errors[METHODS[1]].mse / self.errors[METHODS[0]].mse

    @property
    def spread(self) -> float:
        """Standard error of the gain, over the maps."""
        filtered, found = (np.array(self.each[method]) for method in METHODS)
        apart = (found - (1 - self.gain) * filtered) / filtered.mean()
        return float(apart.std(ddof=1) / np.sqrt(len(apart))) if len(apart) > 1 else float("nan")


def run(*arguments: object) -> None:
    """Run one Python program, its output going where ours goes."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=ROOT)


def trained(arguments: argparse.Namespace, out: Path, *options: str) -> tuple[Path, Path]:
    """Make maps, train on them and predict the test maps; the folders of test maps and predictions."""
    counts = ("--train", arguments.train, "--val", 0, "--test", arguments.test, "--workers", arguments.workers)
    kind = ("--n-gal", arguments.n_gal, "--kappa0", arguments.kappa0, "--seed", arguments.data_seed)
    run(ROOT / "data" / "mass_maps.py", out / "data", *counts, *kind, *options)
    settings = [f"data.root={out / 'data' / 'train'}", *arguments.overrides]
    made = out / "run" / "config.yaml"
    if not made.exists():
        run("-m", "densepred", "train", arguments.config, *settings, "--run", out / "run")
    elif configuration.load(made) == configuration.load(arguments.config, settings):
        run("-m", "densepred", "train", "--resume", out / "run")
    else:
        raise SystemExit(f"{out / 'run'} is of another recipe or other settings: choose another --out")
    run("-m", "densepred", "predict", out / "run", out / "data" / "test", "--out", out / "predicted")
    return out / "data" / "test", out / "predicted" / "regression"


def judged(test: Path, predicted: Path) -> Found:
    """Compare both methods with the truth, map by map."""
    errors = {method: MapErrors() for method in METHODS}
    spectra: dict[str, Spectra] = {}
    each: dict[str, list[float]] = {method: [] for method in METHODS}
    correlations: dict[str, list[float]] = {method: [] for method in METHODS}
    example: list[Map] = []
    for path in sorted(test.glob("*.fits")):
        truth, pixel = fits.getdata(path, "KAPPA").astype(np.float64), fits.getheader(path)["PIXEL"] * ARCMIN
        maps = {METHODS[0]: fits.getdata(path, "WIENER").astype(np.float64), METHODS[1]: _prediction(predicted, path)}
        example = example or [truth, *maps.values()]
        for method, found in maps.items():
            one, power = MapErrors.of(truth, found), Spectra.of(truth, found, float(pixel), RINGS)
            errors[method] += one
            each[method].append(one.mse)
            correlations[method].append(one.pearson)
            spectra[method] = spectra[method] + power if method in spectra else power
    return Found(errors, each, {m: float(np.mean(r)) for m, r in correlations.items()}, spectra, example)


def _prediction(folder: Path, path: Path) -> Map:
    (file,) = folder.glob(f"{path.stem}.fits*")
    with fits.open(file) as opened:
        return next(unit.data for unit in opened if unit.data is not None).squeeze().astype(np.float64)


def draw_spectra(found: Found, path: Path) -> None:
    """Left the correlation r(l) with the truth, right the power over the truth's: smooth maps lack small scales."""
    figure = new_figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    for method, color in zip(METHODS, (COLORS[6], COLORS[5]), strict=True):
        one = found.spectra[method]
        left.plot(one.frequency, one.correlation, ".-", color=color, label=method)
        right.plot(one.frequency, one.ratio, ".-", color=color, label=method)
    right.axhline(1, color=INK, lw=0.8, ls=":")
    left.set(xscale="log", xlabel="multipole l", ylabel="r(l) with the truth", ylim=(0, 1.02))
    right.set(xscale="log", xlabel="multipole l", ylabel="power / power of the truth", ylim=(0, 1.1))
    left.legend(frameon=False)
    save_png(figure, path)


def draw_maps(found: Found, path: Path) -> None:
    """The first test map: truth, both methods, on one scale; white where nothing was observed."""
    figure = new_figure(12.5, 4.2)
    panels = figure.subplots(1, 3)
    hidden = np.isnan(found.example[0])
    for panel, array, title in zip(panels, found.example, ("truth", *METHODS), strict=True):
        shown = panel.imshow(np.where(hidden, np.nan, array), origin="lower", cmap="magma", vmin=-0.02, vmax=0.06)
        panel.set(title=title, xticks=[], yticks=[])
    figure.colorbar(shown, ax=panels, label="kappa", shrink=0.85)
    save_png(figure, path)


def table(parts: dict[str, Found]) -> str:
    """Errors of both methods, in Markdown."""
    lines = ["| maps | | MSE | r | below the filter's MSE |", "|---" * 5 + "|"]
    for part, found in parts.items():
        for method in METHODS:
            gain = f"**{100 * found.gain:.2f} %** ± {100 * found.spread:.2f}" if method == METHODS[1] else ""
            name = part if method == METHODS[0] else ""
            error, r = found.errors[method].mse, found.correlations[method]
            lines.append(f"| {name} | {method} | {error:.4e} | {r:.4f} | {gain} |")
    return "\n".join(lines) + "\n"


def demands(parts: dict[str, Found]) -> dict[str, bool]:
    """What must hold, in words."""
    lognormal = parts["lognormal"]
    gain = lognormal.gain
    out = {f"lognormal: {100 * gain:.2f} % below the filter, at least {100 * GAIN:g} %": gain >= GAIN}
    if "Gaussian" in parts:
        gain = parts["Gaussian"].gain
        out[f"Gaussian: {100 * gain:.2f} % below the filter, within {100 * LEAK:g} % of it"] = abs(gain) <= LEAK
    return out


def main() -> None:
    """Parse the command line and go the whole road."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for maps, runs and results")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "massmap_unet2d.yaml")
    parser.add_argument("--train", type=int, default=10_000, help="training maps (default 10000)")
    parser.add_argument("--test", type=int, default=1000, help="test maps (default 1000)")
    parser.add_argument("--n-gal", type=float, default=30.0, help="galaxies per square arcmin (default 30)")
    parser.add_argument("--kappa0", type=float, default=0.02, help="the smaller, the more skewed (default 0.02)")
    parser.add_argument("--data-seed", type=int, default=0, help="of the maps")
    parser.add_argument("--workers", type=int, default=1, help="processes that make maps (default 1)")
    parser.add_argument("--no-control", action="store_true", help="leave out the Gaussian maps")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of the recipe")
    arguments = parser.parse_args()
    out = writable_folder(arguments.out.resolve())
    parts = {"lognormal": judged(*trained(arguments, out / "lognormal"))}
    if not arguments.no_control:
        parts["Gaussian"] = judged(*trained(arguments, out / "gaussian", "--gaussian"))
    found = demands(parts)
    text = table(parts) + "".join(f"\n- [{'x' if holds else ' '}] {what}" for what, holds in found.items())
    scores = {
        part: {"gain": one.gain, "spread": one.spread, **{m: one.errors[m].mse for m in METHODS}}
        for part, one in parts.items()
    }
    atomic_write(out / "scores.json", json.dumps({"parts": scores, "demands": found}, indent=2) + "\n")
    atomic_write(out / "table.md", text + "\n")
    draw_spectra(parts["lognormal"], out / "spectra.png")
    draw_maps(parts["lognormal"], out / "maps.png")
    print(text)
    raise SystemExit(0 if all(found.values()) else 1)


if __name__ == "__main__":
    main()
