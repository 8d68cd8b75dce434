"""SMP's decoders on encoders of ours, against SMP's whole networks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from densepred.models.adapters import imports
from densepred.models.adapters import smp_decoder as decoders

WHOLE = {
    "Unet": {},
    "UnetPlusPlus": {},
    "Linknet": {},
    "FPN": {},
    "PSPNet": {"encoder_depth": 5},
    "PAN": {"encoder_output_stride": 32},
    "MAnet": {},
    "DeepLabV3": {"encoder_output_stride": 8},
    "DeepLabV3Plus": {"encoder_output_stride": 16},
    "UPerNet": {},
    "Segformer": {},
}


@pytest.mark.parametrize("name", decoders.names())
def test_a_decoder_gives_what_smps_whole_network_gives(name: str):
    options = {**WHOLE[name]}
    dilated = options.get("encoder_output_stride", 32)
    whole = getattr(imports.smp(), name)("resnet18", encoder_weights=None, in_channels=1, **options).eval()
    strides = [min(stride, dilated) for stride in (2, 4, 8, 16, 32)]
    channels = whole.encoder.out_channels[1:]
    if name == "PSPNet":  # looks at the map of stride 8, as SMP's whole network does by default
        whole = imports.smp().PSPNet("resnet18", encoder_weights=None, in_channels=1).eval()
    ours = decoders.smp_decoder(name, channels, [(s, s) for s in strides]).eval()
    ours.decoder.load_state_dict(whole.decoder.state_dict())
    x = torch.randn(1, 1, 256, 288)
    with torch.no_grad():
        expected = whole.decoder(whole.encoder(x))
        maps = imports.smp().encoders.get_encoder("resnet18", 1, 5, None, dilated).eval()
        maps.load_state_dict(whole.encoder.state_dict())
        (out,) = ours(list(maps(x)[1:]), (256, 288))
    if expected.shape[2:] != x.shape[2:]:
        expected = F.interpolate(expected, (256, 288), mode="bilinear")
    assert torch.equal(out, expected)
    assert ours.channels == (out.shape[1],)


GRIDS = {
    "resnet": ((8, 8, 16, 16, 24), (2, 4, 8, 16, 32)),
    "vgg": ((4, 8, 8, 16, 16, 24), (1, 2, 4, 8, 16, 32)),
    "convnext": ((8, 16, 16, 24), (4, 8, 16, 32)),
    "dilated": ((8, 8, 16, 16, 24), (2, 4, 8, 16, 16)),
}


@pytest.mark.parametrize("name", decoders.names())
@pytest.mark.parametrize("grid", GRIDS)
def test_decoders_take_every_grid_and_size(name: str, grid: str):
    channels, strides = GRIDS[grid]
    pairs = [(s, s) for s in strides]
    if (name, grid) == ("UnetPlusPlus", "convnext"):
        with pytest.raises(ValueError, match=r"needs maps of strides 2, 4, 8, 16, 32 .* the encoder has 4, 8, 16, 32"):
            decoders.smp_decoder(name, channels, pairs)
        return
    with torch.device("meta"):
        decoder = decoders.smp_decoder(name, channels, pairs)
        for size in ((65, 70), (1, 1)):
            features = [
                torch.empty(2, c, *(math.ceil(n / s) for n in size)) for c, s in zip(channels, strides, strict=True)
            ]
            (out,) = decoder(features, size)
            assert out.shape == (2, decoder.channels[0], *size)
            assert decoder.strides == ((1, 1),)


def test_a_decoder_that_cannot_be():
    quarter = [(4, 4), (8, 8), (16, 16)]
    with pytest.raises(ValueError, match=r"smp.FPN needs maps of strides 2, 4, 8, 16 .* the encoder has 4, 8, 16"):
        decoders.smp_decoder("FPN", (8, 8, 8), quarter)
    with pytest.raises(ValueError, match=r"powers of two along 2 axes, got \(2, 1\)"):
        decoders.smp_decoder("Unet", (8, 8), [(2, 1), (4, 2)])
    with pytest.raises(ValueError, match=r"a multiple of 4 channels in the map of stride 8, got 9 = 2 x 4 \+ 1"):
        decoders.smp_decoder("PSPNet", (8, 9, 8), quarter)
    with pytest.raises(ValueError, match=r"DPT needs the tokens of a vision transformer"):
        decoders.smp_decoder("DPT", (8, 8, 8), quarter)
    with pytest.raises(ValueError, match=r"options of smp.Unet must be among decoder_channels, use_norm"):
        decoders.smp_decoder("Unet", (8, 8, 8), quarter, {"width": 3})
    for option in ({"interpolation_mode": "x"}, {"decoder_channels": 8}, {"attention_type": "os.system"}):
        with pytest.raises(ValueError, match=r"smp.Unet with options|Attention os.system is not"):
            decoders.smp_decoder("Unet", (8, 8, 8), quarter, option)
    with pytest.raises(ValueError, match="did you mean 'Unet'"):
        decoders.smp_decoder("UNet", (8, 8, 8), quarter)
