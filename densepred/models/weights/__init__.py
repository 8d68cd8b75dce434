"""Pretrained weights: from where they are published or lie into an encoder of any channels and dimensions.

Fetching and reading is `fetch`'s, which is the only module of `models` that knows of files.
"""

from densepred.models.weights.fetch import cache_folder, read_state
from densepred.models.weights.inflate import adapt_first_conv, depth_profile, inflate
from densepred.models.weights.load import load_weights
from densepred.models.weights.report import Pretraining, Report

__all__ = [
    "Pretraining",
    "Report",
    "adapt_first_conv",
    "cache_folder",
    "depth_profile",
    "inflate",
    "load_weights",
    "read_state",
]
