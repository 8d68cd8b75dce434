"""Checksums taken while pixels are read: whatever the order, damage is found before the values are vouched for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes import Volume, fits_pixels, open_volume

VALUES = np.random.default_rng(8).normal(0, 1, (61, 47)).astype("f4")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fits_pixels, "_BLOCK", 3_000)
    monkeypatch.setattr(fits_pixels, "_PIECE", 500)
    fits.PrimaryHDU(VALUES).writeto(tmp_path / "x.fits", checksum=True)
    return tmp_path / "x.fits"


def damage(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(2880 + at)
        octet = file.read(1)[0]
        file.seek(2880 + at)
        file.write(bytes([octet ^ 16]))


def columns(volume: Volume) -> None:
    np.testing.assert_array_equal(volume[:, :, 5:9], volume[:][:, :, 5:9])
    volume.verify()


def backwards(volume: Volume) -> None:
    for row in range(60, -1, -1):
        volume[:, row : row + 1]
    volume.verify()


def half(volume: Volume) -> None:
    volume[:, :30]
    volume.verify()


WAYS: list[Callable[[Volume], object]] = [
    lambda volume: volume.numpy(),
    lambda volume: list(volume.slabs(7)),
    lambda volume: volume.verify(),
    columns,
    backwards,
    half,
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading_finds_damage(path: Path, way: Callable[[Volume], object]) -> None:
    way(open_volume(path))
    for at in (0, 499, 500, 4_001, VALUES.nbytes - 1, VALUES.nbytes):  # the last in the padding
        damage(path, at)
        with pytest.raises(InputError, match="HDU 0: its data sum to"):
            way(open_volume(path))
        damage(path, at)
    way(open_volume(path))


def test_each_pass_is_checked_for_itself(path: Path) -> None:
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.numpy()[0], VALUES)
    damage(path, 77)
    for way in (lambda: volume.numpy(), lambda: volume.verify(), lambda: volume.numpy()):
        with pytest.raises(InputError, match="the file is corrupt"):
            way()
    damage(path, 77)
    np.testing.assert_array_equal(volume.numpy()[0], VALUES)


def test_values_read_before_the_damage_was_mended_are_not_vouched_for(path: Path) -> None:
    damage(path, 5_000)
    volume = open_volume(path)
    volume[...]
    damage(path, 5_000)
    with pytest.raises(InputError, match="the file is corrupt"):
        volume.verify()
