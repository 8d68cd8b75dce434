"""Every encoder with every decoder, in 2D and 3D: any size in, the same size out, gradients everywhere."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from densepred.models import catalog
from densepred.models.build import create_model
from densepred.models.dense import DensePredictor, Model

SIZES = {2: (65, 70), 3: (33, 30, 37)}
CHANNELS = (1, 2, 3, 4, 12)
SMALL: dict[str, dict[str, Any]] = {
    "plain": {"channels": (4, 6, 8, 10)},
    "residual": {"channels": (4, 6, 8, 10)},
    "vgg11": {"width": 4},
    "vgg11_bn": {"width": 4},
    "resnet18": {"width": 4},
    "resnet50": {"width": 4},
    "resnext50_32x4d": {"width": 16},
    "wide_resnet50_2": {"width": 4},
    "se_resnet18": {"width": 4},
    "convnext_tiny": {"width": 4},
    "convnextv2_tiny": {"width": 4},
    "lenet5": {},
    "timm.mobilenetv3_small_050": {},
    "torchvision.squeezenet1_1": {},
    "smp.mobilenet_v2": {},
}
"""One of each body, at small width: these are computed. Deeper variants are built and followed on the meta device."""
WIDE = {"fpn": {"decoder_channels": 8}, "deeplabv3plus": {"decoder_channels": 8}}
SMP = ("Linknet", "MAnet", "PAN", "UPerNet")


def options(encoder: str, decoder: str) -> dict[str, Any]:
    return SMALL.get(encoder, {}) | WIDE.get(decoder, {})


def in_channels(encoder: str, decoder: str) -> int:
    return CHANNELS[(len(encoder) + len(decoder)) % len(CHANNELS)]


def exists(encoder: str, decoder: str, dims: int) -> bool:
    if encoder == "lenet5" and decoder in ("smp.PAN", "smp.UPerNet"):
        return False  # they need a map of stride 8, and say so
    entries = catalog.find("encoder", encoder), catalog.find("decoder", decoder)
    return all(entry is not None and dims in entry.dims for entry in entries)


def cases(encoders: list[str]) -> list[tuple[str, str, int]]:
    everything = product(encoders, [*catalog.DECODERS, *(f"smp.{name}" for name in SMP)], (2, 3))
    return [case for case in everything if exists(*case)]


COMPUTED = cases(list(SMALL))
FOLLOWED = [case for case in cases([name for name in catalog.ENCODERS if name not in SMALL]) if "." not in case[1]]


def check_maps(model: DensePredictor, features: list[Tensor], maps: list[Tensor], size: tuple[int, ...]) -> None:
    """Channels and strides are what the encoder and the decoder say."""
    assert model.decoder is not None
    for part, found in ((model.encoder, features), (model.decoder, maps)):
        assert [m.shape[1] for m in found] == list(part.channels)
        grids = [tuple(-(-n // s) for n, s in zip(size, stride, strict=True)) for stride in part.strides]
        assert [tuple(m.shape[2:]) for m in found] == grids
    assert model.decoder.strides[0] == (1,) * model.dims


def checked(model: Model, x: Tensor) -> Tensor:
    """What a network gives for `x`, its maps on the way being as they should."""
    assert isinstance(model, DensePredictor)
    assert model.decoder is not None
    seen: list[list[Tensor]] = []
    hook = model.decoder.register_forward_hook(lambda decoder, inputs, maps: seen.extend((inputs[0], maps)))
    out = model(x)
    hook.remove()
    check_maps(model, *seen, tuple(x.shape[2:]))
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize(("encoder", "decoder", "dims"), COMPUTED, ids=lambda value: str(value))
def test_any_pair_gives_back_the_size_and_learns(encoder: str, decoder: str, dims: int) -> None:
    channels = in_channels(encoder, decoder)
    model = create_model(encoder, decoder, dims, channels, 3, seed=0, **options(encoder, decoder))
    out = checked(model, torch.randn(1, channels, *SIZES[dims], generator=torch.Generator().manual_seed(0)))
    assert out.shape == (1, 3, *SIZES[dims])
    out.square().mean().backward()
    unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not unused
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("encoder", "decoder", "dims"), FOLLOWED, ids=lambda value: str(value))
def test_the_deeper_variants_do_too(encoder: str, decoder: str, dims: int) -> None:
    channels = in_channels(encoder, decoder)
    with torch.device("meta"):
        model = create_model(encoder, decoder, dims, channels, 3, **options(encoder, decoder))
        assert checked(model.eval(), torch.empty(1, channels, *SIZES[dims])).shape == (1, 3, *SIZES[dims])


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("encoder", [name for name in SMALL if "." not in name])
def test_any_number_of_channels(encoder: str, dims: int, channels: int) -> None:
    if not exists(encoder, "unet", dims):
        pytest.skip(f"{encoder} exists in 2D only")
    with torch.device("meta"):
        model = create_model(encoder, "unet", dims, channels, 2, **SMALL[encoder])
        assert model(torch.empty(1, channels, *SIZES[dims])).shape == (1, 2, *SIZES[dims])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (1, 1, 1), (2, 3, 1), (5, 7, 4)], ids=str)
@pytest.mark.parametrize("decoder", catalog.DECODERS)
@pytest.mark.parametrize("encoder", ["plain", "vgg11_bn", "resnet18", "convnext_tiny"])
def test_images_smaller_than_a_coarse_voxel(encoder: str, decoder: str, size: tuple[int, ...]) -> None:
    model = create_model(encoder, decoder, len(size), 1, 2, **options(encoder, decoder)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert model(torch.randn(1, 1, *size)).shape == (1, 2, *size)
