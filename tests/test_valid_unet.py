"""The U-Nets of 2015 and 2016: published numbers, the sizes that fit, the mirrored border."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from densepred.models.blocks import Style
from densepred.models.decoders.unet import UNetDecoder, UNetOptions
from densepred.models.dense import DensePredictor
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.heads import Classification, Segmentation
from densepred.models.layers import CONVOLUTIONS, fill_nearest_
from densepred.models.mirror import Mirrored, mirror
from densepred.models.presets import unet2015
from densepred.models.valid import ValidAxis, ValidPredictor
from tests.unet_helpers import SIZES, exported, randomize


def tiny(dims: int = 2, in_channels: int = 1, channels: Sequence[int] = (4, 6, 8)) -> ValidPredictor:
    style = Style("none", "relu")
    encoder = PlainEncoder(dims, in_channels, channels, style=style, pool="max", padding="valid")
    options = UNetOptions(padding="valid")
    decoder = UNetDecoder(dims, encoder.channels, encoder.strides, style=style, options=options)
    return ValidPredictor(encoder, decoder, dims, in_channels, 2)


def test_unet_of_2015_takes_every_16th_size() -> None:
    with torch.device("meta"):
        axis = unet2015().axes[0]
    assert [n for n in range(1, 600) if n >= axis.smallest and (n - axis.smallest) % axis.period == 0] == [
        *range(188, 600, 16)
    ]


def test_sizes_that_do_not_fit_are_answered_with_the_arithmetic() -> None:
    with torch.device("meta"):
        model = unet2015()
        message = (
            r"an input of 572 x 570 voxels does not fit the network: along x, 570 voxels do not fit: 279 voxels are "
            r"left before pooling 2 \(570 -> 566 -> 279\), no multiple of its window 2; the nearest sizes that fit are "
            r"556 and 572"
        )
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(1, 1, 572, 570))
        with pytest.raises(ValueError, match=r"stage 5 take 4 voxels off the 1 that are left; .* are 188 and 204"):
            model(torch.zeros(1, 1, 76, 572))
        with pytest.raises(ValueError, match=r"decoder leave nothing of the 1 voxels .* fit are 188 and 204"):
            model(torch.zeros(1, 1, 140, 572))


@pytest.mark.parametrize(("pools", "kernels"), [((1, 2, 2), (3, 3, 5)), ((1, 3, 1), (1, 5, 3)), ((1, 2, 4), (3, 1, 3))])
def test_output_sizes_are_those_of_the_layers(pools: tuple[int, ...], kernels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        encoder = PlainEncoder(2, 1, (1, 1, 1), pools, kernels, style=Style("none"), pool="max", padding="valid")
        options = UNetOptions(padding="valid", residual=True)
        decoder = UNetDecoder(2, encoder.channels, encoder.strides, kernels, 1, encoder.style, options)
        model = ValidPredictor(encoder, decoder, 2, 1, 1)
        fitting = []
        for n in range(1, 70):
            try:
                expected = model.output_size((n, n))
            except ValueError:
                continue
            fitting.append(n)
            maps = encoder(torch.zeros(1, 1, n, n))
            assert decoder(maps, (n, n))[0].shape[2:] == expected
            assert all(m.shape[2] % pool == 0 for m, pool in zip(maps, pools[1:], strict=False))
    assert fitting == [*range(fitting[0], 70, model.axes[0].period)]
    assert model.axes[0].output(fitting[0]) <= model.axes[0].period


def test_valid_networks_are_made_of_fitting_parts() -> None:
    plain = PlainEncoder(2, 1, (4, 8), padding="valid")
    pooled = PlainEncoder(2, 1, (4, 8), pool="max", padding="valid")
    valid, same = (UNetDecoder(2, (4, 8), ((1, 1), (2, 2)), options=UNetOptions(padding=p)) for p in ("valid", "same"))
    with pytest.raises(ValueError, match="pool='max', got pool='stride'"):
        ValidPredictor(plain, valid, 2, 1, 2)
    with pytest.raises(ValueError, match="padding='valid', got padding='same'"):
        ValidPredictor(pooled, same, 2, 1, 2)
    with pytest.raises(ValueError, match=r"stride 1, got \(2, 2\)"):
        ValidPredictor(PlainEncoder(2, 1, (4, 8), (2, 2), pool="max", padding="valid"), valid, 2, 1, 2)
    with pytest.raises(ValueError, match="need odd kernels"):
        ValidAxis((1, 2), (3, 4), (4,))
    with pytest.raises(ValueError, match="padding must be 'valid' or 'mirror', got 'same'"):
        unet2015(padding="same")  # type: ignore[arg-type]


def centred_identity(model: DensePredictor, through_skips: bool) -> None:
    """Make the network hand its input on: by the finest skip, or by way of the coarsest map alone."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, CONVOLUTIONS):
                layer.weight.zero_()
                layer.bias.zero_()
                layer.weight[0, 0][tuple(k // 2 for k in layer.kernel_size)] = 1
        for step in model.decoder.steps:
            fill_nearest_(step.up)
        if through_skips:  # the first channel after those that come from below
            first = model.decoder.steps[-1].blocks[0].conv
            first.weight[0, first.out_channels] = first.weight[0, 0]
            first.weight[0, 0] = 0


@pytest.mark.parametrize("dims", [2, 3])
def test_the_output_is_the_middle_of_the_input(dims: int) -> None:
    model = tiny(dims)
    image = torch.rand(1, 1, *(44, 48, 52)[:dims])
    blocks = torch.rand(1, 1, *(12, 13, 14)[:dims])  # of the 4 voxels that two poolings join: they leave them alone
    for axis in range(2, 2 + dims):
        blocks = blocks.repeat_interleave(4, axis).narrow(axis, 2, image.shape[axis])  # pooling starts at voxel 2
    inner = (..., *(slice(2, -2),) * dims)
    for through_skips, x in ((True, image), (False, blocks)):
        centred_identity(model, through_skips)
        out = model(x)[:, :1]
        middle = tuple(slice((n - m) // 2, (n + m) // 2) for n, m in zip(x.shape[2:], out.shape[2:], strict=True))
        assert torch.equal(out, x[(..., *middle)])
        assert out.shape[2:] == model.output_size(x.shape[2:])
    assert torch.equal(Mirrored(model)(blocks)[:, :1][inner], blocks[inner])


def test_tiles_of_a_valid_network_join_to_what_the_mirrored_one_gives() -> None:
    model = tiny()
    randomize(model)
    image = torch.rand(1, 1, 101, 90)
    whole = Mirrored(model)(image)
    assert whole.shape == (1, 2, 101, 90)
    assert float(whole.detach().std()) > 0.01
    axis = model.axes[0]
    before = axis.margin // 2
    for start in (20, 40):  # whole pooling periods
        tile = image[:, :, start - before :, start - before :][:, :, :60, :60]
        out = model(tile)
        n = axis.output(60)
        torch.testing.assert_close(out, whole[:, :, start : start + n, start : start + n], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mirrored_networks_take_any_size(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Mirrored(tiny(len(size)))
    randomize(model)
    x = torch.rand(1, 1, *size, requires_grad=True)
    out = model(x)
    assert out.shape == (1, 2, *size)
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert float(x.grad.abs().sum()) > 0


def test_mirroring_is_numpys_reflection() -> None:
    np = pytest.importorskip("numpy")
    for n, before, after in ((1, 3, 2), (2, 5, 4), (3, 7, 9), (6, 2, 5)):
        row = torch.rand(1, 1, n, 2)
        expected = np.pad(row[0, 0].numpy(), ((before, after), (1, 1)), mode="reflect")
        assert torch.equal(mirror(row, (before, 1), (after, 1))[0, 0], torch.from_numpy(expected))


def test_a_mirrored_network_shares_weights_and_names_with_the_valid_one() -> None:
    encoder, decoder = tiny().encoder, tiny().decoder
    heads = {"organ": Segmentation(3), "grade": Classification(2)}
    valid = ValidPredictor(encoder, decoder, 2, 1, heads)  # type: ignore[arg-type]
    mirrored = Mirrored(valid)
    assert [*mirrored.state_dict()] == [*valid.state_dict()]
    assert all(a is b for a, b in zip(mirrored.parameters(), valid.parameters(), strict=True))
    shapes = {name: tuple(out.shape) for name, out in mirrored(torch.rand(2, 1, 9, 11)).items()}
    assert shapes == {"organ": (2, 3, 9, 11), "grade": (2, 2)}


def test_mirrored_networks_export_with_free_sizes() -> None:
    model = Mirrored(tiny(3, 2, channels=(3, 4)))
    randomize(model)
    program = exported(model, torch.randn(2, 2, 33, 30, 37))
    for size in ((12, 13, 14), (40, 40, 40), (9, 31, 5)):
        x = torch.randn(1, 2, *size)
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


def test_mirrored_networks_run_in_onnxruntime(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = Mirrored(tiny(2, 2, channels=(3, 4))).eval()
    randomize(model)
    path = tmp_path / "model.onnx"
    free = {"x": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    torch.onnx.export(
        model, (torch.randn(2, 2, 33, 30),), path, dynamo=True, dynamic_shapes=free, opset_version=18, verbose=False
    )
    session = runtime.InferenceSession(path)
    for size in ((12, 13), (40, 40), (9, 3)):
        x = torch.randn(1, 2, *size)
        [output] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), atol=1e-5, rtol=1e-5)
