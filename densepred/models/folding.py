"""Batch norms folded into the convolutions before them: the same function in evaluation mode, with fewer passes."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from densepred.models.layers import CONVOLUTIONS, TRANSPOSED, Network, ShallowConv3d
from densepred.models.norms import BatchNorm

_LOG = logging.getLogger(__name__)
_FORWARDS = (BatchNorm.forward, _BatchNorm.forward)


def fold_batch_norms(model: Network, shape: Sequence[int]) -> Network:
    """A copy in evaluation mode, in which convolutions do what the batch norms right behind them did.

    Which those are is seen in one forward pass over a tensor without data (torch's `meta` device), so that it works for
    networks of any library: both layers run once, and nothing but the norm takes what the convolution made. A network
    that cannot run there keeps all its norms. The results differ by rounding.

    Args:
        model: any network; it stays as it is.
        shape: of an input that it takes, (B, C, *spatial).

    Example:
        >>> from densepred.models.build import create_model
        >>> folded = fold_batch_norms(create_model(dims=2, norm="batch", channels=(4, 8)), (1, 1, 16, 16))
        >>> any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
        False
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for conv_name, norm_name in _pairs(folded, shape):
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        assert isinstance(norm, _BatchNorm)
        _fold(conv, norm)
        folded.set_submodule(norm_name, nn.Identity())
    return folded


def _pairs(model: nn.Module, shape: Sequence[int]) -> list[tuple[str, str]]:
    """Names of convolutions and of the norms to fold into them."""
    names = [name for name, layer in model.named_modules() if _is_fixed_norm(layer)]
    if not names:
        return []
    blank = copy.deepcopy(model).to("meta")
    seen = _Seen()
    hooks = []
    for name, layer in blank.named_modules():
        if type(layer) in (*CONVOLUTIONS, ShallowConv3d) and not _has_hooks(layer):
            hooks.append(layer.register_forward_hook(seen.made_by(name)))
        elif name in names:
            hooks.append(layer.register_forward_pre_hook(seen.taken_by(name)))
    try:
        with torch.no_grad(), seen:
            out = blank(torch.empty(*shape, dtype=next(blank.parameters()).dtype, device="meta"))
            seen.uses.update(id(value) for value in _tensors([out]))  # what it gives is used by others
    except Exception as error:  # it looks at values, of which there are none
        _LOG.info("batch norms are not folded: %s", error)
        return []
    return seen.pairs()


def _is_fixed_norm(layer: nn.Module) -> bool:
    """A batch norm and no more (subclasses may have an activation inside), which goes by what it learnt."""
    plain = isinstance(layer, _BatchNorm) and type(layer).forward in _FORWARDS and not _has_hooks(layer)
    return plain and layer.running_mean is not None and layer.running_var is not None


def _has_hooks(layer: nn.Module) -> bool:
    """Whether something runs with it, which may change weights or results."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks)


class _Seen(TorchFunctionMode):
    """Which layers made and took which tensors, and how often each tensor was used to make another one."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[int, str] = {}
        self.made: list[Tensor] = []  # kept alive, so that no other tensor gets the id
        self.takers: dict[str, str] = {}
        self.uses: Counter[int] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor | tuple | list) and not isinstance(out, torch.Size):
            self.uses.update(id(value) for value in _tensors([*args, *(kwargs or {}).values()]))
        return out

    def made_by(self, name: str) -> Callable[..., None]:
        """A hook that notes what a convolution made."""

        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            self.calls[name] += 1
            self.makers[id(output)] = name
            self.uses[id(output)] = 0  # not those of a tensor that had the id before
            self.made.append(output)

        return hook

    def taken_by(self, name: str) -> Callable[..., None]:
        """A hook that notes whose output a norm is about to take."""

        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.calls[name] += 1
            maker = self.makers.get(id(inputs[0]))
            if maker is not None:
                self.takers[maker] = name

        return hook

    def pairs(self) -> list[tuple[str, str]]:
        """Convolutions and norms that ran once, the one's output being used by the other alone."""
        alone = {name for key, name in self.makers.items() if self.uses[key] == 1}
        found = [(conv, norm) for conv, norm in self.takers.items() if conv in alone]
        return [(conv, norm) for conv, norm in found if self.calls[conv] == self.calls[norm] == 1]


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


def _fold(conv: nn.Module, norm: _BatchNorm) -> None:
    """Change a convolution's weight and bias, in place."""
    weight, bias = fuse_conv_bn_weights(
        conv.weight,  # type: ignore[arg-type]
        conv.bias,  # type: ignore[arg-type]
        norm.running_mean,  # type: ignore[arg-type]
        norm.running_var,  # type: ignore[arg-type]
        norm.eps,
        norm.weight,
        norm.bias,
        transpose=isinstance(conv, TRANSPOSED),
    )
    conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
