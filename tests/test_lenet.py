"""LeNet-5: the paper's numbers of weights and connections, its table 1, and the encoder made of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from densepred.models.encoders.lenet import LeNet5, LeNetEncoder, Subsampling, digit_codes


def test_lenet_c3_sees_the_maps_of_table_1() -> None:
    layer = LeNet5().stages.c3
    seen = torch.zeros(16, 6, dtype=torch.bool)
    with torch.no_grad():
        empty = layer(torch.zeros(1, 6, 5, 5))
        for i in range(6):
            x = torch.zeros(1, 6, 5, 5)
            x[0, i] = 1
            seen[:, i] = (layer(x) != empty)[0, :, 0, 0]
    sets = [set(row.nonzero().flatten().tolist()) for row in seen]
    contiguous = [
        [{(i + k) % 6 for k in range(n)} for i in range(6)] for n in (3, 4)
    ]  # around the end, as in the paper
    assert sets[:6] == contiguous[0]
    assert sets[6:12] == contiguous[1]
    assert sets[12:] == [{0, 1, 3, 4}, {1, 2, 4, 5}, {0, 2, 3, 5}, set(range(6))]
    assert seen.sum(0).tolist() == [10] * 6  # ten crosses in each row of the table


def test_lenet_gives_squared_distances_to_its_codes() -> None:
    torch.manual_seed(0)
    model = LeNet5()
    x = torch.randn(2, 1, 32, 32)
    activities = torch.tanh(model.f6(model.stages(x)[-1].flatten(1)) * 2 / 3) * 1.7159
    torch.testing.assert_close(model(x), torch.cdist(activities, digit_codes()) ** 2)
    with torch.no_grad():  # F6 that holds the code of a seven
        model.f6.weight.zero_()
        model.f6.bias.copy_(1.5 * torch.atanh(digit_codes()[7] / 1.7159))
    distances = model(x)[0]
    assert distances[7].item() == pytest.approx(0, abs=1e-6)
    assert distances.sort().values[1] >= 4 * 3  # every other digit differs from it in three pixels or more
    with pytest.raises(ValueError, match=r"\(B, 1, 32, 32\)"):
        model(torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r"\(classes, 84\)"):
        LeNet5(torch.zeros(10, 83))


def test_lenet_subsampling_adds_four_voxels() -> None:
    layer = Subsampling(2, 3)
    x = torch.rand(1, 3, 4, 6)
    total = F.avg_pool2d(x, 2, divisor_override=1)
    torch.testing.assert_close(layer(x), total * layer.weight[:, None, None] + layer.bias[:, None, None])


def test_lenet_encoder_holds_the_published_maps_inside() -> None:
    torch.manual_seed(0)
    published, encoder = LeNet5(), LeNetEncoder(2, 1)
    encoder.load_state_dict({k: v for k, v in published.state_dict().items() if k.startswith("stages.")})
    x = torch.randn(1, 1, 32, 32)
    c1, c3, _ = published.stages(x)
    same = encoder(x)
    torch.testing.assert_close(same[0][:, :, 2:-2, 2:-2], c1)
    torch.testing.assert_close(same[1][:, :, 3:-3, 3:-3], c3)  # a voxel of S2 at the border, two of C3's kernel


@pytest.mark.parametrize("size", [(65, 70), (33, 30, 37), (1, 1), (2, 3, 1)], ids=str)
def test_lenet_channels_and_strides_are_true(size: tuple[int, ...]) -> None:
    encoder = LeNetEncoder(len(size), 3)
    maps = encoder(torch.randn(1, 3, *size))
    grids = [tuple(-(-n // s) for n, s in zip(size, stride, strict=True)) for stride in encoder.strides]
    assert [tuple(m.shape[1:]) for m in maps] == [(c, *g) for c, g in zip(encoder.channels, grids, strict=True)]
