"""Starting a training from weights that were trained on something else."""

from __future__ import annotations

import dataclasses
import json
import logging

import torch
from torch import nn

from densepred.config import Config, ModelConfig, TransferConfig
from densepred.errors import DensepredError, InputError, NetworkError
from densepred.files import atomic_write
from densepred.models.build import build
from densepred.models.encoders.base import Encoder
from densepred.models.surgery import freeze, unfreeze
from densepred.models.weights import Pretraining, Report, load_weights
from densepred.training import ranks
from densepred.training.run import PRETRAINING, Run

_LOG = logging.getLogger(__name__)


def start_from_pretrained(model: nn.Module, run: Run) -> None:
    """Fill the encoder with the weights that `model.pretrained` names; log what became of them, and note their origin.

    The note, `pretraining.json` in the run directory, also holds the normalisation of the images they were trained on.

    Raises:
        DensepredError: as `load_weights`; a NetworkError for its ValueError.
    """
    _LOG.info("%s", _filled(model, run.config.model))
    origin = model.get_submodule("encoder").pretraining
    if ranks.first():
        atomic_write(run.path / PRETRAINING, json.dumps(dataclasses.asdict(origin), indent=2) + "\n")  # type: ignore[call-overload]


def recall_pretraining(model: nn.Module, run: Run) -> None:
    """Tell the encoder of a training that is gone on with what of it was pretrained, as the run's note has it.

    Raises:
        InputError: the note is damaged.
    """
    path = run.path / PRETRAINING
    if not path.is_file():
        return
    try:
        model.get_submodule("encoder").pretraining = Pretraining(**json.loads(path.read_text()))  # type: ignore[assignment]
    except (ValueError, TypeError) as error:
        raise InputError(f"damaged ({error})", "copy the run directory again", path) from error


def rehearse(config: Config) -> None:
    """Build the network, and fill it if it is pretrained, to find faults before any data are touched.

    Weights fit any number of channels and classes, so that one channel and two classes stand for those of the data.

    Raises:
        DensepredError: as `build`, `start_from_pretrained` and `Freezer`.
    """
    with torch.device("cpu" if config.model.pretrained else "meta"):
        model = build(config.model, 1, 2, 0)
    if config.model.pretrained:
        _filled(model, config.model)
    Freezer(model, config.training.transfer)


def _filled(model: nn.Module, config: ModelConfig) -> Report:
    assert config.pretrained is not None
    try:
        return load_weights(model.get_submodule("encoder"), config.pretrained, config.encoder)
    except ValueError as error:
        if isinstance(error, DensepredError):
            raise
        raise NetworkError(str(error), "correct model.pretrained, or leave it out to start afresh") from error


class Freezer:
    """Decides which stages of a network's encoder learn in an epoch; see `densepred.config.TransferConfig`.

    Args:
        model: a network whose parameters that learn are to learn, but for what is frozen.
        transfer: how many stages are frozen, and whether they join in one by one, the last first (Howard & Ruder 2018,
            section 3.3).

    Raises:
        NetworkError: the network has no encoder, or not so many stages.
    """

    def __init__(self, model: nn.Module, transfer: TransferConfig) -> None:
        self.transfer, self.frozen = transfer, 0
        if not transfer.freeze:
            return
        encoder = getattr(model, "encoder", None)
        if not isinstance(encoder, Encoder):
            what = "training.transfer.freeze: the network has no encoder whose stages could be frozen"
            raise NetworkError(what, "leave it out, or choose model.encoder and model.decoder")
        self.encoder, self.stages = encoder, len(encoder.channels)
        if transfer.freeze != "encoder" and transfer.freeze > self.stages:
            what = f"training.transfer.freeze is {transfer.freeze}, but the encoder has {self.stages} stages"
            raise NetworkError(what, f"set it to {self.stages} or less")
        self.fixed = [parameter for parameter in encoder.parameters() if not parameter.requires_grad]

    def at(self, epoch: int) -> None:
        """Freeze what does not learn in this epoch, from 0: a function of the epoch alone."""
        freeze_at_first, every = self.transfer.freeze, self.transfer.unfreeze
        if not freeze_at_first:
            return
        stages = self.stages if freeze_at_first == "encoder" else freeze_at_first
        frozen = max(stages - (epoch // every if every else 0), 0)
        if frozen == self.frozen:
            return
        unfreeze(self.encoder)
        for parameter in self.fixed:
            parameter.requires_grad_(False)
        if frozen:
            freeze(self.encoder, None if frozen == self.stages else frozen)
        self.frozen = frozen
