"""nnU-Net: `nnUNetPredictor`'s sliding window on arrays; `predict_from_files` on files, with its workers and export."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from bench_peers.common import Setting, Task

REQUIRES = ("nnunetv2",)
ON_DEVICE = True
AGAINST = ("gaussian", "even")
FORMATS = (".nii.gz",)
STAND_INS = ("SimpleITK", "blosc2", "imagecodecs")


def settings(device: str, compiled: bool) -> list[Setting]:
    """Its own: float32 on CPUs, autocast in float16 on GPUs."""
    default = Setting("float16" if device.startswith("cuda") else "float32")
    return [default, *([Setting(default.precision, 1, True)] if compiled else [])]


def _predictor_class() -> Any:
    """nnU-Net's readers import libraries of files that its sliding window does not need.

    Where they are not installed (a machine with a GPU and without the internet), mocks stand in for them.
    """
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, tempfile.gettempdir())
    for name in STAND_INS:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock()
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    return nnUNetPredictor


def _predictor(task: Task, setting: Setting) -> Any:
    """A predictor with our network in the place of one built from plans, and plans that ask for the same windows."""
    make = _predictor_class()
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(_plans(task))
    labels = {"background": 0, **{f"class {value}": value for value in range(1, task.classes)}}
    channels = {str(channel): f"image {channel}" for channel in range(task.channels)}
    dataset = {"labels": labels, "channel_names": channels, "file_ending": ".nii.gz", "numTraining": 1}
    predictor = make(1 - task.overlap, use_mirroring=False, device=torch.device(task.device), allow_tqdm=False)
    network = task.network(setting.compiled)
    weights = getattr(network, "_orig_mod", network).state_dict()
    configuration = plans.get_configuration("3d_fullres")
    predictor.manual_initialization(network, plans, configuration, [weights], dataset, "nnUNetTrainer", None)
    return predictor


def _plans(task: Task) -> dict[str, Any]:
    resample = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "bench",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(task.window),
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * task.channels,
        "use_mask_for_norm": [False] * task.channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resample},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **resample},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **resample},
        "architecture": {},  # the network is given
    }
    return {
        "dataset_name": "Dataset001_bench",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(task.channels)},
        "configurations": {"3d_fullres": configuration},
    }


def prepare(task: Task, setting: Setting) -> Callable[[Tensor], Tensor]:
    """Logits in float16, as it adds them up."""
    predictor = _predictor(task, setting)
    return lambda image: predictor.predict_sliding_window_return_logits(image)


def prepare_files(task: Task, setting: Setting) -> Callable[[Path, Path], None]:
    """With as many workers as its command starts: three that preprocess, three that export."""
    predictor = _predictor(task, setting)

    def predict(source: Path, target: Path) -> None:
        ending = predictor.dataset_json["file_ending"]
        predictor.predict_from_files(
            [[str(source)]],
            [str(target).removesuffix(ending)],
            num_processes_preprocessing=3,
            num_processes_segmentation_export=3,
        )

    return predict
