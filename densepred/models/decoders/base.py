"""What every decoder promises."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Decoder(nn.Module):
    """A network that turns an encoder's feature maps into maps up to the size of the image.

    Attributes:
        channels: channels of each map it gives, finest first.
        strides: voxels of the image per voxel of each map and axis; the first is 1 along each.
    """

    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def forward(self, features: list[Tensor], size: Sequence[int]) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, and the image's size -> [(B, channels[i], *ceil(size / strides[i]))]."""
        raise NotImplementedError
