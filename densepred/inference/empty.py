"""Windows that hold nothing: the network is called once for all that hold the same value everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from densepred.errors import InputError
from densepred.inference.reduce import split
from densepred.inference.ring import Ring

TOLERANCE = 1e-3
"""By how much the probabilities of a skipped window may differ from those that the network gives for it."""
AUDITED = 16
"""Of so many windows that could be skipped, one is predicted all the same and compared."""


class EmptyWindows:
    """Tells windows whose values hardly differ, and knows what the network makes of such.

    A window is empty if in each channel its values span at most `spread`. With 0 these are windows of one value, such
    as masked backgrounds, and skipping them changes nothing. With more, they are predicted as if they held the nearest
    multiple of `spread` everywhere; every sixteenth is predicted as it is, and its probabilities are compared.

    Args:
        spread: the largest difference of two values, in units of the normalised image.
        window: spatial shape.
        predict: windows (1, C, *window) to logits (1, K, *window).
        variance: one more channel follows the logits, which is none of a class.
    """

    def __init__(
        self, spread: float, window: Sequence[int], predict: Callable[[Tensor], Tensor], variance: bool = False
    ) -> None:
        self.spread, self.window, self._predict, self._variance = spread, tuple(window), predict, variance
        self.skipped = 0
        self._known: tuple[tuple[float, ...], Tensor] | None = None

    def values(self, image: Ring, starts: Sequence[Sequence[int]]) -> list[tuple[float, ...] | None]:
        """For each window of a row the value of each channel if it is empty, else None; one wait for the device in all.

        Args:
            image: the planes that all windows of the row hold.
            starts: where windows begin along each axis behind the first, of which they are all combinations.
        """
        low, high = image.planes.amin(1), image.planes.amax(1)
        for axis, (size, begins) in enumerate(zip(self.window[1:], starts, strict=True), start=1):
            low = torch.stack([low.narrow(axis, begin, size).amin(axis) for begin in begins], axis)
            high = torch.stack([high.narrow(axis, begin, size).amax(axis) for begin in begins], axis)
        both = torch.stack([low.flatten(1).T, high.flatten(1).T]).cpu().double()
        return [self._value(low.tolist(), high.tolist()) for low, high in zip(*both, strict=True)]

    def _value(self, low: Sequence[float], high: Sequence[float]) -> tuple[float, ...] | None:
        if not all(b - a <= self.spread for a, b in zip(low, high, strict=True)):  # NaN is never empty
            return None
        if self.spread == 0:
            return tuple(low)
        return tuple(round((a + b) / 2 / self.spread) * self.spread for a, b in zip(low, high, strict=True))

    def logits(self, value: tuple[float, ...], device: torch.device) -> Tensor:
        """The logits (K, *window) of a window that holds this value of each channel everywhere; the last stay."""
        self.skipped += 1
        if self._known is None or self._known[0] != value:
            self._known = None  # its memory is that of the next
            cut = torch.tensor(value, dtype=torch.float32, device=device)
            shape = (1, len(value), *self.window)
            self._known = value, self._predict(cut.view(1, -1, *[1] * len(self.window)).expand(shape).contiguous())[0]
        return self._known[1]

    def audited(self, number: int) -> bool:
        """Whether the window of this number is to be predicted and compared."""
        return self.spread > 0 and number % AUDITED == 0

    def compare(self, value: tuple[float, ...], logits: Tensor) -> None:
        """Compares what the network gives for an empty window, (K, *window), with what would have been taken.

        Raises:
            InputError: they differ by more than the tolerance.
        """
        taken, given = (split(one, self._variance)[0].softmax(0) for one in (self.logits(value, logits.device), logits))
        apart = float((taken - given).abs().max())
        if apart > TOLERANCE:
            what = (
                f"windows whose values span less than {self.spread:g} differ by {apart:.2g} in probability from empty"
            )
            raise InputError(f"{what} ones ({TOLERANCE:g} is allowed)", "lower inference.skip, or leave it out")
