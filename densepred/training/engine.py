"""One optimisation step on any device and in any precision, through accelerate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.optim import Optimizer

from densepred.models.forms import Form, in_form, set_form

Inputs = Tensor | tuple[Tensor, ...]
"""An image, or an image and covariates."""
Outputs = Tensor | Mapping[str, Tensor]


class Engine:
    """Forward, backward, clip, update.

    Args:
        model: trained in place.
        optimizer: over the model's parameters.
        device: where to compute.
        precision: torch.float32, or torch.bfloat16 for autocast.
        form: how the network computes; see `densepred.models.forms`.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, device: torch.device, precision: torch.dtype, form: Form
    ) -> None:
        for state in (AcceleratorState, PartialState, GradientState):  # kept for the process; each run needs its own
            state._reset_state()
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        mixed = "bf16" if precision == torch.bfloat16 else "no"
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
        prepared = self.accelerator.prepare(model, optimizer)
        self.form = form
        self.model: nn.Module = set_form(prepared[0], form, device)
        self.optimizer: Optimizer = prepared[1]

    def gradient(self, inputs: Inputs, loss_of: Callable[[Outputs], Tensor], clip: float) -> tuple[float, float]:
        """Loss and gradient norm of a batch (B, C, *spatial), maybe with covariates (B, F).

        The gradients stay in the parameters. Their norm is clipped to `clip`, unless that is 0.
        """
        self.model.train()
        image, *others = (inputs,) if isinstance(inputs, Tensor) else inputs
        loss = loss_of(self.model(in_form(image, self.form), *others))
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip or float("inf"))
        return float(loss.detach()), float(norm)

    def update(self, rate: float) -> None:
        """Step with this learning rate, times a group's own `lr_factor` where it has one, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def seeded(*numbers: int) -> int:
    """A 63-bit seed as a function of some integers."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
