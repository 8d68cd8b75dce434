"""Encoders from torchvision's classifiers: the last map at each resolution.

Each of these networks is a chain of modules: the children of the classifier in the order they were registered, the
sequence that most of them come in (`features`, `layers`, `trunk_output`) opened. A map is what the chain holds before
its resolution falls, so it is the deepest at its stride; the last includes the 1x1 convolution that some (MobileNet,
EfficientNet) end with, and DenseNet's is before its last ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from torch import nn

from densepred.models.adapters import imports
from densepred.models.adapters.source import HALF, Source
from densepred.models.adapters.wrapped import (
    Steps,
    WrappedEncoder,
    adapt_first_convolution,
    built,
    check_depth,
    check_request,
    probe,
)
from densepred.registry import lookup

_OPENED = ("features", "layers", "trunk_output")
_AFTER_THE_CHAIN = ("avgpool", "dropout", "flatten", "classifier", "fc", "head")
_AUXILIARY = ("googlenet", "inception_v3")


def names() -> list[str]:
    """The classifiers that can be an encoder: all but the transformers made for one size of image.

    Example:
        >>> "densenet121" in names(), "vit_b_16" in names()
        (True, False)
    """
    models = imports.torchvision().models
    return [name for name in models.list_models(module=models) if not name.startswith(("vit_", "maxvit_"))]


def torchvision_encoder(
    name: str, dims: int, in_channels: int, depth: int | None = None, options: Mapping[str, object] | None = None
) -> WrappedEncoder:
    """The convolutional part of a torchvision classifier, with fresh weights.

    Args:
        name: as in torchvision, such as "densenet121".
        dims: 2.
        in_channels: channels of the image.
        depth: keep this many maps, finest first, and no layers beyond.
        options: further arguments of torchvision's constructor, such as `stochastic_depth_prob`.

    Raises:
        ValueError: an unknown name or option, `dims` of 3, more maps than there are.

    Example:
        >>> encoder = torchvision_encoder("squeezenet1_1", 2, in_channels=1)
        >>> encoder.channels, [stride[0] for stride in encoder.strides]
        ((64, 128, 256, 512), [2, 4, 8, 16])
    """
    check_request(name, names(), "torchvision", dims, options)
    model = _classifier(name, options or {})
    adapt_first_convolution(model, in_channels)
    steps = _chain(model)
    maps = probe(Steps(dict(model.named_children()), steps, range(len(steps))), in_channels)
    taps = [i for i, m in enumerate(maps) if i + 1 == len(maps) or maps[i + 1].stride != m.stride]
    taps = taps[: check_depth(depth, len(taps))]
    kept = steps[: taps[-1] + 1]
    return WrappedEncoder(in_channels, Steps(_kept(model, kept), kept, taps), [maps[i] for i in taps])


def _classifier(name: str, options: Mapping[str, object]) -> nn.Module:
    fixed: dict[str, object] = {"aux_logits": False, "init_weights": False} if name in _AUXILIARY else {}
    entry = imports.torchvision().models.get_model_builder(name)
    try:
        return built(lambda: entry(weights=None, **fixed, **options))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"options of torchvision.{name}: {error}") from error


def _chain(model: nn.Module) -> list[str]:
    steps = []
    for name, child in model.named_children():
        if name in _OPENED:
            steps += [f"{name}.{inner}" for inner, _ in child.named_children()]
        elif name not in _AFTER_THE_CHAIN:
            steps.append(name)
    return steps


def _kept(model: nn.Module, steps: list[str]) -> dict[str, nn.Module]:
    """The children of `model` that hold the steps, under the same names."""
    kept: dict[str, nn.Module] = {}
    for step in steps:
        outer, _, inner = step.partition(".")
        if inner:
            kept.setdefault(outer, nn.Sequential()).add_module(inner, model.get_submodule(step))
        else:
            kept[outer] = model.get_submodule(step)
    return kept


def weights_of(name: str, weights: str | None = None) -> Source:
    """Where torchvision's weights of a network are.

    Args:
        name: as in torchvision.
        weights: such as "IMAGENET1K_V1"; by default the best there are.

    Raises:
        ValueError: no such network or weights.

    Example:
        >>> weights_of("resnet18").file
        'resnet18-f37072fd.pth'
    """
    check_request(name, names(), "torchvision", 2, None)
    enum = imports.torchvision().models.get_model_weights(name)
    entry = (
        enum.DEFAULT if weights is None else lookup(dict(enum.__members__), weights, f"weights of torchvision.{name}")
    )
    transforms = entry.transforms()
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if name in _AUXILIARY:  # torchvision brings images from the usual normalisation to this inside the network
        mean, std = HALF
    file = PurePosixPath(entry.url).name
    digest = re.search(r"-([0-9a-f]{8,})\.", file)
    return Source(f"torchvision.{name}.{entry.name}", entry.url, file, digest and digest[1], mean, std)
