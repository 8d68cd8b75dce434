"""Image classifiers as published: our encoders of the ImageNet families with torchvision's classifiers on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from densepred.models.blocks import Style
from densepred.models.encoders import convnext, resnet, vgg
from densepred.models.encoders.base import Encoder
from densepred.models.layers import global_pool
from densepred.registry import lookup


def adaptive_mean(x: Tensor, bins: int) -> Tensor:
    """The mean over `bins` stretches of each axis, which may overlap: (B, C, *spatial) -> (B, C, *[bins] * dims).

    Stretch i of n voxels runs from floor(i * n / bins) to ceil((i + 1) * n / bins). This is torch's adaptive average
    pooling for any number of axes, as a product with a matrix per axis, which also exports with sizes left open.

    Args:
        x: (B, C, *spatial).
        bins: along each axis.

    Example:
        >>> import torch
        >>> adaptive_mean(torch.tensor([[[[1.0, 2.0, 6.0]]]]), 2)[0, 0].tolist()
        [[1.5, 4.0], [1.5, 4.0]]
    """
    index = torch.arange(bins, device=x.device).unsqueeze(1)
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        voxel = torch.arange(n, device=x.device)
        inside = (voxel >= index * n // bins) & (voxel < -(-(index + 1) * n // bins))
        weight = inside.to(x.dtype) / inside.sum(1, keepdim=True)
        x = (x.movedim(axis, -1) @ weight.to(x.dtype).T).movedim(-1, axis)
    return x


class VGGHead(nn.Module):
    """Means over 7 stretches of each axis, and three linear layers with dropout between them.

    Args:
        dims: 2 or 3.
        channels: C.
        classes: K.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     shape = VGGHead(2, 512, 1000)(torch.zeros(1, 512, 3, 2)).shape
        >>> shape
        torch.Size([1, 1000])
    """

    def __init__(self, dims: int, channels: int, classes: int) -> None:
        super().__init__()
        first, second = nn.Linear(channels * 7**dims, 4096), nn.Linear(4096, 4096)
        self.classifier = nn.Sequential(
            *(first, nn.ReLU(inplace=True), nn.Dropout(0.5)),
            *(second, nn.ReLU(inplace=True), nn.Dropout(0.5)),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K)."""
        out: Tensor = self.classifier(adaptive_mean(x, 7).flatten(1))
        return out


class ResNetHead(nn.Module):
    """The mean over all voxels and one linear layer.

    Args:
        channels: C.
        classes: K.

    Example:
        >>> import torch
        >>> ResNetHead(4, 5)(torch.zeros(1, 4, 3, 2)).shape
        torch.Size([1, 5])
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K)."""
        out: Tensor = self.fc(global_pool(x))
        return out


class ConvNeXtHead(nn.Module):
    """The mean over all voxels, layer normalisation and one linear layer.

    Args:
        channels: C.
        classes: K.

    Example:
        >>> import torch
        >>> ConvNeXtHead(4, 5)(torch.zeros(1, 4, 3, 2)).shape
        torch.Size([1, 5])
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        norm = Style("layer").make_norm(channels)
        self.classifier = nn.Sequential(norm, nn.Flatten(), nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K)."""
        out: Tensor = self.classifier(global_pool(x))
        return out


class Classifier(nn.Module):
    """An encoder and a head that looks at its coarsest map.

    Args:
        encoder: gives feature maps, finest first.
        head: takes the coarsest to logits.

    Example:
        >>> import torch
        >>> encoder = resnet.ResNetEncoder(3, 1, "resnet18", width=4)
        >>> Classifier(encoder, ResNetHead(32, 5))(torch.zeros(2, 1, 9, 10, 11)).shape
        torch.Size([2, 5])
    """

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> logits (B, K)."""
        out: Tensor = self.head(self.encoder(x)[-1])
        return out

    def load_torchvision(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of torchvision's model of the same name.

        Args:
            state: its `state_dict`. Names that begin with `fc` or `classifier` go to the head, the rest to the encoder.

        Raises:
            RuntimeError: names or shapes that do not match one to one.
        """
        parts = {name: "head" if name.startswith(("fc.", "classifier.")) else "encoder" for name in state}
        self.load_state_dict({f"{part}.{name}": state[name] for name, part in parts.items()})


CLASSIFIERS = (*vgg.VARIANTS, *resnet.VARIANTS, *convnext.VARIANTS)
"""Names for `create_classifier`."""


def create_classifier(name: str, classes: int = 1000, in_channels: int = 3, dims: Literal[2, 3] = 2) -> Classifier:
    """An ImageNet classifier as published, with fresh weights.

    Args:
        name: one of `CLASSIFIERS`, such as "vgg16", "resnet50" or "convnext_tiny".
        classes: logits, K.
        in_channels: channels of the image.
        dims: 2 or 3.

    Raises:
        ValueError: an unknown name or a number outside its range.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = create_classifier("vgg16")
        >>> sum(p.numel() for p in model.parameters())
        138357544
    """
    lookup(dict.fromkeys(CLASSIFIERS), name, "name")
    if classes < 1:
        raise ValueError(f"classes must be positive, got {classes!r}")
    encoder: Encoder
    if name in vgg.VARIANTS:
        encoder = vgg.VGGEncoder(dims, in_channels, name, taps="pools")
        return Classifier(encoder, VGGHead(dims, encoder.channels[-1], classes))
    if name in convnext.VARIANTS:
        encoder = convnext.ConvNeXtEncoder(dims, in_channels, name)
        return Classifier(encoder, ConvNeXtHead(encoder.channels[-1], classes))
    encoder = resnet.ResNetEncoder(dims, in_channels, name)
    return Classifier(encoder, ResNetHead(encoder.channels[-1], classes))
