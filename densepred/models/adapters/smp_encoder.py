"""Encoders from segmentation_models_pytorch (SMP)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.adapters.source import HALF, IMAGENET, Source
from densepred.models.adapters.wrapped import WrappedEncoder, built, check_depth, check_request, drop_unused, probe
from densepred.registry import lookup

_DPN = (124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3
_DEEPEST, _SHALLOWEST = 5, 2  # what every encoder of SMP can be built to


def names() -> list[str]:
    """SMP's encoders by their own names; those it calls `tu-<name>` are `timm.<name>` here.

    Example:
        >>> "mobileone_s0" in names()
        True
    """
    return list(imports.smp().encoders.get_encoder_names())


def smp_encoder(
    name: str, dims: int, in_channels: int, depth: int | None = None, options: Mapping[str, object] | None = None
) -> WrappedEncoder:
    """An encoder of SMP, with fresh weights.

    SMP counts the image itself as the first map, and gives maps without channels where a network has none of that
    stride: both are left out.

    Args:
        name: as in SMP, such as "mobileone_s0".
        dims: 2.
        in_channels: channels of the image.
        depth: keep this many maps, finest first, and no layers beyond.
        options: `output_stride`, 8 or 16, where SMP can dilate the network.

    Raises:
        ValueError: an unknown name or option, `dims` of 3, more maps than there are, a network that cannot be dilated.

    Example:
        >>> encoder = smp_encoder("mobileone_s0", 2, in_channels=1)
        >>> encoder.channels, [stride[0] for stride in encoder.strides]
        ((48, 48, 128, 256, 1024), [2, 4, 8, 16, 32])
    """
    check_request(name, names(), "smp", dims, options)
    unknown = sorted(set(options or {}) - {"output_stride"})
    if unknown:
        raise ValueError(f"options of smp.{name} must be among output_stride, got {', '.join(unknown)}")
    stride = (options or {}).get("output_stride", 32)
    network = _network(name, in_channels, _DEEPEST, stride)
    maps = probe(network, in_channels)
    wanted = check_depth(depth, len(maps))
    if wanted < len(maps):
        network = _network(name, in_channels, max(_DEEPEST - (len(maps) - wanted), _SHALLOWEST), stride)
    drop_unused(network, in_channels, wanted)
    return WrappedEncoder(in_channels, network, maps[:wanted], rename="encoder.".__add__)


class _Maps(nn.Module):
    """An SMP encoder without those of its maps that are the image itself or empty."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, Y, X) -> the feature maps, finest first."""
        return [feature for feature in self.encoder(x) if feature is not x and feature.shape[1]]


def _network(name: str, in_channels: int, depth: int, output_stride: object) -> nn.Module:
    get_encoder = imports.smp().encoders.get_encoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SMP would rename some of its own
        return _Maps(
            built(lambda: get_encoder(name, in_channels=in_channels, depth=depth, output_stride=output_stride))
        )


def weights_of(name: str, weights: str | None = None) -> Source:
    """Where SMP's weights of an encoder are, at the revision that the installed SMP was released with.

    Args:
        name: as in SMP.
        weights: such as "imagenet" or "ssl"; by default the first that SMP lists.

    Raises:
        ValueError: no such encoder or weights.

    Example:
        >>> weights_of("xception").mean
        (0.5, 0.5, 0.5)
    """
    check_request(name, names(), "smp", 2, None)
    published = imports.smp().encoders.encoders[name]["pretrained_settings"]
    weights = next(iter(published)) if weights is None else weights
    entry = lookup(published, weights, f"weights of smp.{name}")
    url = f"https://huggingface.co/{entry['repo_id']}/resolve/{entry['revision']}/model.safetensors"
    label = f"{name}.{weights}"
    return Source(f"smp.{label}", url, f"smp-{label}.safetensors", None, *_normalisation(name, weights))


def _normalisation(name: str, weights: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std, which SMP keeps in a file beside the weights, after the works the weights come from."""
    if name.startswith("dpn"):
        return _DPN
    if name.startswith(("inception", "xception", "timm-tf_efficientnet_lite")) or weights == "advprop":
        return HALF
    return IMAGENET
