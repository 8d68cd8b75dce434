"""nnU-Net's own planner, preprocessing and trainer on a set in Medical Segmentation Decathlon form, in this process.

Its folders are below `work`. What it needs and we do not: `pip install nnunetv2`. It has the settings of the memory
allocator that the command `densepred` has.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densepred.allocator import tune_allocator

tune_allocator()  # before torch is imported

import torch  # noqa: E402

NUMBER, CONFIGURATION = 1, "3d_fullres"
NAME = f"Dataset{NUMBER:03d}_peer"
ENDING = ".nii.gz"


@dataclass(frozen=True)
class Speed:
    """Steps measured, after others that warm up.

    Attributes:
        steps: how many.
        seconds: that they took, with waiting for data.
        waited: seconds of waiting for data.
    """

    steps: int
    seconds: float
    waited: float


def enter(work: Path) -> None:
    """Tell nnU-Net its folders; before anything of it is imported."""
    for name in ("raw", "preprocessed", "results"):
        folder = work / f"nnUNet_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)


def prepare(data: Path, work: Path, cases: list[str]) -> None:
    """Copy the cases under nnU-Net's names, and let it plan and preprocess."""
    enter(work)
    target, told = work / "nnUNet_raw" / NAME, json.loads((data / "dataset.json").read_text())
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for case in cases:
        shutil.copy(data / "imagesTr" / f"{case}{ENDING}", target / "imagesTr" / f"{case}_0000{ENDING}")
        shutil.copy(data / "labelsTr" / f"{case}{ENDING}", target / "labelsTr" / f"{case}{ENDING}")
    labels = {name: int(value) for value, name in told["labels"].items()}
    content = {"channel_names": told["modality"], "labels": labels, "numTraining": len(cases), "file_ending": ENDING}
    (target / "dataset.json").write_text(json.dumps(content))
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    api.extract_fingerprints([NUMBER], num_processes=os.cpu_count() or 1, show_progress_bar=False)
    plans = api.plan_experiments([NUMBER])
    api.preprocess([NUMBER], plans, (CONFIGURATION,), (os.cpu_count() or 1,), show_progress_bar=False)


def plan(work: Path) -> dict[str, Any]:
    """What it planned: patch_size, batch_size, architecture ..."""
    plans = json.loads((work / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json").read_text())
    return dict(plans["configurations"][CONFIGURATION])


def trainer(work: Path, device: str, train: list[str], val: list[str]) -> Any:
    """Its trainer, ready for the first step, its workers running."""
    enter(work)
    torch.backends.cudnn.benchmark = True  # as its command does
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder = work / "nnUNet_preprocessed" / NAME
    (folder / "splits_final.json").write_text(json.dumps([{"train": train, "val": val}]))
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset = json.loads((work / "nnUNet_raw" / NAME / "dataset.json").read_text())
    out = nnUNetTrainer(plans, CONFIGURATION, 0, dataset, torch.device(device))
    out.on_train_start()
    return out


def measured(work: Path, device: str, cases: list[str], warm: int, steps: int) -> tuple[Speed, int]:
    """Its speed, and its network's `kernels`."""
    peer = trainer(work, device, cases, cases[:2])
    peer.on_train_epoch_start()
    waited = start = 0.0
    for step in range(warm + steps):
        if step == warm:
            waited, start = 0.0, _now(device)
        asked = time.perf_counter()
        batch = next(peer.dataloader_train)
        waited += time.perf_counter() - asked
        peer.train_step(batch)
    speed = Speed(steps, _now(device) - start, waited)
    peer.on_train_end()
    return speed, kernels(peer.network.parameters())


def kernels(tensors: Iterable[torch.Tensor]) -> int:
    """Numbers in the kernels of convolutions, but for those of 1 x 1 x 1 voxels that heads have.

    By these two networks are compared: nnU-Net's has biases too that its norms cancel, and a head whose loss counts 0.
    """
    return sum(one.numel() for one in tensors if one.ndim > 3 and one[0, 0].numel() > 1)


def fitted(work: Path, device: str, train: list[str], val: list[str], seconds: float) -> int:
    """Train for so long, then segment `val` by its own validation; how many steps it took.

    Its learning rate falls with the epochs; here it falls with the time, over the same polynomial, and all of the time
    is spent on steps: it does not validate meanwhile.
    """
    peer, step, start = trainer(work, device, train, val), 0, time.perf_counter()
    peer.on_train_epoch_start()
    while (share := (time.perf_counter() - start) / seconds) < 1:
        peer.lr_scheduler.step(share * peer.num_epochs)
        peer.train_step(next(peer.dataloader_train))
        step += 1
    peer.on_train_end()
    peer.perform_actual_validation(save_probabilities=False)
    return step


def segmented(work: Path) -> Path:
    """Where `fitted` leaves the label maps."""
    (folder,) = (work / "nnUNet_results" / NAME).glob("*/fold_0/validation")
    return folder


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
