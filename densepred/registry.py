"""Plain dicts as registries: name -> class or function. Knows nothing of torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, what: str) -> T:
    """The entry called `name`.

    Args:
        registry: the choices.
        name: the name asked for.
        what: the argument it came from, for the message.

    Raises:
        ValueError: no such name; the message lists the names and the nearest one.

    Example:
        >>> lookup({"mean": min, "max": max}, "max", "reduction")(1, 2)
        2
    """
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(str(name), registry, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what} must be one of {', '.join(registry)}, got {name!r}{hint}")
