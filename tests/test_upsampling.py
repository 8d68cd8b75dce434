"""Unpooling puts maxima back where they were, as torch's own does; interpolation leaves voxels where they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.upsampling import enlarge, pool_with_switches, unpool

POOLS = {2: (F.max_pool2d, F.max_unpool2d), 3: (F.max_pool3d, F.max_unpool3d)}


@pytest.mark.parametrize(
    ("size", "kernel"), [((7, 10), 2), ((5, 9), (1, 3)), ((6, 7), (3, 2)), ((5, 7, 8), 2), ((3, 7, 9), (1, 2, 3))]
)
def test_pooling_and_unpooling_are_torchs(size: tuple[int, ...], kernel: int | tuple[int, ...]) -> None:
    pool, max_unpool = POOLS[len(size)]
    x = torch.randn(2, 3, *size)
    pooled, switches = pool_with_switches(x, kernel)
    theirs, indices = pool(x, kernel, ceil_mode=True, return_indices=True)
    assert switches.dtype == torch.uint8
    assert torch.equal(pooled, theirs)
    assert torch.equal(
        unpool(pooled + 1, switches, kernel, size), max_unpool(theirs + 1, indices, kernel, output_size=size)
    )


def test_unpooling_puts_each_maximum_back_in_place() -> None:
    x = torch.randperm(5 * 7 * 9).view(1, 1, 5, 7, 9).float() + 1
    pooled, switches = pool_with_switches(x, 2)
    back = unpool(pooled, switches, 2, (5, 7, 9))
    assert torch.equal(pool_with_switches(back, 2)[1], switches)
    kept = back > 0
    assert torch.equal(back[kept], x[kept])
    assert int(kept.sum()) == pooled.numel() == 3 * 4 * 5


@pytest.mark.parametrize(
    ("window", "place"),
    [([1.0, 5.0, 2.0, 3.0], 1), ([4.0, 1.0, 4.0, 4.0], 0), ([1.0, 9.0, math.nan, 2.0], 2), ([-math.inf] * 4, 0)],
)
def test_switches_count_the_windows_voxels_row_by_row(window: list[float], place: int) -> None:
    pooled, switches = pool_with_switches(torch.tensor(window).view(1, 1, 2, 2), 2)
    torch.testing.assert_close(pooled.item(), window[place], equal_nan=True)
    assert switches.item() == place


def test_gradients_of_pooling_and_unpooling() -> None:
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)

    def both(x: Tensor) -> Tensor:
        pooled, switches = pool_with_switches(x, 2)
        return unpool(pooled.square(), switches, 2, (5, 6))

    assert torch.autograd.gradcheck(both, (x,))


def test_a_window_has_at_most_256_voxels() -> None:
    assert pool_with_switches(torch.arange(256.0).view(1, 1, 16, 16), 16)[1].item() == 255
    with pytest.raises(ValueError, match="at most 256 voxels"):
        pool_with_switches(torch.zeros(1, 1, 8, 8, 8), (4, 8, 9))


class PoolAndBack(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        pooled, switches = pool_with_switches(x, (1, 2, 3))
        return unpool(pooled * 2, switches, (1, 2, 3), x.shape[2:])


def test_unpooling_exports_with_dynamic_sizes(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, example = tmp_path / "unpool.onnx", torch.randn(2, 2, 3, 6, 7)
    free = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC)
    program = torch.onnx.export(
        PoolAndBack().eval(), (example,), dynamic_shapes=(free,), opset_version=18, verbose=False
    )
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for more in (0, 1, 4):
        x = torch.randn(3, 2, 3 + more, 6 + more, 7 + more)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.equal(torch.from_numpy(found), PoolAndBack()(x))


def test_enlarging_does_not_stretch_odd_sizes() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert enlarge(x, (1, 2), (1, 5), "nearest").tolist() == [[[[1, 1, 2, 2, 3]]]]
    assert enlarge(x, (1, 2), (1, 5)).tolist() == [[[[1, 1.25, 1.75, 2.25, 2.75]]]]
