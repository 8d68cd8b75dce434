"""Networks of valid convolutions, such as the original U-Nets: which sizes they take and give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from densepred.models.decoders.unet import UNetDecoder
from densepred.models.dense import DensePredictor
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.heads import HeadSpec
from densepred.models.layers import CONVOLUTIONS


@dataclass(frozen=True)
class ValidAxis:
    """What a U-Net of valid convolutions does to one axis.

    All sizes it takes are `smallest` and whole numbers of `period` above it, all outputs the input less `margin`.

    Attributes:
        pools: window of the pooling before each stage of the encoder, finest first.
        cuts: voxels that the convolutions of each stage take off.
        up_cuts: voxels that the convolutions of each step of the decoder take off, coarsest first.

    Raises:
        ValueError: an odd number of voxels is taken off, which leaves what remains off centre.

    Example:
        >>> axis = ValidAxis(pools=(1, 2, 2, 2, 2), cuts=(4,) * 5, up_cuts=(4,) * 4)  # the U-Net of 2015
        >>> axis.smallest, axis.period, axis.output(572)
        (188, 16, 388)
    """

    pools: tuple[int, ...]
    cuts: tuple[int, ...]
    up_cuts: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(cut % 2 for cut in (*self.cuts, *self.up_cuts)):
            raise ValueError(f"valid convolutions need odd kernels, got some that take off {self.cuts}, {self.up_cuts}")

    def _surpluses(self) -> list[int]:
        """By how much each skip exceeds the decoder's map, coarsest first; the same for all sizes."""
        found, lost = [], 0  # voxels of the present grid that the decoder's map has lost since the skip's
        for pool, cut, up_cut in zip(self.pools[:0:-1], self.cuts[:0:-1], self.up_cuts, strict=True):
            lost = (lost + cut) * pool
            found.append(lost)
            lost += up_cut
        return found

    @property
    def margin(self) -> int:
        """Voxels by which the output is smaller than the input, both ends together."""
        return self.cuts[0] + (self._surpluses()[-1] + self.up_cuts[-1] if self.up_cuts else 0)

    @property
    def period(self) -> int:
        """The distance of the sizes it takes."""
        total = 1
        for pool in self.pools:
            total *= pool
        return total

    @property
    def smallest(self) -> int:
        """The smallest size it takes."""
        n = 0
        for pool, cut in zip(reversed(self.pools), reversed(self.cuts), strict=True):
            n = (n + cut) * pool
        return n + self.period * max(1, -(-(self.margin + 1 - n) // self.period))

    def output(self, n: int) -> int:
        """The size it makes of `n`.

        Raises:
            ValueError: `n` does not fit; the message says where it stops and which sizes near it fit.
        """
        least, period = self.smallest, self.period
        if n >= least and (n - least) % period == 0:
            return n - self.margin
        below = least + (n - least) // period * period
        near = f"{below} and {below + period}" if n > least else f"{least} and {least + period}"
        raise ValueError(f"{n} voxels do not fit: {self._obstacle(n)}; the nearest sizes that fit are {near}")

    def _obstacle(self, n: int) -> str:
        """Where `n` voxels stop."""
        sizes = [n]
        for stage, (pool, cut) in enumerate(zip(self.pools, self.cuts, strict=True)):
            if n % pool:
                way = " -> ".join(map(str, sizes))
                return f"{n} voxels are left before pooling {stage} ({way}), no multiple of its window {pool}"
            n = n // pool - cut
            sizes.append(n)
            if n < 1:
                return f"the convolutions of stage {stage + 1} take {cut} voxels off the {n + cut} that are left"
        return f"the convolutions of the decoder leave nothing of the {n} voxels of the coarsest map"


def valid_axes(encoder: PlainEncoder, decoder: UNetDecoder) -> tuple[ValidAxis, ...]:
    """What the two do to each axis, from their layers.

    Raises:
        ValueError: the encoder downsamples by strided convolutions, which leave voxels off centre, or in its first
            stage; the decoder pads; kernels are even.

    Example:
        >>> from densepred.models.decoders.unet import UNetOptions
        >>> encoder = PlainEncoder(2, 1, (4, 8), pool="max", padding="valid")
        >>> decoder = UNetDecoder(2, (4, 8), encoder.strides, options=UNetOptions(padding="valid"))
        >>> [(axis.smallest, axis.output(20)) for axis in valid_axes(encoder, decoder)]
        [(18, 4), (18, 4)]
    """
    dims = len(encoder.strides[0])
    windows = [window or (1,) * dims for window in encoder.windows]
    if any(s != 1 for layer in encoder.modules() if isinstance(layer, CONVOLUTIONS) for s in layer.stride):
        raise ValueError("an encoder of valid convolutions downsamples by pool='max', got pool='stride'")
    if not all(step.valid for step in decoder.steps):
        raise ValueError("a decoder of valid convolutions has padding='valid', got padding='same'")
    if max(encoder.strides[0]) > 1:
        raise ValueError(f"an encoder of valid convolutions starts at stride 1, got {encoder.strides[0]}")
    down = [_cuts(stage, dims) for stage in encoder.stages]
    up = [_cuts(step.blocks, dims) for step in decoder.steps]  # type: ignore[arg-type]
    return tuple(
        ValidAxis(tuple(window[axis] for window in windows), tuple(c[axis] for c in down), tuple(c[axis] for c in up))
        for axis in range(dims)
    )


def _cuts(block: nn.Module, dims: int) -> list[int]:
    """Voxels that the convolutions in a block take off each axis; the ones of projections beside them take none."""
    layers = [layer for layer in block.modules() if isinstance(layer, CONVOLUTIONS)]
    return [
        sum(layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 2 * int(layer.padding[axis]) for layer in layers)
        for axis in range(dims)
    ]


class ValidPredictor(DensePredictor):
    """An encoder and a decoder of valid convolutions, and named heads: the output is the middle of the input.

    Args:
        encoder: of valid convolutions, with max pooling.
        decoder: of valid convolutions.
        dims: 2 or 3.
        in_channels: channels of the image.
        heads: what to predict, by name; a number stands for one head `segmentation` of so many classes.

    Raises:
        ValueError: parts that do not fit each other.

    Example:
        >>> import torch
        >>> from densepred.models.presets import unet2015
        >>> with torch.device("meta"):
        ...     unet2015()(torch.zeros(1, 1, 572, 572)).shape
        torch.Size([1, 2, 388, 388])
    """

    def __init__(
        self,
        encoder: PlainEncoder,
        decoder: UNetDecoder,
        dims: int,
        in_channels: int,
        heads: Mapping[str, HeadSpec] | int,
    ) -> None:
        super().__init__(encoder, decoder, dims, in_channels, heads)
        self.axes = valid_axes(encoder, decoder)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size it makes of an image.

        Raises:
            ValueError: the image does not fit; the message says why and which sizes do.
        """
        found = []
        for name, axis, n in zip("zyx"[-self.dims :], self.axes, size, strict=True):
            try:
                found.append(axis.output(n))
            except ValueError as error:
                shape = " x ".join(map(str, size))
                raise ValueError(
                    f"an input of {shape} voxels does not fit the network: along {name}, {error}"
                ) from None
        return tuple(found)

    def check_input(self, x: Tensor) -> None:
        """Is `x` (B, C, *spatial) what the model takes?

        Raises:
            ValueError: it has another number of axes or channels, or a size that does not fit.
        """
        super().check_input(x)
        if not torch.compiler.is_exporting():  # the program is for all sizes that fit
            self.output_size(x.shape[2:])
