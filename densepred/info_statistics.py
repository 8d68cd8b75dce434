"""Statistics of a volume's values by one pass, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from densepred.volumes import Volume

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
MOST_LABELS = 256
"""Distinct values up to which those of an integer file are counted one by one."""
_BINS, _DROPPED = 1 << 20, 12  # float32 without its last bits: 11 bits of mantissa are left
_SLAB_BYTES = 1 << 23
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Statistics:
    """Of the finite values of one channel.

    Attributes:
        count: of finite values.
        nans, infinities: how many values are none.
        low, high, mean, std: NaN where there is no finite value; std divides by the count.
        percentiles: by percent; exact for integers of up to 16 bits, else within 0.05 % of the value.
        labels: of an integer channel of at most `MOST_LABELS` values, each with how often it occurs; else None.
        bars, edges: a histogram of equal bins from the 0.5th to the 99.5th percentile, what lies outside in the outer.
    """

    count: int
    nans: int
    infinities: int
    low: float
    high: float
    mean: float
    std: float
    percentiles: Mapping[int, float]
    labels: Mapping[int, int] | None
    bars: tuple[int, ...]
    edges: tuple[float, ...]

    def rows(self, width: int) -> list[tuple[str, str]]:
        """Name and text of each line of a table; up to `width` distinct integers are counted, more make a histogram."""
        rows = [("range", f"{self.low:g} to {self.high:g}"), ("mean, std", f"{self.mean:.6g}, {self.std:.6g}")]
        if self.nans or self.infinities:
            total = self.count + self.nans + self.infinities
            share = 100 * (total - self.count) / total
            rows.append(("not finite", f"{self.nans} NaN, {self.infinities} infinite ({share:.3g} %)"))
        rows.append(("percentiles", ", ".join(f"{q} %: {value:.5g}" for q, value in self.percentiles.items())))
        if self.labels is not None and len(self.labels) <= width:
            rows.append(("values", ", ".join(f"{value}: {count}" for value, count in self.labels.items())))
        elif self.count:
            top = max(self.bars)
            picture = "".join(_BLOCKS[-(-bar * (len(_BLOCKS) - 1) // top)] for bar in self.bars)
            rows.append(("histogram", f"{self.edges[0]:.4g} |{picture}| {self.edges[-1]:.4g}"))
        return rows


def gather(volume: Volume, pooled: bool = False) -> tuple[Statistics, ...]:
    """Statistics of each channel, or of all together; the file is verified on the way.

    Raises:
        InputError: the file is damaged.

    Example:
        >>> found = gather(Volume.from_array(np.array([[0.0, 1.0], [2.0, np.nan]]), (1.0, 1.0)))[0]
        >>> found.mean, found.nans
        (1.0, 1)
    """
    plane = volume.dtype.itemsize * int(np.prod(volume.shape, dtype=np.int64)) // volume.shape[1]
    channels = [_Running(volume.dtype) for _ in range(1 if pooled else volume.shape[0])]
    for _, _, slab in volume.slabs(max(1, _SLAB_BYTES // plane)):
        for number, part in enumerate(slab):
            channels[0 if pooled else number].add(part)
    return tuple(channel.result() for channel in channels)


class _Running:
    """Gathers the statistics of one channel."""

    def __init__(self, dtype: np.dtype) -> None:
        self._exact = dtype.kind in "bui" and dtype.itemsize <= 2
        self._start = int(np.iinfo(dtype).min) if self._exact and dtype.kind != "b" else 0
        self._bins = np.zeros(1 << 16 if self._exact else _BINS, np.int64)
        self._count = self._nans = self._infinities = 0
        self._mean = self._squares = 0.0
        self._low, self._high = np.inf, -np.inf
        self._labels: dict[int, int] | None = {} if dtype.kind in "bui" and not self._exact else None

    def add(self, values: np.ndarray) -> None:
        """Count more values, of any shape."""
        values = values.reshape(-1)
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            if not finite.all():
                nans = int(np.isnan(values).sum())
                self._nans += nans
                self._infinities += int(values.size - finite.sum()) - nans
                values = values[finite]
        if not values.size:
            return
        self._low, self._high = min(self._low, values.min().item()), max(self._high, values.max().item())
        self._combine(values)
        self._bins += np.bincount(self._places(values), minlength=len(self._bins))
        if self._labels is not None:
            for value, count in zip(*np.unique(values, return_counts=True), strict=True):
                self._labels[int(value)] = self._labels.get(int(value), 0) + int(count)
            if len(self._labels) > MOST_LABELS:
                self._labels = None

    def _combine(self, values: np.ndarray) -> None:
        """Mean and squared deviations of both parts together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count, mean = values.size, float(values.mean(dtype=np.float64))
        squares = float(np.square(np.subtract(values, mean, dtype=np.float64)).sum())
        total = self._count + count
        apart = mean - self._mean
        self._squares += squares + apart * apart * self._count * (count / total)
        self._mean += apart * (count / total)
        self._count = total

    def _places(self, values: np.ndarray) -> np.ndarray:
        """The bin of each value: the integer itself, or the leading bits of float32 in the order of the numbers."""
        if self._exact:
            return values.astype(np.int64) - self._start
        with np.errstate(over="ignore"):
            bits = values.astype(np.float32).view(np.uint32)
        ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
        return (ordered >> _DROPPED).astype(np.int64)

    def _values(self) -> np.ndarray:
        """The value that stands for each bin: in its middle."""
        if self._exact:
            return np.arange(len(self._bins), dtype=np.float64) + self._start
        ordered = (np.arange(_BINS, dtype=np.uint32) << _DROPPED) + np.uint32(1 << (_DROPPED - 1))
        bits = np.where(ordered >> 31, ordered & np.uint32(0x7FFFFFFF), ~ordered)
        with np.errstate(invalid="ignore"):  # some patterns are no numbers; their bins stay empty
            return bits.view(np.float32).astype(np.float64)

    def result(self) -> Statistics:
        """What was gathered."""
        if not self._count:
            nothing = float("nan")
            return Statistics(0, self._nans, self._infinities, nothing, nothing, nothing, nothing, {}, None, (), ())
        filled = np.flatnonzero(self._bins)
        counts = self._bins[filled]
        values = np.clip(self._values()[filled], self._low, self._high)
        below = np.cumsum(counts)
        wanted = np.array([0.5, *PERCENTILES, 99.5])
        found = values[np.searchsorted(below, np.ceil(wanted / 100 * self._count).clip(1), side="left")].tolist()
        edges = np.linspace(found[0], found[-1] if found[-1] > found[0] else found[0] + 1, 41)
        bars, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges, weights=counts)
        labels = self._labels
        if self._exact and len(filled) <= MOST_LABELS:
            labels = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
        return Statistics(
            self._count,
            self._nans,
            self._infinities,
            float(self._low),
            float(self._high),
            self._mean,
            float(np.sqrt(self._squares / self._count)),
            dict(zip(PERCENTILES, found[1:-1], strict=True)),
            None if labels is None else dict(sorted(labels.items())),
            tuple(bars.astype(int).tolist()),
            tuple(edges.tolist()),
        )
