"""The optional libraries of networks, imported when first needed."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from densepred.errors import InputError

_declared: list[torch.library.Library] = []  # a declaration lives as long as its library object


def torchvision() -> ModuleType:
    """The package torchvision.

    Its wheels hold compiled operators for one build of torch. Beside another build (a CPU one, say) they do not load,
    and the import fails at the two that it annotates. No network calls them, so they are declared, without a kernel.

    Raises:
        InputError: it is not installed.
    """
    try:
        return _import("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _declared:
            raise
    _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        _declared[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _import("torchvision")


def timm() -> ModuleType:
    """The package timm.

    Raises:
        InputError: it is not installed.
    """
    torchvision()
    return _import("timm")


def smp() -> ModuleType:
    """The package segmentation_models_pytorch.

    Raises:
        InputError: it is not installed.
    """
    torchvision()
    return _import("segmentation_models_pytorch")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(f"{name} is not installed", "pip install 'densepred[models]'") from error
