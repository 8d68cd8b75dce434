"""Cut, false and hostile files of every format: each has its message, and none costs memory or time."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pydicom
import pytest
import tifffile
import zarr
from astropy.io import fits
from PIL import Image

from densepred.errors import InputError
from densepred.volumes import FORMATS, Volume, open_volume
from tests.fits_files import patched as fits_patched
from tests.fits_files import save as save_fits
from tests.nifti_files import patched, save_nib
from tests.read_trials import LONGEST, MOST_MEGABYTES, Answer, reader

BLOCK, TOTAL = 16 << 20, 10 << 30
IMAGES = {".png", ".jpg", ".jpeg", ".bmp"}
WRITTEN = sorted(FORMATS.keys() - {".fits.bz2", ".fits.gz", ".fit.gz", ".fts.gz", ".nhdr", ".mhd", ".dcm"})


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Answer]]:
    with reader() as read:
        yield read


def zeros(total: int = TOTAL) -> bytes:
    """A zlib stream of `total` zeros: one block, again and again."""
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = encoder.compress(bytes(BLOCK)) + encoder.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + block * (total // BLOCK) + b"\x03\0" + struct.pack(">I", total % 65521 << 16 | 1)


def members(head: bytes = b"", total: int = TOTAL) -> bytes:
    """A gzip file of `head` and `total` zeros, in members."""
    return gzip.compress(head, mtime=0) + gzip.compress(bytes(BLOCK), mtime=0) * (total // BLOCK)


def png(width: int, height: int, pixels: bytes, depth: int = 8, kind: int = 0, more: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def nrrd(body: bytes, sizes: str = "8 8 8", encoding: str = "gzip", **more: str) -> bytes:
    lines = ["NRRD0004", "type: uchar", "dimension: 3", f"sizes: {sizes}", f"encoding: {encoding}"]
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in more.items()]
    return ("\n".join(lines) + "\n\n").encode() + body


def mha(body: bytes = zlib.compress(bytes(512)), **more: str) -> bytes:
    fields = {"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "CompressedData": "True"}
    fields |= {"TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "0 0 0", "ElementSpacing": "1 1 1"}
    fields |= {"DimSize": "8 8 8", "ElementType": "MET_UCHAR", **more, "ElementDataFile": "LOCAL"}
    return "".join(f"{name} = {value}\n" for name, value in fields.items()).encode() + body


def npy(shape: tuple[int, ...]) -> bytes:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"shape": shape, "fortran_order": False, "descr": "<f8"})
    return head.getvalue() + bytes(100)


def nifti(path: Path, pack: Callable[[bytes], bytes] = bytes, **fields: object) -> None:
    raw = patched(save_nib(path.with_name("raw.nii"), np.zeros((8, 8, 8), "i2")), **fields).read_bytes()
    path.write_bytes(pack(raw))


def fits_image(path: Path, pack: Callable[[bytes], bytes] = bytes, **cards: object) -> None:
    raw = save_fits(path.with_name("raw.fits"), np.zeros((40, 50), "i2"))
    path.write_bytes(pack(fits_patched(raw, **cards).read_bytes()))


def one_tile(path: Path, codec: str, data: bytes, size: int = 40) -> None:
    """A compressed image of one tile, of `size` rows of 50."""
    column = fits.Column("COMPRESSED_DATA", "1PB()", array=np.array([np.frombuffer(data, "u1"), None], object)[:1])
    table = fits.BinTableHDU.from_columns([column])
    cards = {"ZIMAGE": True, "ZBITPIX": 16, "ZNAXIS": 2, "ZNAXIS1": 50, "ZNAXIS2": size, "ZTILE1": 50, "ZTILE2": size}
    table.header.update({**cards, "ZCMPTYPE": codec})
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)


def many_tiles(path: Path, **cards: int) -> None:
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(np.zeros((9, 9), "i4"))]).writeto(path)
    fits_patched(path, 1, **cards)


def endless(path: Path) -> None:
    fits_image(path)
    path.write_bytes(path.read_bytes()[:2880].replace(b"END", b"   ") + b" " * (60 << 20))


def tiff(path: Path, compression: int, data: bytes) -> None:
    """A page of 64 x 64 whose only strip is `data`."""
    tifffile.imwrite(path, np.zeros((64, 64), "u1"), compression="zlib", metadata=None)
    raw = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        for tag, value in ((273, len(raw)), (279, len(data)), (259, compression)):
            at = tif.pages.first.tags[tag].offset
            raw[at + 2 : at + 12] = struct.pack("<HII", 4, 1, value)
    path.write_bytes(bytes(raw) + data)


def picture(path: Path, kind: str, side: int, compression: int) -> None:
    """A page of 64 x 64 whose only strip is an image of `side` x `side`."""
    held = io.BytesIO()
    Image.new("L", (side, side)).save(held, kind)
    tiff(path, compression, held.getvalue())


def hdf5(path: Path, data: bytes, times: int = 1, shape: tuple[int, ...] = (64, 64)) -> None:
    """A dataset of one chunk, `data`, compressed `times` over."""
    with h5py.File(path, "w") as part:
        setup = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        setup.set_chunk(shape)
        for _ in range(times):
            setup.set_filter(h5py.h5z.FILTER_DEFLATE, 0, (4,))
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(part.id, b"raw", h5py.h5t.NATIVE_UINT8, space, setup).write_direct_chunk((0, 0), data)


def store(
    path: Path,
    codecs: tuple[str, ...],
    data: bytes,
    shape: tuple[float, ...] = (64, 64),
    steps: tuple[int, ...] = (64, 64),
) -> None:
    """A Zarr array of one chunk, `data`."""
    (path / "c" / "0").mkdir(parents=True)
    settings = {"gzip": {"level": 5}, "zstd": {"level": 5, "checksum": False}}
    settings["blosc"] = {"typesize": 1, "cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "blocksize": 0}
    listed = [{"name": "bytes"}, *({"name": name, "configuration": settings[name]} for name in codecs)]
    grid = {"name": "regular", "configuration": {"chunk_shape": steps}}
    head = {"zarr_format": 3, "node_type": "array", "shape": shape, "data_type": "uint8", "chunk_grid": grid}
    head |= {"chunk_key_encoding": {"name": "default"}, "fill_value": 0, "codecs": listed, "attributes": {}}
    (path / "zarr.json").write_text(json.dumps(head))
    (path / "c" / "0" / "0").write_bytes(data)


def old_store(path: Path, codec: dict[str, object], data: bytes) -> None:
    """The same of version 2."""
    path.mkdir()
    head = {"zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "|u1", "fill_value": 0, "order": "C"}
    (path / ".zarray").write_text(json.dumps(head | {"compressor": codec, "filters": None}))
    (path / "0.0").write_bytes(data)


def shards(path: Path, data: bytes) -> None:
    """A sharded array of which the first chunk is `data`."""
    array = zarr.create_array(
        str(path), shape=(64, 64), chunks=(32, 32), shards=(64, 64), dtype="u1", compressors=zarr.codecs.GzipCodec()
    )
    array[...] = 1
    file = path / "c" / "0" / "0"
    raw = file.read_bytes()
    index = np.frombuffer(raw[-68:-4], "<u8").reshape(4, 2).copy()
    index[0] = len(raw) - 68, len(data)
    file.write_bytes(raw[:-68] + data + summed(index.tobytes()))


def summed(index: bytes) -> bytes:
    """With the checksum that zarr puts behind it."""
    crc = 0xFFFFFFFF
    for octet in index:
        crc ^= octet
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return index + struct.pack("<I", crc ^ 0xFFFFFFFF)


def dicom(path: Path, rows: int, spacing: float = 1, pixels: bytes = bytes(70), coded: bool = False) -> None:
    head = pydicom.Dataset()
    head.file_meta = pydicom.dataset.FileMetaDataset()
    head.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless if coded else pydicom.uid.ExplicitVRLittleEndian
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID = "1.2.3.4"
    head.SeriesInstanceUID, head.StudyInstanceUID, head.Modality = "1.2.3", "1.2", "CT"
    head.Rows, head.Columns, head.SamplesPerPixel, head.PhotometricInterpretation = rows, 7, 1, "MONOCHROME2"
    head.BitsAllocated = head.BitsStored = 16
    head.HighBit, head.PixelRepresentation = 15, 0
    head.ImagePositionPatient, head.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    head.PixelSpacing = [spacing, 1]
    head.PixelData = pydicom.encaps.encapsulate([pixels]) if coded else pixels
    head.save_as(path, enforce_file_format=True)


def deflated(path: Path, kind: str = "1.2.840.10008.5.1.4.1.1.2") -> None:
    """A DICOM file whose data set is a zlib stream of 10 GB of zeros."""
    dicom(path, 5)
    head = pydicom.dcmread(path)
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = kind
    head.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    head.save_as(path, enforce_file_format=True)
    with path.open("rb") as file:
        pydicom.filereader.read_preamble(file, False)
        pydicom.filereader._read_file_meta_info(file)
        start = file.tell()
    path.write_bytes(path.read_bytes()[:start] + zeros()[2:-4])


def test_a_deflated_report_beside_a_series_is_no_slice(tmp_path: Path) -> None:
    for number in range(2):
        dicom(path := tmp_path / f"{number}.dcm", 5)
        (head := pydicom.dcmread(path)).ImagePositionPatient = [0, 0, number]
        head.save_as(path, enforce_file_format=True)
    deflated(tmp_path / "report.dcm", "1.2.840.10008.5.1.4.1.1.88.33")  # Comprehensive SR Storage
    assert open_volume(tmp_path).shape == (1, 2, 5, 7)
    deflated(tmp_path / "report.dcm")
    with pytest.raises(InputError, match="its whole data set is deflated"):
        open_volume(tmp_path)


def written(content: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content())


def text(name: bytes, head: bytes) -> Callable[[Path], object]:
    return written(lambda: png(50, 50, zlib.compress(bytes(51 * 50)), more=chunk(name, head + zeros())))


VAST = [3, 32000, 32000, 32000, 1, 1, 1, 1]
HOSTILE: list[tuple[str, Callable[[Path], object], str]] = [
    # what expands to 10 GB of zeros
    ("x.nii.gz", lambda path: nifti(path, members), "goes on for over 67108864 bytes behind the 1376"),
    ("x.fits.gz", lambda path: fits_image(path, members), "goes on for over .* bytes behind its last HDU, 0"),
    ("x.fits.gz", written(members), "no FITS file: starts with the bytes 00 00"),
    ("x.fits.bz2", written(lambda: bz2.compress(bytes(18 << 20)) * 600), "no FITS file"),
    ("x.fits.fz", lambda path: one_tile(path, "GZIP_1", members(total=1 << 30)), "tile 1 expands to more"),
    ("x.png", written(lambda: png(50, 50, zeros())), "its pixels expand to more than twice the 2500 bytes"),
    ("x.png", written(lambda: png(50, 50, zeros(), 16, 2)), "its pixels expand to more than twice"),
    ("x.png", text(b"zTXt", b"Comment\0\0"), "too large"),
    ("x.png", text(b"iCCP", b"icc\0\0"), "too large"),
    ("x.tif", lambda path: tiff(path, 8, zeros()), "page 1 cannot be read"),
    ("x.tif", lambda path: tiff(path, 50000, bytes(numcodecs.Zstd().encode(bytes(1 << 28)))), "page 1 cannot be read"),
    ("x.tif", lambda path: picture(path, "JPEG", 9000, 7), "holds an image of 9000 x 9000"),
    ("x.tif", lambda path: picture(path, "JPEG2000", 5000, 34712), "holds an image of 5000 x 5000"),
    ("x.tif", lambda path: picture(path, "PNG", 20000, 34933), "far larger image"),
    ("x.h5", lambda path: hdf5(path, zeros()), r"the chunk of '/raw' at \(0, 0\) expands to more than its 4096 bytes"),
    ("x.h5", lambda path: hdf5(path, zlib.compress(zeros(), 9), times=2), "compressed more than once"),
    ("x.nrrd", written(lambda: nrrd(members())), "holds over 512 bytes of voxels"),
    ("x.mha", written(lambda: mha(zeros())), "holds over 512 bytes of voxels"),
    ("x.zarr", lambda path: store(path, ("gzip",), members()), "expands to more than the 4096 bytes"),
    ("x.zarr", lambda path: store(path, ("gzip", "gzip"), gzip.compress(members())), "compressed more than once"),
    ("x.zarr", lambda path: store(path, ("zstd",), numcodecs.Zstd().encode(bytes(1 << 28))), "expands to more"),
    ("x.zarr", lambda path: store(path, ("blosc",), numcodecs.Blosc().encode(bytes(1 << 28))), "expands to more"),
    ("x.zarr", lambda path: shards(path, members()), "expands to more than the 1024 bytes of a chunk"),
    ("x.zarr", lambda path: old_store(path, {"id": "zlib", "level": 1}, zeros()), "expands to more"),
    ("x.zarr", lambda path: old_store(path, {"id": "bz2"}, bz2.compress(bytes(1 << 24)) * 16), "expands to more"),
    ("x.zarr", lambda path: old_store(path, {"id": "lzma"}, lzma.compress(bytes(1 << 24)) * 16), "expands to more"),
    # headers that declare the vast
    ("x.nii", lambda path: nifti(path, dim=VAST), "holds 1376 of 65536000000352 bytes"),
    ("x.nii.gz", lambda path: nifti(path, gzip.compress, dim=VAST), "never hold the 65536000000352"),
    ("x.fits", lambda path: fits_image(path, NAXIS1=200_000, NAXIS2=200_000), "of 80000000000 bytes"),
    ("x.fits.gz", lambda path: fits_image(path, gzip.compress, NAXIS1=200_000, NAXIS2=200_000), "of 80000000000"),
    ("x.fits", endless, "HDU 0: no END in the first 1677"),
    ("x.fits.fz", lambda path: many_tiles(path, ZNAXIS2=2_000_000_000), "has 2000000000 tiles of .* its table 9"),
    (
        "x.fits.fz",
        lambda path: many_tiles(path, ZNAXIS1=200_000, ZNAXIS2=200_000, ZTILE1=200_000, ZTILE2=22_223),
        "compressed bytes never hold the 160000000000",
    ),
    ("x.png", written(lambda: png(60000, 1000, zlib.compress(b""), 8, 2)), "can never hold"),
    ("x.png", written(lambda: png(60000, 60000, b"")), "Pillow's limit"),
    ("x.npy", written(lambda: npy((32000,) * 3)), "holds 228 of 262144000000128"),
    ("x.npy", written(lambda: npy((2**63, 2**63))), "truncated"),
    ("x.npy", written(lambda: b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000), "header of this .npy file"),
    ("x.nrrd", written(lambda: nrrd(gzip.compress(b"1"), "4000 4000 200")), "holds 1 of 3200000000 bytes"),
    ("x.nrrd", written(lambda: nrrd(b"1 2 3", "4000 4000 200", "text")), "holds 5 of 6399999999"),
    ("x.nrrd", written(lambda: b"NRRD0004\n" + b"a" * (64 << 20)), "no end of its header"),
    ("x.nrrd", written(lambda: b"NRRD0004\n" + b"#aaaaaaaaaa\n" * (2 << 20)), "no end of its header"),
    ("x.mha", written(lambda: mha(DimSize="4000000000 4000000000 4000000000")), "this machine has"),
    ("x.mha", written(lambda: mha(CompressedDataSize="1000000000000")), "CompressedDataSize = 1000000000000"),
    ("x.mha", written(lambda: mha(NDims="1000000")), "impossible number of axes: NDims = 1000000"),
    ("x.mha", written(lambda: mha(NDims="11", DimSize="1 " * 11)), "impossible number of axes: NDims = 11"),
    ("x.mha", written(lambda: mha(ElementNumberOfChannels="1000000000")), "this machine has"),
    ("x.zarr", lambda path: store(path, (), b"1", (10**12, 10**12), (10**9, 10**9)), "this machine has"),
    ("x.zarr", lambda path: (path.mkdir(), (path / "zarr.json").write_text("[" * 100_000)), "metadata cannot be read"),
    ("x.zarr", lambda path: (path.mkdir(), (path / "zarr.json").write_bytes(bytes(64 << 20))), "no metadata are that"),
    ("x.dcm", deflated, "its whole data set is deflated"),
    ("x.dcm", lambda path: dicom(path, 65535), "holds at most .* of 917490 bytes of pixels"),
    ("x.dcm", lambda path: dicom(path, 5, pixels=bytes(100), coded=True), "pixels have 0 segments"),
    # sizes that are none
    ("x.nii", lambda path: nifti(path, dim=[3, 0, 8, 8, 1, 1, 1, 1]), "impossible sizes: dim"),
    ("x.nii.gz", lambda path: nifti(path, gzip.compress, dim=[3, -8, 8, 8, 1, 1, 1, 1]), "impossible sizes: dim"),
    ("x.nii", lambda path: nifti(path, pixdim=[1, 0, 1, 1, 0, 0, 0, 0]), "impossible spacing: pixdim"),
    ("x.nii.gz", lambda path: nifti(path, gzip.compress, pixdim=[1, 1, -2, 1, 0, 0, 0, 0]), "impossible spacing"),
    ("x.fits", lambda path: fits_image(path, NAXIS1=-50), "impossible sizes: NAXIS1 = -50"),
    ("x.fits", lambda path: fits_image(path, NAXIS1=0), "no image of two axes or more"),
    ("x.fits.fz", lambda path: one_tile(path, "GZIP_1", b"", 0), "no image of two axes|impossible sizes"),
    ("x.png", written(lambda: png(0, 50, zlib.compress(b""))), "image"),
    ("x.npy", written(lambda: npy((-4, 4))), r"impossible sizes: \(-4, 4\)"),
    ("x.npy", written(lambda: npy((0, 4))), r"impossible sizes: \(0, 4\)"),
    ("x.nrrd", written(lambda: nrrd(bytes(512), "-8 8 8", "raw")), "size is zero"),
    ("x.nrrd", written(lambda: nrrd(bytes(512), "0 8 8", "raw")), "size is zero"),
    ("x.nrrd", written(lambda: nrrd(bytes(512), encoding="raw", spacings="0 1 1")), "impossible sizes: spacings = 0"),
    ("x.nrrd", written(lambda: nrrd(bytes(512), encoding="raw", spacings="-1 1 1")), "impossible sizes: spacings = -1"),
    ("x.nrrd", written(lambda: nrrd(bytes(512), encoding="raw", byte_skip="many")), "impossible header: byte skip"),
    ("x.mha", written(lambda: mha(DimSize="0 8 8")), "impossible sizes: DimSize = 0 8 8"),
    ("x.mha", written(lambda: mha(DimSize="-8 8 8")), "impossible sizes: DimSize = -8 8 8"),
    ("x.mha", written(lambda: mha(ElementSpacing="0 1 1")), "impossible sizes: ElementSpacing = 0 1 1"),
    ("x.mha", written(lambda: mha(ElementSpacing="-1 1 1")), "impossible sizes: ElementSpacing = -1 1 1"),
    ("x.mha", written(lambda: mha(NDims="-3")), "impossible number of axes: NDims = -3"),
    ("x.zarr", lambda path: store(path, (), b"1", (-64, 64)), "metadata cannot be read"),
    ("x.zarr", lambda path: store(path, (), b"1", (0, 64)), r"impossible sizes: \(0, 64\)"),
    ("x.zarr", lambda path: store(path, (), b"1", steps=(0, 64)), "impossible sizes: chunks of"),
    ("x.dcm", lambda path: dicom(path, 5, spacing=0), "PixelSpacing is missing or makes no sense"),
    ("x.dcm", lambda path: dicom(path, 0), "ITK cannot read it|empty"),
]
"""Name, what makes the file, words of the message."""
SPARE = {".png": 13, ".bmp": 4}
"""Bytes at the end that hold nothing: the mark of the end, padding. FITS has up to 2880 of padding, and says so."""


@pytest.mark.parametrize(
    ("name", "make", "words"), HOSTILE, ids=[f"{n}-{name[1:]}" for n, (name, *_) in enumerate(HOSTILE)]
)
def test_hostile_files_have_their_message_and_cost_nothing(
    tmp_path: Path,
    ask: Callable[..., Answer],
    name: str,
    make: Callable[[Path], object],
    words: str,
) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    make(path)
    for other in path.parent.glob("raw.*"):
        other.unlink()
    found = ask(path)
    assert found.status == 0
    assert found.reads[0].startswith(f"refused ERROR {path}: "), found.reads[0]
    assert re.search(words, found.reads[0])
    assert found.megabytes < MOST_MEGABYTES
    assert found.seconds < LONGEST / 2


def whole(path: Path) -> bytes:
    """A sound file of a suffix, made by us."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 9, 20, 21)).astype("u1")
    suffix = "".join(path.suffixes)
    Volume(noise[:, 0] if suffix in IMAGES else noise, (1.0,) * (2 if suffix in IMAGES else 3)).save(path)
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.parametrize("suffix", WRITTEN)
def test_cut_files_are_refused_at_every_length(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    sound = whole(path)
    parts = [path] if sound else sorted(part for part in path.rglob("*") if part.is_file())
    for part in parts:
        content = part.read_bytes()
        room = 2880 if suffix.startswith((".fi", ".fts")) else SPARE.get(suffix, 1)
        cuts = {0, 1, 7, 100, *np.linspace(0, len(content) - room, 25).astype(int).tolist(), len(content) - room}
        for size in sorted(cut for cut in cuts if cut < len(content)):
            part.write_bytes(content[:size])
            with warnings.catch_warnings(action="ignore"), pytest.raises(InputError) as caught:
                open_volume(path, "zyx" if suffix.startswith((".fi", ".fts")) else None).numpy()
            assert caught.value.file == path
            assert caught.value.fix
        part.write_bytes(content)


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_a_page_of_the_web_is_called_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    for page in ("<html><head>Please log in</head></html>" * 200, "<!DOCTYPE html>\n<html>no</html>"):
        path.write_text(page)
        with pytest.raises(InputError) as caught:
            open_volume(path).numpy()
        assert caught.value.file == path
        assert caught.value.fix
        if FORMATS[suffix].split(".")[-1] not in ("zarr_store", "dicom"):
            assert f"starts with '{page[:10]}" in caught.value.what


def test_every_format_has_its_hostile_files() -> None:
    covered = {module for suffix, module in FORMATS.items() if any(name.endswith(suffix) for name, *_ in HOSTILE)}
    assert covered == set(FORMATS.values())
