"""Starting a training from weights that were trained on something else."""

from __future__ import annotations

import dataclasses
import json
import logging

import torch
from torch import nn

from densepred.config import ModelConfig
from densepred.errors import DensepredError, NetworkError
from densepred.files import atomic_write
from densepred.models.build import build
from densepred.models.weights import Report, load_weights
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
    atomic_write(run.path / PRETRAINING, json.dumps(dataclasses.asdict(origin), indent=2) + "\n")  # type: ignore[call-overload]


def rehearse(config: ModelConfig) -> None:
    """Build the network, and fill it if it is pretrained, to find faults before any data are touched.

    Weights fit any number of channels and classes, so that one channel and two classes stand for those of the data.

    Raises:
        DensepredError: as `build` and `start_from_pretrained`.
    """
    with torch.device("cpu" if config.pretrained else "meta"):
        model = build(config, 1, 2, 0)
    if config.pretrained:
        _filled(model, config)


def _filled(model: nn.Module, config: ModelConfig) -> Report:
    assert config.pretrained is not None
    try:
        return load_weights(model.get_submodule("encoder"), config.pretrained, config.encoder)
    except ValueError as error:
        if isinstance(error, DensepredError):
            raise
        raise NetworkError(str(error), "correct model.pretrained, or leave it out to start afresh") from error
