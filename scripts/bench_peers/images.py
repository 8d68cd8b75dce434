"""Many small 2D images: how many a second, of the network alone at its best batch size and of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bench_peers.common import Task, steady, wait
from densepred.device import pick_precision
from densepred.inference.backends import Prepared, prepare
from densepred.inference.images import predict_images
from densepred.models.build import create_model
from densepred.models.layers import to_channels_last

DISTINCT = 64  # images in memory; they come again and again
CHANNELS = 3


def network(device: str) -> nn.Module:
    """A ResNet-34 U-Net with the widths of segmentation_models_pytorch."""
    torch.manual_seed(0)
    widths = (16, 32, 64, 128, 256)
    model = create_model("resnet34", "unet", 2, CHANNELS, 3, decoder_channels=widths, seed=0)
    return to_channels_last(model).eval().requires_grad_(False).to(device)


def measure_bare(task: Task, size: int, seconds: float) -> dict[str, float]:
    """Images a second by batch size, from the device's memory to the device's memory; in the form that ours runs."""
    found, device = {}, torch.device(task.device)
    precision = pick_precision("auto", device)
    for batch in (1, 2, 4, 8, 16, *((32, 64) if task.device.startswith("cuda") else ())):
        x = torch.randn(batch, CHANNELS, size, size, device=device).contiguous(memory_format=torch.channels_last)
        run = prepare(network(task.device), tuple(x.shape), device, precision, "torch")
        with torch.inference_mode():
            speed = batch / steady(lambda x=x, run=run: run(x), task.device, seconds)
        found[f"{str(precision)[6:]}, batch {batch}"] = speed
    return found


def labels_of(run: Prepared, images: Sequence[Tensor], device: str) -> Iterator[Tensor]:
    """Ours: labels (*spatial) of images (C, *spatial) in the memory of the host, as `predict_many` makes them."""
    for logits in predict_images(run, run.shape, images, torch.device(device)):
        yield logits.max(0).indices.to(torch.uint8).cpu()


def measure(task: Task, count: int, size: int, seconds: float) -> dict[str, object]:
    """Images a second: of the network alone by batch size, then of it at its best and of ours, in turns.

    Ours goes from arrays in the memory of the host to labels there.
    """
    bare = measure_bare(task, size, seconds)
    best = max(bare, key=lambda name: bare[name])
    several = int(best.rpartition(" ")[2])
    distinct, device = torch.randn(DISTINCT, CHANNELS, size, size), torch.device(task.device)
    batch, precision = 32 if device.type == "cuda" else 4, pick_precision("auto", device)
    run = prepare(network(task.device), (batch, CHANNELS, size, size), device, precision, "torch")
    x = distinct[:several].to(device).contiguous(memory_format=torch.channels_last)
    bare_run = prepare(network(task.device), tuple(x.shape), device, precision, "torch")
    alone, ours, done = 0.0, 0.0, 0
    for _ in labels_of(run, distinct[:batch], task.device):
        pass
    while done < count:
        start = wait(task.device)
        with torch.inference_mode():
            for _ in range(DISTINCT // several):
                bare_run(x)
        between = wait(task.device)
        for _ in labels_of(run, distinct, task.device):
            pass
        alone, ours, done = alone + between - start, ours + wait(task.device) - between, done + DISTINCT
    return {"bare": bare, "best": best, "alone": done / alone, "ours": done / ours}
