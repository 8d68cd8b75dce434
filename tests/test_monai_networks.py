"""MONAI's networks at any size, against MONAI's own."""

from __future__ import annotations

import pytest
import torch
from monai.networks import nets

from densepred.models.adapters.monai_network import monai_network

SMALL = {
    "UNETR": {"hidden_size": 24, "mlp_dim": 24, "num_heads": 2, "img_size": 32, "feature_size": 4},
    "SwinUNETR": {"feature_size": 12, "depths": [1, 1, 1, 1], "window_size": 3},
    "BasicUNet": {"features": [4, 4, 8, 8, 8, 4]},
    "BasicUNetPlusPlus": {"features": [4, 4, 8, 8, 8, 4]},
    "UNet": {"channels": [4, 4, 8], "strides": [2, 2]},
    "AttentionUnet": {"channels": [4, 4, 8], "strides": [2, 2]},
    "DynUNet": {"filters": [4, 4, 8], "strides": [1, 2, 2]},
    "MedNeXt": {"init_filters": 4, "norm_type": "group"},
    "SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
}
ELSEWHERE = {
    "DynUNet": {"kernel_size": (3, 3, 3), "upsample_kernel_size": (2, 2)},
    "UNet": {"num_res_units": 2},
}
"""Arguments of MONAI's own that we have a default for."""


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_monai_networks_are_monais_at_regular_sizes_and_take_others(name: str, dims: int):
    ours = monai_network(name, dims, 2, 3, SMALL[name]).eval()
    assert (ours.dims, ours.in_channels, ours.classes) == (dims, 2, 3)
    options = {**SMALL[name], **ELSEWHERE.get(name, {})}
    theirs = getattr(nets, name)(spatial_dims=dims, in_channels=2, out_channels=3, **options).eval()
    theirs.load_state_dict(ours.network.state_dict())
    x = torch.randn(1, 2, *(32,) * (dims - 1), 32 if name == "UNETR" else 64)
    assert all(32 % divisor == 0 for divisor in ours.divisor)
    with torch.no_grad():
        expected = theirs(x)
        expected = expected[0] if isinstance(expected, list) else expected
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5 if name == "UNETR" else 0)
        for size in ((33, 30, 37)[-dims:], (1,) * dims):
            assert ours(torch.randn(1, 2, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("name", ["VNet", "FlexibleUNet", "MedNeXtSmall", "MedNeXtLarge"])
def test_the_larger_networks_of_monai_build(name: str):
    for dims in (2, 3):
        with torch.device("meta"):
            network = monai_network(name, dims, 4, 2)
            assert network(torch.empty(1, 4, *(33, 30, 37)[:dims])).shape == (1, 2, *(33, 30, 37)[:dims])


def test_monai_options_are_checked():
    assert monai_network("DynUNet", 3, 1, 2, {"strides": [1, [1, 2, 2], [2, 2, 2]]}).divisor == (2, 4, 4)
    with pytest.raises(ValueError, match=r"options of monai.SegResNet must be among init_filters, .* got pretrained"):
        monai_network("SegResNet", 2, 1, 2, {"pretrained": True})
    with pytest.raises(ValueError, match="option act must hold numbers, strings and lists of them, got Tensor"):
        monai_network("SegResNet", 2, 1, 2, {"act": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"monai.VNet with 3 channels"):
        monai_network("VNet", 2, 3, 2)
    with pytest.raises(ValueError, match="dims must be 2 or 3, got 4"):
        monai_network("UNet", 4, 1, 2)
    with pytest.raises(ValueError, match="expects 1 channel"):
        monai_network("SegResNet", 2, 1, 2)(torch.zeros(1, 2, 8, 8))
