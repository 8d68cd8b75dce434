"""densepred: train, apply and judge networks that predict something for every voxel.

The names below are imported when first used, so that `import densepred` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densepred.config import Config
    from densepred.config import load as load_config
    from densepred.evaluation import evaluate
    from densepred.export import export
    from densepred.inference.predictor import Predictor, load
    from densepred.inference.sliding_window import SlidingWindowInferer
    from densepred.models.build import create_model
    from densepred.training.loop import resume, train
    from densepred.volumes import Volume, open_volume, open_writer

__version__ = "0.1.0"

_HOMES = {
    "Config": ("densepred.config", "Config"),
    "Predictor": ("densepred.inference.predictor", "Predictor"),
    "SlidingWindowInferer": ("densepred.inference.sliding_window", "SlidingWindowInferer"),
    "Volume": ("densepred.volumes", "Volume"),
    "create_model": ("densepred.models.build", "create_model"),
    "evaluate": ("densepred.evaluation", "evaluate"),
    "export": ("densepred.export", "export"),
    "load": ("densepred.inference.predictor", "load"),
    "load_config": ("densepred.config", "load"),
    "open_volume": ("densepred.volumes", "open_volume"),
    "open_writer": ("densepred.volumes", "open_writer"),
    "resume": ("densepred.training.loop", "resume"),
    "train": ("densepred.training.loop", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "Config",
    "Predictor",
    "SlidingWindowInferer",
    "Volume",
    "__version__",
    "create_model",
    "evaluate",
    "export",
    "load",
    "load_config",
    "open_volume",
    "open_writer",
    "resume",
    "train",
]
