"""Heads: from the decoder's features to what is predicted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from densepred.models.layers import conv


class SegmentationHead(nn.Module):
    """Scores (logits) of exclusive classes by a convolution of one voxel.

    Example:
        >>> import torch
        >>> SegmentationHead(2, 8, 3)(torch.zeros(1, 8, 5, 6)).shape
        torch.Size([1, 3, 5, 6])
    """

    def __init__(self, dims: int, in_channels: int, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes!r}")
        self.conv = conv(dims, in_channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> logits (B, K, *spatial)."""
        out: Tensor = self.conv(x)
        return out


HEADS: dict[str, Callable[[int, int, int], nn.Module]] = {"segmentation": SegmentationHead}
