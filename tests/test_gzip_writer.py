"""Gzip as we write it: what other libraries read, the same for any portions, and read back bit by bit."""

from __future__ import annotations

import gzip
import io
import zlib

import imagecodecs
import numpy as np
import pytest
from isal import igzip, isal_zlib

from densepred.volumes import gzip_writer
from densepred.volumes.gzip_writer import GzipWriter

RNG = np.random.default_rng(4)
CONTENT = RNG.integers(0, 3, 300_000, dtype=np.uint8).tobytes() + bytes(2_500_000)


def written(content: bytes, portions: list[int]) -> tuple[GzipWriter, bytes]:
    file = io.BytesIO()
    writer, at = GzipWriter(file), 0
    for size in [*portions, len(content)]:
        writer.write(memoryview(content)[at : at + size])
        at += size
    writer.finish()
    return writer, file.getvalue()


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, len(CONTENT)])
def test_other_libraries_read_it(size: int) -> None:
    writer, packed = written(CONTENT[:size], [])
    assert gzip.decompress(packed) == igzip.decompress(packed) == zlib.decompress(packed, 31) == CONTENT[:size]
    assert bytes(imagecodecs.gzip_decode(packed, out=size) if size else b"") == CONTENT[:size]
    assert writer.reads_back(io.BytesIO(packed))


def test_the_bytes_do_not_depend_on_the_portions() -> None:
    whole = written(CONTENT, [])[1]
    for portions in ([352], [1 << 20], [(1 << 20) - 1, 1, 1], [10] * 50, [1_700_000]):
        assert written(CONTENT, portions)[1] == whole


def test_several_members_are_read_back_one_after_the_other() -> None:
    (first, one), (second, two) = written(CONTENT, []), written(b"another", [])
    file = io.BytesIO(one + two)
    assert first.reads_back(file)
    assert second.reads_back(file)
    assert not file.read(1)
    assert gzip.decompress(one + two) == CONTENT + b"another"


def test_no_flipped_bit_and_no_missing_end_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_writer, "_PIECE", 500)
    writer, packed = written(CONTENT[:2_000] + bytes(1_000), [])
    assert len(writer._pieces) == 6
    assert writer.reads_back(io.BytesIO(packed))
    for bit in range(8 * len(packed)):
        torn = bytearray(packed)
        torn[bit // 8] ^= 1 << bit % 8
        assert not writer.reads_back(io.BytesIO(torn))
    for length in range(len(packed)):
        assert not writer.reads_back(io.BytesIO(packed[:length]))


def test_a_compressor_that_errs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes come back as it wrote them, and are not the content."""
    real = isal_zlib.compressobj

    class Erring:
        def __init__(self, *how: int) -> None:
            self._encoder = real(*how)

        def compress(self, data: memoryview) -> bytes:
            return self._encoder.compress(bytes(data[:-1]) + b"?")

        def flush(self, mode: int) -> bytes:
            return self._encoder.flush(mode)

    monkeypatch.setattr(gzip_writer.isal_zlib, "compressobj", Erring)
    writer, packed = written(CONTENT[:500], [])
    assert not writer.reads_back(io.BytesIO(packed))


def test_labels_are_no_larger_than_by_zlibs_first_level() -> None:
    """What nibabel takes; rows of blobs, as label maps are."""
    steps = RNG.random((400, 5_000)) < 0.02
    labels = (np.cumsum(steps, 1) % 4).astype(np.uint8)
    assert len(written(labels.tobytes(), [])[1]) <= len(zlib.compress(labels.tobytes(), 1))
