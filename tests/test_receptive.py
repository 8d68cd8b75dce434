"""Receptive fields: as gradients measure them, and as others have published them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.build import create_model
from densepred.models.layers import conv, fit, patch_conv, transposed_conv, upsample
from densepred.models.mirror import mirror
from densepred.models.norms import NORMS
from densepred.models.receptive import Tracer
from densepred.models.summary import summarize
from densepred.models.upsampling import enlarge, pool_with_switches, unpool

Function = Callable[[Tensor], Tensor]


def traced(function: Function, *size: int, channels: int = 1, device: str = "meta") -> tuple[int | None, ...]:
    image = torch.ones(1, channels, *size, device=device)
    with torch.no_grad(), Tracer(image) as tracer:
        out = function(image)
    return tracer.receptive_field(out)


def supports(function: Function, *size: int) -> Tensor:
    """(N, 2, axes): for each voxel of the output the first and last voxel along each axis with a gradient."""
    jacobian = torch.autograd.functional.jacobian(function, torch.rand(1, 1, *size, dtype=torch.double), vectorize=True)
    places = [row.nonzero() for row in jacobian.reshape(-1, *size)]
    return torch.stack([torch.stack([place.amin(0), place.amax(0)]) for place in places if len(place)])


def reached(function: Function, *size: int) -> tuple[int, ...]:
    """The widest support of any output voxel that the border of the image does not cut off, along each axis."""
    ends = supports(function, *size)
    widths = ends[:, 1] - ends[:, 0] + 1
    inner = (ends[:, 0] > 0) & (ends[:, 1] < torch.tensor(size) - 1)
    assert inner.any(0).all()
    return tuple(int(widths[inner[:, axis], axis].max()) for axis in range(len(size)))


def ones(layer: nn.Module) -> nn.Module:
    """The layer with all weights one, in double precision; on the meta device nothing is left of them."""
    for p in layer.parameters():
        nn.init.ones_(p)
    return layer.double()


def of(layer: nn.Module) -> Function:
    layer = ones(layer)
    twin = {name: p.to("meta", torch.float32) for name, p in layer.state_dict().items()}
    return lambda x: torch.func.functional_call(layer, twin, (x,)) if x.is_meta else layer(x)


def windows(x: Tensor) -> Tensor:
    """The mean over windows of 4 x 3 voxels at each of their voxels, by reshaping as window attention does."""
    b, c, h, w = x.shape
    parts = x.view(b, c, h // 4, 4, w // 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 12, c)
    parts = parts.mean(1, keepdim=True).expand(-1, 12, -1)
    return parts.reshape(b, h // 4, w // 3, 4, 3, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def depth_to_space(x: Tensor) -> Tensor:
    """Voxels repeated by stacking and reshaping; the 2 of each pair lie on the axis."""
    b, c, h, w = x.shape
    return torch.stack([x, 2 * x], dim=3).reshape(b, c, 2 * h, w)


def tokens(x: Tensor) -> Tensor:
    """A linear layer over channels of flattened voxels, as in transformers."""
    y = x.flatten(2).transpose(1, 2)
    y = y @ torch.ones(x.shape[1], 3, dtype=x.dtype, device=x.device)
    return y.transpose(1, 2).reshape(x.shape[0], 3, *x.shape[2:])


def neighbours(x: Tensor) -> Tensor:
    """A voxel and the fifth after it, by slices, pads and changes in place."""
    y = F.pad(x[:, :, 5:], [0, 0, 0, 5])
    y += x
    return y.view(1, -1).mul_(2).view_as(x).add_(x)


OPERATIONS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "strided": (of(conv(2, 1, 1, (3, 5), stride=(2, 1))), (24, 18)),
    "dilated": (of(conv(2, 1, 1, 3, dilation=3)), (24, 18)),
    "3D": (of(nn.Sequential(conv(3, 1, 1, (1, 3, 3), (1, 2, 2)), conv(3, 1, 1, 3))), (8, 14, 12)),
    "patches": (of(nn.Sequential(conv(2, 1, 1, 3), patch_conv(2, 1, 1, (4, 3)))), (23, 25)),
    "transposed": (of(nn.Sequential(conv(2, 1, 1, 3, 2), transposed_conv(2, 1, 1, 2))), (24, 18)),
    "overlapping": (of(nn.Sequential(conv(2, 1, 1, 3, 3), transposed_conv(2, 1, 1, 3, kernel=7))), (30, 27)),
    "mean pooling": (of(nn.Sequential(nn.AvgPool2d((2, 3), ceil_mode=True), conv(2, 1, 1, 3))), (23, 28)),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (5, 4)), (24, 24)),
    "linear": (lambda x: upsample(F.avg_pool2d(x, 2), (24, 36)), (24, 24)),
    "linear x 3": (lambda x: enlarge(F.avg_pool2d(x, 3), (3, 4), (29, 30)), (30, 27)),
    "linear to odd": (lambda x: upsample(F.avg_pool2d(x, 2), (25, 31)), (26, 24)),
    "linear 3D": (lambda x: upsample(F.avg_pool3d(x, 2), (8, 12, 9)), (8, 12, 10)),
    "by factor": (lambda x: F.interpolate(F.avg_pool2d(x, 3), scale_factor=1.5, mode="bilinear"), (30, 27)),
    "aligned": (lambda x: F.interpolate(x, (31, 40), mode="bilinear", align_corners=True), (16, 14)),
    "cubic": (lambda x: F.interpolate(x, (32, 42), mode="bicubic"), (16, 14)),
    "nearest": (lambda x: F.interpolate(F.avg_pool2d(x, 3), (19, 24)), (30, 27)),
    "nearest exact": (lambda x: upsample(F.avg_pool2d(x, 3), (19, 24), "nearest"), (30, 27)),
    "pixel shuffle": (lambda x: F.pixel_shuffle(F.avg_pool2d(x, 3).expand(-1, 8, -1, -1), 2), (30, 27)),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 3).mean(1, keepdim=True), (24, 18)),
    "repeated": (lambda x: F.avg_pool2d(x, 3).repeat_interleave(2, 3), (30, 27)),
    "windows": (lambda x: windows(x[:, :, ::2]), (32, 18)),
    "windows beside voxels": (lambda x: windows(x) + x + F.avg_pool2d(x, 5, 1, 2), (24, 18)),
    "stacked": (lambda x: F.avg_pool2d(depth_to_space(x), 3, 1), (20, 15)),
    "tokens": (lambda x: F.avg_pool2d(tokens(F.avg_pool2d(x, 2)), 3, 1), (24, 18)),
    "slices": (neighbours, (24, 18)),
    "concatenated along": (lambda x: F.avg_pool2d(torch.cat([x[:, :, :9], 2 * x[:, :, 9:]], 2), 3, 1), (20, 12)),
    "concatenated": (lambda x: torch.cat([x, x.roll(0, 2), F.avg_pool2d(x, 3, 1, 1)], 1).sum(1, True), (12, 10)),
    "split": (lambda x: torch.add(*F.pad(x, [3, 3, 0, 0]).split([10, 10], 3)), (12, 14)),
    "reflected": (lambda x: F.avg_pool2d(F.pad(x, [2, 2, 1, 1], mode="reflect"), 3, 1), (14, 12)),
    "replicated": (lambda x: F.avg_pool2d(F.pad(x, [2, 2, 1, 1], mode="replicate"), 3, 1), (14, 12)),
    "mirrored": (lambda x: F.avg_pool2d(mirror(x, (3, 2), (4, 2)), 5, 1), (16, 14)),
    "fitted": (lambda x: F.avg_pool2d(fit(x, (18, 9)), 3, 1), (14, 12)),
    "max then argmax": (lambda x: F.avg_pool2d(x.expand(-1, 3, -1, -1).amax(1, True), 3, 1), (14, 12)),
    "joined by shape": (lambda x: x.unsqueeze(2).squeeze(2).movedim(1, -1)[..., 0].unsqueeze(1) * x, (8, 7)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_field_of_operations_is_what_gradients_reach(name: str) -> None:
    function, size = OPERATIONS[name]
    assert traced(function, *size) == reached(function, *size)


def attention(x: Tensor) -> Tensor:
    q = x.flatten(2).transpose(1, 2)
    return (q @ q.transpose(1, 2)).softmax(-1) @ q


def squeeze(x: Tensor) -> Tensor:
    return x * x.mean((2, 3), keepdim=True).sigmoid()


def written(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, 2:] = x[:, :, :-2]
    return out


def filled(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.view(-1).copy_(x.flatten())
    return out


def kept_aside(x: Tensor) -> Tensor:
    y = x * 2
    aside = y.view(-1).view_as(y)
    y += x.mean((2, 3), keepdim=True)
    return aside


def assembled(x: Tensor) -> Tensor:
    out = x.clone()
    out[:, :, 2:] += x[:, :, :-2]
    return out


WHOLE: dict[str, Function] = {
    "mean": lambda x: x.mean((2, 3)),
    "global pool": lambda x: F.adaptive_avg_pool2d(x, 1).expand_as(x),
    "attention": attention,
    "squeeze": squeeze,
    "norm of a map": lambda x: x / torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True),
    "flattened": lambda x: F.linear(x.flatten(1), torch.ones(3, x[0].numel(), dtype=x.dtype, device=x.device)),
    "fft": lambda x: torch.fft.rfft2(x).abs(),
    "sorted by values": lambda x: x.flatten(2)[:, :, x.flatten().argsort()],
    "written": written,
    "written by another name": filled,
    "changed by another name": kept_aside,
    "added to a part": assembled,
    "rolled": lambda x: x.roll((2, 1), (2, 3)),
    "largest of all": lambda x: torch.max(x, x.max()),
    "reshaped across": lambda x: x.reshape(1, 1, x.shape[3], x.shape[2]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_sees_all_or_is_not_followed_gets_no_number(name: str) -> None:
    assert traced(WHOLE[name], 6, 4) == (None, None)


def test_only_the_axis_that_is_seen_whole_is_marked() -> None:
    assert traced(lambda x: F.avg_pool2d(x, 3, 1, 1) + x.mean(2, keepdim=True), 9, 8) == (None, 3)
    assert traced(lambda x: F.avg_pool2d(x, 3, 1, 1).cumsum(3), 9, 8) == (3, None)
    assert traced(lambda x: x.select(2, 4), 9, 8) == (None, 1)


def test_what_does_not_see_the_image_depends_on_none_of_it() -> None:
    assert traced(lambda x: x.new_zeros(x.shape) + 1, 9, 8) == (0, 0)
    assert traced(lambda x: torch.arange(4), 9, 8) == (0, 0)


def test_unpooling_keeps_to_its_windows() -> None:
    """Gradients reach only where the maxima were: the union over many images is the field."""

    def network(x: Tensor) -> Tensor:
        pooled, switches = pool_with_switches(x, (2, 3))
        pooled = F.avg_pool2d(pooled, 3, 1, 1)
        return F.avg_pool2d(unpool(pooled, switches, (2, 3), x.shape[2:]), 3, 1, 1)

    assert traced(network, 15, 20) == traced(network, 64, 64)
    torch.manual_seed(0)
    seen = torch.zeros(6, 9, 32, 30, dtype=torch.bool)
    rows, columns = torch.arange(6).repeat_interleave(9), torch.arange(9).repeat(6)
    for _ in range(40):  # each voxel of an image of its own
        x = torch.rand(54, 1, 32, 30, requires_grad=True)
        network(x)[torch.arange(54), 0, 12 + rows, 9 + columns].sum().backward()
        assert x.grad is not None
        seen |= (x.grad[:, 0] != 0).unflatten(0, (6, 9))
    places = [one.nonzero() for one in seen.flatten(0, 1)]
    widths = torch.stack([place.amax(0) - place.amin(0) + 1 for place in places]).amax(0)
    assert traced(network, 32, 30) == tuple(widths.tolist())


def test_scattering_anywhere_is_not_taken_for_unpooling() -> None:
    def network(x: Tensor) -> Tensor:
        pooled, switches = pool_with_switches(x, 2)
        table = torch.tensor([0, 1, 8, 25])  # 25 is in another window
        corners = torch.arange(4)[:, None] * 16 + torch.arange(4) * 2
        places = table[switches.long()] + corners
        empty = pooled.new_zeros(1, 1, 64)
        return empty.scatter(2, places.flatten(2), pooled.flatten(2)).view(1, 1, 8, 8)

    assert traced(network, 8, 8, device="cpu") == (None, None)


def without_norms(model: nn.Module) -> nn.Module:
    """Weights and shifts of one, no norms, means for maxima: gradients are positive wherever there is a way."""
    norms = tuple(type(make(1)) for name, make in NORMS.items() if name != "none")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, norms):
            model.set_submodule(name, nn.Identity())
        elif isinstance(layer, nn.MaxPool2d | nn.MaxPool3d):
            pool = nn.AvgPool2d if isinstance(layer, nn.MaxPool2d) else nn.AvgPool3d
            twin = pool(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, count_include_pad=False)
            model.set_submodule(name, twin)
    for p in model.parameters():
        nn.init.constant_(p, 0.01)
    return model.double()


SMALL = {"channels": (1, 1, 1), "convs_per_stage": 1}
UNET = {**SMALL, "decoder_convs": 1}
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "plain": ({**UNET, "pool": "max"}, (72, 70), 4),
    "plain 3D": ({**UNET, "strides": (1, (1, 2, 2), 2)}, (22, 34, 40), 4),
    "interpolated": ({**UNET, "upsampling": "interpolate"}, (72, 70), 4),
    "attention gates": ({**UNET, "attention": True}, (72, 70), 4),
    "unet++": ({**UNET, "decoder": "unetplusplus"}, (80, 80), 4),
    "resnet": ({"encoder": "resnet18", "width": 1, "depth": 3, "decoder_convs": 1}, (240, 224), 8),
    "vgg": ({"encoder": "vgg11_bn", "width": 1, "depth": 4, "decoder_convs": 1}, (150, 144), 8),
    "convnext": ({"encoder": "convnext_tiny", "width": 2, "depth": 2, "decoder_convs": 1}, (280, 272), 8),
    "fcn": ({"encoder": "vgg11", "width": 1, "depth": 4, "decoder": "fcn8s", "fc_channels": 1}, (330, 320), 16),
    "fpn": ({**SMALL, "decoder": "fpn", "decoder_channels": 1}, (120, 112), 4),
    "lenet": ({"encoder": "lenet5"}, (80, 72), 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_field_of_networks_is_what_gradients_reach(name: str) -> None:
    options, size, period = NETWORKS[name]
    model = create_model(dims=len(size), classes=1, **{**options})
    claimed = summarize(model, size).receptive_field
    model = without_norms(model)
    widths = []
    for offset in range(period):
        x = torch.ones(1, 1, *size, dtype=torch.double, requires_grad=True)
        out = model(x)
        out[(0, 0, *(n // 2 + offset for n in size))].backward()
        assert x.grad is not None
        seen = x.grad[0, 0].nonzero()
        assert (seen.amin(0) > 0).all()
        assert (seen.amax(0) < torch.tensor(size) - 1).all()
        widths.append(seen.amax(0) - seen.amin(0) + 1)
    assert claimed == tuple(torch.stack(widths).amax(0).tolist())


def test_published_fields() -> None:
    """Long et al. 2015, table 1 (with fc6 as a convolution), and Araujo et al. 2019 (the convolutional parts)."""
    models = imports.torchvision().models
    with torch.device("meta"):
        alexnet, vgg16 = models.alexnet().features, models.vgg16().features
        inception = models.inception_v3(aux_logits=False, init_weights=False)
        published = {
            195: alexnet,
            355: nn.Sequential(alexnet, conv_valid(256, 6)),
            212: vgg16,
            404: nn.Sequential(vgg16, conv_valid(512, 7)),
            1311: nn.Sequential(*list(inception.children())[:-3]),
        }
        found = {n: traced(network, 320, 320, channels=3) for n, network in published.items()}
    assert found == {n: (n, n) for n in published}


def conv_valid(channels: int, kernel: int) -> nn.Module:
    return nn.Conv2d(channels, 1, kernel)


@pytest.mark.parametrize("decoder", ["fcn32s", "deconvnet"])
def test_fc6_on_vgg16_sees_404_voxels(decoder: str) -> None:
    encoder = "vgg16_bn" if decoder == "deconvnet" else "vgg16"
    with torch.device("meta"):
        model = create_model(encoder, decoder, dims=2, in_channels=3, classes=21)
    rows = {row.name: row for row in summarize(model, (224, 224)).rows}
    name = "decoder.middle.fc6.conv" if decoder == "deconvnet" else "decoder.fc.0.conv"
    assert (rows[name].receptive_field, rows[name].stride) == ((404, 404), (32, 32))
