"""PNG, JPEG and BMP read and written; Pillow and imagecodecs are the witnesses."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densepred.errors import InputError
from densepred.volumes import Volume, open_volume
from tests.drawn_arrays import COMMON, RNG, last, scan


def test_real_pngs_read_as_pillow_reads_them_and_come_back(real_data: Path, tmp_path: Path) -> None:
    files = sorted((real_data / "nuclei").glob("*/*.png"))[::25]
    assert {path.parent.name for path in files} == {"images", "labels"}
    for path in files:
        theirs = np.asarray(Image.open(path))
        volume = open_volume(path)
        np.testing.assert_array_equal(last(volume.numpy()), theirs)
        assert volume.dtype == theirs.dtype
        assert volume.header.colour == (4 if path.parent.name == "images" else 0)
        volume.save(tmp_path / "copy.png")
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "copy.png")), theirs)
        volume.save(tmp_path / "copy.tif")
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "copy.tif"), theirs)


@settings(**COMMON)
@given(
    kind=st.sampled_from(["u1", "u2", "?"]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    suffix=st.sampled_from([".png", ".bmp"]),
)
def test_images_round_trip_with_their_peers(tmp_path: Path, kind: str, shape: tuple, suffix: str) -> None:
    if suffix == ".bmp":
        kind, shape = "u1", (1 if shape[0] < 3 else 3, *shape[1:])
    values = RNG.integers(0, 2 if kind == "?" else np.iinfo(kind).max + 1, shape).astype(kind)
    Volume(values, (1, 1)).save(tmp_path / f"x{suffix}")
    theirs = np.asarray(Image.open(tmp_path / f"x{suffix}"))
    if kind == "u2" and shape[0] > 1:
        theirs = imagecodecs.png_decode((tmp_path / "x.png").read_bytes())
    np.testing.assert_array_equal(theirs.reshape(last(values).shape), last(values))
    with open_volume(tmp_path / f"x{suffix}") as volume:
        np.testing.assert_array_equal(volume.numpy(), values)
        np.testing.assert_array_equal(np.concatenate([slab for *_, slab in volume.slabs(3)], 1), values)
        np.testing.assert_array_equal(volume[:, ::-2, 0], values[:, ::-2, 0])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16"])
def test_every_mode_of_pillow_is_read(tmp_path: Path, mode: str) -> None:
    values = scan((9, 11, 4))[..., : max(len(mode), 1) if mode.isalpha() else 1].squeeze()
    image = Image.fromarray(values > 50 if mode == "1" else values.astype("u2") * 600 if mode == "I;16" else values)
    assert image.mode == mode
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(last(open_volume(tmp_path / "x.png").numpy()), np.asarray(image))


def test_a_palette_gives_colours_or_indices(tmp_path: Path) -> None:
    indices = scan((12, 13)) % 5
    image = Image.fromarray(indices).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    image.putdata(indices.ravel().tolist())
    path = tmp_path / "x.png"
    image.save(path)
    colours = open_volume(path)
    np.testing.assert_array_equal(last(colours.numpy()), np.asarray(image.convert("RGB")))
    chosen = open_volume(f"{path}[index]")
    np.testing.assert_array_equal(chosen.numpy()[0], indices)
    assert (colours.labels, chosen.labels) == (False, True)
    image.save(path, transparency=2)
    np.testing.assert_array_equal(last(open_volume(path).numpy()), np.asarray(Image.open(path).convert("RGBA")))
    with pytest.raises(InputError, match=r"has no part \[3\]"):
        open_volume(f"{path}[3]")
    Image.fromarray(indices).save(path)
    with pytest.raises(InputError, match="has no palette"):
        open_volume(f"{path}[index]")


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_classes_in_two_and_four_bits_are_not_stretched(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(4, 2, 2, 0, b"\0\x1b\0\xe4"))  # 00 01 10 11, then backward
    np.testing.assert_array_equal(open_volume(path).numpy()[0], [[0, 1, 2, 3], [3, 2, 1, 0]])
    path.write_bytes(png(4, 1, 4, 0, b"\0\x07\xf1"))
    np.testing.assert_array_equal(open_volume(path).numpy()[0], [[0, 7, 15, 1]])


def test_sixteen_bits_of_colour_are_kept(tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (7, 9, 3)).astype("u2")
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(values))
    np.testing.assert_array_equal(last(open_volume(tmp_path / "x.png").numpy()), values)


def test_jpeg_is_read_as_pillow_reads_it_and_takes_no_labels(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(40), np.arange(50)).astype("u1")
    Image.fromarray(np.stack([smooth, smooth, 255 - smooth], -1)).save(tmp_path / "x.jpg")
    with warnings.catch_warnings(action="error"):
        volume = open_volume(tmp_path / "x.jpg")
        np.testing.assert_array_equal(last(volume.numpy()), np.asarray(Image.open(tmp_path / "x.jpg")))
    volume.save(tmp_path / "y.jpeg")
    assert np.abs(open_volume(tmp_path / "y.jpeg").numpy().astype(int) - volume.numpy()).max() < 20
    with pytest.raises(InputError, match="JPEG is lossy") as caught:
        volume.like(smooth, labels=True).save(tmp_path / "z.jpg")
    assert caught.value.fix == "write a .png file"
    Image.fromarray(np.stack([smooth] * 4, -1), "CMYK").save(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="colour mode CMYK is not supported"):
        open_volume(tmp_path / "x.jpg")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_orientation_is_told_and_not_applied(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(scan((20, 30)))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / f"x{suffix}", exif=exif)
    with pytest.warns(UserWarning, match="EXIF orientation 6 is not applied"):
        assert open_volume(tmp_path / f"x{suffix}").shape == (1, 20, 30)


def test_what_an_image_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    image = Volume.from_array(scan((4, 5)), (1, 1))
    refusals: list[tuple[str, Volume, str]] = [
        ("x.png", Volume.from_array(scan((3, 4, 5)), (1, 1, 1)), "this volume has 3 planes"),
        ("x.png", image.like(np.ones((4, 5), np.float32)), "integers of up to 16 bits, not float32"),
        ("x.png", image.like(np.ones((5, 4, 5), np.uint8)), "PNG cannot hold 5 channels"),
        ("x.png", image.like(np.full((4, 5), 70000)), "from 70000 to 70000 do not fit 0 to 65535"),
        ("x.png", image.like(np.full((4, 5), -1, np.int16)), "from -1 to -1 do not fit"),
        ("x.bmp", image.like(np.ones((4, 4, 5), np.uint8)), "BMP cannot hold 4 channels"),
        ("x.bmp", image.like(np.ones((4, 5), np.uint16), labels=False), "integers of 8 bits, not uint16"),
    ]
    for name, volume, words in refusals:
        with pytest.raises(InputError, match=words):
            volume.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_labels_and_resolution_survive(tmp_path: Path) -> None:
    Image.fromarray(scan((4, 5))).save(tmp_path / "x.png", dpi=(200, 100))
    volume = open_volume(tmp_path / "x.png")
    assert volume.spacing == (1, 1)
    volume.like(np.full((4, 5), 300)).save(tmp_path / "y.png")
    written = open_volume(tmp_path / "y.png")
    assert (written.labels, written.dtype, written.numpy().max()) == (True, np.uint16, 300)
    assert Image.open(tmp_path / "y.png").info["dpi"] == pytest.approx((200, 100), abs=0.01)


def test_damaged_images_are_refused(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg", ".bmp"):
        path = tmp_path / f"x{suffix}"
        Image.fromarray(scan((60, 70))).save(path)
        sound = path.read_bytes()
        for size in (0, 2, 10, len(sound) // 2, len(sound) - 20):
            path.write_bytes(sound[:size])
            with pytest.raises(InputError) as caught:
                open_volume(path).numpy()
            assert caught.value.file == path
        path.write_text("<html>log in</html>")
        with pytest.raises(InputError, match="file: starts with '<html>log in"):
            open_volume(path)
    path = tmp_path / "x.png"
    path.write_bytes(png(60000, 1000, 8, 2, b"\0" * 100))
    with pytest.raises(InputError, match=r"declares 60000 x 1000 pixels, which its .* bytes can never hold"):
        open_volume(path)
    path.write_bytes(png(60000, 60000, 8, 2, b"\0" * 100))
    with pytest.raises(InputError, match="Pillow's limit") as caught:
        open_volume(path)
    assert "tiled TIFF" in caught.value.fix
    Image.fromarray(scan((4, 5))).save(path, save_all=True, append_images=[Image.fromarray(scan((4, 5)))])
    with pytest.raises(InputError, match="holds 2 images"):
        open_volume(path)
    Image.fromarray(scan((4, 5))).save(path, "BMP")
    with pytest.warns(UserWarning, match="the file is BMP, against its name"):
        open_volume(path)
