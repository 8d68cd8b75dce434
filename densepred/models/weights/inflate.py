"""Weights of 2D networks in 3D ones, and weights for three colours on any number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Inflation = Literal["mean", "centre"]
INFLATIONS = ("mean", "centre")


def inflate(weight: Tensor, shape: Sequence[int], profile: Tensor | None = None) -> Tensor:
    """A 2D kernel repeated along a new axis before its last two (Carreira & Zisserman 2017, section 2.3.1).

    What becomes of each type of layer when a 3D encoder takes 2D weights:

    - convolution of any size, grouped and depthwise included, (K, C, h, w) -> (K, C, d, h, w): d copies times 1/d, so
      that a volume constant along z gives what the image gave. A 1x1 kernel becomes 1x1x1 and stays as it is.
    - patches, kernel = stride (stem and downsampling of ConvNeXt): the same; each patch averages d equal planes.
    - transposed convolution, (C, K, h, w) -> (C, K, d, h, w): with kernel = stride d copies, not divided, for each
      output voxel receives one of them. Where kernels overlap, each by the number that reach the same voxel.
    - fully connected layer read as a convolution (fc6 of FCN), (K, C * h * w) -> (K, C, h, w), then as above.
    - linear layers, biases, norm scales, biases and running statistics, squeeze-and-excitation: unchanged, they have
      no spatial axes.
    - ConvNeXt's layer scale (C, 1, 1) -> (C, 1, 1, 1) and the scale and bias of global response normalisation:
      unchanged but for an axis of one.

    With the profile of the mode "mean" the features are those of the 2D network wherever no kernel reaches past the
    volume's first or last plane. With "centre" the 2D kernel stands in the one plane that never falls on padding, with
    zeros elsewhere: exact at all z, and at the start each plane is seen on its own. Layers that look at all voxels
    (squeeze-and-excitation, global response, instance and group normalisation) see the border too: with them "mean" is
    an approximation, "centre" is exact.

    Args:
        weight: of the 2D layer, (..., h, w).
        shape: of the 3D layer's weight, (..., d, h, w).
        profile: the factor of each of the d copies, as `depth_profile` gives it; by default 1/d.

    Raises:
        ValueError: shapes that differ in more than the new axis, or a profile of another length.

    Example:
        >>> inflate(torch.ones(8, 3, 7, 7), (8, 3, 5, 7, 7))[0, 0, :, 0, 0]
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    shape = tuple(shape)
    if len(shape) != weight.ndim + 1 or weight.shape != shape[:-3] + shape[-2:]:
        raise ValueError(f"shape must be {tuple(weight.shape)} with one more axis before the last two, got {shape}")
    depth = shape[-3]
    if profile is None:
        profile = torch.full((depth,), 1 / depth)
    if profile.shape != (depth,):
        raise ValueError(f"profile must have {depth} numbers for shape {shape}, got {tuple(profile.shape)}")
    return weight.unsqueeze(-3) * profile.to(weight).view(depth, 1, 1)


def depth_profile(layer: nn.Module, mode: Inflation = "mean") -> Tensor:
    """The factors with which the copies of a 2D kernel add up to it, one for each plane of a 3D layer's kernel.

    Args:
        layer: a 3D convolution, plain or transposed.
        mode: "mean" for equal factors, "centre" for ones where the kernel is never on padding and zeros elsewhere.

    Raises:
        ValueError: an unknown mode, or a layer without a kernel of three axes.

    Example:
        >>> from densepred.models.layers import conv, transposed_conv
        >>> depth_profile(conv(3, 1, 1, 5), "centre")
        tensor([0., 0., 1., 0., 0.])
        >>> depth_profile(transposed_conv(3, 1, 1, 2))
        tensor([1., 1.])
    """
    if mode not in INFLATIONS:
        raise ValueError(f"inflation must be one of {', '.join(INFLATIONS)}, got {mode!r}")
    if not isinstance(layer, _ConvNd) or len(layer.kernel_size) != 3:
        raise ValueError(f"layer must be a 3D convolution, got {type(layer).__name__}")
    size, step = layer.kernel_size[0], layer.stride[0]
    planes = torch.arange(size)
    # planes of one phase meet in an output voxel: all of a convolution's, every step-th of a transposed one's
    phase = planes % step if layer.transposed else torch.zeros_like(planes)
    if mode == "mean":
        return 1 / (phase[:, None] == phase).sum(1)
    first = _safe_plane(layer)
    count = min(step, size) if layer.transposed else 1
    return ((planes >= first) & (planes < first + count)).float()


def _safe_plane(layer: _ConvNd) -> int:
    """The (first) plane of a kernel that stands on a voxel of the volume wherever the kernel is placed."""
    size, step, padding = layer.kernel_size[0], layer.stride[0], layer.padding
    if isinstance(padding, str):
        padding = (layer.dilation[0] * (size // 2) if padding == "same" else 0,)
    if padding[0] or layer.transposed:
        return padding[0] // layer.dilation[0]
    return (
        size // 2 if size % 2 and step < size else 0
    )  # of patches the first plane is the image's, the last may not be


def adapt_first_conv(weight: Tensor, in_channels: int) -> Tensor:
    """The weights of a first convolution for another number of channels.

    The channels are taken in turn and scaled by C / n, as timm's `adapt_input_conv` does it. Where n is no multiple of
    C some colours come more often than others; what is missing or in excess is then spread evenly over the channels.
    That is the smallest change (least squares) after which an image of equal channels has exactly the response of a
    grey image in the published network, for any n. One channel therefore gets the sum over red, green and blue.

    Args:
        weight: (K, C, *kernel), C being 3 for colour images.
        in_channels: n, channels of the image.

    Returns:
        (K, n, *kernel).

    Raises:
        ValueError: `in_channels` below 1.

    Example:
        >>> adapt_first_conv(torch.tensor([[[[1.0]], [[2.0]], [[6.0]]]]), 1)
        tensor([[[[9.]]]])
    """
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels!r}")
    colours = weight.shape[1]
    if in_channels == colours:
        return weight.clone()
    exact = weight.double()
    cyclic = exact[:, torch.arange(in_channels) % colours] * (colours / in_channels)
    missing = exact.sum(1, keepdim=True) - cyclic.sum(1, keepdim=True)
    return (cyclic + missing / in_channels).to(weight.dtype)
