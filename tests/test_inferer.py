"""The sliding-window inferer: against an identity network, a dense float64 reference, MONAI, and its own promises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from densepred.errors import InputError, ResourceError
from densepred.inference import window_pass
from densepred.inference.ring import Accumulator, Ring
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.inference.windows import WindowGrid

BLENDS = ("gaussian", "constant", "gaussian_monai")


pytestmark = pytest.mark.usefixtures("one_thread")


def small_net(dims: int, channels: int = 1, classes: int = 3) -> nn.Module:
    """A network that is neither linear nor shift-invariant at window edges (zero padding), and C != K."""
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return nn.Sequential(conv(channels, 4, 3, padding=1), nn.Tanh(), conv(4, classes, 3, padding=1))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def dense_reference(model: nn.Module, image: Tensor, window: Sequence[int], overlap: float) -> np.ndarray:
    """nnU-Net's procedure in float64: pad, spread windows evenly, weight, add, count, divide, crop."""
    size = np.array(image.shape[1:])
    pad = np.maximum(np.array(window) - size, 0)
    image = torch.from_numpy(np.pad(image.numpy(), [(0, 0), *((p // 2, p - p // 2) for p in pad)]))
    steps = []
    for extent, length in zip(size + pad, window, strict=True):
        count = int(np.ceil((extent - length) / (length * (1 - overlap)))) + 1
        steps.append([int(np.round((extent - length) / max(count - 1, 1) * i)) for i in range(count)])
    delta = np.zeros(window)
    delta[tuple(length // 2 for length in window)] = 1
    importance = gaussian_filter(delta, [length / 8 for length in window], mode="constant")
    total, count = np.zeros((1, *image.shape[1:])), np.zeros(image.shape[1:])
    for corner in itertools.product(*steps):
        box = tuple(slice(start, start + length) for start, length in zip(corner, window, strict=True))
        with torch.no_grad():
            logits = model(image[(slice(None), *box)][None])[0].double().numpy()
        total = np.broadcast_to(total, (logits.shape[0], *count.shape)).copy() if len(total) == 1 else total
        total[(slice(None), *box)] += logits * importance
        count[box] += importance
    crop = tuple(slice(p // 2, p // 2 + extent) for p, extent in zip(pad, size, strict=True))
    return (total / count)[(slice(None), *crop)]


class Recorder:
    """A lazy source that notes what is read of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.reads = array, array.shape, []

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        channels, planes = key
        assert channels == slice(None)
        assert planes.step is None
        self.reads.append((planes.start, planes.stop))
        return self.array[key]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """Shape, window and overlap of a 2D or 3D image: one-voxel axes and windows beyond the image included."""
    dims = draw(st.sampled_from([2, 3]))
    longest = {2: 40, 3: 18}[dims]
    shape = draw(st.tuples(*[st.integers(1, longest)] * dims))
    window = draw(st.tuples(*[st.integers(1, 12)] * dims))
    overlap = draw(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.75])] * dims))
    return shape, window, overlap


class TestIdentity:
    @settings(max_examples=120, deadline=None)
    @given(layouts(), st.sampled_from(BLENDS), st.sampled_from(["even", "fixed"]), st.integers(1, 5), st.booleans())
    def test_gives_the_image_back(self, layout, blend: str, spacing: str, batch: int, reflect: bool) -> None:
        shape, window, overlap = layout
        image = noise(2, *shape)
        border = "reflect" if reflect else "constant"
        inferer = SlidingWindowInferer(window, overlap, blend, batch, spacing=spacing, border=border)
        logits = inferer(nn.Identity(), image)
        assert logits.dtype == torch.float32
        assert logits.shape == image.shape
        scale = float(image.abs().max())
        np.testing.assert_allclose(logits.numpy(), image.numpy(), rtol=0, atol=2e-6 * scale)

    @pytest.mark.parametrize("blend", ["gaussian", "constant"])
    def test_is_exact_where_windows_do_not_overlap(self, blend: str) -> None:
        image = noise(1, 12, 8, 10)
        assert torch.equal(SlidingWindowInferer((4, 8, 5), 0.0, blend)(nn.Identity(), image), image)

    def test_every_voxel_keeps_its_place(self) -> None:
        coordinates = np.stack(np.meshgrid(*map(np.arange, (23, 14, 9)), indexing="ij"))
        logits = SlidingWindowInferer((8, 6, 12), 0.5, batch=3)(nn.Identity(), coordinates)
        assert np.array_equal(logits.round().numpy(), coordinates)

    def test_one_number_stands_for_all_axes(self) -> None:
        image = noise(1, 11, 13)
        logits = SlidingWindowInferer(5)(nn.Identity(), image)
        assert torch.equal(logits, SlidingWindowInferer((5, 5), (0.5, 0.5))(nn.Identity(), image))

    def test_a_small_image_is_widened(self) -> None:
        seen: list[Tensor] = []

        def model(cut: Tensor) -> Tensor:
            seen.append(cut[0, 0])
            return cut

        image = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
        SlidingWindowInferer((3, 8), border="reflect")(model, image)
        SlidingWindowInferer((3, 8))(model, image)
        assert seen[0].tolist()[:2] == [[3, 2, 1, 2, 3, 2, 1, 2], [6, 5, 4, 5, 6, 5, 4, 5]]
        assert torch.equal(seen[0][2], seen[0][0])
        assert seen[1].tolist() == [[0, 0, 1, 2, 3, 0, 0, 0], [0, 0, 4, 5, 6, 0, 0, 0], [0] * 8]


class TestAgainstPeers:
    @pytest.mark.parametrize(
        ("shape", "window", "overlap"),
        [
            ((30, 22), (12, 9), 0.5),
            ((20, 17, 25), (8, 9, 10), 0.5),
            ((7, 30, 5), (12, 11, 8), 0.5),
            ((1, 20, 19), (1, 8, 8), 0.25),
        ],
    )
    def test_equals_nnunets_procedure_in_float64(self, shape, window, overlap: float) -> None:
        image, model = noise(2, *shape), small_net(len(shape), channels=2)
        expected = dense_reference(model, image, window, overlap)
        logits = SlidingWindowInferer(window, overlap)(model, image)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("ours", "theirs"), [("constant", "constant"), ("gaussian_monai", "gaussian")])
    @pytest.mark.parametrize(
        ("shape", "window", "overlap"),
        [
            ((33, 40), (16, 12), 0.5),
            ((24, 19, 21), (8, 10, 7), 0.5),
            ((9, 30, 17), (12, 16, 16), 0.25),
            ((5, 6, 40), (8, 8, 8), 0.8),
        ],
    )
    def test_equals_monai(self, ours: str, theirs: str, shape, window, overlap: float) -> None:
        from monai.inferers.utils import sliding_window_inference

        image, model = noise(1, *shape), small_net(len(shape))
        with torch.no_grad():
            expected = sliding_window_inference(image[None], window, 3, model, overlap, mode=theirs)[0]
        logits = SlidingWindowInferer(window, overlap, ours, batch=2, spacing="fixed")(model, image)
        np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=0, atol=1e-5)

    def test_the_two_gaussians_differ(self) -> None:
        image, model = noise(1, 24, 24, 24), small_net(3)
        one, other = (SlidingWindowInferer((12,) * 3, blend=blend)(model, image) for blend in BLENDS[::2])
        assert (one - other).abs().max() > 1e-3

    def test_the_window_of_the_whole_image_is_the_bare_model(self) -> None:
        image, model = noise(1, 9, 10), small_net(2)
        with torch.no_grad():
            assert torch.equal(SlidingWindowInferer((9, 10))(model, image), model(image[None])[0])


class TestStream:
    @pytest.mark.parametrize("read_bytes", [1, 4 * 2 * 9 * 8 * 5, 1 << 30])
    def test_reads_each_plane_once_and_forward(self, monkeypatch: pytest.MonkeyPatch, read_bytes: int) -> None:
        array, model = noise(2, 37, 9, 8).numpy(), small_net(3, channels=2)
        whole = SlidingWindowInferer((10, 6, 8))(model, array)
        monkeypatch.setattr(window_pass, "READ_BYTES", read_bytes)
        source = Recorder(array)
        slabs = list(SlidingWindowInferer((10, 6, 8)).stream(model, source))
        planes = [plane for start, stop in source.reads for plane in range(start, stop)]
        assert planes == list(range(37))
        edges = [(start, stop) for start, stop, _ in slabs]
        assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])]
        assert edges[-1][1] == 37
        assert torch.equal(torch.cat([slab for *_, slab in slabs], dim=1), whole)  # whatever was read at a time

    def test_a_slab_comes_before_the_next_planes_are_read(self) -> None:
        source = Recorder(noise(1, 64, 6, 6).numpy())
        stream = SlidingWindowInferer((8, 6, 6)).stream(nn.Identity(), source)
        for start, stop, slab in stream:
            assert slab.shape == (1, stop - start, 6, 6)
            assert source.reads[-1][1] <= start + 8

    @pytest.mark.parametrize("blend", BLENDS)
    def test_memory_does_not_grow_with_depth(self, monkeypatch: pytest.MonkeyPatch, blend: str) -> None:
        made: list[int] = []
        create = Ring.__init__

        def record(ring: Ring, *args) -> None:
            create(ring, *args)
            made.append(ring.planes.nbytes)

        monkeypatch.setattr(Ring, "__init__", record)
        sizes = []
        for depth in (16, 160):
            made.clear()
            for _ in SlidingWindowInferer((8, 8, 8), blend=blend).stream(nn.Identity(), noise(1, depth, 10, 12)):
                pass
            sizes.append(list(made))
        plane = 4 * 8 * 10 * 12
        assert sizes[0] == sizes[1] == [plane] * (3 if blend == "gaussian_monai" else 2)

    def test_progress_counts_all_windows(self) -> None:
        seen: list[tuple[int, int]] = []
        SlidingWindowInferer((8, 8), batch=2)(nn.Identity(), noise(1, 20, 20), lambda *counts: seen.append(counts))
        assert seen[-1] == (16, 16)
        assert [done for done, _ in seen] == [2, 4, 6, 8, 10, 12, 14, 16]

    def test_a_source_that_gives_other_planes_is_refused(self) -> None:
        source = Recorder(noise(1, 10, 8, 8).numpy())
        source.shape = (1, 12, 8, 8)
        with pytest.raises(ValueError, match=r"8:12\] must have shape \(1, 4, 8, 8\), got \(1, 2, 8, 8\)"):
            SlidingWindowInferer((8, 8, 8))(nn.Identity(), source)

    @pytest.mark.parametrize("dtype", [">i2", "<u2", ">f4", "uint8", "float64", "bool"])
    def test_planes_of_any_kind_are_read(self, dtype: str) -> None:
        array = np.arange(200).reshape(1, 20, 10).astype(dtype)
        array.flags.writeable = False
        logits = SlidingWindowInferer((8, 8))(nn.Identity(), array)
        np.testing.assert_allclose(logits.numpy(), array.astype(float), atol=2e-4)


class TestModel:
    def test_batch_size_changes_nothing(self) -> None:
        image, model = noise(1, 25, 22, 19), small_net(3)
        results = [SlidingWindowInferer((10, 8, 9), batch=batch)(model, image) for batch in (1, 2, 5, 64)]
        for other in results[1:]:
            np.testing.assert_allclose(other.numpy(), results[0].numpy(), rtol=0, atol=1e-5)

    def test_batches_have_the_asked_size_but_the_last_of_a_row(self) -> None:
        sizes: list[int] = []

        def model(cut: Tensor) -> Tensor:
            sizes.append(len(cut))
            return cut

        SlidingWindowInferer((8, 8, 8), batch=4)(model, noise(1, 12, 20, 12))  # rows of 4 x 2 windows, 2 rows
        assert sizes == [4, 4, 4, 4]
        sizes.clear()
        SlidingWindowInferer((8, 8, 8), batch=3)(model, noise(1, 12, 20, 12))
        assert sizes == [3, 3, 2, 3, 3, 2]

    @pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
    def test_mirrored_views_are_averaged(self, axes: tuple[int, ...]) -> None:
        image, model = noise(1, 14, 12, 10), small_net(3)
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        window = (8, 12, 7)
        logits = SlidingWindowInferer(window, mirror_axes=axes)(model, image)
        assert len(calls) == 2 ** len(axes) * len(WindowGrid.plan(image.shape[1:], window, 0.5))
        views = [view for n in range(len(axes) + 1) for view in itertools.combinations([a + 2 for a in axes], n)]

        def by_hand(cut: Tensor) -> Tensor:
            return sum(model(cut.flip(view)).flip(view) for view in views) / len(views)

        expected = SlidingWindowInferer(window)(by_hand, image)
        np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=0, atol=1e-6)
        assert not torch.allclose(logits, SlidingWindowInferer(window)(model, image), atol=1e-3)

    def test_mirroring_survives_a_model_that_works_in_place(self) -> None:
        image = noise(1, 8, 8)
        logits = SlidingWindowInferer((8, 8), mirror_axes=(0, 1))(nn.ReLU(inplace=True), image)
        np.testing.assert_allclose(logits.numpy(), image.relu().numpy(), atol=1e-7)

    def test_outputs_of_a_dict(self) -> None:
        def model(cut: Tensor) -> dict[str, Tensor]:
            return {"seg": cut, "depth": cut * 2}

        image = noise(1, 10, 10)
        first = SlidingWindowInferer((8, 8))(model, image)
        named = SlidingWindowInferer((8, 8), output="depth")(model, image)
        np.testing.assert_allclose(named.numpy(), 2 * image.numpy(), atol=1e-5)
        np.testing.assert_allclose(first.numpy(), image.numpy(), atol=1e-5)
        with pytest.raises(ValueError, match="one of seg, depth, got 'edges'"):
            SlidingWindowInferer((8, 8), output="edges")(model, image)
        with pytest.raises(TypeError, match="got tuple"):
            SlidingWindowInferer((8, 8))(lambda cut: (cut, cut), image)

    @pytest.mark.parametrize("stride", [2, 0])
    def test_an_output_of_another_size_is_refused(self, stride: int) -> None:
        model = nn.AvgPool2d(stride) if stride else nn.Flatten()
        with pytest.raises(ValueError, match=r"shape \(1, K, 8, 8\) for its input, got"):
            SlidingWindowInferer((8, 8))(model, noise(1, 10, 10))

    def test_every_layer_returns_to_its_own_mode(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5))
        model[0].eval()
        before = model[1].running_mean.clone()
        stream = SlidingWindowInferer((8, 8)).stream(model, noise(1, 20, 10))
        next(stream)
        assert [layer.training for layer in model] == [False, True, True]  # between slabs too
        assert not torch.is_inference_mode_enabled()
        list(stream)
        assert torch.equal(model[1].running_mean, before)
        with pytest.raises(InputError):
            SlidingWindowInferer((8, 8))(model, torch.full((1, 20, 10), np.nan))
        assert [layer.training for layer in model] == [False, True, True]

    def test_the_logits_are_the_callers_to_change(self) -> None:
        for _, _, slab in SlidingWindowInferer((8, 8)).stream(nn.Identity(), noise(1, 20, 10)):
            weight = torch.ones((), requires_grad=True)
            (slab.mul_(2) * weight).sum().backward()
            assert weight.grad is not None

    @pytest.mark.parametrize("precision", ["bfloat16", "float16", "auto"])
    def test_reduced_precision_stays_close(self, precision: str) -> None:
        image, model = noise(1, 20, 20), small_net(2)
        exact = SlidingWindowInferer((12, 12))(model, image)
        logits = SlidingWindowInferer((12, 12), precision=precision)(model, image)
        assert logits.dtype == torch.float32
        np.testing.assert_allclose(logits.numpy(), exact.numpy(), atol=0.02)
        if precision != "auto":
            assert not torch.equal(logits, exact)


class TestFaults:
    def test_non_finite_logits_name_their_window(self) -> None:
        image = noise(1, 24, 8, 24).clamp(-3, 3)
        image[0, 20, 4, 3] = 9.0  # only the windows of the last row, at the left

        def model(cut: Tensor) -> Tensor:
            return torch.where(cut > 8, float("nan"), cut)

        with pytest.raises(ResourceError, match=r"logits of the window of shape \(8, 8, 8\) at voxel \(16, 0, 0\)"):
            SlidingWindowInferer((8, 8, 8), batch=2)(model, image)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_non_finite_image_is_blamed_itself(self, value: float) -> None:
        image = noise(1, 6, 20)  # widened to 8: one row in front
        image[0, 2, 5:7] = value
        with pytest.raises(InputError, match=r"2 of 64 values are NaN or infinite in .* at voxel \(-1, 0\)"):
            SlidingWindowInferer((8, 8))(small_net(2), image)

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ({"window": 0}, "window must hold integers of at least 1"),
            ({"window": (8, 2.5)}, "window must hold integers"),
            ({"overlap": 1.0}, "overlap must be at least 0 and below 1"),
            ({"overlap": (0.5, -0.1)}, "overlap must be at least 0"),
            ({"blend": "hann"}, "blend must be one of gaussian, constant, none, gaussian_monai, got 'hann'"),
            ({"precision": "int8"}, "precision must be one of float32, bfloat16, float16, auto"),
            ({"spacing": "random"}, "spacing must be one of even, fixed"),
            ({"border": "wrap"}, "border must be one of constant, reflect"),
            ({"batch": 0}, "batch must be at least 1, got 0"),
        ],
    )
    def test_arguments_are_checked(self, argument: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SlidingWindowInferer(**{"window": (8, 8), **argument})

    def test_what_does_not_fit_the_image_is_said_before_the_first_slab(self) -> None:
        image = noise(1, 20, 20)
        for inferer, message in (
            (SlidingWindowInferer((8, 8, 8)), r"window must be one number or 2 .* got 3"),
            (SlidingWindowInferer((8, 8), (0.5,) * 3), r"overlap must be one number or 2"),
            (SlidingWindowInferer((8, 8), mirror_axes=(2,)), r"mirror_axes must be within 0..1, got \(2,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                inferer.stream(nn.Identity(), image)
        with pytest.raises(ValueError, match="at least one axis and one voxel"):
            SlidingWindowInferer((8, 8)).stream(nn.Identity(), torch.zeros(1, 0, 8))

    def test_the_accumulator_refuses_planes_out_of_reach(self) -> None:
        sums = Accumulator(1, 4, (0, 0), (4,), normalised=True, device=torch.device("cpu"))
        one, weight = torch.ones(1, 4, 4), torch.ones(4, 4)
        sums.add((0, 0), one, weight)
        assert torch.equal(sums.retire(2), torch.ones(1, 2, 4))
        for start in (1, 3):
            with pytest.raises(ValueError, match="outside the ring, which begins at plane 2"):
                sums.add((start, 0), one, weight)
        sums.add((2, 0), one, weight)
        assert torch.equal(sums.retire(6)[0, :, 0], torch.tensor([2.0, 2, 1, 1]))
