"""Encoders from timm's networks with `features_only`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from densepred.models.adapters import imports
from densepred.models.adapters.source import Source
from densepred.models.adapters.wrapped import PROBES, Map, WrappedEncoder, built, check_depth, check_request, probe

_ONE_STRIDE = frozenset(
    "beit cait deit eva mlp_mixer naflexvit tnt vision_transformer vision_transformer_hybrid "
    "vision_transformer_relpos vision_transformer_sam vitamin volo xcit".split()
)
_NO_MAPS = frozenset("coat convit convmixer crossvit visformer".split())
_ONE_SIZE = frozenset("efficientformer efficientformer_v2 efficientvit_msra gcvit hiera levit nest pit".split())
_NO_TRIAL = frozenset(["efficientvit_mit"])  # its autocast knows no tensors without data
_ANY_SIZE = {
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
    "swin_transformer_v2_cr": {"strict_img_size": False},
}
"""What lets the networks of a module of timm take images of other sizes than they were trained on."""


def names() -> list[str]:
    """The networks of timm that can be an encoder.

    Left out: those without intermediate maps, those whose maps all have one stride (plain vision transformers) and
    those that take images of one size only.

    Example:
        >>> "convnext_atto" in names(), "vit_base_patch16_224" in names()
        (True, False)
    """
    models = imports.timm().models
    without = [m for m in models.list_modules() if m in _ONE_STRIDE | _NO_MAPS | _ONE_SIZE | _NO_TRIAL]
    hidden = {name for module in without for name in models.list_models(module=module)}
    return [name for name in models.list_models() if name not in hidden]


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
    _refuse_hidden(name)
    check_request(name, names(), "timm", dims, options)
    given = {**_fixed(name), **(options or {})}
    network = _network(name, in_channels, given)
    if depth is not None:
        count = check_depth(depth, len(network.feature_info.out_indices))
        network = _network(name, in_channels, {**given, "out_indices": tuple(range(count))})
    maps, multiple = _probed(name, network, in_channels)
    own = {key.removeprefix("model.").replace(".", "_"): key for key in network.state_dict()}
    return WrappedEncoder(in_channels, network, maps, multiple, lambda key: own.get(key.replace(".", "_"), key))


def _module_of(name: str) -> str:
    models = imports.timm().models
    return next((module for module in models.list_modules() if models.is_model_in_modules(name, [module])), "")


def _fixed(name: str) -> Mapping[str, object]:
    return _ANY_SIZE.get(_module_of(name), {})


def _refuse_hidden(name: str) -> None:
    reasons = {
        "its feature maps all have one stride, a decoder needs several": _ONE_STRIDE,
        "timm offers no intermediate feature maps of it": _NO_MAPS,
        "it takes images of one size only": _ONE_SIZE,
        "it does not run without data, so its maps cannot be measured": _NO_TRIAL,
    }
    for reason, modules in reasons.items():
        if _module_of(name) in modules:
            raise ValueError(f"timm.{name} cannot be an encoder: {reason}; take convnext_tiny, say, or pvt_v2_b2")


def _network(name: str, in_channels: int, options: Mapping[str, object]) -> nn.Module:
    create = imports.timm().create_model
    given = {"in_chans": in_channels, "features_only": True, "pretrained": False, **options}
    try:
        return built(lambda: create(name, **given))
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"timm cannot build {name} as an encoder: {error}") from error


def _probed(name: str, network: nn.Module, in_channels: int) -> tuple[list[Map], int | None]:
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
        raise ValueError(f"weights of timm.{name} must be one of {', '.join(tags) or '(none published)'}, got {weights!r}")
    tag = weights or next(iter(tags))
    cfg = tags[tag]
    url = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/{cfg.hf_hub_filename or 'model.safetensors'}"
    return Source(f"timm.{name}.{tag}", url, f"timm-{name}.{tag}.safetensors", None, tuple(cfg.mean), tuple(cfg.std))
