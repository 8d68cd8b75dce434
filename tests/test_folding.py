"""Folding batch norms into convolutions changes nothing but the number of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from densepred.models.build import create_model
from densepred.models.folding import fold_batch_norms
from densepred.models.layers import CONVOLUTIONS, conv
from densepred.models.norms import BatchNorm


def trained(model: nn.Module) -> nn.Module:
    """Norms with statistics and parameters as training would leave them; float64, so that only a mistake shows."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
    return model.double().eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(layer, _BatchNorm) for layer in model.modules())


@pytest.mark.parametrize(
    ("encoder", "decoder", "dims", "options", "left"),
    [
        ("plain", "unet", 2, {"norm": "batch", "channels": (4, 8, 16)}, 0),
        ("plain", "unet", 3, {"norm": "batch", "channels": (4, 8)}, 0),
        ("resnet18", "unet", 2, {}, 0),
        ("resnet18", "unet", 3, {}, 0),
        ("vgg11_bn", "deconvnet", 2, {"fc_channels": 8}, 0),
        ("resnet18", "deeplabv3plus", 2, {}, 0),
        ("timm.resnet18", "unet", 2, {}, 0),
        ("smp.resnet18", "smp.UnetPlusPlus", 2, {}, 0),
        ("smp.densenet121", "unet", 2, {}, 62),  # norms before convolutions
        ("timm.mobilenetv3_small_100", "unet", 2, {}, 33),  # norms with an activation inside
        ("timm.pvt_v2_b0", "unet", 2, {}, 0),
    ],
)
def test_folding_is_exact(encoder: str, decoder: str, dims: int, options: dict[str, Any], left: int) -> None:
    model = trained(create_model(encoder, decoder, dims=dims, seed=0, **options))
    x = torch.randn(2, 1, *((64, 48) if dims == 2 else (32, 32, 32)), dtype=torch.float64)
    before, folded = norms(model), fold_batch_norms(model, x.shape)
    assert norms(folded) == left < before
    with torch.no_grad():
        wanted, got = model(x), folded(x)
    assert norms(model) == before
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


def test_folding_in_float32_is_exact_to_rounding() -> None:
    model = trained(create_model("resnet34", dims=2, seed=0)).float()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        wanted, got = model(x), fold_batch_norms(model, x.shape)(x)
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


class Odd(nn.Module):
    """A convolution and a norm that must not be merged, for one reason each."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
        self.conv, self.norm = conv(2, 1, 1, 3), BatchNorm(1, track_running_stats=reason != "statistics")
        if reason == "hook":
            self.conv.register_forward_hook(lambda layer, inputs, output: output.relu())

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.reason == "used":
            return self.norm(y) + y
        if self.reason == "between":
            return self.norm(y.relu())
        if self.reason == "twice":
            return self.norm(self.norm(y))
        if self.reason == "shared":
            return self.norm(y) + self.conv(x + 1)
        if self.reason == "values" and float(x.sum()) > 0:
            return self.norm(y + 1)
        if self.reason == "numpy" and x.numpy().sum() > 0:
            return self.norm(y + 1)
        if self.reason == "keyword":
            return self.norm(x=y)
        out: Tensor = self.norm(y)
        return out


@pytest.mark.parametrize(
    "reason", ["used", "between", "twice", "shared", "values", "numpy", "keyword", "statistics", "hook"]
)
def test_what_is_more_than_a_pair_stays(reason: str) -> None:
    model = Odd(reason)
    if reason != "statistics":
        trained(model)
    model.double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    folded = fold_batch_norms(model, x.shape)
    assert norms(folded) == 1
    with torch.no_grad():
        assert torch.equal(model(x), folded(x))


def test_what_is_given_out_before_the_norm_stays() -> None:
    class Two(Odd):
        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return {"normed": self.norm(y), "plain": y}

    model = trained(Two("none")).double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    folded: Any = fold_batch_norms(model, x.shape)
    with torch.no_grad():
        assert torch.equal(model(x)["plain"], folded(x)["plain"])


def test_a_plain_pair_is_merged_and_the_original_kept() -> None:
    model = trained(Odd("none"))
    weight = next(p for layer in model.modules() if isinstance(layer, CONVOLUTIONS) for p in layer.parameters()).clone()
    folded = fold_batch_norms(model, (1, 1, 8, 8))
    assert (norms(folded), norms(model)) == (0, 1)
    assert torch.equal(weight, next(model.parameters()))
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in model.parameters())
