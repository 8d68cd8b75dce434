"""The names that files give to the layers of this package's encoders, whose own names are torchvision's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")

_CLASSIFIER = re.compile(
    r"(network\.)?(encoder\.)?(_?fc|linear|fc_norm|head|heads|classifier|last_linear|logits|pre_logits|\w*aux\w*)(\.|$)",
    re.IGNORECASE,
)
_BLOCK = {  # timm's and Meta's ConvNeXt blocks
    "conv_dw": "block.0",
    "dwconv": "block.0",
    "norm": "block.2",
    "mlp.fc1": "block.3",
    "pwconv1": "block.3",
    "mlp.grn": "block.4.1",
    "grn": "block.4.1",
    "mlp.fc2": "block.5",
    "pwconv2": "block.5",
}
_PARTS = "|".join(sorted(map(re.escape, _BLOCK), key=len, reverse=True))
_STEM = re.compile(r"(?:stem|downsample_layers\.0)\.(\d)\.(weight|bias)")
_DOWN = re.compile(r"(?:stages\.(\d)\.downsample|downsample_layers\.(\d))\.(\d)\.(weight|bias)")
_IN_BLOCK = re.compile(rf"stages\.(\d)\.(?:blocks\.)?(\d+)\.(?:({_PARTS})\.(weight|bias|gamma|beta)|gamma)")


_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def densenets(name: str) -> str:
    """A name in torchvision's published DenseNets, which are older than its classes; other names stay.

    Example:
        >>> densenets("features.denseblock1.denselayer2.norm.1.weight")
        'features.denseblock1.denselayer2.norm1.weight'
    """
    return _DENSE_LAYER.sub(r"\1\2.", name)


def is_classifier(name: str) -> bool:
    """Whether a published tensor belongs to the layers behind the last feature map.

    Example:
        >>> is_classifier("fc.weight"), is_classifier("layer1.0.conv1.weight")
        (True, False)
    """
    return _CLASSIFIER.match(name) is not None


def to_torchvision(name: str) -> str:
    """timm's and Meta's names of ConvNeXt layers as torchvision has them; other names stay.

    Example:
        >>> to_torchvision("stages.1.blocks.2.mlp.fc1.weight"), to_torchvision("layer1.0.conv1.weight")
        ('features.3.2.block.3.weight', 'layer1.0.conv1.weight')
    """
    if found := _STEM.fullmatch(name):
        return f"features.0.{found[1]}.{found[2]}"
    if found := _DOWN.fullmatch(name):
        return f"features.{2 * int(found[1] or found[2])}.{found[3]}.{found[4]}"
    if found := _IN_BLOCK.fullmatch(name):
        block = f"features.{2 * int(found[1]) + 1}.{found[2]}"
        kind = {"gamma": "weight", "beta": "bias"}.get(found[4], found[4])
        return f"{block}.{_BLOCK[found[3]]}.{kind}" if found[3] else f"{block}.layer_scale"
    return name


def align(state: Mapping[str, T], own: Collection[str]) -> dict[str, T]:
    """Take the prefix off the names in a file that makes most of them an encoder's ("module.", "encoder.", "").

    Args:
        state: from the file.
        own: names of the encoder's tensors.

    Example:
        >>> align({"module.conv1.weight": 1, "module.fc.weight": 2, "epoch": 3}, ["conv1.weight"])
        {'conv1.weight': 1, 'fc.weight': 2, 'epoch': 3}
    """
    names, first = set(own), next(iter(own), "")
    prefixes = ["", *(name.removesuffix(first) for name in state if first and name.endswith(f".{first}"))]
    stripped = [{name: name[len(p) :] for name in state if name.startswith(p)} for p in prefixes]
    best = max(stripped, key=lambda found: len(names.intersection(found.values())))
    taken = set(best.values())  # what lies elsewhere in the file keeps its name, unless that is taken now
    return {best.get(name, name): value for name, value in state.items() if name in best or name not in taken}
