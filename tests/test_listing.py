"""The list of what can be built: counts that others publish, names, patterns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from densepred.errors import InputError
from densepred.models import catalog
from densepred.models.adapters import imports
from densepred.models.listing import MOST, matrix, rows


def test_parameters_are_those_of_the_papers_and_of_torchvision() -> None:
    assert [row.parameters for row in rows("network", "unet2015")] == [(31_030_658,)]
    counted = {row.name: row.parameters for row in rows("encoder", "*")}
    models = imports.torchvision().models
    with torch.device("meta"):
        published = {
            "vgg16_bn": (models.vgg16_bn().features, 64 * 9),
            "resnext50_32x4d": (torch.nn.Sequential(*list(models.resnext50_32x4d().children())[:-1]), 64 * 49),
            "convnext_tiny": (models.convnext_tiny().features, 96 * 16),
        }
    for name, (network, per_channel) in published.items():
        expected = sum(p.numel() for p in network.parameters()) - 2 * per_channel  # they take three channels
        given = counted[name]
        assert given is not None
        assert given[0] == expected


def test_all_of_ours_are_counted_in_the_dimensions_they_have() -> None:
    for kind, entries in catalog.REGISTRIES.items():
        found = rows(kind)
        assert [(row.name, row.dims) for row in found[: len(entries)]] == [(n, e.dims) for n, e in entries.items()]
        assert all(row.parameters and len(row.parameters) == len(row.dims) for row in found[: len(entries)])
        libraries = found[len(entries) :]
        assert [row.name for row in libraries] == [f"{prefix}*" for prefix in catalog.ADAPTERS[kind]]
        assert all(row.parameters is None and "lists them" in row.remark for row in libraries)


@pytest.mark.parametrize(
    ("kind", "pattern", "names"),
    [
        ("encoder", "vgg1[13]", ["vgg11", "vgg13"]),
        ("decoder", "FCN", ["fcn32s", "fcn16s", "fcn8s"]),
        ("network", "unet?d*", ["unet3d2016"]),
        ("network", "monai.swin*", ["monai.SwinUNETR"]),
        ("decoder", "smp.*plus*", ["smp.UnetPlusPlus", "smp.DeepLabV3Plus"]),
        ("encoder", "torchvision.squeezenet", ["torchvision.squeezenet1_0", "torchvision.squeezenet1_1"]),
        ("encoder", "nothing", []),
    ],
)
def test_patterns_are_parts_or_globs(kind: str, pattern: str, names: list[str]) -> None:
    found = rows(kind, pattern)
    assert [row.name for row in found] == names
    assert all(row.parameters and not row.remark for row in found)


def test_few_names_of_a_library_are_counted_and_many_are_not() -> None:
    (few,) = rows("encoder", "timm.resnet18d")
    with torch.device("meta"):
        peer = imports.timm().create_model("resnet18d", in_chans=1, features_only=True)
    assert few.parameters == (sum(p.numel() for p in peer.parameters()),)
    many = rows("encoder", "timm.*")
    assert len(many) > 500
    assert all(row.parameters is None and f"more than {MOST}" in row.remark for row in many)


def test_a_library_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise InputError("timm is not installed", "pip install 'densepred[models]'")

    monkeypatch.setattr(imports, "timm", missing)
    (row,) = rows("encoder", "timm.resnet*")
    assert (row.name, row.remark) == ("timm.*", "timm is not installed: pip install 'densepred[models]'")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="encoder, decoder, network"):
        rows("backbone")


def test_matrix_is_the_registries() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in matrix().splitlines() if line]
    header, _, *body = lines[: lines.index(["whole network", "dimensions"])]
    cells = {
        (encoder, decoder): dims
        for line in body
        for encoder in line[0].split(", ")
        for decoders, dims in zip(header[1:], line[1:], strict=True)
        for decoder in decoders.split(", ")
    }
    adapted = {kind: {f"{name}NAME": e for name, e in entries.items()} for kind, entries in catalog.ADAPTERS.items()}
    encoders = {**catalog.ENCODERS, **adapted["encoder"]}
    decoders = {**catalog.DECODERS, **adapted["decoder"]}
    assert len(cells) == len(encoders) * len(decoders)
    for encoder, one in encoders.items():
        for decoder, other in decoders.items():
            dims = [f"{n}D" for n in (2, 3) if n in one.dims and n in other.dims]
            assert cells[f"`{encoder}`", f"`{decoder}`"].split(", ") == dims
    networks = {name: dims for names, dims in lines[len(body) + 4 :] for name in names.split(", ")}
    assert networks["`unet2015`"] == "2D"
    assert len(networks) == len(catalog.NETWORKS) + len(catalog.ADAPTERS["network"])


def test_the_readme_holds_the_matrix() -> None:
    """Print it anew with python -c 'from densepred.models.listing import matrix; print(matrix())'."""
    assert matrix() in (Path(__file__).parent.parent / "README.md").read_text()
