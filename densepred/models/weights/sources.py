"""Which published weights a name stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from densepred.models.adapters import smp_encoder, timm_encoder, torchvision_encoder
from densepred.models.adapters.source import Source
from densepred.registry import lookup

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
"""How files of weights end."""

LIBRARIES: dict[str, Callable[[str, str | None], Source]] = {
    "torchvision": torchvision_encoder.weights_of,
    "timm": timm_encoder.weights_of,
    "smp": smp_encoder.weights_of,
}
"""Name of a library -> (name of a network there, version or None) -> where its weights are."""

_FROM_TIMM = ("convnextv2_", "se_resnet")  # torchvision has none, smp's SE-ResNets stride elsewhere


def is_file(source: str | Path) -> bool:
    """Whether a source is a file's path rather than the name of published weights.

    Example:
        >>> is_file("weights/a.pth"), is_file("timm:a1_in1k")
        (True, False)
    """
    if isinstance(source, Path) or "/" in source or source.lower().endswith(SUFFIXES):
        return True
    published = source.partition(":")[0] in ("imagenet", *LIBRARIES)  # whatever else lies in the working folder
    return not published and Path(source).is_file()


def resolve(source: str, encoder: str) -> Source:
    """The published weights that a name stands for.

    Args:
        source: "imagenet" (torchvision's for the families it has, otherwise timm's; the library's own for an encoder
            of a library), or "torchvision", "timm" or "smp", alone or with a version behind a colon.
        encoder: such as "resnet50", or "timm.mobilenetv3_small_050".

    Raises:
        ValueError: an unknown source or version, or one that does not have this encoder.

    Example:
        >>> resolve("torchvision:IMAGENET1K_V2", "resnet50").file
        'resnet50-11ad3fa6.pth'
    """
    wanted, _, version = source.partition(":")
    owner, dot, network = encoder.rpartition(".")
    owner = owner if dot else ""
    if wanted == "imagenet" and not version:
        wanted = owner or ("timm" if encoder.startswith(_FROM_TIMM) else "torchvision")
    elif wanted not in LIBRARIES or (wanted == "imagenet" and version):
        names = dict.fromkeys(("imagenet", *LIBRARIES, *(f"{name}:VERSION" for name in LIBRARIES), "a file (.pth ...)"))
        lookup(names, source, "pretrained")
    weights_of = lookup(LIBRARIES, wanted, "library of weights")
    if owner and wanted != owner:
        raise ValueError(f"weights of {encoder} must be {owner}'s, which it is a network of, got {source!r}")
    if not owner and encoder.startswith(_FROM_TIMM):
        if wanted != "timm":
            raise ValueError(f"weights of {encoder} must be timm's, for no other fit it, got {source!r}")
        network = network.replace("se_resnet", "seresnet")
    return weights_of(network, version or None)
