"""Networks with random weights, for the tests of weights."""

from __future__ import annotations

import torch
from torch import nn

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""For networks whose maps are near one."""


def randomized(module: nn.Module) -> nn.Module:
    """Every parameter and statistic at random, of the size that keeps maps near one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point():
                if "running_var" in name:
                    value.uniform_(0.5, 2)
                elif value.ndim > 1 and "scale" not in name:
                    nn.init.kaiming_normal_(value)
                else:
                    value.copy_(torch.randn_like(value) * 0.2 + (0.5 if "weight" in name else 0))
    return module.eval()
