"""Parts of an image, ensembles, empty windows and threads: the plain way through the whole image is the reference."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from densepred.errors import InputError
from densepred.inference.empty import AUDITED, EmptyWindows
from densepred.inference.sliding_window import Part, SlidingWindowInferer
from densepred.inference.threads import Behind, ahead
from tests.test_inferer import layouts, noise, small_net

pytestmark = pytest.mark.usefixtures("one_thread")


class TestParts:
    @settings(max_examples=150, deadline=None)
    @given(layouts(), st.data(), st.sampled_from(["gaussian", "constant", "gaussian_monai", "none"]))
    def test_a_voxel_has_the_same_bits_in_every_part(self, layout, data: st.DataObject, blend: str) -> None:
        shape, window, overlap = layout
        image, model = noise(1, *shape), small_net(len(shape))
        inferer = SlidingWindowInferer(window, overlap, blend)
        whole = inferer(model, image)
        edges = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape[:2]]
        (z0, z1), (y0, y1) = (
            (low, max(high, low + 1)) if low < size else (low - 1, low)
            for (low, high), size in zip(edges, shape, strict=False)
        )
        slabs = list(inferer.stream(model, image, part=Part((z0, z1), (y0, y1))))
        assert [slabs[0][0], slabs[-1][1]] == [z0, z1]
        assert torch.equal(torch.cat([slab for *_, slab in slabs], 1), whole[:, z0:z1, y0:y1])

    def test_only_the_planes_that_a_part_needs_are_read(self) -> None:
        reads: list[tuple[int, int]] = []

        class Planes:
            shape = (1, 64, 10, 10)

            def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
                reads.append((key[1].start, key[1].stop))
                return np.zeros((1, key[1].stop - key[1].start, 10, 10), np.float32)

        list(SlidingWindowInferer((8, 8, 8)).stream(nn.Identity(), Planes(), part=Part((30, 40), (0, 5))))
        assert reads[0][0] >= 30 - 8
        assert reads[-1][1] <= 40 + 8

    @pytest.mark.parametrize("ahead_by", [1, 3])
    def test_reading_ahead_changes_nothing(self, ahead_by: int) -> None:
        image, model = noise(2, 40, 9, 8), small_net(3, channels=2)
        plain = SlidingWindowInferer((8, 8, 8))(model, image)
        assert torch.equal(SlidingWindowInferer((8, 8, 8), ahead=ahead_by)(model, image.numpy()), plain)


class TestEnsembles:
    def test_the_logits_of_models_and_views_are_averaged_and_their_spread_given(self) -> None:
        image, models = noise(1, 14, 12), [small_net(2), nn.Sequential(small_net(2), nn.Tanh())]
        inferer = SlidingWindowInferer((14, 12), mirror_axes=(1,), variance=True)
        out = inferer(models, image)
        with torch.no_grad():
            views = [m(image[None].flip(f)).flip(f)[0] for m in models for f in ((), (3,))]
        np.testing.assert_allclose(out[:3], torch.stack(views).mean(0), rtol=0, atol=1e-6)
        probabilities = torch.stack([view.double().softmax(0) for view in views]).numpy()
        np.testing.assert_allclose(out[3], probabilities.var(0).mean(0), rtol=0, atol=1e-6)

    def test_one_model_and_view_has_no_spread(self) -> None:
        image, model = noise(1, 20, 12), small_net(2)
        out = SlidingWindowInferer((8, 8), variance=True)(model, image)
        assert torch.equal(out[:3], SlidingWindowInferer((8, 8))(model, image))
        assert not out[3].any()


class TestEmptyWindows:
    @staticmethod
    def counted(model: nn.Module) -> list[int]:
        calls: list[int] = []
        model.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
        return calls

    @pytest.mark.parametrize("batch", [1, 3])
    def test_windows_of_one_value_are_predicted_once(self, batch: int) -> None:
        image = torch.full((1, 64, 40, 32), -2.5)
        image[0, 20:30, 10:20, 5:15] = noise(10, 10, 10)
        plain_model, model = small_net(3), small_net(3)
        plain = SlidingWindowInferer((16, 16, 16), batch=batch)(plain_model, image)
        calls = self.counted(model)
        skipped = SlidingWindowInferer((16, 16, 16), batch=batch, skip=0.0)(model, image)
        if batch == 1:
            assert torch.equal(skipped, plain)
        np.testing.assert_allclose(skipped.numpy(), plain.numpy(), rtol=0, atol=1e-5)
        assert sum(calls) < 0.5 * len(SlidingWindowInferer((16, 16, 16)).grid(image.shape[1:]))

    def test_several_channels_must_all_be_empty(self) -> None:
        image, model = torch.zeros(2, 32, 16), small_net(2, channels=2)
        image[1, :16] = noise(16, 16)
        plain = SlidingWindowInferer((16, 16), 0.0)(small_net(2, channels=2), image)
        calls = self.counted(model)
        assert torch.equal(SlidingWindowInferer((16, 16), 0.0, skip=0.0)(model, image), plain)
        assert len(calls) == 2  # one for the window with noise, one for the empty one

    def test_nearly_empty_windows_stay_within_the_tolerance(self) -> None:
        image = 1e-3 * noise(1, 128, 32)
        image[0, :16] = noise(16, 32)
        model = small_net(2)
        plain = SlidingWindowInferer((16, 16))(model, image).softmax(0)
        calls = self.counted(model)
        skipped = SlidingWindowInferer((16, 16), skip=0.02)(model, image).softmax(0)
        assert len(calls) < 20
        assert 0 < (skipped - plain).abs().max() < 1e-2

    def test_windows_that_are_not_empty_to_the_network_are_refused(self) -> None:
        image, model = noise(1, 16 * (AUDITED + 1), 16), small_net(2)
        with pytest.raises(InputError, match=r"differ by 0\.\d+ in probability from empty ones \(0.001 is allowed\)"):
            SlidingWindowInferer((16, 16), 0.0, skip=20.0)(model, image)

    def test_the_logits_of_one_value_at_a_time_are_kept(self) -> None:
        made: list[float] = []

        def predict(cut: Tensor) -> Tensor:
            made.append(float(cut.mean()))
            return cut.repeat(1, 3, 1, 1)

        empty, device = EmptyWindows(0.0, (4, 4), predict), torch.device("cpu")
        for value in (1.0, 1.0, 2.0, 2.0, 3.0, 1.0):
            assert (empty.logits((value,), device) == value).all()
        assert made == [1.0, 2.0, 3.0, 1.0]

    def test_a_variance_behind_the_logits_is_no_class(self) -> None:
        empty = EmptyWindows(0.1, (4, 4), lambda cut: torch.zeros(1, 3, 4, 4), variance=True)
        logits = torch.zeros(3, 4, 4)
        logits[2] = 0.25
        empty.compare((0.0,), logits)
        logits[1] = 0.1
        with pytest.raises(InputError, match=r"differ by 0\.025 in probability"):
            empty.compare((0.0,), logits)

    def test_a_non_finite_window_is_never_empty(self) -> None:
        with pytest.raises(InputError, match="NaN or infinite"):
            SlidingWindowInferer((8, 8), skip=1.0)(small_net(2), torch.full((1, 16, 8), np.nan))


class TestThreads:
    def test_ahead_keeps_the_order_and_stays_within_its_depth(self) -> None:
        made: list[int] = []

        def items() -> Iterator[int]:
            for number in range(20):
                made.append(number)
                yield number

        for number in ahead(items(), depth=2):
            time.sleep(0.002)
            assert len(made) <= number + 4
        assert made == list(range(20))

    def test_an_error_ahead_is_raised_in_its_turn(self) -> None:
        def items() -> Iterator[int]:
            yield 1
            raise OSError("disk gone")

        found = ahead(items())
        assert next(found) == 1
        with pytest.raises(OSError, match="disk gone"):
            next(found)

    def test_closing_ends_the_thread(self) -> None:
        before = set(threading.enumerate())
        found = ahead(iter(range(1000)), depth=1)
        next(found)
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"densepred-ahead"}
        found.close()  # type: ignore[attr-defined]
        assert not set(threading.enumerate()) - before

    def test_behind_works_in_order_beside_the_caller(self) -> None:
        seen: list[tuple[int, str]] = []
        with Behind(lambda item: seen.append((item, threading.current_thread().name))) as put:
            for number in range(10):
                put(number)
        assert seen == [(number, "densepred-behind") for number in range(10)]

    def test_an_error_behind_ends_the_block_and_the_items_after_it_are_dropped(self) -> None:
        seen: list[int] = []

        def work(item: int) -> None:
            if item == 3:
                raise OSError("disk full")
            seen.append(item)

        def fill(*numbers: int) -> None:
            with Behind(work, depth=1) as put:
                for number in numbers:
                    put(number)

        with pytest.raises(OSError, match="disk full"):
            fill(*range(100))
        assert seen == [0, 1, 2]
        with pytest.raises(OSError, match="disk full"):
            fill(3)  # seen at the end of the block

    def test_an_error_of_the_caller_drops_what_waits(self) -> None:
        seen: list[int] = []
        begun = threading.Event()

        made: list[Behind[int]] = []

        def work(item: int) -> None:
            begun.set()
            until = time.monotonic() + 30
            while made[0]._error is None and time.monotonic() < until:  # as long as the caller has no error
                time.sleep(0.001)
            seen.append(item)

        def fill() -> None:
            with Behind(work) as put:
                made.append(put)
                put(1)
                put(2)
                begun.wait(30)
                raise KeyError

        with pytest.raises(KeyError):
            fill()
        assert seen == [1]

    def test_a_source_that_fails_in_its_thread_ends_the_stream_with_its_error(self) -> None:
        class Broken:
            shape = (1, 64, 8, 8)

            def __getitem__(self, key: tuple[slice, slice]) -> Tensor:
                if key[1].stop > 32:
                    raise InputError("damaged", "copy it again", "a.nii.gz")
                return torch.zeros(1, key[1].stop - key[1].start, 8, 8)

        slabs = SlidingWindowInferer((8, 8, 8), ahead=2).stream(nn.Identity(), Broken())
        with pytest.raises(InputError, match="damaged"):
            list(slabs)
