"""The cosmic-ray images, against closed forms, and the counting of the benchmark, against brute force."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from astropy.io import fits
from scipy import stats
from scipy.spatial import ConvexHull

from densepred import load
from densepred.files import sha256
from densepred.training.loop import train
from densepred.volumes import open_volume

ROOT = Path(__file__).parent.parent
KINDS = ("sparse", "crowded", "nebular")


def _module(folder: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{folder}_cosmic_rays", ROOT / folder / "cosmic_rays.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make, bench = _module("data"), _module("scripts")


@pytest.fixture(scope="module")
def scenes() -> dict[str, list]:
    return {kind: [make.make_scene(kind, make.SEEDS[kind] + n) for n in range(4)] for kind in KINDS}


def test_a_pixel_collects_the_integral_of_a_gaussian():
    found = make.deposit((9, 11), np.array([4.3]), np.array([5.1]), np.array([700.0]))
    edges = [stats.norm.cdf(np.arange(n + 1) - 0.5, at, 0.35) for n, at in ((9, 4.3), (11, 5.1))]
    np.testing.assert_allclose(found, 700 * np.outer(*(np.diff(edge) for edge in edges)), atol=1e-4)
    assert found.sum() == pytest.approx(700, rel=1e-6)


def test_charge_adds_up_and_leaves_over_the_edges():
    at = np.array([-0.5, 3.0, 20.0]), np.array([2.0, 9.5, 2.0])
    found = make.deposit((10, 10), *at, np.array([100.0, 10.0, 1.0]))
    assert found.sum() == pytest.approx(50 + 5, rel=1e-5), "half of each of two, none of the third"


def test_fields_receive_the_charge_of_the_tracks():
    """The mean of a lognormal, for 60 tracks in a field of 256 x 256; twice as much in twice the time."""
    expected = 60 * 900 * np.exp(0.8**2 / 2)
    for exposure in (1.0, 2.0):
        total = [make.cosmic_rays(np.random.default_rng(n), (256, 256), exposure).sum() for n in range(60)]
        error = exposure * expected * np.sqrt(np.exp(0.8**2) / (60 * exposure * len(total)))
        assert np.mean(total) == pytest.approx(exposure * expected, abs=4 * error)


def test_tracks_have_the_lengths_of_isotropic_rays(monkeypatch: pytest.MonkeyPatch):
    """cos = sqrt(u), so tan > t for a share 1 / (1 + t^2) of them."""
    drawn = []
    monkeypatch.setattr(make, "deposit", lambda shape, y, x, charge: drawn.append((y, x, charge)) or np.zeros(shape))
    lengths = []
    for seed in range(1500):
        make.cosmic_rays(_OneTrack(np.random.default_rng(seed)), (8, 8), 1.0)
        y, x, _ = drawn.pop()
        lengths.append(np.hypot(y[-1] - y[0], x[-1] - x[0]) * len(y) / max(len(y) - 1, 1))
    for limit in (5.0, 10.0, 20.0):
        share = 1 / (1 + (limit / 7.5) ** 2)
        assert np.mean(np.array(lengths) > limit) == pytest.approx(share, abs=4 * np.sqrt(share / 1500))
    assert max(lengths) == pytest.approx(30)


class _OneTrack:
    """A generator whose Poisson numbers are 1."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def poisson(self, mean: float) -> int:
        return 1

    def __getattr__(self, name: str):
        return getattr(self.rng, name)


def test_a_star_is_moffats_profile(monkeypatch: pytest.MonkeyPatch):
    class Centre(_OneTrack):
        def uniform(self, low, high, size):
            return np.full(size, 100.0) if isinstance(size, tuple) else np.full(size, 5.0)

    star = make.stars(Centre(np.random.default_rng(0)), (201, 201), 1, (2, 5))
    alpha = 2.2 / 2 / np.sqrt(2 ** (1 / 2.5) - 1)
    assert star[100, 100] == pytest.approx(1e5 * 1.5 / (np.pi * alpha**2))
    assert star[100, 103] == pytest.approx(star[100, 100] * (1 + 9 / alpha**2) ** -2.5)
    y, x = np.mgrid[-100:101, -100:101]
    inside = 1 - (1 + 15**2 / alpha**2) ** -1.5
    assert star[np.hypot(y, x) < 15].sum() == pytest.approx(1e5 * inside, rel=5e-3)


def test_half_of_a_discs_light_lies_within_its_radius():
    disc = make._disc((301, 301), np.array([150.0, 150.0]), 9.0, 0.5, 0.6)
    y, x = np.mgrid[-150:151, -150:151]
    long, short = x * np.cos(0.6) + y * np.sin(0.6), y * np.cos(0.6) - x * np.sin(0.6)
    assert disc.sum() == pytest.approx(1, rel=0.01)
    assert disc[np.hypot(long, short / 0.5) < 9].sum() == pytest.approx(0.5, abs=0.01)
    flat = make._blur(np.full((40, 40), 3.0))
    np.testing.assert_allclose(flat, 3.0, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_its_expectation_with_its_noise(scenes: dict[str, list], kind: str):
    pulls = []
    for scene in scenes[kind]:
        assert (scene.image.dtype, scene.label.dtype) == (np.float32, np.uint8)
        known = scene.label != 255
        sigma = np.sqrt(scene.expected + 5.0**2)
        pulls.append(((scene.image - scene.expected - scene.charge) / sigma)[known])
        np.testing.assert_array_equal(scene.label[known] == 1, (scene.charge > 3 * sigma)[known])
        assert scene.image.max() <= 10_000
        assert (scene.label[scene.image >= 10_000] == 255).all()
    pulls = np.concatenate(pulls)
    assert pulls.mean() == pytest.approx(0, abs=5 / np.sqrt(len(pulls)))
    assert pulls.std() == pytest.approx(1, abs=0.01)


def test_the_kinds_differ_and_the_rates_are_as_said(scenes: dict[str, list]):
    rays = {kind: np.mean([scene.label == 1 for scene in found]) for kind, found in scenes.items()}
    many = [make.cosmic_rays(np.random.default_rng(n), (256, 256), 1.0) > 3 * np.sqrt(85) for n in range(60)]
    assert np.mean(many) == pytest.approx(0.008, abs=0.0007), "over an empty sky"
    assert all(0.005 < rate < 0.01 for rate in rays.values())
    median = {kind: np.median([scene.expected for scene in found]) for kind, found in scenes.items()}
    bright = {kind: np.mean([scene.expected > 500 for scene in found]) for kind, found in scenes.items()}
    assert median["sparse"] == pytest.approx(60, rel=0.02)
    assert median["nebular"] > 1.3 * median["sparse"]
    assert bright["crowded"] > 5 * max(bright["sparse"], bright["nebular"])


def test_the_seed_decides_every_bit():
    first, again, other = (make.make_scene("crowded", seed, 64, augment=True) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    assert (first.image != other.image).mean() > 0.99
    assert (first.charge != other.charge).any()


def test_exposure_and_sky_are_drawn_as_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(make.FIELDS, "empty", lambda rng, shape: np.zeros(shape))
    drawn = [make.make_scene("empty", seed, 8, augment=True) for seed in range(300)]
    exposures, skies = np.array([(s.exposure, s.expected[0, 0] / s.exposure / 60 - 1) for s in drawn]).T
    assert stats.kstest(np.log2(exposures), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(skies, stats.uniform(-0.9, 3.9).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(exposures, skies)[0, 1]) < 0.2
    plain = make.make_scene("empty", 0, 8)
    assert (plain.exposure, plain.expected[0, 0]) == (1, 60)


def test_the_files_are_a_sound_set(tmp_path: Path):
    command = [sys.executable, str(ROOT / "data" / "cosmic_rays.py"), str(tmp_path / "a")]
    numbers = ["--train", "3", "--test", "1", "--size", "48", "--seed", "2"]
    subprocess.run([*command, *numbers], check=True, cwd=ROOT, env={"PYTHONPATH": "."}, timeout=60)
    make.write_set(tmp_path / "b", train=3, test=1, size=48, seed=2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.fits"))
    assert len(files) == 2 * (3 + 3)
    assert [sha256(tmp_path / "a" / file) for file in files] == [sha256(tmp_path / "b" / file) for file in files]
    seeds, kinds = [], []
    for file in (file for file in files if file.parent.name == "images"):
        image, label = tmp_path / "a" / file, tmp_path / "a" / file.parent.parent / "labels" / file.name
        header = fits.getheader(image)
        assert header["BUNIT"] == "electron"
        assert (header["GAIN"], header["RDNOISE"], header["SATURATE"]) == (1, 5, 10_000)
        assert 450 <= header["EXPTIME"] <= 1800
        assert ("train" in str(file)) or header["EXPTIME"] == 900
        assert open_volume(image).shape == open_volume(label).shape == (1, 48, 48)
        assert set(np.unique(fits.getdata(label))) <= {0, 1, 255}
        seeds.append(header["SEED"])
        kinds.append(header["OBJECT"])
    assert len(set(seeds)) == 6, "no image is in two parts"
    assert sorted(kinds) == sorted(2 * KINDS)
    starts = sorted(make.SEEDS.values())
    assert min(np.diff(starts)) == 1_000_000
    assert starts[-1] + 1_000_000 <= 10_000_000


def _brute(scores: np.ndarray, truth: np.ndarray, limit: float) -> float:
    rates = [(((scores >= t) & ~truth).sum() / (~truth).sum(), (scores[truth] >= t).mean()) for t in np.unique(scores)]
    return max([true for false, true in rates if false <= limit], default=0.0)


@pytest.mark.parametrize("levels", [4, 50, 10**6])
def test_rates_are_those_of_every_threshold(levels: int):
    rng = np.random.default_rng(levels)
    truth = rng.random(400) < 0.2
    scores = rng.integers(0, levels, 400) + levels / 3 * truth
    curve = bench.roc(scores, truth)
    assert (curve[0][0], curve[1][0], curve[0][-1], curve[1][-1]) == (0, 0, 1, 1)
    for limit in (0, 1 / 321, 0.01, 0.05, 0.3, 1):
        assert bench.rate_at(curve, limit) == pytest.approx(_brute(scores, truth, limit), abs=1e-12)


def test_two_gaussians_have_the_curve_of_the_books():
    rng = np.random.default_rng(0)
    truth = np.arange(400_000) < 200_000
    curve = bench.roc(rng.normal(size=400_000) + 2 * truth, truth)
    for limit in (0.005, 0.05, 0.5):
        assert bench.rate_at(curve, limit) == pytest.approx(stats.norm.cdf(stats.norm.ppf(limit) + 2), abs=0.01)


def test_the_hull_is_the_convex_hull():
    points = np.random.default_rng(1).beta(2, 2, (40, 2))
    points[:, 1] = np.maximum(points[:, 0], points[:, 1])
    x, y = bench.hull([(float(a), float(b)) for a, b in points])
    every = np.vstack([points, [(0, 0), (1, 1)]])
    expected = every[ConvexHull(every).vertices]
    upper = {tuple(p) for p in expected if p[1] > p[0] or tuple(p) in ((0, 0), (1, 1))}
    assert {*zip(x.tolist(), y.tolist(), strict=True)} == upper
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) >= 0).all()


def test_astroscrappys_masks_are_counted_over_the_set():
    astroscrappy = pytest.importorskip("astroscrappy")
    header = fits.Header([("GAIN", 1.0), ("RDNOISE", 5.0), ("SATURATE", 10_000.0)])
    made = [make.make_scene("sparse", seed, 96) for seed in (1, 2)]
    (false, true), grown = bench._rates((4.0, 0.3, 5.0, "median"), [(s.image, header, s.label) for s in made])
    given = {"sigclip": 4.0, "sigfrac": 0.3, "objlim": 5.0, "readnoise": 5.0, "satlevel": 1e4}
    masks = [astroscrappy.detect_cosmics(s.image, inmask=s.label == 255, **given)[0] for s in made]
    found, label = np.array(masks), np.array([s.label for s in made])
    assert true == pytest.approx(found[label == 1].mean())
    assert false == pytest.approx(found[label == 0].mean())
    assert 0.3 < true < grown[1]
    assert false < grown[0]


def test_the_recipe_fits_the_files_and_its_predictions_are_ranked(tmp_path: Path):
    make.write_set(tmp_path / "set", train=2, test=2, size=96, seed=1)
    small = ["training.epochs=1", "training.steps=2", "patch.batch=2", "data.folds=2", "training.tensorboard=false"]
    small += [f"data.root={tmp_path / 'set' / 'train'}", "inference.window=[48,48]"]
    train(ROOT / "configs" / "cosmic_rays_unet2d.yaml", tmp_path / "run", small)
    predictor = load(tmp_path / "run")
    path, label = next(bench.images(tmp_path / "set", "sparse"))
    odds = bench.log_odds(predictor, path)
    labels = predictor.predict(path).numpy()[0]
    assert odds.shape == label.shape
    np.testing.assert_array_equal(labels == 1, odds > 0)
    false, true = bench.network_curve(predictor, tmp_path / "set", "sparse")
    assert (false[-1], true[-1]) == (1, 1)
    pixels = sum(int((label != 255).sum()) for _, label in bench.images(tmp_path / "set", "sparse"))
    assert len(false) <= pixels + 1
    assert 0 <= bench.tiled_difference(tmp_path / "run", path) <= 1


def test_the_table_and_the_demands():
    good, bad = (np.array([0, 1e-5, 1.0]), np.array([0, 0.97, 1.0])), (np.array([0, 1.0]), np.array([0, 1.0]))
    least = np.array([0, 1e-4, 1.0]), np.array([0, 1e-4, 1.0])
    ours, theirs = {kind: [good, good] for kind in KINDS}, dict.fromkeys(KINDS, least)
    every, none = ({kind: list(chosen) for kind in KINDS} for chosen in (bench.LIMITS, ()))
    lines = bench.table(ours, theirs, every).splitlines()
    assert lines[2] == "| sparse | U-Net | " + " | ".join(["**0.9700** ± 0.0000"] * 3) + " |"
    assert lines[3] == "| | astroscrappy | 0.0001 | 0.0005 | 0.0050 |"
    assert bench.table(ours, theirs, none).splitlines()[3] == "| | astroscrappy | - | - | - |"
    assert all(bench.demands(ours, theirs, every, 1e-6).values())
    assert list(bench.demands(ours, theirs, none, 0).values()) == [True, False, False, False, True]
    assert list(bench.demands(ours, theirs, every, 1e-4).values()) == [True, True, True, True, False]
    worse = {**ours, "crowded": [good, bad]}
    assert list(bench.demands(worse, theirs, every, 0).values()) == [True, True, False, True, True]
    assert not any(bench.demands({kind: [bad] for kind in KINDS}, dict.fromkeys(KINDS, good), every, 1.0).values())


def test_a_rate_is_reached_by_a_setting_below_the_hull_too():
    low, mid, high = bench.LIMITS
    assert bench.reached([(0.5 * low, 0.1), (2 * high, 0.9)]) == [low, mid, high]
    assert bench.reached([(0.0, 0.0), (1.5 * mid, 0.9)]) == [high]
    assert bench.reached([]) == []
