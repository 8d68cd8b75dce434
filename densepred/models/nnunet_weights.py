"""Weights trained with nnU-Net, for our `nnunet` and `nnunet_residual`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_NAMES = (
    (r"encoder\.stem\.convs\.0\.(.+)", r"encoder.stem.\1"),
    (r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(.+)", r"encoder.stages.\1.\2.\3"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.((?:conv[12]|skip\.\d)\..+)", r"encoder.stages.\1.\2.\3"),
    (r"decoder\.transpconvs\.(\d+)\.(.+)", r"decoder.steps.\1.up.\2"),
    (r"decoder\.stages\.(\d+)\.convs\.(\d+)\.(.+)", r"decoder.steps.\1.blocks.\2.\3"),
)
_REPEATED = re.compile(r"decoder\.encoder\.|.*\.all_modules\.")  # the same tensors under a second name


def from_nnunet(state: Mapping[str, Tensor], deep_supervision: int = 0) -> dict[str, Tensor]:
    """Rename the weights of a PlainConvUNet or ResidualEncoderUNet of dynamic_network_architectures to ours.

    The biases of convolutions that a norm follows are dropped: instance norm takes them away with the mean, and batch
    norm does once they are taken off its running mean, as is done here. All other numbers stay as they are.

    Args:
        state: the state dict, which is "network_weights" in a checkpoint of nnU-Net.
        deep_supervision: the number of coarser outputs that our model has; nnU-Net stores one for every decoder stage,
            the others are dropped.

    Raises:
        ValueError: a name that belongs to neither network, or fewer outputs than are asked for.

    Example:
        >>> import torch
        >>> theirs = {"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(4, 1, 3, 3)}
        >>> list(from_nnunet(theirs))
        ['encoder.stages.0.0.conv.weight']
    """
    state = {name: tensor for name, tensor in state.items() if not _REPEATED.match(name)}
    heads = _head_names(state, deep_supervision)
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, _, kind = name.rpartition(".conv.")
        if kind == "bias" and f"{before}.norm.weight" in state:
            continue
        if name.endswith(".norm.running_mean"):
            bias = state.get(name.replace(".norm.running_mean", ".conv.bias"))
            tensor = tensor if bias is None else tensor - bias
        new = _rename(name, heads)
        if new is not None:
            ours[new] = tensor
    return ours


def _rename(name: str, heads: dict[int, str]) -> str | None:
    """Our name, or None for an output that is not wanted."""
    for pattern, new in _NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    output = re.fullmatch(r"decoder\.seg_layers\.(\d+)\.(weight|bias)", name)
    if output is None:
        raise ValueError(f"state must be of a PlainConvUNet or ResidualEncoderUNet, got a weight called {name}")
    head = heads.get(int(output[1]))
    return None if head is None else f"heads.{head}.conv.{output[2]}"


def _head_names(state: Mapping[str, Tensor], deep_supervision: int) -> dict[int, str]:
    """The name of our head for each of nnU-Net's that is wanted; those are counted from the coarsest."""
    count = sum(bool(re.fullmatch(r"decoder\.transpconvs\.\d+\.weight", name)) for name in state)
    if not 0 <= deep_supervision < max(count, 1):
        raise ValueError(
            f"deep_supervision must be at least 0 and below {max(count, 1)} stages, got {deep_supervision!r}"
        )
    names = {count - 1: "segmentation"}
    kernels = [state[f"decoder.transpconvs.{step}.weight"].shape[2:] for step in reversed(range(count))]
    stride = [1] * len(kernels[0]) if kernels else []
    for i in range(deep_supervision):
        stride = [s * k for s, k in zip(stride, kernels[i], strict=True)]  # the kernel of each is its stride
        names[count - 2 - i] = f"segmentation@{max(stride)}"
    return names
