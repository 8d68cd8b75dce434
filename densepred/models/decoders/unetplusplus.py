"""U-Net++ (Zhou et al. 2018, arXiv:1807.10165): a U-Net whose skips are dense nests of convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from densepred.models.blocks import Style
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.steps import StepShape, UNetOptions, UpStep
from densepred.models.decoders.unet import stride_ratio, way_up
from densepred.models.layers import Size, per_stage


class UNetPlusPlusDecoder(Decoder):
    """Node (i, j) sees all earlier nodes of its row i and, brought up, node (i + 1, j - 1) of the row below it.

    Column 0 is the encoder. The last nodes of the rows are what the decoder gives, so that deep supervision sees each
    grid once. Where the encoder's finest map is coarser than the image, steps without a skip follow, as in the U-Net.

    Args:
        dims: 2 or 3.
        channels: channels of the encoder's maps, finest first; the inner nodes of a row have as many.
        strides: cumulative strides of the encoder's maps.
        kernels: odd kernel for each of the encoder's maps; by default 3.
        convs_per_stage: convolutions in each node.
        style: norm, activation, dropout.
        options: as for the U-Net, less attention gates and valid convolutions; `widths` are those of the last nodes.

    Raises:
        ValueError: attention gates or valid convolutions, or another argument outside its range.

    Example:
        >>> import torch
        >>> maps = [torch.zeros(1, 4, 7, 6), torch.zeros(1, 6, 4, 3), torch.zeros(1, 8, 2, 2)]
        >>> decoder = UNetPlusPlusDecoder(2, (4, 6, 8), ((1, 1), (2, 2), (4, 4)))
        >>> [m.shape[1:] for m in decoder(maps, (7, 6))]
        [torch.Size([4, 7, 6]), torch.Size([6, 4, 3])]
    """

    def __init__(
        self,
        dims: int,
        channels: Sequence[int],
        strides: Sequence[tuple[int, ...]],
        kernels: Sequence[Size] | None = None,
        convs_per_stage: int = 2,
        style: Style | None = None,
        options: UNetOptions | None = None,
    ) -> None:
        super().__init__()
        style, options = style or Style(), options or UNetOptions()
        if options.attention or options.padding != "same":
            raise ValueError(f"U-Net++ has neither attention gates nor valid convolutions, got {options}")
        sizes = per_stage(kernels or (3,) * len(channels), len(channels), dims, "kernels")
        widths, grids = way_up(channels, strides, options.widths)
        bare, self.depth = len(grids) - len(channels), len(channels) - 1
        last = (*widths[bare:], channels[-1])

        def width(row: int, column: int) -> int:
            return last[row] if row + column == self.depth else channels[row]

        self.nodes = nn.ModuleDict()
        for column in range(1, self.depth + 1):
            for row in range(self.depth + 1 - column):
                ratio = stride_ratio(grids[bare + row + 1], grids[bare + row])
                below, beside = width(row + 1, column - 1), column * channels[row]
                shape = StepShape(below, beside, width(row, column), ratio, sizes[row])
                self.nodes[f"{row}_{column}"] = UpStep(dims, shape, convs_per_stage, style, options)
        self.steps = nn.ModuleList()
        for i in reversed(range(bare)):
            shape = StepShape((*widths[:bare], last[0])[i + 1], 0, widths[i], stride_ratio(grids[i + 1], grids[i]))
            self.steps.append(UpStep(dims, shape, convs_per_stage, style, options))
        self.channels = widths or (channels[0],)
        self.strides = grids[: len(self.channels)]

    def forward(
        self, features: list[Tensor], size: Sequence[int], switches: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, and the image's size -> [(B, channels[i], *ceil(size / strides[i]))]."""
        rows = [[feature] for feature in features]  # newest first
        for column in range(1, self.depth + 1):
            for row in range(self.depth + 1 - column):
                below = rows[row + 1][-column]
                rows[row].insert(0, self.nodes[f"{row}_{column}"](below, rows[row], features[row].shape[2:]))
        maps = [row[0] for row in rows[: self.depth]] or features[:1]
        for step, stride in zip(self.steps, reversed(self.strides[: len(self.steps)]), strict=True):
            maps.insert(0, step(maps[0], [], [-(-n // s) for n, s in zip(size, stride, strict=True)]))
        return maps[: len(self.channels)]
