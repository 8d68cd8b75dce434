"""Power spectra of small maps of the sky, and how they correlate at each scale.

The sky is flat and the maps are taken as periodic. With a pixel of so many radians the wave number is the multipole l.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spectra:
    """Sums of the power of truth, prediction and both over rings of wave number; those of several maps add up.

    Args:
        edges: (n + 1,) rising, of the rings, in radians per unit of the pixel.
        modes: (n,) int64, Fourier modes in each ring, over all maps.
        frequencies: (n,) sum of the modes' wave numbers.
        truth: (n,) sum of the power, in the map's unit squared times the area of a pixel.
        prediction: (n,) the same of the prediction.
        cross: (n,) the same of both.

    Source of the estimator: the flat-sky pseudo-spectrum, Hivon et al. 2002 (astro-ph/0105302), without decoupling.
    """

    edges: np.ndarray
    modes: np.ndarray
    frequencies: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    cross: np.ndarray

    @classmethod
    def of(
        cls,
        truth: np.ndarray,
        prediction: np.ndarray,
        pixel: float | tuple[float, float] = 1.0,
        edges: np.ndarray | int = 16,
    ) -> Spectra:
        """Transform two maps.

        Args:
            truth: float (Y, X), NaN where it is not known. Such pixels are set to the mean in both maps, and the power
                is divided by the share that is known: neighbouring modes mix, so compare ratios rather than values.
            prediction: float (Y, X).
            pixel: its size, of one number or height and width; in radians for multipoles.
            edges: of the rings, or how many of equal width, from half the smallest wave number on to beyond the largest
                along an axis.

        Raises:
            ValueError: the shapes differ or are not 2D, nothing is known, or the edges do not rise.

        Example:
            >>> map = np.cos(2 * np.pi * 3 * np.arange(32) / 32) + np.zeros((32, 1))
            >>> found = Spectra.of(map, 0.5 * map, edges=16)
            >>> at = int(np.argmax(found.power[0]))
            >>> round(float(found.ratio[at]), 6), round(float(found.correlation[at]), 6)
            (0.25, 1.0)
        """
        if truth.ndim != 2 or truth.shape != prediction.shape:
            raise ValueError(f"truth and prediction must be (Y, X) alike, got {truth.shape} and {prediction.shape}")
        known = np.isfinite(truth) & np.isfinite(prediction)
        if not known.any():
            raise ValueError("truth and prediction have no pixel in common that is known")
        sizes = (pixel, pixel) if isinstance(pixel, int | float) else pixel
        waves = [2 * np.pi * np.fft.fftfreq(n, size) for n, size in zip(truth.shape, sizes, strict=True)]
        wave = np.hypot(waves[0][:, None], waves[1])
        if isinstance(edges, int):
            half = min(abs(axis[1]) for axis in waves) / 2
            edges = np.linspace(half, min(np.abs(axis).max() for axis in waves) + half, edges + 1)
        if not (np.diff(edges) > 0).all():
            raise ValueError(f"edges must rise, got {edges}")
        scale = sizes[0] * sizes[1] / known.sum()
        ours, theirs = (
            np.fft.fft2(np.where(known, one - one[known].mean(dtype=np.float64), 0)) for one in (truth, prediction)
        )
        at = np.searchsorted(edges, wave.ravel(), side="right") - 1
        inside = (at >= 0) & (at < len(edges) - 1) & (wave.ravel() > 0)

        def ring(values: np.ndarray) -> np.ndarray:
            return np.bincount(at[inside], values.ravel()[inside], len(edges) - 1)

        powers = (np.abs(ours) ** 2, np.abs(theirs) ** 2, (ours * theirs.conj()).real)
        modes = np.bincount(at[inside], minlength=len(edges) - 1)
        return cls(np.asarray(edges, float), modes, ring(wave), *(scale * ring(power) for power in powers))

    def __add__(self, other: Spectra) -> Spectra:
        if not np.array_equal(self.edges, other.edges):
            raise ValueError("spectra must have the same edges of rings")
        names = ("modes", "frequencies", "truth", "prediction", "cross")
        return Spectra(self.edges, *(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def frequency(self) -> np.ndarray:
        """Mean wave number of each ring (l, of pixels in radians), (n,); nan for a ring without modes, as all here."""
        return _over(self.frequencies, self.modes)

    @property
    def power(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean power of truth, of prediction and of both in each ring: C(l) where the pixel is in radians."""
        return _over(self.truth, self.modes), _over(self.prediction, self.modes), _over(self.cross, self.modes)

    @property
    def ratio(self) -> np.ndarray:
        """Power of the prediction over that of the truth, (n,)."""
        return _over(self.prediction, self.truth)

    @property
    def correlation(self) -> np.ndarray:
        """r(l): the cross power over the root of the product of the two powers, (n,) within -1..1."""
        return _over(self.cross, np.sqrt(self.truth * self.prediction))


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole != 0)
