"""Augmentation of 128^3 patches on one core: ours, nnU-Net's default pipeline and the same of MONAI's transforms.

    python scripts/bench_augment.py --rounds 9

Every pipeline gets the same patches, image (float32) and label (int16), one at a time in one thread, and has the
probabilities and ranges of nnU-Net v2. In every round each does the same number of patches, in turn, so that what else
the machine does meets all alike. A turn's time is that of the processor, which does not count the waiting on a busy
machine; that of the clock stands beside it. nnU-Net's needs batchgeneratorsv2 (`pip install batchgeneratorsv2`), MONAI
is a dependency. Labels: ours and nnU-Net's by the largest linear share, MONAI's by the nearest voxel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.augment.volume import Augmenter
from densepred.config import AugmentConfig

Pipeline = Callable[[Tensor, Tensor, int], object]


def patch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A smooth image with noise (1, *size), and three classes in blobs (*size), a tenth of the voxels at borders."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size,) * 3
    smooth = F.interpolate(torch.randn(1, 1, 5, 5, 5, generator=generator), shape, mode="trilinear")[0]
    label = (smooth[0] > 0.6).to(torch.int16) + (smooth[0] > 1.1).to(torch.int16)
    return smooth + 0.2 * torch.randn(1, *shape, generator=generator), label


def ours(size: int) -> Pipeline:
    augment = Augmenter(AugmentConfig.model_validate("nnunet"), 3)
    return lambda image, label, seed: augment(image[None], label[None], [seed])


def ours_warped(size: int) -> Pipeline:
    always = [{"rotation": {"probability": 1}}, {"scaling": {"probability": 1}}]
    augment = Augmenter(AugmentConfig.model_validate(always), 3)
    return lambda image, label, seed: augment(image[None], label[None], [seed])


def nnunet(size: int) -> Pipeline:
    """As nnUNetTrainer.get_training_transforms puts it together, without deep supervision."""
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform
    from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform

    around_one = BGContrast((0.75, 1.25))
    blur = GaussianBlurTransform((0.5, 1.0), False, False, p_per_channel=0.5, benchmark=True)
    brightness = MultiplicativeBrightnessTransform(around_one, synchronize_channels=False, p_per_channel=1)
    contrast = ContrastTransform(around_one, preserve_range=True, synchronize_channels=False, p_per_channel=1)
    coarse = SimulateLowResolutionTransform((0.5, 1), False, True, ignore_axes=None, p_per_channel=0.5)
    gammas = [
        GammaTransform(
            BGContrast((0.7, 1.5)), p_invert_image=p, synchronize_channels=False, p_per_channel=1, p_retain_stats=1
        )
        for p in (1, 0)
    ]
    together = ComposeTransforms(
        [
            nnunet_spatial(size, 0.2),
            RandomTransform(GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
            RandomTransform(blur, 0.2),
            RandomTransform(brightness, 0.15),
            RandomTransform(contrast, 0.15),
            RandomTransform(coarse, 0.25),
            RandomTransform(gammas[0], 0.1),
            RandomTransform(gammas[1], 0.3),
            MirrorTransform(allowed_axes=(0, 1, 2)),
            RemoveLabelTansform(-1, 0),
        ]
    )
    return _nnunet_run(together)


def nnunet_spatial(size: int, probability: float) -> object:
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    return SpatialTransform(
        (size,) * 3,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=probability,
        rotation=(-np.pi / 6, np.pi / 6),
        p_scaling=probability,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )


def nnunet_warped(size: int) -> Pipeline:
    return _nnunet_run(nnunet_spatial(size, 1.0))


def _nnunet_run(transform: Callable[..., object]) -> Pipeline:
    def run(image: Tensor, label: Tensor, seed: int) -> object:
        np.random.seed(seed % 2**32)  # what the library draws from; it works in place, so it gets copies
        torch.manual_seed(seed)
        return transform(image=image.clone(), segmentation=label[None].clone())

    return run


def monai(size: int) -> Pipeline:
    from monai import transforms as m

    keys, image = ["image", "label"], ["image"]
    together = m.Compose(
        [
            monai_spatial(0.36),
            m.RandGaussianNoised(image, prob=0.1, std=0.3),
            m.RandGaussianSmoothd(image, prob=0.1, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
            m.RandScaleIntensityd(image, prob=0.15, factors=0.25),
            m.RandScaleIntensityFixedMeand(image, prob=0.15, factors=0.25, preserve_range=True),
            m.RandSimulateLowResolutiond(image, prob=0.125, zoom_range=(0.5, 1)),
            m.RandAdjustContrastd(image, prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
            m.RandAdjustContrastd(image, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
            *[m.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
        ]
    )
    return _monai_run(together)


def monai_spatial(probability: float) -> object:
    from monai import transforms as m

    angle, factor = (np.pi / 6,) * 3, ((-0.3, 0.4),) * 3
    modes = ("bilinear", "nearest")
    return m.RandAffined(
        ["image", "label"], prob=probability, rotate_range=angle, scale_range=factor, mode=modes, padding_mode="zeros"
    )


def monai_warped(size: int) -> Pipeline:
    from monai import transforms as m

    return _monai_run(m.Compose([monai_spatial(1.0)]))


def _monai_run(transform: object) -> Pipeline:
    def run(image: Tensor, label: Tensor, seed: int) -> object:
        transform.set_random_state(seed % 2**32)  # type: ignore[attr-defined]
        return transform({"image": image.clone(), "label": label[None].clone()})  # type: ignore[operator]

    return run


WHOLE = {"ours": ours, "nnU-Net": nnunet, "MONAI": monai}
WARP = {"ours": ours_warped, "nnU-Net": nnunet_warped, "MONAI": monai_warped}


def measure(
    makers: dict[str, Callable[[int], Pipeline]], size: int, rounds: int, patches: int
) -> dict[str, list[float]]:
    """Milliseconds of the processor and of the clock a patch, the median over the rounds."""
    given = [patch(size, seed) for seed in range(4)]
    pipelines = {name: make(size) for name, make in makers.items()}
    for run in pipelines.values():  # what libraries do once
        for seed in range(8):
            run(*given[0], seed)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    for turn in range(rounds):
        for name, run in pipelines.items():
            processor, clock = time.process_time(), time.perf_counter()
            for index in range(patches):
                run(*given[index % len(given)], 1000 * turn + index)
            spent = time.process_time() - processor, time.perf_counter() - clock
            times[name].append((spent[0] / patches * 1e3, spent[1] / patches * 1e3))
    return {name: [statistics.median(kind) for kind in zip(*rows, strict=True)] for name, rows in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="edge of the patch")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each pipeline")
    parser.add_argument("--patches", type=int, default=16, help="patches a turn")
    parser.add_argument("--only", nargs="*", choices=WHOLE, help="leave out the others")
    parser.add_argument("--json", action="store_true", help="print the numbers alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arguments.only or list(WHOLE)
    results = {}
    for title, makers, share in (("whole pipeline", WHOLE, 1), ("rotation and scaling", WARP, 4)):
        kept = {name: makers[name] for name in chosen}
        patches = max(1, arguments.patches // share)
        results[title] = measure(kept, arguments.size, arguments.rounds, patches)
        if not arguments.json:
            print(f"{title}, {arguments.size}^3, median of {arguments.rounds} rounds of {patches}")
            for name, (processor, clock) in results[title].items():
                rate = 1000 / processor
                print(f"  {name:8s} {processor:7.1f} ms ({clock:.0f} by the clock), {rate:5.1f} patches/s and core")
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
