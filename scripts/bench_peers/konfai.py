"""KonfAI: its window grid, reader of windows and streaming accumulator on arrays; `predict_model` on files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench_peers.common import Setting, Task

REQUIRES = ("konfai",)
ON_DEVICE = False
AGAINST = ("gaussian", "fixed")  # its Gaussian is MONAI's without the clamp; its last windows reach over the border
FORMATS = (".nii.gz",)


def settings(device: str, compiled: bool) -> list[Setting]:
    """Its autocast is CUDA's alone, in float16."""
    return [Setting(), *([Setting("float16"), Setting("float16", 4)] if device.startswith("cuda") else [])]


def prepare(task: Task, setting: Setting) -> Callable[[Tensor], Tensor]:
    from konfai.data.patching import Gaussian, ModelPatch, StreamingAccumulator

    model = task.network(setting.compiled)
    window = list(task.window)

    def labels(image: Tensor) -> Tensor:
        grid = ModelPatch(window, task.steps, pad_value=0)
        grid.load(list(image.shape[1:]))
        gaussian, axis = Gaussian(), grid.get_sweep_axis()
        gaussian.set_patch_config(window, task.steps)
        sums = StreamingAccumulator(grid.get_patch_slices(), window, gaussian, batch=False, sweep_axis=axis)
        out = torch.empty(image.shape[1:], dtype=torch.uint8)

        def finish(slabs: list[tuple[slice, Tensor]]) -> None:
            for region, slab in slabs:
                out.movedim(axis, 0)[region] = slab.argmax(0).movedim(axis, 0).to(out)

        with torch.inference_mode(), task.autocast(setting):
            for start in range(0, grid.get_size(), setting.batch):
                indices = range(start, min(start + setting.batch, grid.get_size()))
                cut = torch.stack([grid.get_data(image, index, 0, True) for index in indices]).to(task.device)
                for index, logits in zip(indices, model(cut), strict=True):
                    finish(sums.add_layer(index, logits))
            finish(sums.finalize())
        return out

    return labels


def prepare_files(task: Task, setting: Setting) -> Callable[[Path, Path], None]:
    """A data set of one case, in its layout: root/case/group.nii.gz."""
    import konfai
    from konfai.data.transform import Argmax, Standardize, TensorCast

    model = task.network(setting.compiled)

    def predict(source: Path, target: Path) -> None:
        root = target.parent / f"konfai_{source.name.partition('.')[0]}"
        shutil.rmtree(root, ignore_errors=True)
        (root / "data" / "case").mkdir(parents=True)
        (root / "data" / "case" / "IMAGE.nii.gz").symlink_to(source.resolve())
        konfai.predict_model(
            model,
            f"{root / 'data'}:nii.gz",
            inputs="IMAGE",
            patch=task.window,
            overlap=task.steps[0],
            output=f"{root / 'out'}:nii.gz",
            in_channels=task.channels,
            batch_size=setting.batch,
            transforms={"IMAGE": [Standardize()]},
            final_transforms=[Argmax(), TensorCast("uint8")],
            autocast=setting.precision == "float16",
            gpu=[0] if task.device.startswith("cuda") else None,
            quiet=True,
            overwrite=True,
            predictions_dir=root / "workspace",
        )
        (root / "out" / "case" / "PRED.nii.gz").replace(target)

    return predict
