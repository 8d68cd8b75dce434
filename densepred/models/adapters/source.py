"""Where published weights are, and how the images they were trained on were normalised."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Source:
    """One file of published weights.

    An image `x` of values from 0 to `input_range` was fed as `(x - mean) / std`, channel by channel (red, green, blue).

    Args:
        name: what the weights are called, such as "torchvision.resnet18.IMAGENET1K_V1".
        url: where the file is.
        file: the name to keep it under; no two sources share one.
        sha256: the whole digest in hex, its first digits where only those are known, or None.
        mean: of each channel.
        std: of each channel.
        input_range: the largest value of an image before normalisation: 1 or 255.

    Raises:
        ValueError: a digest that is not lower-case hex, another input range, or as many means as there are not stds.

    Example:
        >>> Source("a.b", "https://x.org/b-0a1b2c3d.pth", "b-0a1b2c3d.pth", "0a1b2c3d", *IMAGENET).input_range
        1
    """

    name: str
    url: str
    file: str
    sha256: str | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_range: int = 1

    def __post_init__(self) -> None:
        if self.sha256 is not None and (set(self.sha256) - set("0123456789abcdef") or not 8 <= len(self.sha256) <= 64):
            raise ValueError(f"sha256 must be 8 to 64 lower-case hex digits or None, got {self.sha256!r}")
        if self.input_range not in (1, 255):
            raise ValueError(f"input_range must be 1 or 255, got {self.input_range!r}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one number per channel each, got {self.mean} and {self.std}")
