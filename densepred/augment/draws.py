"""Random numbers of one sample: a function of its seed alone, drawn on the CPU so that nothing waits for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Generator, float64, rand

from densepred.config.transforms import Channelwise


class Numbers:
    """Uniform numbers for one transform of one sample.

    Every transform has its own, so what one draws does not move what the others get.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self._values = iter(values)

    def uniform(self) -> float:
        """From 0 to 1."""
        return next(self._values)

    def between(self, limits: tuple[float, float]) -> float:
        """Evenly within limits."""
        return limits[0] + (limits[1] - limits[0]) * self.uniform()

    def around_one(self, limits: tuple[float, float]) -> float:
        """Within limits, below and above 1 equally often, however lopsided they are."""
        side, (low, high) = self.uniform(), limits
        if low < 1 < high:
            low, high = (low, 1.0) if side < 0.5 else (1.0, high)
        return self.between((low, high))

    def fires(self, probability: float) -> bool:
        """True with that probability."""
        return self.uniform() < probability

    def seed(self) -> int:
        """A seed for larger fields of numbers."""
        return int(self.uniform() * 2**53)


def numbers_of(seed: int, transforms: int, channels: int) -> list[Numbers]:
    """The numbers of a sample, for each of its transforms."""
    generator = Generator().manual_seed(int(seed) % 2**63)
    width = 40 + 8 * channels
    return [Numbers(row) for row in rand(transforms, width, dtype=float64, generator=generator).tolist()]


class Change(NamedTuple):
    """What a transform does to one channel of one sample."""

    channel: int
    values: tuple[float, ...]
    seed: int


def changes(
    settings: Channelwise, numbers: Numbers, channels: Sequence[int], count: int = 1, around_one: bool = False
) -> list[Change]:
    """Which channels change, and by what: `count` values each within the settings' range."""
    limits = settings.range  # type: ignore[attr-defined]
    draw = numbers.around_one if around_one else numbers.between
    fires = numbers.fires(settings.probability)
    shared = tuple(draw(limits) for _ in range(count))
    found = []
    for channel in channels:
        chosen = numbers.fires(settings.channels)
        own = tuple(draw(limits) for _ in range(count)) if settings.per_channel else shared
        seed = numbers.seed()
        if fires and chosen:
            found.append(Change(channel, own, seed))
    return found
