"""Effective receptive fields and checkerboards: closed forms, and pictures that show the numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from densepred.model_figures import (
    checkerboard_figure,
    draw_checkerboard,
    draw_receptive_field,
    receptive_field_figure,
)
from densepred.models.build import create_model
from densepred.models.dense import Model
from densepred.models.heads import Classification
from densepred.models.inspect import EffectiveField, checkerboard, effective_receptive_field
from densepred.models.layers import conv, transposed_conv


class Chain(Model):
    """Layers one after another, all weights one."""

    def __init__(self, dims: int, *layers: nn.Module) -> None:
        super().__init__(dims, 1, 1)
        self.layers = nn.Sequential(*layers)
        for name, p in self.named_parameters():
            nn.init.constant_(p, float(name.endswith("weight")))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@pytest.mark.parametrize("dims", [2, 3])
def test_effective_field_of_linear_convolutions_is_their_kernel(dims: int) -> None:
    """n means over 3 voxels in a row weigh as the coefficients of (1 + x + x^2)^n (Luo et al. 2016, section 2.2)."""
    n = 4
    field = effective_receptive_field(Chain(dims, *(conv(dims, 1, 1, 3) for _ in range(n))), (21,) * dims, samples=2)
    weights = np.ones(1)
    for _ in range(n):
        weights = np.convolve(weights, np.ones(3))
    kernel = weights
    for _ in range(dims - 1):
        kernel = np.multiply.outer(kernel, weights)
    expected = np.pad(kernel / kernel.max(), (21 - 9) // 2)
    assert field.gradient == pytest.approx(expected, abs=1e-6)
    assert field.theoretical == ((6, 15),) * dims
    # 1 4 10 16 19 16 10 4 1 of 81: the middle five hold 71 (88 %), the middle seven 79 (97.5 %), six in a row 75 (93 %)
    assert field.effective == ((7, 14),) * dims
    assert field.fraction == pytest.approx((7 / 9) ** dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradient_fills_the_theoretical_field_and_ends_there(dims: int) -> None:
    model = create_model(dims=dims, channels=(3, 4, 5), convs_per_stage=1, decoder_convs=1, seed=0)
    field = effective_receptive_field(model, (34, 36, 40)[-dims:], samples=12)
    for axis, span in enumerate(field.theoretical):
        assert span is not None
        seen = np.flatnonzero(field.gradient.max(tuple({*range(dims)} - {axis})))
        assert (seen[0], seen[-1] + 1) == span
    assert all(1 < n < span[1] - span[0] for n, span in zip(field.extent, field.possible, strict=True))


def test_statistics_of_norms_do_not_count() -> None:
    """They would let a voxel depend on all others; as constants they leave the values what they are."""
    for norm in ("instance", "group", "batch"):
        model = create_model(dims=2, channels=(8, 8), norm=norm, seed=0)
        field = effective_receptive_field(model, (40, 40), samples=1)
        (top, bottom), (left, right) = field.possible
        outside = field.gradient.copy()
        outside[top:bottom, left:right] = 0
        assert not outside.any()


def test_whole_images_and_global_outputs() -> None:
    heads = {"kind": Classification(classes=2, covariates=3)}
    model = create_model("resnet18", dims=2, heads=heads, width=4, depth=2, seed=0)
    field = effective_receptive_field(model, (24, 20), samples=1)
    assert field.theoretical == (None, None)
    assert field.possible == ((0, 24), (0, 20))
    assert field.gradient.all()


def test_model_and_random_numbers_are_left_alone() -> None:
    model = create_model(dims=2, channels=(4, 8), dropout=0.5, norm="batch", seed=0).train()
    model.encoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (effective_receptive_field(model, (20, 20), samples=2, seed=3) for _ in range(2))
    assert (one.gradient == two.gradient).all()
    assert (one.gradient != effective_receptive_field(model, (20, 20), samples=2, seed=4).gradient).any()
    checkerboard(model, (20, 20))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not model.encoder.training
    assert not any(layer._forward_hooks for layer in model.modules())


def test_what_cannot_be_measured_is_refused() -> None:
    model = create_model(dims=2, channels=(4, 8), seed=0)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        effective_receptive_field(model, (20, 20), samples=0)
    with pytest.raises(ValueError, match="size must be 2 positive numbers"):
        effective_receptive_field(model, (20,))
    with pytest.raises(ValueError, match=r"at least 3 x \(2, 2\) voxels, got \(5, 20\)"):
        checkerboard(model, (5, 20))
    scores_start_from_zero = create_model("resnet18", "fcn32s", dims=2, width=2)
    with pytest.raises(ValueError, match="no finite gradient"):
        effective_receptive_field(scores_start_from_zero, (64, 64), samples=1)
    with pytest.raises(ValueError, match="response to a constant image"):
        checkerboard(scores_start_from_zero, (96, 96))


def overlapping(dims: int) -> nn.Module:
    """Kernel 3 at stride 2, whose windows overlap at every second voxel."""
    kind = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    return kind(1, 1, 3, 2, 1, output_padding=1)


@pytest.mark.parametrize("dims", [2, 3])
def test_uneven_overlap_is_the_closed_form(dims: int) -> None:
    """Odena et al. 2016: 1 and 2 kernels take turns along each axis, so the mean is 1.5^d and the square's 2.5^d."""
    size = (40, 36, 32)[-dims:]
    result = checkerboard(Chain(dims, conv(dims, 1, 1, 3, 2), overlapping(dims)), size)
    assert result.period == (2,) * dims
    assert result.unevenness == pytest.approx(math.sqrt((2.5 / 1.5**2) ** dims - 1), rel=1e-5)
    assert result.pattern.max() == pytest.approx((2 / 1.5) ** dims - 1, rel=1e-5)
    assert result.response.shape == size


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (4, 2), (3, 3), (1, 1)])
def test_kernels_that_are_whole_strides_cover_evenly(kernel: int, stride: int) -> None:
    model = Chain(2, conv(2, 1, 1, 3, stride), transposed_conv(2, 1, 1, stride, kernel=kernel))
    assert checkerboard(model, (36, 30)).unevenness < 1e-6


def test_networks_that_start_smooth_show_no_pattern() -> None:
    options = {"dims": 2, "channels": (4, 8, 8), "seed": 0}
    assert checkerboard(create_model(**options), (96, 88)).unevenness > 0.05
    assert checkerboard(create_model(**options, smooth_start=True), (96, 88)).unevenness < 1e-5
    assert checkerboard(create_model(**options, upsampling="interpolate"), (96, 88)).unevenness < 1e-5
    fcn = create_model("vgg11", "fcn8s", dims=2, width=4, depth=3, fc_channels=8, seed=0)
    for p in fcn.decoder.parameters():
        if p.ndim > 1 and not p.any():  # the scores'
            nn.init.normal_(p)
    assert checkerboard(fcn, (240, 240)).unevenness < 1e-5


def test_border_and_trend_are_not_taken_for_a_pattern() -> None:
    class Ramp(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.arange(x.shape[3], device=x.device) / 4

    result = checkerboard(Ramp(2, conv(2, 1, 1, 3, 4), transposed_conv(2, 1, 1, 4)), (40, 44))
    assert result.unevenness < 1e-6
    assert all(first >= 4 and last <= n - 4 for (first, last), n in zip(result.measured, (40, 44), strict=True))


def rectangles(axes: object) -> list[tuple[float, float, float, float]]:
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]  # type: ignore[attr-defined]
    return [(p.get_x() + 0.5, p.get_y() + 0.5, p.get_width(), p.get_height()) for p in patches]


def test_picture_of_the_field_holds_the_numbers() -> None:
    gradient = np.full((10, 20, 30), 1e-9)
    gradient[5, 10, 15] = 1
    field = EffectiveField(gradient, ((4, 7), (8, 13), (12, 19)), ((-2, 9), None, (5, 25)))
    figure = receptive_field_figure(field)
    *planes, bar = figure.axes
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in planes]
    names = [("x (voxels)", "y (voxels)"), ("x (voxels)", "z (voxels)"), ("y (voxels)", "z (voxels)")]
    assert labels == names
    assert rectangles(planes[0]) == [(5, 0, 20, 20), (12, 8, 7, 5)]
    assert rectangles(planes[1]) == [(5, 0, 20, 9), (12, 4, 7, 3)]
    assert rectangles(planes[2]) == [(0, 0, 20, 9), (8, 4, 5, 3)]
    assert planes[0].images[0].get_array()[10, 15] == 1
    assert planes[0].images[0].get_array().shape == (20, 30)
    assert "gradient" in bar.get_ylabel()
    title = figure.get_suptitle()
    assert "field 3 x 5 x 7 voxels" in title
    assert f"{3 * 5 * 7 / (9 * 20 * 20):.1%} of the theoretical 11 x all x 20 within the image" in title


def test_picture_of_the_checkerboard_holds_the_numbers() -> None:
    result = checkerboard(Chain(2, conv(2, 1, 1, 3, 2), overlapping(2)), (40, 36))
    figure = checkerboard_figure(result)
    above, below, *_ = figure.axes
    assert (above.get_xlabel(), above.get_ylabel()) == ("x (voxels)", "y (voxels)")
    assert np.array_equal(above.images[0].get_array(), result.response)
    assert np.array_equal(below.images[0].get_array()[:2, :2], result.pattern)
    (top, bottom), (left, right) = result.measured
    assert rectangles(above) == [(left, top, right - left, bottom - top)]
    assert "uneven by 48.4% of the mean, period 2 x 2 voxels" in figure.get_suptitle()


@pytest.mark.parametrize("dims", [2, 3])
def test_pictures_are_whole_files(dims: int, tmp_path: Path) -> None:
    model = create_model(dims=dims, channels=(2, 3), seed=0)
    size = (12, 14, 16)[-dims:]
    first = draw_receptive_field(effective_receptive_field(model, size, samples=1), tmp_path / "field.png")
    second = draw_checkerboard(checkerboard(model, size), tmp_path / "checkerboard.png")
    assert sorted(tmp_path.iterdir()) == sorted([first, second])
    for path in (first, second):
        assert min(imread(path).shape[:2]) > 250
