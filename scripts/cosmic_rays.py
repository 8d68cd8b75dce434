"""Cosmic rays: make the images, train the recipe on them, and compare what it finds with astroscrappy.

    python scripts/cosmic_rays.py --out runs/cosmic_rays --seeds 5

Writes `table.md`, `roc.png` and `scores.json`. A rate is counted over all pixels of a kind of field whose truth is
known; the truth is what data/cosmic_rays.py says. The exit status is 1 where a demand of the table's last lines fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy import ndimage

from densepred.config import load as load_config
from densepred.figures import COLORS, INK, new_figure, save_png
from densepred.files import atomic_write, writable_folder

if TYPE_CHECKING:
    from densepred.inference.predictor import Predictor

ROOT = Path(__file__).parent.parent
KINDS = ("sparse", "crowded", "nebular")
LIMITS = (1e-4, 5e-4, 5e-3)
"""False-positive rates to compare at."""
RAY, IGNORED = 1, 255
SIGCLIP, SIGFRAC = (2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 25.0, 50.0, 100.0), (0.1, 0.3, 0.6, 1.0)
OBJLIM, FSMODE = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0), ("median", "convolve")
PROBE = 3
"""Images on which all settings of astroscrappy are tried; those near the best go on to all images."""
TILED = 1e-5
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""False- and true-positive rates, both ascending."""


def roc(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> Curve:
    """The curve from (0, 0) to (1, 1) over all thresholds, one point for each distinct score.

    Args:
        scores: (n,), higher where a cosmic ray is more likely.
        truth: (n,), is there one?
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(truth[order], dtype=np.int64)
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # equal scores are found together
    true, false = found[last], last + 1 - found[last]
    return np.append(0, false / max(false[-1], 1)), np.append(0, true / max(true[-1], 1))


def rate_at(curve: Curve, limit: float) -> float:
    """The highest true-positive rate whose false-positive rate is not above the limit."""
    return float(curve[1][np.searchsorted(curve[0], limit, side="right") - 1])


def hull(points: Sequence[tuple[float, float]]) -> Curve:
    """The upper convex hull of (false, true) rates with (0, 0) and (1, 1).

    Its chords are reached by drawing between two settings (Fawcett 2006, doi:10.1016/j.patrec.2005.10.010).
    """
    kept: list[tuple[float, float]] = []
    for point in sorted({(0.0, 0.0), (1.0, 1.0), *points}):
        while len(kept) > 1 and _turn(kept[-2], kept[-1], point) >= 0:
            kept.pop()
        kept.append(point)
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def reached(points: Sequence[tuple[float, float]]) -> list[float]:
    """The rates of false positives that some setting reaches; below, a hull says only that nothing need be found."""
    lowest = min((false for false, true in points if true > 0), default=1.0)
    return [limit for limit in LIMITS if limit >= lowest]


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Positive where the way from a over b to c turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def images(data: Path, kind: str) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    """The test images of a kind of field and their labels (Y, X)."""
    for path in sorted((data / "test" / kind / "images").glob("[!.]*.fits")):
        yield path, fits.getdata(path.parent.parent / "labels" / path.name)


def log_odds(predictor: Predictor, path: Path) -> NDArray[np.float32]:
    """Logarithm of the odds of a cosmic ray at each pixel (Y, X)."""
    from densepred.cases.case import Case
    from densepred.cases.preprocess import open_image

    with open_image(Case(path.stem, (path,)), predictor.plan) as volume:
        return np.concatenate([(p.logits[1] - p.logits[0]).cpu().numpy() for p in predictor.stream(volume)])


def network_curve(predictor: Predictor, data: Path, kind: str) -> Curve:
    """The network's curve over all test images of a kind of field."""
    scores, truth = [], []
    for path, label in images(data, kind):
        known = label != IGNORED
        scores.append(log_odds(predictor, path)[known])
        truth.append(label[known] == RAY)
    return roc(np.concatenate(scores), np.concatenate(truth))


Setting = tuple[float, float, float, str]


def astroscrappy_points(data: Path, kind: str) -> list[tuple[float, float]]:
    """Rates of astroscrappy at many settings: all on a few images, the promising ones on all.

    It is told what it can know: gain, read noise, saturation, the true point spread function, and the pixels whose
    truth is unknown, which the network is not told. What it finds is taken as it is and grown by a pixel.
    """
    exposures = [
        (fits.getdata(path).astype(np.float32), fits.getheader(path), label) for path, label in images(data, kind)
    ]
    every: list[Setting] = list(itertools.product(SIGCLIP, SIGFRAC, OBJLIM, FSMODE))
    tried = {setting: _rates(setting, exposures[:PROBE]) for setting in every}
    best = hull([point for points in tried.values() for point in points])

    def promising(point: tuple[float, float]) -> bool:
        return point[0] <= 4 * LIMITS[-1] and point[1] > float(np.interp(point[0], *best)) - 0.02

    kept = [setting for setting, points in tried.items() if any(promising(point) for point in points)]
    return [point for setting in kept for point in _rates(setting, exposures)]


def _rates(
    setting: Setting, exposures: Sequence[tuple[NDArray[np.float32], fits.Header, NDArray[np.uint8]]]
) -> list[tuple[float, float]]:
    """(false, true) rate of a setting's mask, and of the mask grown by a pixel."""
    from astroscrappy import detect_cosmics

    counts = np.zeros((2, 2), np.int64)  # as found and grown, false and true
    rays = others = 0
    for image, header, label in exposures:
        mask, _ = detect_cosmics(
            image,
            inmask=label == IGNORED,
            sigclip=setting[0],
            sigfrac=setting[1],
            objlim=setting[2],
            fsmode=setting[3],
            gain=header["GAIN"],
            readnoise=header["RDNOISE"],
            satlevel=header["SATURATE"],
            psfmodel="moffat",
            psffwhm=2.2,
            psfbeta=2.5,
        )
        for row, found in zip(counts, (mask, ndimage.binary_dilation(mask)), strict=True):
            row += np.bincount(label[found & (label != IGNORED)] == RAY, minlength=2)
        rays, others = rays + int((label == RAY).sum()), others + int((label == 0).sum())
    return [(float(row[0] / others), float(row[1] / rays)) for row in counts]


def tiled_difference(run: Path, path: Path) -> float:
    """The largest difference in probability between a prediction by windows and one of the whole image at once."""
    from densepred import load

    size = list(fits.getdata(path).shape)
    tiled, whole = (log_odds(load(run, given), path) for given in ([], [f"inference.window={size}"]))
    return float(np.abs(_probability(tiled) - _probability(whole)).max())


def _probability(log_odds: NDArray[np.float32]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-log_odds.astype(np.float64)))


def table(ours: dict[str, list[Curve]], theirs: dict[str, Curve], limits: dict[str, list[float]]) -> str:
    """True-positive rates at the false-positive rates, in Markdown; the spread is over the trainings."""
    head = [f"{100 * limit:g} %" for limit in LIMITS]
    lines = ["| field | | " + " | ".join(head) + " |", "|---" * (2 + len(LIMITS)) + "|"]
    for kind in ours:
        cells = []
        for limit in LIMITS:
            rates = [rate_at(curve, limit) for curve in ours[kind]]
            spread = f" ± {np.std(rates, ddof=1):.4f}" if len(rates) > 1 else ""
            cells.append(f"**{np.mean(rates):.4f}**{spread}")
        lines.append(f"| {kind} | U-Net | " + " | ".join(cells) + " |")
        peer = [f"{np.interp(limit, *theirs[kind]):.4f}" if limit in limits[kind] else "-" for limit in LIMITS]
        lines.append("| | astroscrappy | " + " | ".join(peer) + " |")
    return "\n".join(lines) + "\n"


def draw(ours: dict[str, list[Curve]], theirs: dict[str, Curve], path: Path) -> None:
    """A panel for each kind of field: the curves of all trainings and of astroscrappy."""
    figure = new_figure(4.2 * len(ours), 3.9)
    panels = figure.subplots(1, len(ours), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, ours, strict=True):
        for number, curve in enumerate(ours[kind]):
            near = curve[0] < 0.1
            panel.plot(curve[0][near], curve[1][near], color=COLORS[5], lw=1.2, label=None if number else "U-Net")
        rates = np.geomspace(1e-5, max(theirs[kind][0][:-1]), 400)  # chords bend on a logarithmic axis
        panel.plot(rates, np.interp(rates, *theirs[kind]), color=COLORS[6], lw=1.2, label="astroscrappy, best settings")
        panel.plot(theirs[kind][0][1:-1], theirs[kind][1][1:-1], "o", color=COLORS[6], ms=3)
        for limit in LIMITS:
            panel.axvline(limit, color=INK, lw=0.6, ls=":")
        panel.set(xscale="log", xlim=(1e-5, 0.1), ylim=(0, 1.01), title=kind, xlabel="false-positive rate")
    panels[0].set_ylabel("true-positive rate")
    panels[0].legend(loc="lower right", frameon=False)
    save_png(figure, path)


def demands(
    ours: dict[str, list[Curve]], theirs: dict[str, Curve], limits: dict[str, list[float]], tiled: float
) -> dict[str, bool]:
    """What must hold of every training, in words."""
    sparse = min(rate_at(curve, LIMITS[-1]) for curve in ours["sparse"])
    out = {f"sparse: {sparse:.4f} of the rays at {100 * LIMITS[-1]:g} % false, at least 0.95": sparse > 0.95}
    for kind, curves in ours.items():
        ahead = [rate_at(c, limit) - np.interp(limit, *theirs[kind]) for c in curves for limit in limits[kind]]
        said = f"at {len(limits[kind])} of {len(LIMITS)} rates, which its settings reach"
        least = min(ahead, default=float("nan"))
        out[f"{kind}: ahead of astroscrappy by at least {least:.4f} {said}"] = bool(least > 0)
    out[f"windows differ from the whole image by {tiled:.1e} in probability, at most {TILED:g}"] = tiled <= TILED
    return out


def run(*arguments: object) -> None:
    """Run one Python program, its output going where ours goes."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=ROOT)


def prepare(arguments: argparse.Namespace, out: Path) -> list[Path]:
    """Make the images and train; the runs."""
    make, seed = ROOT / "data" / "cosmic_rays.py", ("--seed", arguments.data_seed)
    run(make, out / "data", "--train", arguments.train, "--test", arguments.test, *seed)
    run(make, out / "large", "--train", 0, "--test", 1, "--size", arguments.large, *seed)
    settings = [f"data.root={out / 'data' / 'train'}", f"data.cache={out / 'cache'}", *arguments.overrides]
    if arguments.steps:
        epoch = load_config(arguments.config).training.steps
        settings.append(f"training.epochs={max(1, arguments.steps // epoch)}")
    runs = [out / f"run_{seed}" for seed in range(arguments.seeds)]
    for number, folder in enumerate(runs):
        run("-m", "densepred", "train", arguments.config, *settings, f"training.seed={number}", "--run", folder)
    return runs


def main() -> None:
    """Parse the command line and go the whole road."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for images, runs and results")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "cosmic_rays_unet2d.yaml")
    parser.add_argument("--seeds", type=int, default=1, help="trainings, each with its own seed (default 1)")
    parser.add_argument("--steps", type=int, help="steps of a training, instead of the recipe's")
    parser.add_argument("--train", type=int, default=160, help="training images (default 160)")
    parser.add_argument("--test", type=int, default=40, help="test images of each kind of field (default 40)")
    parser.add_argument("--data-seed", type=int, default=1, help="of the images (default 1; the recipe was found on 0)")
    parser.add_argument("--large", type=int, default=603, help="pixels of the image for the windows (default 603)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of the recipe")
    arguments = parser.parse_args()
    from densepred import load

    out = writable_folder(arguments.out.resolve())
    predictors = [load(folder) for folder in prepare(arguments, out)]
    ours = {kind: [network_curve(one, out / "data", kind) for one in predictors] for kind in KINDS}
    points = {kind: astroscrappy_points(out / "data", kind) for kind in KINDS}
    theirs = {kind: hull(found) for kind, found in points.items()}
    limits = {kind: reached(found) for kind, found in points.items()}
    large = next(iter(images(out / "large", "crowded")))[0]
    found = demands(ours, theirs, limits, tiled_difference(out / "run_0", large))
    text = table(ours, theirs, limits) + "".join(
        f"\n- [{'x' if holds else ' '}] {what}" for what, holds in found.items()
    )
    rates = {kind: [[rate_at(c, limit) for limit in LIMITS] for c in curves] for kind, curves in ours.items()}
    peer = {kind: np.interp(LIMITS, *curve).tolist() for kind, curve in theirs.items()}
    scores = {"limits": LIMITS, "unet": rates, "astroscrappy": peer, "demands": found}
    atomic_write(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    atomic_write(out / "table.md", text + "\n")
    draw(ours, theirs, out / "roc.png")
    print(text)
    raise SystemExit(0 if all(found.values()) else 1)


if __name__ == "__main__":
    main()
