"""Filling an encoder with the weights of a file or of a published source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from densepred.errors import InputError
from densepred.models.weights.fetch import obtain, read_state, sha256
from densepred.models.weights.inflate import INFLATIONS, Inflation, adapt_first_conv, depth_profile, inflate
from densepred.models.weights.names import align, is_classifier, to_torchvision
from densepred.models.weights.report import Pretraining, Report, listed
from densepred.models.weights.sources import is_file, resolve


def load_weights(
    encoder: nn.Module,
    source: str | Path,
    name: str | None = None,
    *,
    inflation: Inflation = "mean",
    pretraining: Pretraining | None = None,
    strict: bool = True,
) -> Report:
    """Fill an encoder with pretrained weights; changes it, and puts what is known of them at `encoder.pretraining`.

    The first convolution is fitted to the channels of the image (`adapt_first_conv`) and 2D weights to a 3D encoder
    (`inflate`). What belongs to a classifier is left out.

    Args:
        encoder: with fresh weights, on any device but meta.
        source: a file (.safetensors, .pth ...), or "imagenet", or a library of published weights, "torchvision",
            "timm" or "smp", or one of its versions, such as "torchvision:IMAGENET1K_V2". Naming published weights asks
            for their download, where they are not in the cache folder yet.
        name: the encoder's in the configuration, such as "resnet50"; published weights are found by it.
        inflation: how a 2D kernel stands in a 3D one: "mean" or "centre".
        pretraining: how the images that a local file was trained on were normalised, where that is known.
        strict: refuse a file with tensors of other shapes; otherwise these keep their fresh values.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: an unknown source, version or inflation, or an encoder on the meta device.
        InputError: no file of weights, or weights of another width or architecture.
        ResourceError: published weights that are not there and cannot be downloaded.
        UnsafeError: a file that could run code, or with another hash than published.

    Example:
        >>> import tempfile, torch
        >>> from densepred.models.encoders.resnet import ResNetEncoder
        >>> file = Path(tempfile.mkdtemp(), "grey.pth")
        >>> torch.save(ResNetEncoder(2, 1, width=4).state_dict(), file)
        >>> load_weights(ResNetEncoder(3, 2, width=4), file).complete
        True
    """
    if inflation not in INFLATIONS:
        raise ValueError(f"inflation must be one of {', '.join(INFLATIONS)}, got {inflation!r}")
    if any(parameter.is_meta for parameter in encoder.parameters()):
        raise ValueError("encoder must have real parameters to be filled, it is on the meta device")
    path, known = _found(source, name, pretraining)
    name = name or type(encoder).__name__
    state = _renamed(encoder, read_state(path))
    values, report = _sorted(encoder, state, inflation, f"{known.source} ({path})")
    if not report.loaded:
        raise _nothing_fits(name, encoder, state, path)
    if strict and report.refused:
        raise _other_shapes(name, encoder, state, report, path)
    encoder.load_state_dict(values, strict=False)
    _remember(encoder, replace(known, sha256=sha256(path)), report)
    return report


def _remember(encoder: nn.Module, known: Pretraining, report: Report) -> None:
    """Put what is known of the weights at the encoder, for its channels."""
    learnt = {key for key, _ in encoder.named_parameters()}
    known = replace(known, fresh=tuple(key for key in (*report.missing, *report.refused) if key in learnt))
    _, layer = _first_convolution(encoder)
    known = known if layer is None else known.for_channels(layer.in_channels)
    setattr(encoder, "pretraining", known)  # noqa: B010 (any module may be filled)


def _found(source: str | Path, name: str | None, pretraining: Pretraining | None) -> tuple[Path, Pretraining]:
    """The file, and what is known of its pretraining."""
    if is_file(source):
        return Path(source), pretraining or Pretraining(Path(source).name)
    if name is None:
        raise ValueError(f"name must be the encoder's, such as 'resnet50', to find the weights {source!r}, got None")
    published = resolve(str(source), name)
    limits = 0.0, float(published.input_range)
    return obtain(published), Pretraining(published.name, published.mean, published.std, limits)


def _renamed(encoder: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the encoder's names: as they are, or as the family or another library publishes them."""
    own = encoder.state_dict().keys()
    aligned = align(state, own)
    published = getattr(encoder, "published", None)
    renamed = published(state) if published else {to_torchvision(key): value for key, value in aligned.items()}
    return max(aligned, renamed, key=lambda names: len(own & names.keys()))


def _first_convolution(encoder: nn.Module) -> tuple[str, _ConvNd | None]:
    """The layer that sees the image, and its name."""
    found = ((name, layer) for name, layer in encoder.named_modules() if isinstance(layer, _ConvNd))
    return next(found, ("", None))


def _sorted(
    encoder: nn.Module, state: Mapping[str, Tensor], inflation: Inflation, source: str
) -> tuple[dict[str, Tensor], Report]:
    """What to fill the encoder with, and what becomes of each tensor on either side."""
    own, report, values = encoder.state_dict(), Report(source), dict[str, Tensor]()
    layers, (first, _) = dict(encoder.named_modules()), _first_convolution(encoder)
    for key, target in own.items():
        if key not in state:
            if not key.endswith("num_batches_tracked"):  # which older files lack, and nothing is computed from
                report.missing[key] = target.numel()
            continue
        value, layer = _as_kernel(state[key], target.shape), layers[key.rpartition(".")[0]]
        if key == f"{first}.weight" and value.shape[1] != target.shape[1]:
            value = adapt_first_conv(value, target.shape[1])
            report.adapted[key] = target.numel()
        if isinstance(layer, _ConvNd) and _lacks_depth(value, target):
            value = inflate(value, target.shape, depth_profile(layer, inflation))
            report.inflated[key] = target.numel()
        if _but_ones(value.shape) == _but_ones(target.shape):
            value = value.reshape(target.shape)
        fits = value.shape == target.shape
        (report.loaded if fits else report.refused)[key] = target.numel()
        if fits:
            values[key] = value
    for key in [key for key in state if key not in own]:
        (report.classifier if is_classifier(key) else report.unexpected)[key] = state[key].numel()
    return values, report


def _as_kernel(value: Tensor, shape: Sequence[int]) -> Tensor:
    """A fully connected layer over h x w voxels, read as the convolution it is."""
    if value.ndim == 2 and len(shape) > 3 and value.shape[1] == shape[1] * math.prod(shape[-2:]):
        return value.reshape(value.shape[0], shape[1], *shape[-2:])
    return value


def _lacks_depth(value: Tensor, target: Tensor) -> bool:
    return value.ndim == 4 and target.ndim == 5 and value.shape == target.shape[:2] + target.shape[3:]


def _but_ones(shape: Sequence[int]) -> list[int]:
    """Sizes without the axes of one, in which layer scales and linear layers of 2D and 3D, or of libraries, differ."""
    return [n for n in shape if n > 1]


def _nothing_fits(name: str, encoder: nn.Module, state: Mapping[str, Tensor], path: Path) -> InputError:
    theirs, ours = listed(list(state), 3), listed(list(encoder.state_dict()), 3)
    what = f"none of its {len(state)} tensors fits encoder {name}: the file has {theirs}; the encoder has {ours}"
    return InputError(what, "choose weights of this architecture", path)


def _other_shapes(name: str, encoder: nn.Module, state: Mapping[str, Tensor], report: Report, path: Path) -> InputError:
    """Says which width the weights are of, if that is what differs."""
    own, (first, _) = encoder.state_dict(), _first_convolution(encoder)
    kernels = [key for key in report.refused if key != f"{first}.weight" and own[key].ndim > 1]
    key = (kernels or list(report.refused))[0]
    shapes = f"{key} is {tuple(own[key].shape)}, the file has {tuple(state[key].shape)}"
    ours, theirs = (len(tensors[f"{first}.weight"]) for tensors in (own, state))
    if ours != theirs:
        what = f"encoder {name} has width {ours}, its pretrained weights {theirs}: {shapes}"
        return InputError(what, f"use width {theirs} or leave pretrained out", path)
    what = f"{len(report.refused)} of {len(report.refused) + len(report.loaded)} tensors have other shapes: {shapes}"
    return InputError(what, f"choose weights of encoder {name} or leave pretrained out", path)
