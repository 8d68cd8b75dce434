"""Encoders from timm's networks with `features_only`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from densepred.models.adapters import imports
from densepred.models.adapters.source import Source
from densepred.models.adapters.wrapped import (
    PROBES,
    Map,
    WrappedEncoder,
    adapt_first_convolution,
    built,
    check_depth,
    check_request,
    drop_unused,
    probe,
)

_REFUSED = {
    "its feature maps all have one stride, a decoder needs several": "beit cait deit eva mlp_mixer naflexvit tnt "
    "vision_transformer vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo xcit",
    "timm offers no intermediate feature maps of it": "coat convit convmixer crossvit visformer",
    "it takes images of one size only": "efficientformer efficientformer_v2 efficientvit_msra gcvit "
    "hiera levit nest pit",
    "its strides are no whole numbers for every image": "sequencer",
    "it does not run without data, so its maps cannot be measured": "efficientvit_mit",
}
"""Why the networks of these modules of timm cannot be an encoder."""

_ONE_SIZE = ("coatne", "botnet", "eca_botnext", "halo2botnet", "lamhalobotnet", "lambda_resnet26rpt", "sebotnet")
"""Beginnings of names within other modules: they attend over the whole image, with a learned bias for each distance."""

_ANY_SIZE = {
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
    "swin_transformer_v2_cr": {"strict_img_size": False},
}
"""What lets the networks of a module of timm take images of other sizes than they were trained on."""


def names() -> list[str]:
    """The networks of timm that can be an encoder.

    Left out: those without intermediate maps, those whose maps all have one stride (plain vision transformers), those
    that take images of one size only.

    Example:
        >>> "convnext_atto" in names(), "vit_base_patch16_224" in names()
        (True, False)
    """
    return [name for name, module in _modules().items() if not _refusal(name, module)]


def _modules() -> dict[str, str]:
    """The name of each network of timm -> the module it is in."""
    models = imports.timm().models
    return {name: module for module in models.list_modules() for name in models.list_models(module=module)}


def _refusal(name: str, module: str) -> str:
    """Why a network cannot be an encoder, or nothing."""
    if name.startswith(_ONE_SIZE):
        return "it takes images of one size only"
    return next((reason for reason, modules in _REFUSED.items() if module in modules.split()), "")


def timm_encoder(
    name: str, dims: int, in_channels: int, depth: int | None = None, options: Mapping[str, object] | None = None
) -> WrappedEncoder:
    """A network of timm as an encoder, with fresh weights.

    Networks whose windows do not fit any image (MaxViT, HaloNet) take whole multiples of the size they were trained on,
    mostly 224 or 256: smaller images are padded to that.

    Args:
        name: as in timm, without a tag, such as "convnext_atto".
        dims: 2.
        in_channels: channels of the image.
        depth: keep this many maps, finest first, and no layers beyond.
        options: further arguments of timm's constructor, such as `drop_path_rate`, `output_stride`, `img_size`.

    Raises:
        ValueError: an unknown name or option, `dims` of 3, more maps than there are, a network that cannot be an
            encoder.

    Example:
        >>> encoder = timm_encoder("convnext_atto", 2, in_channels=1)
        >>> encoder.channels, [stride[0] for stride in encoder.strides]
        ((40, 80, 160, 320), [4, 8, 16, 32])
    """
    module = _modules().get(name, "")
    refusal = _refusal(name, module)
    if refusal:
        raise ValueError(f"timm.{name} cannot be an encoder: {refusal}; take convnext_tiny, say, or pvt_v2_b2")
    check_request(name, names(), "timm", dims, options)
    given = {**_ANY_SIZE.get(module, {}), **(options or {})}
    network = _network(name, in_channels, given)
    if depth is not None:
        count = check_depth(depth, len(network.feature_info.out_indices))
        network = _network(name, in_channels, {**given, "out_indices": tuple(range(count))})
    maps, multiple = _probed(name, network, in_channels)
    drop_unused(network, in_channels, len(maps), multiple or PROBES[0])
    own = {key.removeprefix("model.").replace(".", "_"): key for key in network.state_dict()}
    return WrappedEncoder(in_channels, network, maps, multiple, partial(_own_name, own))


def _own_name(own: Mapping[str, str], key: str) -> str:
    """The name here of a published entry."""
    return own.get(key.replace(".", "_"), key)


def _network(name: str, in_channels: int, options: Mapping[str, object]) -> Any:
    create = imports.timm().create_model
    pruned = name.endswith("_pruned")  # timm reads their widths from a list that knows three input channels
    given = {"in_chans": 3 if pruned else in_channels, "features_only": True, "pretrained": False, **options}
    try:
        network = built(lambda: create(name, **given))
        if pruned:
            adapt_first_convolution(network, in_channels)
        return network
    except (TypeError, RuntimeError, AssertionError, AttributeError, KeyError) as error:
        raise ValueError(f"timm cannot build {name} as an encoder: {error}") from error


def _probed(name: str, network: Any, in_channels: int) -> tuple[list[Map], int | None]:
    """The maps, and what sizes of images have to be multiples of where it is not the coarsest stride."""
    trained = network.pretrained_cfg["input_size"][-1]
    failure: Exception | None = None
    for sizes, multiple in ((PROBES, None), ((trained, 2 * trained), trained)):
        try:
            maps = probe(network, in_channels, sizes)
        except (RuntimeError, AssertionError, ValueError) as error:
            failure = error
            continue
        if len({m.stride for m in maps}) == 1 < len(maps):
            raise ValueError(f"timm.{name} cannot be an encoder: its maps all have stride {maps[0].stride}")
        return maps, multiple
    raise ValueError(f"timm.{name} cannot be an encoder for images of any size: {failure}") from failure


def weights_of(name: str, weights: str | None = None) -> Source:
    """Where timm's weights of a network are.

    Args:
        name: as in timm, without a tag.
        weights: the tag, such as "a1_in1k"; by default the one timm recommends.

    Raises:
        ValueError: no such network or weights.

    Example:
        >>> weights_of("resnet18", "a1_in1k").url
        'https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors'
    """
    check_request(name, names(), "timm", 2, None)
    models = imports.timm().models
    published = {key: cfg for key, cfg in models.get_arch_pretrained_cfgs(name).items() if cfg.hf_hub_id}
    tags = {key.partition(".")[2] or "default": cfg for key, cfg in published.items()}
    if not tags or (weights is not None and weights not in tags):
        raise ValueError(
            f"weights of timm.{name} must be one of {', '.join(tags) or '(none published)'}, got {weights!r}"
        )
    tag = weights or next(iter(tags))
    cfg = tags[tag]
    url = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/{cfg.hf_hub_filename or 'model.safetensors'}"
    return Source(f"timm.{name}.{tag}", url, f"timm-{name}.{tag}.safetensors", None, tuple(cfg.mean), tuple(cfg.std))
