"""What can be built: the names, with dimensions and parameters, and a table of what goes with what."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from densepred.errors import InputError, NetworkError
from densepred.models.build import create_model
from densepred.models.catalog import ADAPTERS, REGISTRIES, Entry
from densepred.models.heads import Classification
from densepred.registry import lookup

IN_CHANNELS, CLASSES = 1, 2
MOST = 30
"""Names of other libraries whose parameters are counted at once: each takes up to a second."""
_BESIDE = "resnet18"
_MODULES = {
    ("encoder", "timm."): "timm_encoder",
    ("encoder", "torchvision."): "torchvision_encoder",
    ("encoder", "smp."): "smp_encoder",
    ("decoder", "smp."): "smp_decoder",
    ("network", "monai."): "monai_network",
}


@dataclass(frozen=True)
class Row:
    """One name.

    Attributes:
        name: as recipes and `create_model` take it.
        kind: "encoder", "decoder" or "network".
        dims: numbers of spatial dimensions it exists in.
        parameters: for each of `dims`, with one channel and two classes: of an encoder, of a decoder on `resnet18` with
            its heads, or of a whole network. None where they were not counted.
        remark: why they were not, or what else there is to say.
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    parameters: tuple[int, ...] | None = None
    remark: str = ""

    def cells(self) -> tuple[str, str]:
        """Dimensions and parameters as text, such as ("2D, 3D", "11,170,240 / 33,144,640")."""
        return _dims(self.dims), " / ".join(f"{count:,}" for count in self.parameters or ())


def rows(kind: str, pattern: str | None = None) -> list[Row]:
    """The encoders, decoders or networks whose names match.

    Args:
        kind: "encoder", "decoder" or "network".
        pattern: part of the name, or a glob such as "timm.*next*"; capitals do not matter. By default all of our own,
            and a row for each library, such as "timm.*".

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> [(row.name, row.dims, row.parameters) for row in rows("network", "unet2*")]
        [('unet2015', (2,), (31030658,))]
    """
    ours = lookup(REGISTRIES, kind, "kind")
    found = [_counted(Row(name, kind, entry.dims)) for name, entry in ours.items() if _matches(name, pattern)]
    for prefix, entry in ADAPTERS[kind].items():
        found += _of_library(kind, prefix, entry, pattern)
    return found


def _matches(name: str, pattern: str | None) -> bool:
    name, pattern = name.lower(), (pattern or "").lower()
    return fnmatch.fnmatchcase(name, pattern) if set(pattern) & set("*?[") else pattern in name


def _of_library(kind: str, prefix: str, entry: Entry, pattern: str | None) -> list[Row]:
    if pattern is None:
        return [Row(f"{prefix}*", kind, entry.dims, remark=f"a pattern such as '{prefix}*' lists them")]
    library = pattern.lower().partition(".")[0] + "."
    if library in ADAPTERS[kind] and library != prefix:
        return []
    module = importlib.import_module(f"densepred.models.adapters.{_MODULES[kind, prefix]}")
    try:
        names = [prefix + name for name in module.names() if _matches(prefix + name, pattern)]
    except InputError as error:
        return [Row(f"{prefix}*", kind, entry.dims, remark=f"{error.what}: {error.fix}")]
    found = [Row(name, kind, entry.dims) for name in names]
    if len(found) <= MOST:
        return [_counted(row) for row in found]
    remark = f"not counted: more than {MOST} names match"
    return [Row(row.name, kind, row.dims, remark=remark) for row in found]


def _counted(row: Row) -> Row:
    """With the parameters; a name that cannot be built says why."""
    try:
        counts = tuple(_parameters(row.kind, row.name, dims) for dims in row.dims)
    except NetworkError as error:
        return Row(row.name, row.kind, row.dims, remark=error.what)
    return Row(row.name, row.kind, row.dims, counts)


def _parameters(kind: str, name: str, dims: int) -> int:
    with torch.device("meta"):
        parts = _parts(kind, name, cast(Literal[2, 3], dims))
    return sum(p.numel() for part in parts for p in part.parameters())


def _parts(kind: str, name: str, dims: Literal[2, 3]) -> list[nn.Module]:
    """What to count of a new model."""
    if kind == "network":
        return [create_model(network=name, dims=dims, in_channels=IN_CHANNELS, classes=CLASSES, seed=0)]
    if kind == "encoder":
        heads = {"kind": Classification(CLASSES)}
        model = create_model(name, dims=dims, in_channels=IN_CHANNELS, heads=heads, seed=0)
        return [model.get_submodule("encoder")]
    model = create_model(_BESIDE, name, dims=dims, in_channels=IN_CHANNELS, classes=CLASSES, seed=0)
    return [model.get_submodule("decoder"), model.get_submodule("heads")]


def matrix() -> str:
    """Markdown tables of which encoders go with which decoders in how many dimensions, and of the whole networks.

    Example:
        >>> print(matrix().splitlines()[2][:9])
        | `plain`
    """
    columns = [*_families(REGISTRIES["decoder"]), *_families(_adapters("decoder"))]
    lines = ["| encoder | " + " | ".join(names for names, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for names, encoder in [*_families(REGISTRIES["encoder"]), *_families(_adapters("encoder"))]:
        cells = (_dims(set(encoder.dims) & set(decoder.dims)) for _, decoder in columns)
        lines.append(f"| {names} | " + " | ".join(cells) + " |")
    lines += ["", "| whole network | dimensions |", "|---|---|"]
    networks = [*_families(REGISTRIES["network"]), *_families(_adapters("network"))]
    lines += [f"| {names} | {_dims(entry.dims)} |" for names, entry in networks]
    return "\n".join(lines)


def _adapters(kind: str) -> Mapping[str, Entry]:
    return {f"{prefix}NAME": entry for prefix, entry in ADAPTERS[kind].items()}


def _families(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    """Names that stand for the same entry together: "`fcn32s`, `fcn16s`"."""
    for entry in {id(entry): entry for entry in entries.values()}.values():
        yield ", ".join(f"`{name}`" for name, other in entries.items() if other is entry), entry


def _dims(values: set[int] | tuple[int, ...]) -> str:
    return ", ".join(f"{n}D" for n in sorted(values)) or "-"
