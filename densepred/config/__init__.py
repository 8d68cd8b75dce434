"""Recipes: the schema of the YAML, and how it is read and checked. Knows nothing of torch."""

from densepred.config.base import Section
from densepred.config.data import ChannelConfig, DataConfig, ValidityConfig
from densepred.config.loading import check, dump, load
from densepred.config.model import ModelConfig
from densepred.config.schema import (
    AugmentConfig,
    Config,
    InferenceConfig,
    LossConfig,
    OptimizerConfig,
    PatchConfig,
    RandomConfig,
    TrainingConfig,
)

__all__ = [
    "AugmentConfig",
    "ChannelConfig",
    "Config",
    "DataConfig",
    "InferenceConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PatchConfig",
    "RandomConfig",
    "Section",
    "TrainingConfig",
    "ValidityConfig",
    "check",
    "dump",
    "load",
]
