"""What the tests of U-Nets share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZES = [(65, 70), (7, 7), (1, 1), (2, 3), (33, 30, 37), (7, 7, 7), (1, 1, 1), (2, 3, 1)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomize(model: nn.Module) -> None:
    """Weights, biases and statistics that no two layers share and that leave nothing at zero or one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1:
                tensor.normal_(0, 0.3)
            elif tensor.ndim > 1:
                tensor.normal_(0, (1 / tensor[0].numel()) ** 0.5)


def exported(model: nn.Module, x: Tensor) -> nn.Module:
    free = dict.fromkeys(range(2, x.ndim), torch.export.Dim.DYNAMIC) | {0: torch.export.Dim.AUTO}
    return torch.export.export(model.eval(), (x,), dynamic_shapes={"x": free}).module()
