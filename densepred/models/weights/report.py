"""What is known of a pretraining, and what became of each tensor of a file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pretraining:
    """Where an encoder's weights come from and how the images it was trained on were normalised.

    Args:
        source: such as "torchvision.resnet18.IMAGENET1K_V1", or the name of a local file.
        mean: of each channel, in the units of `range`; empty where it is not known.
        std: of each channel.
        range: what black and white were before normalisation, such as (0, 1) or (0, 255).
        sha256: of the file.
        fresh: names of the encoder's parameters that the file did not have.

    Raises:
        ValueError: as many means as there are not standard deviations, one that is not positive, or an empty range.

    Example:
        >>> grey = Pretraining("x", (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)).for_channels(1)
        >>> grey.normalize(torch.tensor([[[127.5]]]), 0, 255)
        tensor([[[0.]]])
    """

    source: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    range: tuple[float, float] = (0.0, 1.0)
    sha256: str = ""
    fresh: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mean", "std", "range", "fresh"):  # lists, where they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have a number for each channel, got {self.mean} and {self.std}")
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        if len(self.range) != 2 or self.range[0] >= self.range[1]:
            raise ValueError(f"range must be two numbers, the smaller first, got {self.range}")

    def for_channels(self, channels: int) -> Pretraining:
        """The same for an image of so many channels: other than the colours, each gets the average mean and std."""
        if channels == len(self.mean) or not self.mean:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * channels, std=(std,) * channels)

    def normalize(self, image: Tensor, low: float, high: float, axis: int = 0) -> Tensor:
        """Bring an image to the values the network was trained on.

        Args:
            image: (C, *spatial), or (B, C, *spatial) with `axis` 1.
            low: the image's value for black, in its own units.
            high: its value for white; (0, 255) for 8-bit pictures, the limits of the window for a CT.
            axis: of the channels.

        Returns:
            The same shape; floating point.

        Raises:
            ValueError: the normalisation is not known, another number of channels, or `high` is not above `low`.
        """
        if not self.mean:
            raise ValueError(f"the normalisation of {self.source} is not known: give mean and std with the weights")
        if image.shape[axis] != len(self.mean):
            raise ValueError(f"image must have {len(self.mean)} channels on axis {axis}, got {tuple(image.shape)}")
        if not low < high:
            raise ValueError(f"high must be above low, got {low!r} and {high!r}")
        black, white = self.range
        scale = (white - black) / (high - low)
        shape = [-1 if i == axis else 1 for i in range(image.ndim)]
        precision = torch.result_type(image, 1.0)
        mean, std = (torch.tensor(v, dtype=precision, device=image.device).view(shape) for v in (self.mean, self.std))
        return ((image - low) * scale + black - mean) / std


@dataclass(frozen=True)
class Report:
    """What of a file went where: name of each tensor -> its number of values.

    Attributes:
        source: the file, and where it is from.
        loaded: tensors of the encoder that the file filled, in whichever way.
        adapted: those of them fitted to the number of channels.
        inflated: those of them inflated from 2D to 3D.
        missing: tensors of the encoder that the file has not; they keep their fresh values.
        refused: tensors whose shapes differ (only where loading is not strict); they keep their fresh values.
        classifier: tensors of the file that belong to its classifier, not used.
        unexpected: other tensors of the file without a place in the encoder, such as stages it was built without.

    Example:
        >>> print(Report("a.pth", loaded={"conv1.weight": 9408}, adapted={"conv1.weight": 9408}))
        a.pth
          loaded      1 tensor           9,408 values
            adapted   1 tensor           9,408 values: conv1.weight
    """

    source: str
    loaded: dict[str, int] = field(default_factory=dict)
    adapted: dict[str, int] = field(default_factory=dict)
    inflated: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    classifier: dict[str, int] = field(default_factory=dict)
    unexpected: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every tensor of the encoder was filled."""
        return not self.missing and not self.refused

    def __str__(self) -> str:
        rows = [self.source, _row("  loaded", self.loaded)]
        rows += [_row(f"    {kind}", part, 1) for kind in ("adapted", "inflated") if (part := getattr(self, kind))]
        others = ("missing", "refused", "classifier", "unexpected")
        return "\n".join(rows + [_row(f"  {kind}", part, 3) for kind in others if (part := getattr(self, kind))])


def _row(label: str, tensors: dict[str, int], names: int = 0) -> str:
    """One line: how many tensors and values, and the first few names."""
    count = f"{len(tensors)} tensor{' ' if len(tensors) == 1 else 's'}"
    row = f"{label:<13} {count:<11} {sum(tensors.values()):>12,} values"
    return row if not names else f"{row}: {listed(list(tensors), names)}"


def listed(names: Sequence[str], most: int) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
