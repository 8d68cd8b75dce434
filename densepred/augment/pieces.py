"""How much is computed at a time."""

from __future__ import annotations

import torch


def at_once(device: torch.device) -> bool:
    """Whether a whole batch is: on a GPU, which wants much work and no waiting; a CPU wants what fits its cache."""
    return device.type != "cpu"
