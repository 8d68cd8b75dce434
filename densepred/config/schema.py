"""The schema of a recipe: a class for each section, every default, a line of doc for each field."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from densepred.config.augment import AugmentConfig, any_form
from densepred.config.base import Section
from densepred.config.data import DataConfig
from densepred.config.inference import InferenceConfig
from densepred.config.loss import LossConfig
from densepred.config.model import ModelConfig
from densepred.config.patch import PatchConfig
from densepred.config.tasks import HeadConfig
from densepred.config.training import OptimizerConfig, TrainingConfig


class Config(Section):
    """A whole recipe."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    patch: PatchConfig = PatchConfig()
    augment: Annotated[AugmentConfig, Field(json_schema_extra=any_form)] = AugmentConfig.model_validate("light")
    loss: LossConfig = LossConfig()
    heads: dict[str, HeadConfig] = Field(default_factory=dict)
    """Of `segmentation`, and of each of `data.targets`, how it is predicted; may be left out."""
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()
