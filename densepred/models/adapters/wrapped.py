"""Another library's 2D network of feature maps, brought to what an `Encoder` promises.

Such networks floor where we ceil, lose their borders to convolutions without padding, or put channels last. The image
is therefore padded at its far ends (its last voxels repeated) to a whole number of the network's coarsest voxels; a map
that then lacks voxels is centred on the regular grid of its stride, its outer voxels repeated; and each map is cropped
to ceil(n / stride).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from densepred.models.blocks import Style
from densepred.models.encoders.base import Encoder
from densepred.models.layers import CONVOLUTIONS, fit

_RESERVED = {"pretrained", "weights", "features_only", "in_chans", "in_channels", "out_indices", "depth", "num_classes"}
_RESERVED |= {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "feature_cls"}
_RESERVED |= {"pretrained_strict", "pretrained_filter_fn", "pretrained_custom_load", "feature_cfg", "kwargs_filter"}
_RESERVED |= {"model_cfg", "exportable", "no_jit"}
"""Arguments that adapters set themselves, or that would load weights from somewhere."""

PROBES = (256, 320)  # sizes of two trial images; their difference is a whole number of any usual stride


@dataclass(frozen=True)
class Map:
    """One feature map, as trial images show it.

    Args:
        channels: of the map.
        stride: voxels of the image per voxel of the map.
        missing: voxels along an axis that it has less than n / stride, n being a multiple of the stride.
        channels_last: whether it comes as (B, Y, X, C).
    """

    channels: int
    stride: int
    missing: int = 0
    channels_last: bool = False


class WrappedEncoder(Encoder):
    """A network that gives a list of 2D feature maps, finest first, as an encoder.

    Args:
        in_channels: channels of the image.
        network: (B, C, Y, X) -> list of (B, C_i, Y_i, X_i) or (B, Y_i, X_i, C_i).
        maps: what it gives, from `probe`; where there are more, the rest are left.
        multiple: voxels per axis that the network takes whole numbers of, where that is not its coarsest stride.
        rename: a published entry's name -> this network's name for it.

    Example:
        >>> network = Steps({"pool": nn.AvgPool2d(2)}, ["pool"], [0])
        >>> encoder = WrappedEncoder(1, network, probe(network, 1))
        >>> encoder.strides, encoder(torch.zeros(1, 1, 5, 8))[0].shape
        (((2, 2),), torch.Size([1, 1, 3, 4]))
    """

    own_initialization = True

    def __init__(
        self,
        in_channels: int,
        network: nn.Module,
        maps: Sequence[Map],
        multiple: int | None = None,
        rename: Callable[[str], str] = str,
    ) -> None:
        super().__init__()
        self.dims, self.in_channels, self.maps = 2, in_channels, tuple(maps)
        self.network, self._rename = network, rename
        self.channels = tuple(m.channels for m in maps)
        self.strides = tuple((m.stride, m.stride) for m in maps)
        self.style = Style("batch", "relu")
        self.multiple = multiple or math.lcm(*(m.stride for m in maps))
        self._least = _least(network, in_channels, self.maps, self.multiple)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, Y, X) -> [(B, channels[i], ceil(Y / strides[i]), ceil(X / strides[i])) for each i]."""
        size = x.shape[2:]
        padded = [whole(n, self.multiple, self._least) for n in size]
        features = []
        for m, feature in zip(self.maps, self.network(fit(x, padded)), strict=False):
            feature = feature.permute(0, 3, 1, 2) if m.channels_last else feature
            feature = _centred(feature, [n // m.stride for n in padded], m.missing)
            features.append(fit(feature, [-(-n // m.stride) for n in size]))
        return features

    def published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published weights under this encoder's names; also those that it has no layer for, as a classifier's.

        Example:
            >>> network = Steps({"conv1": nn.AvgPool2d(2)}, ["conv1"], [0])
            >>> list(WrappedEncoder(1, network, probe(network, 1)).published({"conv1.weight": torch.zeros(1)}))
            ['network.conv1.weight']
        """
        return {f"network.{self._rename(name)}": tensor for name, tensor in state.items()}


def whole(n: int, multiple: int, least: int = 1) -> int:
    """The next whole number of multiples, and no fewer than `least` of them.

    Example:
        >>> whole(33, 32), whole(1, 32, least=2)
        (64, 64)
    """
    count = -(-n // multiple)
    # where one will do there is nothing to compare, and an exported program takes any size
    return (count if least == 1 else torch.sym_max(count, least)) * multiple


class Steps(nn.Module):
    """Modules one after another, of which some give feature maps.

    Args:
        children: modules by name; those within which steps are named are not called themselves.
        steps: names of the modules in the order they are called, such as "features.0".
        taps: positions in `steps` whose outputs are the feature maps.

    Example:
        >>> network = Steps({"a": nn.Identity(), "b": nn.Sequential(nn.AvgPool2d(2))}, ["a", "b.0"], [0, 1])
        >>> [tuple(feature.shape) for feature in network(torch.zeros(1, 1, 4, 4))]
        [(1, 1, 4, 4), (1, 1, 2, 2)]
    """

    def __init__(self, children: Mapping[str, nn.Module], steps: Sequence[str], taps: Sequence[int]) -> None:
        super().__init__()
        for name, module in children.items():
            self.add_module(name, module)
        self.steps, self.taps = tuple(steps), frozenset(taps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, Y, X) -> the feature maps."""
        features = []
        for i, name in enumerate(self.steps):
            x = self.get_submodule(name)(x)
            if i in self.taps:
                features.append(x)
        return features


def dry_run(network: nn.Module, make: Callable[[], object], training: bool = False) -> Any:
    """What a network gives for `make()`, on the device "meta": shapes without values.

    The network is left in training mode; going there also empties what it may have cached.

    Example:
        >>> dry_run(nn.Linear(2, 3), lambda: torch.empty(5, 2)).shape
        torch.Size([5, 3])
    """
    network.train(training)
    try:
        with torch.device("meta"), torch.no_grad():
            return functional_call(network, _on_meta(network), (make(),), tie_weights=False)
    finally:
        network.train()


def _on_meta(network: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers without their values, each under one name: replaced twice, it would not come back."""
    state: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        own = [*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)]
        for name, tensor in own:
            state[name] = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
    return state


def shapes(network: nn.Module, in_channels: int, n: int) -> list[tuple[int, ...]]:
    """Shapes of the maps for one image of n x n voxels."""
    return [tuple(feature.shape) for feature in dry_run(network, lambda: torch.empty(1, in_channels, n, n))]


def probe(network: nn.Module, in_channels: int, sizes: tuple[int, int] = PROBES) -> list[Map]:
    """What maps a network gives, from two trial images: what grows with the image is spatial, and how fast, the stride.

    Raises:
        ValueError: a map whose voxels are not a whole number of the image's.
    """
    maps = []
    small, large = (shapes(network, in_channels, n) for n in sizes)
    for a, b in zip(small, large, strict=True):
        last = a[1] != b[1]
        axis = 1 if last else 2
        stride, rest = divmod(sizes[1] - sizes[0], max(b[axis] - a[axis], 1))
        if rest or sizes[0] % stride:
            raise ValueError(
                f"images of {sizes[0]} and {sizes[1]} give maps of {a[axis]} and {b[axis]}: no whole stride"
            )
        maps.append(Map(a[3] if last else a[1], stride, sizes[0] // stride - a[axis], last))
    return maps


def drop_unused(network: nn.Module, in_channels: int, count: int, n: int = PROBES[0]) -> None:
    """Put nothing in the place of modules that the first `count` maps do not depend on, in place.

    Libraries build layers beyond the maps asked for; training in parallel stumbles over weights without a gradient. A
    network that looks into such layers is left whole. The trial image has n x n voxels.
    """
    unused = _unused(network, in_channels, count, n)
    for path in unused:
        network.set_submodule(path, _Nothing())
    try:
        shapes(network, in_channels, n)
    except (RuntimeError, TypeError, AttributeError):
        for path, module in unused.items():
            network.set_submodule(path, module)


class _Nothing(nn.Module):
    """Stands where a module is not needed, whatever it is called with."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """(B, C, Y, X) -> the same."""
        return x


def _unused(network: nn.Module, in_channels: int, count: int, n: int) -> dict[str, nn.Module]:
    """The outermost modules with weights of which none has a part in the first `count` maps."""
    network.eval()
    with torch.device("meta"):
        state = _on_meta(network)
        outputs = functional_call(network, state, (torch.empty(1, in_channels, n, n),), tie_weights=False)
    network.train()
    used = _leaves(outputs[:count])
    unused: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        weights = [state[name] for name, _ in module.named_parameters(path) if name in state]
        if path and weights and not used.intersection(weights) and not any(path.startswith(f"{p}.") for p in unused):
            unused[path] = module
    return unused


def _leaves(outputs: Sequence[Tensor]) -> set[Tensor]:
    """The tensors that autograd would give gradients to."""
    nodes, seen, leaves = [output.grad_fn for output in outputs], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


def _least(network: nn.Module, in_channels: int, maps: Sequence[Map], multiple: int) -> int:
    """How many multiples the smallest image has.

    Every map is left with a voxel; with two where borders are lost, since one alone cannot be normalised in training.
    """
    most = -(-PROBES[0] // multiple)
    for count in range(1, most):
        try:
            given = shapes(network, in_channels, count * multiple)
        except (RuntimeError, AssertionError):  # too small for some layer
            continue
        expected = [count * multiple // m.stride - m.missing for m in maps]
        found = [shape[1 if m.channels_last else 2] for m, shape in zip(maps, given, strict=False)]
        if found == expected and all(n > (m.missing > 0) for m, n in zip(maps, found, strict=True)):
            return count
    return most


def _centred(x: Tensor, size: Sequence[int], missing: int) -> Tensor:
    """Lay `size - missing` voxels on a grid of `size`, half of what is missing on either side, outer voxels repeated.

    An odd number puts the grid half-way between voxels: the mean of the two.
    """
    for axis, n in enumerate(size, start=2):
        if missing:
            last = x.shape[axis] - 1
            position = torch.arange(n, device=x.device)
            near, far = ((position - shift).clamp(min=0, max=last) for shift in (-(-missing // 2), missing // 2))
            grid = x.index_select(axis, near)
            x = (grid + x.index_select(axis, far)) / 2 if missing % 2 else grid
    return x


def built(create: Callable[[], nn.Module]) -> nn.Module:
    """A new network, also on the device "meta" where its constructor computes with tensors.

    Example:
        >>> with torch.device("meta"):
        ...     built(lambda: nn.Linear(int(torch.ones(())), 2)).weight.shape
        torch.Size([2, 1])
    """
    try:
        return create()
    except (RuntimeError, NotImplementedError):
        if torch.get_default_device().type != "meta":
            raise
    with torch.device("cpu"):
        return create().to("meta")


def adapt_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Give the first convolution another number of input channels, with fresh weights, in place."""
    for name, layer in network.named_modules():
        if isinstance(layer, CONVOLUTIONS):
            if layer.in_channels != in_channels:
                network.set_submodule(name, _with_in_channels(layer, in_channels))
            return


def _with_in_channels(layer: nn.Module, in_channels: int) -> nn.Module:
    options = ("kernel_size", "stride", "padding", "dilation", "groups")
    given = {option: getattr(layer, option) for option in options}
    return type(layer)(in_channels, layer.out_channels, bias=layer.bias is not None, **given)


def check_request(
    name: str, names: Iterable[str], source: str, dims: int, options: Mapping[str, object] | None
) -> None:
    """Can `source` build the network `name` in `dims` dimensions?

    Raises:
        ValueError: it exists in 2D only, there is no such name, or options that the adapter sets itself.
    """
    if dims != 2:
        raise ValueError(f"dims must be 2 for {source}.{name}, got {dims!r}; in 3D take an encoder without a prefix")
    known = list(names)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"encoder must be one of the {len(known)} names of {source}, got {source}.{name}{hint}")
    taken = sorted(set(options or {}) & _RESERVED)
    if taken:
        raise ValueError(f"options may not hold what the adapter sets itself, got {', '.join(taken)}")


def check_depth(depth: int | None, count: int) -> int:
    """The number of maps to keep.

    Raises:
        ValueError: not from 1 to as many as there are.
    """
    if depth is not None and not 1 <= depth <= count:
        raise ValueError(f"depth must be 1 to the {count} maps there are, got {depth!r}")
    return depth or count
