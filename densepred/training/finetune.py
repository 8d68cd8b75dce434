"""Starting a training from weights that were trained on something else."""

from __future__ import annotations

import dataclasses
import json
import logging

from torch import nn

from densepred.files import atomic_write
from densepred.models.weights import load_weights
from densepred.training.run import PRETRAINING, Run

_LOG = logging.getLogger(__name__)


def start_from_pretrained(model: nn.Module, run: Run) -> None:
    """Fill the encoder with the weights that `model.pretrained` names; log what became of them, and note their origin.

    The note, `pretraining.json` in the run directory, also holds the normalisation of the images they were trained on.

    Raises:
        ValueError, DensepredError: as `load_weights`.
    """
    config = run.config.model
    assert config.pretrained is not None
    report = load_weights(model.get_submodule("encoder"), config.pretrained, config.encoder)
    _LOG.info("%s", report)
    origin = model.get_submodule("encoder").pretraining
    atomic_write(run.path / PRETRAINING, json.dumps(dataclasses.asdict(origin), indent=2) + "\n")  # type: ignore[call-overload]
