"""Whole numbers that the network computes from shapes alone, such as the places that it picks voxels from.

On the device "meta" they have no values, so they are computed once more beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_MOST = 2**22
_WHOLE = (torch.int32, torch.int64, torch.uint8, torch.bool)


class Known:
    """The values of tensors of whole numbers.

    Example:
        >>> known = Known()
        >>> out = torch.empty(3, dtype=torch.int64, device="meta")
        >>> known.record(torch.ops.aten.arange.default, (3,), {"device": "meta"}, [out])
        >>> known.get(out)
        tensor([0, 1, 2])
    """

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}

    def get(self, tensor: Tensor) -> Tensor | None:
        """The value, on the CPU; None if it is not known."""
        if not tensor.is_meta and tensor.numel() <= _MOST and tensor.dtype in _WHOLE:
            return tensor.cpu()
        return self._values.get(id(tensor))

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: list[Tensor]) -> None:
        """Note the result of an operation that had only known inputs. The tensors have to stay alive from then on."""
        given = [self.get(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            if out and out[0].dtype in _WHOLE:
                self._values.clear()  # it may have been written through a view
            return
        one = len(out) == 1 and out[0].is_meta and out[0].numel() <= _MOST and out[0].dtype in _WHOLE
        if not one or any(value is None for value in given) or torch.Tag.nondeterministic_seeded in func.tags:
            return
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like):
            return
        args, kwargs = tree_map(self._real, (args, kwargs))
        self._values[id(out[0])] = func(*args, **kwargs)

    def _real(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.get(value)
        return torch.device("cpu") if isinstance(value, torch.device) or value == "meta" else value
