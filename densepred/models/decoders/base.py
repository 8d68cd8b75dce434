"""What every decoder promises."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Decoder(nn.Module):
    """A network that turns an encoder's feature maps into maps up to the size of the image.

    Attributes:
        channels: channels of each map it gives, finest first.
        strides: voxels of the image per voxel of each map and axis; the first is 1 along each.
        scores: whether the one map it gives holds the outputs of the heads already, as the FCN's does.
        needs_switches: whether it unpools with the encoder's switches.
        own_initialization: whether its weights start as constructed, rather than as `build.initialize` fills them.
    """

    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    scores: bool = False
    needs_switches: bool = False
    own_initialization: bool = False

    def forward(
        self, features: list[Tensor], size: Sequence[int], switches: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, and the image's size -> [(B, channels[i], *ceil(size / strides[i]))].

        `switches`, one for each map, are given where `needs_switches`.
        """
        raise NotImplementedError
