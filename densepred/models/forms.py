"""How a network computes what it computes: the same function, faster or in less memory.

Instance normalisation is always computed as group normalisation (see `norms.InstanceNorm`). The rest is one switch:

    plain   contiguous tensors, one kernel after the other
    fast    channels-last tensors, and the whole network compiled (`torch.compile`; needs a C++ compiler)
    lean    gradient checkpointing: activations inside a block are computed again in the backward pass, not kept
            (Chen et al. 2016, arXiv:1604.06174); slower by about a third, in a fraction of the memory. Layers outside
            of blocks, as all of VGG's, are kept as they were
    auto    plain; on GPUs channels-last, unless there are instance or group norms, whose kernel copies such tensors
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

from densepred.models.decoders.base import Decoder
from densepred.models.encoders.base import Encoder
from densepred.models.layers import CHANNELS_LAST, CONVOLUTIONS, Network, to_channels_last
from densepred.models.norms import HALVES, InstanceNorm

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, Encoder, Decoder)
_MOST = 12
"""Convolutions and linear layers of a block: more and its own activations would be what fills the memory."""
Form = Literal["auto", "plain", "fast", "lean"]
_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def set_form(model: Network, form: Form, device: torch.device) -> Network:
    """Change how `model` computes, in place; parameters, names and results stay the same to rounding.

    Args:
        model: a network on `device`.
        form: see above.
        device: where it will run.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> from densepred.models.build import create_model
        >>> model = set_form(create_model(channels=(4, 8)), "lean", torch.device("cpu"))
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    if is_channels_last(model, form, device):
        to_channels_last(model)
    if form == "lean":
        for block in _blocks(model):
            block.__class__ = _checkpointed(type(block))
    if form == "fast":
        model.compile(dynamic=False)  # patches are of one size; free sizes fail in parts of torch 2.13's compiler
    return model


def is_channels_last(model: nn.Module, form: Form, device: torch.device) -> bool:
    """Whether training in this form lays tensors out channels-last."""
    if form == "fast" or form == "plain" or device.type != "cuda":
        return form == "fast"
    return not is_copied(model, device)


def is_copied(model: nn.Module, device: torch.device, predicting: torch.dtype = torch.float32) -> bool:
    """Whether its norms copy channels-last tensors there and back: CUDA's kernel of instance and group norms does.

    Args:
        model: the network.
        device: where it computes.
        predicting: in half precision, without gradients, our `InstanceNorm` has a way of its own that does not.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm | _InstanceNorm)]
    own = predicting in HALVES and all(isinstance(norm, InstanceNorm) for norm in norms)
    return device.type == "cuda" and bool(norms) and not own


def in_layout(image: Tensor, last: bool) -> Tensor:
    """An image (B, C, *spatial) in the memory layout that training wants, channels-last or contiguous."""
    return image.contiguous(memory_format=CHANNELS_LAST[image.ndim - 2]) if last else image


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules below the containers that are no single layers: stages' blocks, decoder steps.

    Other libraries' networks and stages are containers too, if they hold many layers.
    """
    for child in module.children():
        if isinstance(child, _CONTAINERS) or _layers(child) > _MOST:
            yield from _blocks(child)
        elif any(True for _ in child.children()):
            yield child


def _layers(module: nn.Module) -> int:
    """How many convolutions and linear layers it holds."""
    return sum(isinstance(layer, (*CONVOLUTIONS, nn.Linear)) for layer in module.modules())


def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a block that keeps its input alone; one for each class, so that copies share it."""
    if issubclass(kind, _Checkpointed):
        return kind
    if kind not in _MADE:
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _MADE[kind] = type(kind.__name__, (_Checkpointed, kind), names)
    return _MADE[kind]


class _Checkpointed(nn.Module):
    """Mixed into a block: keeps its input alone in training. A copy of the block does the same."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().__call__(*args, **options)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _untracked(self)

        args = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)  # the caller may add to its own
        return checkpoint(super().__call__, *args, use_reentrant=False, context_fn=contexts, **options)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kind = next(kind for kind in type(self).__mro__ if not issubclass(kind, _Checkpointed))
        return _revived, (kind,), self.__getstate__()


def _revived(kind: type[nn.Module]) -> nn.Module:
    """An empty block of a class, for pickle and copy to fill."""
    return nn.Module.__new__(_checkpointed(kind))


@contextmanager
def _untracked(block: nn.Module) -> Iterator[None]:
    """The second forward pass must not move the running statistics again."""
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]
