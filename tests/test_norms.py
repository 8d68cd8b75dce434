"""Instance normalisation in each of its forms is the textbook's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from densepred.models.layers import CHANNELS_LAST
from densepred.models.norms import InstanceNorm, normalized_by_formula, normalized_by_sums, normalized_in_passes

Form = Callable[[Tensor, Tensor, Tensor, float], Tensor]
FORMS = [normalized_by_sums, normalized_by_formula, normalized_in_passes]
EPS = 1e-5


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In float64, straight from the definition."""
    axes, shape = list(range(2, x.ndim)), (1, -1, *(1 for _ in x.shape[2:]))
    x = x.double()
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * weight.double().view(shape) + bias.double().view(shape)


def drawn(shape: tuple[int, ...], offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """An image whose means are up to `offset` standard deviations, and parameters."""
    torch.manual_seed(0)
    channels = shape[1]
    scales = torch.logspace(-2, 2, channels).view(1, -1, *(1 for _ in shape[2:]))
    x = (torch.randn(shape) + offset * torch.linspace(-1, 1, channels).view_as(scales)) * scales
    return x, torch.rand(channels) + 0.5, torch.randn(channels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 8, 12, 13, 14), (3, 8, 33, 34), (1, 8, 1, 5)])
def test_forms_are_exact_and_keep_type_and_layout(
    form: Form, last: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, weight, bias = drawn(shape, offset=3.0)
    layout = CHANNELS_LAST[len(shape) - 2] if last else torch.contiguous_format
    x = x.to(dtype).contiguous(memory_format=layout)
    out = form(x, weight, bias, EPS)
    assert out.dtype == dtype
    assert out.stride() == x.stride()
    wanted = exact(x, weight, bias)
    rounding = torch.finfo(dtype).eps  # of the result; all else is float32
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4 + rounding, atol=1e-4)


@pytest.mark.parametrize("offset", [10.0, -10.0])
def test_sums_are_exact_where_the_mean_is_ten_deviations(offset: float) -> None:
    x, weight, bias = drawn((1, 8, 32, 32, 32), offset)
    out = normalized_by_sums(x, weight, bias, EPS)
    torch.testing.assert_close(out.double(), exact(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [normalized_by_formula, normalized_in_passes])
def test_centred_forms_are_exact_where_the_mean_is_a_hundred_deviations(form: Form) -> None:
    x, weight, bias = drawn((2, 8, 16, 16, 16), 100.0)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(form(last, weight, bias, EPS).double(), exact(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 7.3, -1000.0])
def test_a_constant_channel_gives_its_bias(form: Form, value: float) -> None:
    weight, bias = torch.ones(4), torch.arange(4.0)
    out = form(torch.full((2, 4, 6, 7, 8), value, dtype=torch.bfloat16), weight, bias, EPS)
    limit = 1e-2 * max(1.0, abs(value) * EPS**-0.5 * 1e-4)
    torch.testing.assert_close(out.float(), bias.view(1, -1, 1, 1, 1).expand_as(out), rtol=0, atol=limit)


def test_the_layer_without_gradients_keeps_channels_last_and_is_exact() -> None:
    x, weight, bias = drawn((2, 8, 9, 10, 11), 3.0)
    layer = InstanceNorm(8)
    layer.load_state_dict({"weight": weight, "bias": bias})
    x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        out = layer(x)
    assert out.stride() == x.stride()
    torch.testing.assert_close(out.double(), exact(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_the_layer_gives_a_compiler_the_formula_only_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = drawn((2, 8, 9, 10), 1.0)
    layer = InstanceNorm(8)
    layer.load_state_dict({"weight": weight, "bias": bias})
    kernel, wanted = layer(x), exact(x, weight, bias)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        half = copy.deepcopy(layer)(x.bfloat16())  # float32 parameters beside bfloat16 values
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact(x.bfloat16(), weight, bias), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(kernel.double(), wanted, rtol=1e-4, atol=1e-4)
    assert layer(x).requires_grad
