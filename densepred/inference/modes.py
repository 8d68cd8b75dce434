"""Evaluation mode for the time of a prediction, also where several threads predict with one model at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = threading.Lock()
_USED: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
"""Layer -> how many predict with it, and the mode it had before the first of them."""


@contextmanager
def evaluating(*models: Callable[..., Any]) -> Iterator[None]:
    """Evaluation mode for the time of the block; after the last of several blocks every layer is in its own mode again.

    Args:
        models: modules; anything else has no modes.
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    layers = list(dict.fromkeys(layer for module in modules for layer in module.modules()))
    with _LOCK:
        for layer in layers:
            count, mode = _USED.get(layer, (0, layer.training))
            _USED[layer] = count + 1, mode
        for module in modules:
            module.eval()
    try:
        yield
    finally:
        with _LOCK:
            for layer in layers:
                count, mode = _USED.pop(layer)
                if count > 1:
                    _USED[layer] = count - 1, mode
                else:
                    layer.training = mode
