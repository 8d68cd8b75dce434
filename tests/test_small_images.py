"""Images predicted together are as predicted one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.inference.backends import Prepared, prepare
from densepred.inference.images import predict_images
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.models.build import create_model
from densepred.models.dense import Model

CPU = torch.device("cpu")
WINDOW = (32, 40)


def network(dims: int = 2) -> Model:
    model: Model = create_model(dims=dims, in_channels=2, channels=(4, 8), seed=0).eval()
    return model


def prepared(model: Model, batch: int, window: tuple[int, ...] = WINDOW) -> Prepared:
    return prepare(model, (batch, 2, *window), CPU, torch.float32)


def predict(ready: Prepared, several: Iterable[Any], border: str = "constant") -> Iterator[Tensor]:
    return predict_images(ready, ready.shape, several, border=border)


def images(*sizes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, *size) for size in sizes]


@pytest.mark.parametrize("border", ["constant", "reflect"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_equal_to_the_inferer_one_by_one(border: str, batch: int) -> None:
    model = network()
    several = images((32, 40), (20, 40), (31, 33), (1, 7), (32, 40), (32, 39), (9, 9))
    inferer = SlidingWindowInferer(WINDOW, border=border)
    for image, logits in zip(several, predict(prepared(model, batch), several, border), strict=True):
        wanted = inferer(model, image)
        assert logits.dtype == torch.float32
        assert logits.is_contiguous()
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_volumes_too() -> None:
    model, several = network(3), images((8, 9, 10), (12, 12, 12), (5, 12, 3))
    inferer = SlidingWindowInferer((12, 12, 12))
    for image, logits in zip(several, predict(prepared(model, 2, (12, 12, 12)), several), strict=True):
        torch.testing.assert_close(logits, inferer(model, image), rtol=1e-5, atol=1e-5)


def test_no_more_than_a_batch_is_read_ahead_and_results_stand_alone() -> None:
    read = []

    def source() -> Iterator[np.ndarray]:
        for number in range(10):
            read.append(number)
            yield np.full((2, 32, 40), number, np.float32)

    results = predict(prepared(network(), 4), source())
    first = next(results)
    assert read == [0, 1, 2, 3]
    assert first.untyped_storage().nbytes() == first.numel() * 4  # an image kept does not keep its batch
    assert len(list(results)) == 9


def test_what_does_not_fit_is_refused() -> None:
    ready = prepared(network(), 2)
    for wrong in (torch.zeros(2, 33, 40), torch.zeros(1, 32, 40), torch.zeros(32, 40)):
        with pytest.raises(ValueError, match="images must be"):
            list(predict(ready, [wrong]))
    with pytest.raises(ValueError, match="border must be one of"):
        list(predict(ready, images((4, 4)), border="wrap"))
    assert list(predict(ready, [])) == []
