"""The loss section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from densepred.config.base import Section


class LossConfig(Section):
    """The loss is the weighted sum of its terms; a term of weight 0 is left out."""

    dice: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the soft Dice loss over the foreground classes."""
    cross_entropy: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy."""
    batch_dice: bool = True
    """Dice over the batch as one volume rather than per sample."""
