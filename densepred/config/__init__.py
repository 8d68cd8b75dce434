"""Recipes: the schema of the YAML, and how it is read and checked. Knows nothing of torch."""

from densepred.config.augment import AugmentConfig
from densepred.config.base import Section
from densepred.config.data import ChannelConfig, DataConfig, ValidityConfig
from densepred.config.inference import InferenceConfig
from densepred.config.loading import check, dump, load
from densepred.config.loss import LossConfig
from densepred.config.model import ModelConfig
from densepred.config.schema import Config, PatchConfig
from densepred.config.tasks import HeadConfig, TargetConfig
from densepred.config.training import OptimizerConfig, TrainingConfig, TransferConfig, parse_duration

__all__ = [
    "AugmentConfig",
    "ChannelConfig",
    "Config",
    "DataConfig",
    "HeadConfig",
    "InferenceConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PatchConfig",
    "Section",
    "TargetConfig",
    "TrainingConfig",
    "TransferConfig",
    "ValidityConfig",
    "check",
    "dump",
    "load",
    "parse_duration",
]
