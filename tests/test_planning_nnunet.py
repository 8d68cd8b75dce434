"""The `nnunet` rules against nnU-Net's own planner, on the fingerprints of data sets that everybody knows.

Cases are drawn around the median shape and spacing. Spacings: those of MONAI's tutorials
(modules/dynunet_pipeline/task_params.py, target spacings) and, where nnU-Net takes the 10th percentile, of the sets
themselves. Shapes: as told of the sets (nnU-Net's papers), written down from memory. Both planners see the same lists,
so the comparison does not hang on these numbers being exact.

What nnU-Net gave is kept in `nnunet_plans.json`, written by `python -m tests.test_planning_nnunet` where it is
installed (extra `bench`); there it is asked anew.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from densepred.planning.nnunet import Configuration, Sizes, configurations


@dataclass(frozen=True)
class Known:
    """A data set: cases, channels, classes with the background, median shape and spacing, spread of both.

    `slices` are spacings of the first axis to draw from, where they differ much.
    """

    cases: int
    channels: int
    labels: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    spread: float = 0.1
    slices: tuple[float, ...] = ()


KNOWN = {
    "BrainTumour": Known(484, 4, 4, (138, 169, 138), (1.0, 1.0, 1.0), 0.0),
    "BraTS uncropped": Known(1251, 4, 4, (155, 240, 240), (1.0, 1.0, 1.0), 0.0),
    "Heart": Known(20, 1, 2, (115, 320, 232), (1.37, 1.25, 1.25), 0.05),
    "Liver": Known(131, 1, 3, (432, 512, 512), (1.0, 0.77, 0.77), 0.3),
    "Hippocampus": Known(260, 1, 3, (36, 50, 35), (1.0, 1.0, 1.0), 0.0),
    "Prostate": Known(32, 2, 3, (20, 320, 319), (3.6, 0.62, 0.62), 0.1),
    "Lung": Known(63, 1, 2, (252, 512, 512), (1.24, 0.79, 0.79), 0.2),
    "Pancreas": Known(281, 1, 3, (93, 512, 512), (2.5, 0.8, 0.8), 0.2),
    "HepaticVessel": Known(303, 1, 3, (49, 512, 512), (5.0, 0.8, 0.8), 0.1, (0.8, 1.5, 5.0, 5.0, 5.0, 5.0, 7.5)),
    "Spleen": Known(41, 1, 2, (90, 512, 512), (5.0, 0.79, 0.79), 0.1, (1.6, 5.0, 5.0, 5.0, 5.0)),
    "Colon": Known(126, 1, 2, (95, 512, 512), (5.0, 0.78, 0.78), 0.2, (3.0, 5.0, 5.0)),
    "ACDC": Known(200, 1, 4, (9, 256, 216), (10.0, 1.56, 1.56), 0.1, (5.0, 6.5, 10.0, 10.0, 10.0, 10.0)),
    "coarse x": Known(40, 1, 2, (180, 160, 30), (1.0, 1.1, 4.0), 0.1),
    "planes": Known(50, 3, 2, (1, 750, 720), (999.0, 1.0, 1.0), 0.0),
}


def drawn(known: Known) -> Sizes:
    """Cases around the medians, the same each time."""
    generator = np.random.default_rng(7)
    shapes, spacings = [], []
    for _ in range(known.cases):
        factors = np.exp(known.spread * generator.normal(size=3))
        step = (float(generator.choice(known.slices)) if known.slices else known.spacing[0], *known.spacing[1:])
        spacing = [s * float(f) for s, f in zip(step, factors, strict=True)]
        sizes = [max(1, round(n * float(np.exp(known.spread * generator.normal())))) for n in known.shape]
        shapes.append(tuple(sizes) if known.spread else known.shape)
        spacings.append(tuple(spacing))
    return Sizes(tuple(shapes), tuple(spacings), known.channels, known.labels)


PLANNER = "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner"
PLANS = Path(__file__).with_name("nnunet_plans.json")
ASKED = [(name, 8.0) for name in KNOWN]
ASKED += [(name, gigabytes) for gigabytes in (4.0, 24.0, 40.0) for name in ("Prostate", "Heart")]
"""Data sets, and the memory they are planned for."""


def planner_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sizes, float], dict[str, Any]]:
    """nnU-Net's plans of some sizes; its files are in a temporary folder, and its networks have no weights."""
    module = pytest.importorskip(PLANNER, reason="nnunetv2 is not installed (extra `bench`)")

    def plans(sizes: Sizes, memory: float) -> dict[str, Any]:
        raw, made = folder / "raw", folder / "preprocessed"
        for place in (raw, made):
            shutil.rmtree(place, ignore_errors=True)  # it would keep configurations of plans that are there
            (place / "set").mkdir(parents=True)
        dataset = {
            "channel_names": {str(number): "MRI" for number in range(sizes.channels)},
            "labels": {f"class {number}" if number else "background": number for number in range(sizes.labels)},
            "numTraining": sizes.cases,
            "file_ending": ".nii.gz",
        }
        fingerprint = {
            "spacings": sizes.spacings,
            "shapes_after_crop": sizes.shapes,
            "median_relative_size_after_cropping": 1.0,
            "foreground_intensity_properties_per_channel": {},
        }
        (raw / "set" / "dataset.json").write_text(json.dumps(dataset))
        (made / "set" / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        monkeypatch.setattr(module, "nnUNet_raw", str(raw))
        monkeypatch.setattr(module, "nnUNet_preprocessed", str(made))
        monkeypatch.setattr(module, "maybe_convert_to_dataset_name", lambda name: name)
        monkeypatch.setattr(module, "get_filenames_of_train_images_and_targets", lambda folder, content: {})
        monkeypatch.setattr(
            module.ExperimentPlanner, "determine_reader_writer", lambda self: SimpleNamespace(__name__="none")
        )
        with torch.device("meta"):
            planner = module.ExperimentPlanner("set", gpu_memory_target_in_gb=memory)
            found: dict[str, Any] = planner.plan_experiment()
        return found

    return plans


def numbers(one: Configuration, order: list[int]) -> dict[str, Any]:
    """Ours in nnU-Net's order of the axes, which puts the coarsest first."""
    flat = one.dims == 2
    net = one.net if flat else one.net.moved(order)
    return {
        "patch_size": tuple(net.patch),
        "batch_size": one.batch,
        "strides": tuple(net.strides),
        "kernels": tuple(net.kernels),
        "features": one.channels,
        "spacing": pytest.approx(tuple(one.spacing[axis] for axis in order)[flat:], rel=1e-12),
        "shape": pytest.approx(tuple(one.shape[axis] for axis in order)[flat:], rel=1e-12),
        "batch_dice": one.batch_dice,
    }


def expected(plan: dict[str, Any]) -> dict[str, Any]:
    network = plan["architecture"]["arch_kwargs"]
    return {
        "patch_size": tuple(int(n) for n in plan["patch_size"]),
        "batch_size": plan["batch_size"],
        "strides": tuple(map(tuple, network["strides"])),
        "kernels": tuple(map(tuple, network["kernel_sizes"])),
        "features": tuple(network["features_per_stage"]),
        "spacing": tuple(float(one) for one in plan["spacing"]),
        "shape": tuple(float(one) for one in plan["median_image_size_in_voxels"]),
        "batch_dice": plan["batch_dice"],
    }


def told(plans: dict[str, Any]) -> dict[str, Any]:
    """What is compared of nnU-Net's plans."""
    made = {name: expected(plan) for name, plan in plans["configurations"].items() if "patch_size" in plan}
    return {"axes": plans["transpose_forward"], "configurations": made}


def compare(sizes: Sizes, theirs: dict[str, Any], gigabytes: float = 8) -> dict[str, Configuration]:
    ours = configurations(sizes, gigabytes * 1e9)
    assert set(ours) == set(theirs["configurations"])
    for name, one in ours.items():
        for key, value in numbers(one, theirs["axes"]).items():
            assert value == _tuples(theirs["configurations"][name][key]), (name, key)
    return ours


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(("name", "gigabytes"), ASKED)
def test_every_configuration_is_nnunets(name: str, gigabytes: float):
    compare(drawn(KNOWN[name]), json.loads(PLANS.read_text())["plans"][f"{name}, {gigabytes:g} GB"], gigabytes)


def test_nnunet_still_plans_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plans = planner_in(tmp_path, monkeypatch)
    kept = json.loads(PLANS.read_text())["plans"]
    for name, gigabytes in ASKED:
        found = json.loads(json.dumps(told(plans(drawn(KNOWN[name]), gigabytes))))
        assert found == kept[f"{name}, {gigabytes:g} GB"]


def test_hippocampus_as_measured(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The 203 cases here: what `plan` measures of the files is what nnU-Net's planner is given."""
    files = sorted((real_data / "hippocampus/imagesTr").glob("*.nii.gz"))
    images = [nib.load(file) for file in files]
    shapes = tuple(tuple(reversed(image.shape)) for image in images)
    spacings = tuple(tuple(float(one) for one in reversed(image.header.get_zooms())) for image in images)
    sizes = Sizes(shapes, spacings, 1, 3)
    found = compare(sizes, told(planner_in(tmp_path, monkeypatch)(sizes, 8)))
    assert found["3d_fullres"].net.patch == (40, 56, 40)


def test_the_sets_cover_all_branches():
    """Without the peer: coarser grids where patches see little, 10th percentiles, a coarse axis that is the last."""
    found = {name: configurations(drawn(known)) for name, known in KNOWN.items()}
    assert {name for name, one in found.items() if "3d_lowres" in one} >= {"Liver", "Lung", "Colon"}
    assert "3d_lowres" not in found["Hippocampus"]
    assert set(found["planes"]) == {"2d"}
    assert found["ACDC"]["3d_fullres"].spacing[0] < 7
    assert found["coarse x"]["2d"].axis == 2
    hippocampus = found["Hippocampus"]  # MONAI's task_params.py and nnU-Net's documentation/benchmarking.md
    assert (hippocampus["3d_fullres"].net.patch, hippocampus["3d_fullres"].batch) == ((40, 56, 40), 9)
    assert (hippocampus["2d"].net.patch, hippocampus["2d"].batch) == ((56, 40), 366)


def record() -> None:
    """Write what the nnU-Net that is installed gives."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        plans = planner_in(Path(folder), patch)
        found = {f"{name}, {memory:g} GB": told(plans(drawn(KNOWN[name]), memory)) for name, memory in ASKED}
    content = {"planner": f"nnunetv2 {version('nnunetv2')}", "plans": found}
    PLANS.write_text(json.dumps(content, indent=None, separators=(", ", ": ")).replace('}}, "', '}},\n"') + "\n")


if __name__ == "__main__":
    record()
