"""One window per voxel (`blend: none`), at multiples of the stride: the prediction of the whole image, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from densepred.config import ModelConfig
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.inference.windows import WindowGrid
from densepred.models.build import build, initialize


@pytest.mark.parametrize("size", [(96, 128), (97, 101), (130, 99)])
def test_one_window_per_voxel_gives_what_the_whole_image_gives(size: tuple[int, int]):
    model = initialize(build(ModelConfig(dims=2, channels=(4, 8, 16), norm="batch"), 1, 2), 0).eval()
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)) * 10
    with torch.inference_mode():
        whole = model(image[None])[0]
    tiled = SlidingWindowInferer(80, 0.75, "none", multiple=4)(model, image)
    assert (tiled - whole).abs().max() < 1e-5 * whole.abs().max()
    shifted = SlidingWindowInferer(80, 0.75, "none")(model, image)
    if any(n % 4 for n in size):
        assert (shifted - whole).abs().max() > 1e-3 * whole.abs().max(), "windows elsewhere differ"


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_all_windows_begin_at_multiples_and_cover_the_axis(multiple: int):
    for size in range(60, 200, 7):
        (axis,) = WindowGrid.plan((size,), 64, 0.5, multiple=multiple).axes
        assert all(start % multiple == 0 for start in axis.starts)
        assert list(axis.starts) == sorted(set(axis.starts))
        assert axis.starts[-1] + axis.window == axis.padded >= size
        assert 64 <= axis.window < 64 + multiple
        assert (np.diff(axis.starts) <= axis.window).all()


@pytest.mark.parametrize(
    ("model", "stride"),
    [
        (ModelConfig(dims=2, channels=(4, 8, 16)), (4, 4)),
        (ModelConfig(dims=3, channels=(4, 8, 16), strides=(1, (1, 2, 2), 2)), (2, 4, 4)),
        (ModelConfig(dims=2, encoder="resnet18"), (32, 32)),
        (ModelConfig(dims=3, network="monai.UNet"), (16, 16, 16)),
    ],
)
def test_models_tell_their_stride(model: ModelConfig, stride: tuple[int, ...]):
    with torch.device("meta"):
        assert build(model, 1, 2).stride == stride
