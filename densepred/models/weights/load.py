"""Filling an encoder with the weights of a file or of a published source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from densepred.errors import InputError
from densepred.models.weights.fetch import obtain, read_state, sha256
from densepred.models.weights.inflate import INFLATIONS, Inflation, adapt_first_conv, depth_profile, inflate
from densepred.models.weights.names import align, densenets, is_classifier, to_torchvision
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
        strict: refuse a file of another architecture: tensors of other shapes, or that the encoder lacks in its midst
            (blocks, biases), or that it has and the file has not; otherwise what is not filled keeps its fresh values.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: an unknown source, version or inflation, or an encoder on the meta device.
        InputError: no file of weights, weights of another width or architecture, or numbers that are no weights.
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
    _check_numbers(encoder.state_dict(), state, path)
    values, report = _sorted(encoder, state, inflation, f"{known.source} ({path})")
    if not report.loaded:
        raise _nothing_fits(name, encoder, state, path)
    if strict and report.refused:
        raise _other_shapes(name, encoder, state, report, path)
    if strict:
        _check_whole(name, encoder, report, path)
    encoder.load_state_dict(values, strict=False)
    _remember(encoder, replace(known, sha256=sha256(path)), report)
    return report


def _remember(encoder: nn.Module, known: Pretraining, report: Report) -> None:
    """Put what is known of the weights at the encoder, for its channels."""
    learnt = {key for key, _ in encoder.named_parameters()}
    known = replace(known, fresh=tuple(key for key in (*report.missing, *report.refused) if key in learnt))
    channels = _image_channels(encoder)
    known = known.for_channels(channels) if channels else known
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
    state = {densenets(key): value for key, value in state.items()}
    aligned = align(state, own)
    published = getattr(encoder, "published", None)
    renamed = published(state) if published else {to_torchvision(key): value for key, value in aligned.items()}
    return max(aligned, renamed, key=lambda names: len(own & names.keys()))


def _first_convolution(encoder: nn.Module) -> tuple[str, _ConvNd | None]:
    """The layer that sees the image, and its name."""
    found = ((name, layer) for name, layer in encoder.named_modules() if isinstance(layer, _ConvNd))
    return next(found, ("", None))


def _image_channels(encoder: nn.Module) -> int:
    """Channels of the image; the first convolution sees more of them where the image was folded into channels."""
    _, layer = _first_convolution(encoder)
    return int(getattr(encoder, "in_channels", layer.in_channels if layer else 0))


def _sorted(
    encoder: nn.Module, state: Mapping[str, Tensor], inflation: Inflation, source: str
) -> tuple[dict[str, Tensor], Report]:
    """What to fill the encoder with, and what becomes of each tensor on either side."""
    own, report, values = encoder.state_dict(), Report(source), dict[str, Tensor]()
    layers, (first, _), channels = dict(encoder.named_modules()), _first_convolution(encoder), _image_channels(encoder)
    colours = {*state[f"{first}.weight"].shape[1:2]} if f"{first}.weight" in state else set()
    for key, target in own.items():
        if key not in state:
            if not key.endswith("num_batches_tracked"):  # which older files lack, and nothing is computed from
                report.missing[key] = target.numel()
            continue
        value, layer = _as_kernel(state[key], target.shape), layers[key.rpartition(".")[0]]
        kinds = [report.loaded]
        if _sees_image(layer, target, channels) and value.ndim > 2 and value.shape[1] in colours - {0, channels}:
            value = adapt_first_conv(value, channels)
            kinds.append(report.adapted)
        if isinstance(layer, _ConvNd) and _lacks_depth(value, target):
            value = inflate(value.to(target.dtype), target.shape, depth_profile(layer, inflation))
            kinds.append(report.inflated)
        if _but_ones(value.shape) == _but_ones(target.shape):
            value = value.reshape(target.shape)
        fits = value.shape == target.shape
        for kind in kinds if fits else [report.refused]:
            kind[key] = target.numel()
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


def _sees_image(layer: nn.Module, target: Tensor, channels: int) -> bool:
    """Whether this may be the weight of a convolution of the image; a stem of several branches has several."""
    return isinstance(layer, _ConvNd) and target.ndim > 2 and target.shape[1] == channels


def _lacks_depth(value: Tensor, target: Tensor) -> bool:
    return value.ndim == 4 and target.ndim == 5 and value.shape == target.shape[:2] + target.shape[3:]


def _but_ones(shape: Sequence[int]) -> list[int]:
    """Sizes without the axes of one, in which layer scales and linear layers of 2D and 3D, or of libraries, differ."""
    return [n for n in shape if n > 1]


def _check_numbers(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse what would be copied and is no floating-point numbers, or not finite."""
    for key, target in own.items():
        value = state.get(key, target)
        if not target.is_floating_point():
            continue
        if value.layout != torch.strided or value.is_meta or value.is_quantized or not value.is_floating_point():
            kind = "no values" if value.is_meta else f"{value.dtype} ({value.layout})"
            fix = "choose weights of floating-point numbers, not quantised ones"
            raise InputError(f"{key} holds {kind}, the encoder {target.dtype}", fix, path)
        if value is not target and not bool(value.isfinite().all()):
            raise InputError(f"{key} holds numbers that are not finite", "choose weights of a sound training", path)


def _check_whole(name: str, encoder: nn.Module, report: Report, path: Path) -> None:
    """Refuse a file that fills a part of the encoder only, or whose network computes more within the encoder."""
    learnt = {key for key, _ in encoder.named_parameters()}
    lacking = [key for key in report.missing if key in learnt or key.rpartition(".")[2].startswith("running_")]
    beyond = [key for key in report.unexpected if _is_within(encoder, key)]
    if not lacking and not beyond:
        return
    count = len(report.loaded) + len(lacking)
    parts = [f"the file lacks {len(lacking)} of its {count} tensors ({listed(lacking, 2)})"] if lacking else []
    parts += [f"it has no place for {len(beyond)} of the file's ({listed(beyond, 2)})"] if beyond else []
    what = f"weights of another architecture than encoder {name}: {' and '.join(parts)}"
    raise InputError(what, f"choose weights of encoder {name} or leave pretrained out", path)


def _is_within(encoder: nn.Module, key: str) -> bool:
    """Whether a tensor belongs into the midst of the encoder, not to later stages that it was built without."""
    modules = dict(encoder.named_modules())
    place = key.rpartition(".")[0]
    while place not in modules:
        place = place.rpartition(".")[0]
    names, layer = list(modules), modules[place]
    if key.endswith("num_batches_tracked") or not (isinstance(layer, nn.Identity) or layer.state_dict()):
        return False
    later = [other for other in names[names.index(place) + 1 :] if place and not other.startswith(f"{place}.")]
    return any(modules[other].state_dict() for other in later)


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
