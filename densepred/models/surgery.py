"""Changing a finished network: what learns and how fast, other heads, dropout that stays on.

What a layer does in training beyond learning (a batch norm gathers statistics, dropout drops) follows its `training`
flag, which `model.train()` and `model.eval()` set for all layers at once. Where a layer shall not follow them, a hook
sets the flag back just before each forward pass. A hook works for any `nn.Module`, whoever calls `train()` on whichever
part, is copied and pickled with the layer and is no part of the `state_dict`; overriding `train` would need a class of
its own for each type of layer, or a method patched into instances, which copies and pickles lose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from densepred.models.dense import DensePredictor
from densepred.models.encoders.base import Encoder
from densepred.models.heads import HeadSpec, build_head
from densepred.models.layers import CONVOLUTIONS

Hook = Callable[[nn.Module, Any], None]


def freeze(module: nn.Module, stages: int | None = None) -> None:
    """Stop a module's parameters from learning and its norms from gathering statistics, also after `.train()`.

    Its norms with running statistics (batch normalisation) use them, as in evaluation, and leave them alone. Dropout
    and stochastic depth go on following `.train()` and `.eval()`. Freezing twice is freezing once.

    Args:
        module: any part of a network.
        stages: of an encoder, only what its first so many maps are computed by.

    Raises:
        ValueError: `stages` outside 1 to the number of maps.
        TypeError: `stages` of something that is no encoder.

    Example:
        >>> from densepred.models.encoders.resnet import ResNetEncoder
        >>> encoder = ResNetEncoder(2, 3, width=4)
        >>> freeze(encoder, stages=2)
        >>> encoder.layer1[0].conv1.weight.requires_grad, encoder.layer2[0].conv1.weight.requires_grad
        (False, True)
    """
    chosen = None if stages is None else _of_first_maps(module, stages)
    for prefix, layer in module.named_modules():
        own = {f"{prefix}.{name}" if prefix else name: p for name, p in layer.named_parameters(recurse=False)}
        frozen = [p for name, p in own.items() if chosen is None or name in chosen]
        for parameter in frozen:
            parameter.requires_grad_(False)
        if getattr(layer, "running_mean", None) is not None and (frozen or chosen is None):
            _hook(layer, _stay_in_evaluation)
            layer.eval()


def unfreeze(module: nn.Module) -> None:
    """Let all parameters of a module learn and its norms gather statistics in training; undoes `freeze`.

    All of them, also those that were fixed when it was built: give the part that is meant.

    Example:
        >>> layer = nn.BatchNorm1d(4)
        >>> freeze(layer)
        >>> unfreeze(layer)
        >>> layer.weight.requires_grad
        True
    """
    module.requires_grad_(True)
    for layer in module.modules():
        if _unhook(layer, _stay_in_evaluation):
            layer.train(module.training)


@contextlib.contextmanager
def frozen(module: nn.Module, stages: int | None = None) -> Iterator[None]:
    """`freeze` for the length of a block; afterwards everything learns, or not, as before.

    Args:
        module: any part of a network.
        stages: as for `freeze`.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> with frozen(layer):
        ...     layer.weight.requires_grad
        False
        >>> layer.weight.requires_grad
        True
    """
    learning = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    held = {layer for layer in module.modules() if _stay_in_evaluation in layer._forward_pre_hooks.values()}
    freeze(module, stages)
    try:
        yield
    finally:
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
        for layer in set(module.modules()) - held:
            if _unhook(layer, _stay_in_evaluation):
                layer.train(module.training)


def monte_carlo_dropout(model: nn.Module, on: bool = True) -> int:
    """Keep dropout active in evaluation, so that passes differ as the weights' uncertainty lets them (Gal & Ghahramani
    2016, arXiv:1506.02142); everything else, batch norms and stochastic depth included, follows `.train()`, `.eval()`.

    The switch holds through both until it is turned off. Only dropout that is a layer can be switched.

    Args:
        model: any network.
        on: False to turn it off again.

    Returns:
        The number of dropout layers with p > 0.

    Raises:
        ValueError: switched on where there are none: all passes would be the same.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5)).eval()
        >>> monte_carlo_dropout(model)
        1
        >>> bool((model(torch.ones(1000)) == 0).any())
        True
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
    if on and not layers:
        raise ValueError("model has no dropout layer with p > 0, so all passes are the same; build it with dropout > 0")
    for layer in layers:
        if on:
            _hook(layer, _stay_in_training)
        elif _unhook(layer, _stay_in_training):
            layer.train(model.training)
    return len(layers)


def replace_head(model: DensePredictor, name: str, spec: HeadSpec) -> None:
    """Give a network another head in place of one, with fresh weights, and so for its deep supervision.

    Args:
        model: changed; the new head is on the device and in the precision of the old one.
        name: of the head, a key of `model.specs`.
        spec: what to predict from now on, such as `Segmentation(5)`.

    Raises:
        ValueError: no head of this name; a dense head for a global one or the other way round; a decoder that computes
            the outputs itself (FCN), whose number is built in.

    Example:
        >>> from densepred.models.heads import Segmentation
        >>> from densepred.models.build import create_model
        >>> model = create_model(dims=2, channels=(4, 8), classes=3)
        >>> replace_head(model, "segmentation", Segmentation(5))
        >>> model(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 5, 8, 8])
    """
    if name not in model.specs:
        raise ValueError(f"name must be one of the heads {', '.join(model.specs)}, got {name!r}")
    old = model.specs[name]
    if old.dense != spec.dense:
        kinds = {True: "dense", False: "global"}
        raise ValueError(f"spec must be {kinds[old.dense]} as the head {name!r} is, got {spec!r}")
    if old.dense:
        assert model.decoder is not None
        if model.decoder.scores and old.channels != spec.channels:
            what = f"{type(model.decoder).__name__} computes the {old.channels} outputs of {name!r} itself"
            raise ValueError(f"{what}, so {spec.channels} need a model built anew")
        widths = [None if model.decoder.scores else width for width in model.decoder.channels]
        keys = {name + suffix: width for suffix, width in zip(model.suffixes, widths, strict=False)}
    else:
        keys = {name: model.encoder.channels[-1]}
    for key, width in keys.items():
        model.heads[key] = _like(model.heads[key], build_head(model.dims, width, spec))
    model.specs[name] = spec


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` on the device, in the precision and in the mode of `old`."""
    parameter = next(old.parameters(), None)
    new = new if parameter is None else new.to(parameter.device, parameter.dtype)
    return new.train(old.training)


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    pretrained_lr_factor: float = 0.1,
    weight_decay: float = 3e-5,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for torch's optimisers: mild rates for pretrained layers, bold ones for new layers.

    Pretrained is what `load_weights` filled in `model.encoder`; decoder, heads and what the file did not have are new.
    Every parameter is in exactly one group, frozen ones too, so that they learn as soon as they are unfrozen. Norms,
    biases and layer scales are not decayed.

    Args:
        model: with or without an encoder, pretrained or not.
        base_lr: rate of new layers.
        pretrained_lr_factor: rate of pretrained layers, relative to that; of the encoder's last stage.
        weight_decay: of kernels and matrices.
        layer_decay: further factor for each stage before the last, towards the image (Howard & Ruder 2018, section
            3.2: 1 / 2.6); 1 for one rate.

    Returns:
        `params`, `lr`, `weight_decay`, and for a schedule `lr_factor` (lr / base_lr) and `name`, such as "new",
        "encoder" or "encoder.2, not decayed". Groups without parameters are left out.

    Raises:
        ValueError: a rate or factor that is not positive, a factor above 1, or a negative decay.

    Example:
        >>> groups = parameter_groups(nn.Conv2d(1, 4, 3), 0.01)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('new', 0.01, 3e-05), ('new, not decayed', 0.01, 0.0)]
    """
    if base_lr <= 0 or weight_decay < 0:
        raise ValueError(f"base_lr must be positive and weight_decay not negative, got {base_lr!r}, {weight_decay!r}")
    for name, value in (("pretrained_lr_factor", pretrained_lr_factor), ("layer_decay", layer_decay)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    stages = _pretrained(model, layer_decay < 1)
    last = max(stages.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        factor, part = 1.0, "new"
        if name in stages:
            factor = pretrained_lr_factor * layer_decay ** (last - stages[name])
            part = f"encoder.{stages[name]}" if layer_decay < 1 else "encoder"
        decays = is_decayed(name, parameter)
        key = part if decays else f"{part}, not decayed"
        settings = {"lr": base_lr * factor, "weight_decay": weight_decay if decays else 0.0, "lr_factor": factor}
        groups.setdefault(key, {"params": [], **settings, "name": key})["params"].append(parameter)
    return list(groups.values())


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for this parameter: not for norms, biases and layer scales.

    Example:
        >>> is_decayed("conv.weight", torch.zeros(4, 1, 3, 3)), is_decayed("layer_scale", torch.zeros(4, 1, 1))
        (True, False)
    """
    leaf = name.rpartition(".")[2]
    return parameter.ndim > 1 and "bias" not in leaf and leaf != "layer_scale"


def _pretrained(model: nn.Module, by_stage: bool) -> dict[str, int]:
    """Names of the parameters that were pretrained -> stage, or 0 for all."""
    encoder = getattr(model, "encoder", None)
    pretraining = getattr(encoder, "pretraining", None)
    if encoder is None or pretraining is None:
        return {}
    names = [name for name, _ in encoder.named_parameters() if name not in pretraining.fresh]
    stages = stages_of(encoder) if by_stage else dict.fromkeys(names, 0)
    return {f"encoder.{name}": stages[name] for name in names}


def _of_first_maps(module: nn.Module, stages: int) -> set[str]:
    if not isinstance(module, Encoder):
        raise TypeError(f"stages can only be told apart of an Encoder, got {type(module).__name__}")
    if not 1 <= stages <= len(module.channels):
        raise ValueError(f"stages must be 1 to {len(module.channels)}, got {stages!r}")
    return {name for name, stage in stages_of(module).items() if stage < stages}


def stages_of(encoder: Encoder) -> dict[str, int]:
    """The stage of each of an encoder's parameters: the index of the first (finest) map that depends on it.

    Found by following an image through the encoder on the meta device, so it holds for any encoder and computes
    nothing. What no map depends on counts to the last stage.

    Args:
        encoder: of any family or library, on any device.

    Returns:
        Name of each parameter -> stage.

    Example:
        >>> from densepred.models.encoders.plain import PlainEncoder
        >>> stages = stages_of(PlainEncoder(2, 1, (4, 8)))
        >>> stages["stages.0.0.conv.weight"], stages["stages.1.0.conv.weight"]
        (0, 1)
    """
    first = next(layer.in_channels for layer in encoder.modules() if isinstance(layer, CONVOLUTIONS))
    channels = getattr(encoder, "in_channels", first)  # the first convolution sees more where voxels become channels
    size = [2 * max(axis) for axis in zip(*encoder.strides, strict=True)]
    state = (*encoder.named_parameters(), *encoder.named_buffers())
    tensors = {name: torch.empty_like(value, device="meta", requires_grad=False) for name, value in state}
    parameters = {name: tensors[name].requires_grad_() for name, _ in encoder.named_parameters()}
    with torch.enable_grad():
        maps = functional_call(encoder, tensors, (torch.empty(1, channels, *size, device="meta"),))
        stages = dict.fromkeys(parameters, len(maps) - 1)
        for i, one in reversed(list(enumerate(maps))):
            found = torch.autograd.grad(one.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
            stages |= {name: i for name, gradient in zip(parameters, found, strict=True) if gradient is not None}
    return stages


def _stay_in_evaluation(layer: nn.Module, inputs: Any) -> None:
    layer.training = False


def _stay_in_training(layer: nn.Module, inputs: Any) -> None:
    layer.training = True


def _hook(layer: nn.Module, hook: Hook) -> None:
    if hook not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(hook)


def _unhook(layer: nn.Module, hook: Hook) -> bool:
    """Take a hook away; whether it was there."""
    keys = [key for key, found in layer._forward_pre_hooks.items() if found is hook]
    for key in keys:
        del layer._forward_pre_hooks[key]
    return bool(keys)
