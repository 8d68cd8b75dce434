"""The overlap-tile strategy of Ronneberger et al. 2015: a mirrored border, so that valid convolutions lose nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densepred.models.decoders.unet import UNetDecoder
from densepred.models.dense import DensePredictor
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.layers import fit
from densepred.models.valid import ValidPredictor


def mirror(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Extend `x` (B, C, *spatial) by reflection about its first and last voxels, as often as the width takes.

    Args:
        x: an image of any size, also smaller than the border.
        before: voxels to add at the start of each axis.
        after: voxels to add at its end.

    Example:
        >>> mirror(torch.tensor([[[[0, 1, 2]]]]), before=(0, 3), after=(0, 3))[0, 0].tolist()
        [[1, 2, 1, 0, 1, 2, 1, 0, 1]]
    """
    for axis, (first, last) in enumerate(zip(before, after, strict=True), start=2):
        n = x.shape[axis]
        turn = max(2 * (n - 1), 1)  # there and back, without the turning points twice; one voxel stays where it is
        period = torch.full((1,), turn, device=x.device)  # a tensor, for the remainder by a free size has no ONNX form
        places = torch.arange(-first, n + last, device=x.device) % period
        x = x.index_select(axis, torch.minimum(places, period - places))
    return x


class Mirrored(DensePredictor):
    """A network of valid convolutions that sees a mirrored border, so that any image comes back at its own size.

    The border is what the convolutions take off, and as much more at the far end as leads to a size that fits. Weights
    are shared with the network it is made of and bear the same names.

    Args:
        model: a network of valid convolutions.

    Example:
        >>> from densepred.models.presets import unet2015
        >>> with torch.device("meta"):
        ...     Mirrored(unet2015())(torch.zeros(1, 1, 65, 70)).shape
        torch.Size([1, 2, 65, 70])
    """

    def __init__(self, model: ValidPredictor) -> None:
        encoder, decoder = model.encoder, model.decoder
        assert isinstance(encoder, PlainEncoder)
        assert isinstance(decoder, UNetDecoder)
        super().__init__(encoder, decoder, model.dims, model.in_channels, model.specs)
        self.heads = model.heads
        self.axes = model.axes

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """As `DensePredictor`, at the size of `x`.

        Raises:
            ValueError: the input has another number of axes or channels than the model.
        """
        self.check_input(x)
        size = x.shape[2:]
        before, after = [], []
        for axis, n in zip(self.axes, size, strict=True):
            least = axis.smallest - axis.margin  # at most the period, so that no size needs less than it
            surplus = (least - n) % axis.period
            before.append(axis.margin // 2)
            after.append(axis.margin - axis.margin // 2 + surplus)
        outputs = super().forward(mirror(x, before, after), covariates)
        if isinstance(outputs, Tensor):
            return _crop(outputs, size)
        return {name: _crop(output, size) for name, output in outputs.items()}


def _crop(output: Tensor, size: Sequence[int]) -> Tensor:
    """The voxels of the image itself; what is one for the whole image stays as it is."""
    return output if output.ndim == 2 else fit(output, size)
