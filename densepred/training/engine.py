"""One optimisation step on any device, in any precision and by any number of processes, through accelerate."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.optim import Optimizer

from densepred.device import reproducible
from densepred.errors import InputError
from densepred.models.forms import Form, in_layout, is_channels_last, set_form
from densepred.models.norms import BatchNorm
from densepred.training import ranks
from densepred.training.small_maps import guard_small_maps

Inputs = Tensor | tuple[Tensor, ...]
"""An image, or an image and covariates."""
Outputs = Tensor | Mapping[str, Tensor]
Part = tuple[Inputs, Callable[[Outputs], Tensor]]
"""An image (B, C, *spatial), maybe with covariates, and the loss of what the network gives for it."""


class Engine:
    """Forward, backward, clip, update.

    Args:
        model: trained in place; one whose parameters are shared out by `ranks.shard` stays so.
        optimizer: over the model's parameters.
        device: where to compute.
        precision: torch.float32, or torch.bfloat16 for autocast.
        form: how the network computes; see `densepred.models.forms`.
        partly: with several processes: some parameters do not learn at times.

    Raises:
        InputError: several processes on CPUs, and a network whose batch normalisation would see only its own samples.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        precision: torch.dtype,
        form: Form,
        partly: bool = False,
    ) -> None:
        kept = (AcceleratorState, GradientState, *((PartialState,) if ranks.count() == 1 else ()))
        for state in kept:  # for the process; each run needs its own
            state._reset_state()
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        reproducible(device)
        mixed = "bf16" if precision == torch.bfloat16 else "no"
        options = DistributedDataParallelKwargs(find_unused_parameters=partly)
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[options])
        self.channels_last = is_channels_last(model, form, device)
        self.sharded = hasattr(next(model.parameters()), "full_tensor")
        if ranks.count() > 1 and not self.sharded:
            model = synchronised(model, device)
        if device.type == "cpu" and precision == torch.bfloat16:
            guard_small_maps(model)
        set_form(model.to(device), form, device)
        # a sharded network averages its gradients itself; in evaluation mode accelerate only adds the precision
        self.model: nn.Module = self.accelerator.prepare_model(model, evaluation_mode=self.sharded)
        self.optimizer: Optimizer = self.accelerator.prepare_optimizer(optimizer)

    def gradient(self, inputs: Inputs, loss_of: Callable[[Outputs], Tensor], clip: float) -> tuple[float, float]:
        """Loss and gradient norm of a batch (B, C, *spatial), maybe with covariates (B, F).

        The gradients stay in the parameters. Their norm is clipped to `clip`, unless that is 0.
        """
        return self.gradients([(inputs, loss_of)], clip)

    def gradients(self, parts: Sequence[Part], clip: float) -> tuple[float, float]:
        """As `gradient`, of the mean of the losses of several parts of a batch.

        With several processes the losses are of the samples of all of them; what they take is gathered.
        """
        self.model.train()
        total: Tensor | float = 0.0  # a tensor of the CPU would have to be copied, and wait for the device
        for index, (inputs, loss_of) in enumerate(parts):
            image, *others = (inputs,) if isinstance(inputs, Tensor) else inputs
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last or self.sharded else self.accelerator.no_sync(self.model):
                loss = loss_of(ranks.whole(self.model(in_layout(image, self.channels_last), *others))) / len(parts)
                self.accelerator.backward(loss * ranks.count())  # whose gradients are averaged over the processes
            total = total + loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip or float("inf"))
        return float(total), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def update(self, rate: float) -> None:
        """Step with this learning rate, times a group's own `lr_factor` where it has one, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """Batch norms gather their statistics over all processes, so that how a batch is split does not matter."""
    batched = [m for m in model.modules() if isinstance(m, BatchNorm | nn.modules.batchnorm._BatchNorm)]
    if batched and device.type == "cpu":
        what = "batch normalisation over several processes needs GPUs"
        raise InputError(what, "set model.norm to instance or group, or train in one process")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if batched else model


def seeded(*numbers: int) -> int:
    """A 63-bit seed as a function of some integers."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
