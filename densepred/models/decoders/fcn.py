"""Fully convolutional networks (Long, Shelhamer and Darrell 2015), for any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.blocks import ConvBlock, Style
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.unet import stride_ratio
from densepred.models.layers import CONVOLUTIONS, conv, fill_bilinear_, fit, transposed_conv
from densepred.models.upsampling import enlarge

MAPS = {32: 1, 16: 2, 8: 3}
"""Maps that each network of the family scores, by the stride that the finest of them has on VGG."""
FC_DROPOUT = 0.5


class LinearUpsampling(nn.Module):
    """Upsampling by whole factors that is linear interpolation, or starts as that and learns.

    The last voxels are repeated beyond the border, so that a constant stays constant up to it.

    Args:
        dims: 2 or 3.
        channels: C.
        ratio: factor along each axis.
        learn: by a transposed convolution without bias, two strides wide, that starts as interpolation.

    Example:
        >>> import torch
        >>> LinearUpsampling(2, 1, (1, 2), True)(torch.tensor([[[[0.0, 4.0]]]]), (1, 3)).tolist()
        [[[[0.0, 1.0, 3.0]]]]
    """

    own_initialization = True

    def __init__(self, dims: int, channels: int, ratio: tuple[int, ...], learn: bool) -> None:
        super().__init__()
        self.ratio = ratio
        self.layer: nn.Module | None = None
        if learn and max(ratio) > 1:
            kernel = tuple(2 * s - s % 2 for s in ratio)
            self.layer = fill_bilinear_(transposed_conv(dims, channels, channels, ratio, bias=False, kernel=kernel))

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(B, C, *spatial) -> (B, C, *size), size at most spatial * ratio."""
        if self.layer is None:
            return enlarge(x, self.ratio, size)
        spatial = x.shape[2:]
        x = self.layer(_widened(x))
        for axis, (n, s) in enumerate(zip(spatial, self.ratio, strict=True), start=2):
            x = x.narrow(axis, s, n * s)
        return fit(x, size)

    def reset_parameters(self) -> None:
        """Back to linear interpolation."""
        if self.layer is not None:
            fill_bilinear_(self.layer)


def _widened(x: Tensor) -> Tensor:
    """The first and last voxels along each axis once more: (B, C, *spatial) -> (B, C, *(spatial + 2))."""
    if not x.is_cuda:
        return F.pad(x, [1, 1] * (x.ndim - 2), mode="replicate")
    for axis in range(2, x.ndim):  # there the gradient of that is added up in whatever order threads come
        x = torch.cat([x.narrow(axis, 0, 1), x, x.narrow(axis, x.shape[axis] - 1, 1)], axis)
    return x


class _ScoreLayers(nn.ModuleList):
    own_initialization = True


class FCNDecoder(Decoder):
    """Scores of the coarsest maps, upsampled and summed from coarse to fine, then upsampled to the image.

    On VGG16's pools with `fc_channels=4096` it is the published network but for the borders: those padded the image
    by 100 voxels and cut the surplus off the scores; here 7x7 convolutions are padded to keep the grid, and
    upsampling is aligned by its own geometry. The parameters are the same.

    Args:
        dims: 2 or 3.
        channels: channels of the encoder's maps, finest first.
        strides: cumulative strides of the encoder's maps.
        outputs: scores per voxel, K.
        stride: 32, 16 or 8: the coarsest map alone is scored, or with it the next finer one or two. On encoders other
            than VGG their strides may differ from this number.
        fc_channels: channels of fc6 and fc7, the classifier's layers turned into convolutions, each with dropout of
            one half; by default there are none, and the coarsest map is scored as it is.
        fc_kernel: odd kernel of fc6.
        style: norm and activation of fc6 and fc7, by default none and relu as published; dropout before the coarsest
            scores where there is no fc6.
        learn_upsampling: by transposed convolutions that start as linear interpolation; otherwise it is interpolation
            and stays so, as the released networks' frozen filters.
        at_once: finer maps are scaled by 0.01 and 0.0001 before they are scored, which lets the network be trained at
            once instead of from FCN-32s over FCN-16s.

    Raises:
        ValueError: another stride, fewer maps than it takes, strides that are no multiples of the finer ones.

    Example:
        >>> import torch
        >>> maps = [torch.zeros(1, 4, 7, 6), torch.zeros(1, 8, 4, 3)]
        >>> FCNDecoder(2, (4, 8), ((2, 2), (4, 4)), outputs=3, stride=16)(maps, (13, 12))[0].shape
        torch.Size([1, 3, 13, 12])
    """

    scores = True

    def __init__(
        self,
        dims: int,
        channels: Sequence[int],
        strides: Sequence[tuple[int, ...]],
        outputs: int,
        stride: int = 32,
        fc_channels: int | None = None,
        fc_kernel: int = 7,
        style: Style | None = None,
        learn_upsampling: bool = True,
        at_once: bool = False,
    ) -> None:
        super().__init__()
        style = style or Style("none", "relu")
        maps = _maps_for(stride, strides)
        inputs, grids = list(channels[-maps:]), [(1,) * dims, *strides[-maps:]]
        self.fc = nn.Sequential(style.make_dropout(dims))
        if fc_channels is not None:
            fc6 = ConvBlock(dims, inputs[-1], fc_channels, fc_kernel, style=style.of_vectors())
            fc7 = ConvBlock(dims, fc_channels, fc_channels, 1, style=style.of_vectors())
            self.fc = nn.Sequential(fc6, nn.Dropout(FC_DROPOUT), fc7, nn.Dropout(FC_DROPOUT))
            inputs[-1] = fc_channels
        self.score_layers = _ScoreLayers(conv(dims, c, outputs, 1) for c in inputs)
        ratios = [stride_ratio(coarse, fine) for fine, coarse in pairwise(grids)]
        self.ups = nn.ModuleList(LinearUpsampling(dims, outputs, ratio, learn_upsampling) for ratio in ratios)
        self.step_scale = 0.01 if at_once else 1.0
        self.channels, self.strides = (outputs,), ((1,) * dims,)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the scores from zero and the upsampling from linear interpolation, as published."""
        for module in [*self.score_layers, *self.ups]:
            if isinstance(module, LinearUpsampling):
                module.reset_parameters()
            elif isinstance(module, CONVOLUTIONS):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, features: list[Tensor], size: Sequence[int], switches: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, and the image's size -> [(B, K, *size)]."""
        *finer, coarsest = features[-len(self.score_layers) :]
        x: Tensor = self.score_layers[-1](self.fc(coarsest))
        scale = 1.0
        for i in reversed(range(len(finer))):
            scale *= self.step_scale
            feature = finer[i] * scale if scale < 1 else finer[i]
            x = self.ups[i + 1](x, feature.shape[2:]) + self.score_layers[i](feature)
        return [self.ups[0](x, size)]


def _maps_for(stride: int, strides: Sequence[tuple[int, ...]]) -> int:
    """How many of the encoder's maps the network takes."""
    if stride not in MAPS:
        raise ValueError(f"stride must be 32, 16 or 8, got {stride!r}")
    if len(strides) < MAPS[stride]:
        enough = min(s for s, maps in MAPS.items() if maps <= len(strides)) if strides else None
        raise ValueError(
            f"stride {stride} takes the coarsest map and {MAPS[stride] - 1} finer, {MAPS[stride]} in all, and the "
            f"encoder gives {len(strides)}, at strides {list(strides)}: take a deeper encoder or stride {enough}"
        )
    return MAPS[stride]
