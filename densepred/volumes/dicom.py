"""A series of DICOM slices as one volume: pydicom reads the headers, SimpleITK the pixels; an extra, and read-only.

Slices are ordered by their position along the normal of the image plane, never by file name or instance number.

Reference: DICOM PS3.3, C.7.6.2 (image plane) and C.11.1 (modality LUT).
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from densepred.errors import InputError
from densepred.volumes.itk import LPS, information, pixel_dtype, simple_itk, unreadable
from densepred.volumes.volume import Key, SlabWriter, Volume, check_memory, full_key, span

_TAGS = (
    *("SeriesInstanceUID", "SeriesDescription", "Modality", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "PixelRepresentation", "BitsStored", "BitsAllocated", "SOPInstanceUID"),
)
_IO = "GDCMImageIO"
_TURN = 1e-3  # largest change of a direction cosine within a series
_UNEVEN = 0.02  # share of the spacing by which slices may stray
_AGAIN = "get the file again from its source"
_MOST_RATIO = 1 << 12  # bytes of pixels for one that is compressed, by any codec
_FIX = "put the slices of one regular stack into a folder of their own"


@dataclass(frozen=True)
class DicomHeader:
    """The header of a series' first slice, without its pixels, the files in the order of the slices, and the unit."""

    first: Any
    files: tuple[Path, ...]
    unit: str | None = "mm"


def read(path: str | Path, axes: str | None = None, part: str | None = None) -> Volume:
    """Open a series: all headers of its folder are read and checked, pixels are left for later.

    Args:
        path: a folder, or one file of the series in its folder.
        axes: None: the headers say what the axes are.
        part: the SeriesInstanceUID, where the folder holds several series.

    Returns:
        The volume `(C, Z, Y, X)` in the units after rescaling (HU for CT); an image without a position in space, such
        as a plain radiograph, is `(C, Y, X)`.

    Raises:
        InputError: several series, missing slices, or slices that differ in orientation, spacing, size or type.

    Example:
        >>> read("study/series3").affine  # doctest: +SKIP
    """
    path = Path(path)
    if axes is not None:
        raise InputError("the axes of DICOM images are in their headers", "leave out `axes`", path)
    slices = _series(path, part)
    first = slices[0][1]
    if len(slices) == 1 and "ImagePositionPatient" not in first:
        return _radiograph(path, slices[0])
    slices, affine = _ordered(slices, path)
    array = DicomArray([file for file, _ in slices], [head for _, head in slices], flat=False)
    spacing = tuple(reversed(np.linalg.norm(affine[:3, :3], axis=0).tolist()))
    return Volume(array, spacing, affine, DicomHeader(slices[0][1], tuple(file for file, _ in slices)), path)


def open_writer(
    path: str | Path, like: Volume, dtype: np.dtype, channels: int = 1, labels: bool = False
) -> AbstractContextManager[SlabWriter]:
    """DICOM is not written.

    Raises:
        InputError: always.
    """
    raise InputError("DICOM is only read", "write .nii.gz or .nrrd", path)


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise InputError("pydicom is not installed", "pip install 'densepred[itk]'") from error
    return pydicom


def _series(path: Path, uid: str | None) -> list[tuple[Path, Any]]:
    """The image files of one series with their headers."""
    folder = path if path.is_dir() else path.parent
    heads = [(file, _head(file, file.name == path.name)) for file in sorted(folder.iterdir()) if file.is_file()]
    images = [(file, head) for file, head in heads if head is not None and "Rows" in head]
    if not path.is_dir():
        own = next((head for file, head in images if file.name == path.name), None)
        if own is None:
            raise InputError("no DICOM image", "get the file again from its source", path)
        uid = uid or str(own.get("SeriesInstanceUID", ""))
    if not images:
        raise InputError("the folder holds no DICOM images", "give the folder that holds the slices", path)
    counts = Counter(str(head.get("SeriesInstanceUID", "")) for _, head in images)
    if uid is None and len(counts) > 1:
        lines = "; ".join(f"[{name}] {count} images" for name, count in counts.most_common(20))
        fix = f"add one: {path.name}[{counts.most_common(1)[0][0]}]; or give files, as in {path.name}/*.dcm"
        raise InputError(f"the folder holds {len(counts)} series: {lines}", fix, path)
    chosen = uid if uid is not None else next(iter(counts))
    if chosen not in counts:
        what = f"there is no series [{chosen}] in the folder"
        raise InputError(what, f"choose one of {', '.join(list(counts)[:20])}", path)
    return [(file, head) for file, head in images if str(head.get("SeriesInstanceUID", "")) == chosen]


def _head(file: Path, asked: bool) -> Any:
    """The tags of a file that matter here; None if it is no DICOM, or a report that was not asked for."""
    pydicom = _pydicom()
    try:
        if _is_deflated(file, asked):
            return None
        head = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
        list(head)  # which decodes every value now
        return head
    except InputError:
        raise
    except (pydicom.errors.InvalidDicomError, EOFError):
        return None
    except Exception as error:  # pydicom raises many kinds for a broken file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = f"its DICOM header cannot be read: {error}"
        raise InputError(what, "get the file again from its source", file) from error


def _is_deflated(file: Path, asked: bool) -> bool:
    """Is its whole data set deflated? Then a few megabytes could become gigabytes before anything is known of it.

    Raises:
        InputError: so it is, and it was asked for or is no report, so that a series would lack a slice without it.
    """
    pydicom = _pydicom()
    meta = pydicom.filereader.read_file_meta_info(file)
    if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
        return False
    kind = meta.get("MediaStorageSOPClassUID")
    report = kind is not None and any(word in kind.name for word in ("Document", "Presentation State", " SR "))
    if asked or not report:
        what = "its whole data set is deflated, which is not read"
        raise InputError(what, "convert it with dcmconv or dcm2niix", file)
    return True


def _numbers(head: Any, name: str, count: int, file: Path) -> np.ndarray:
    try:
        values = np.asarray([float(value) for value in head[name].value], np.float64)
    except (KeyError, TypeError, ValueError):
        values = np.zeros(0)
    sizes = "Spacing" in name
    if values.shape != (count,) or not np.isfinite(values).all() or (sizes and values.min() <= 0):
        what = f"{name} is missing or makes no sense: {head.get(name)}"
        raise InputError(what, "convert the series with a tool of its maker", file)
    return values


def _same(slices: list[tuple[Path, Any]]) -> None:
    """All slices are single frames of one size, orientation and spacing."""
    (first_file, first), *others = slices
    frames = int(first.get("NumberOfFrames") or 1)
    if frames > 1:
        what = f"a multi-frame file ({frames} frames), which is not supported"
        raise InputError(what, "convert it to NIfTI, with dcm2niix for one", first_file)
    turned = _numbers(first, "ImageOrientationPatient", 6, first_file)
    pixel = _numbers(first, "PixelSpacing", 2, first_file)
    for file, head in others:
        for name in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"):
            if (head.get(name) or 1) != (first.get(name) or 1):
                what = (
                    f"slices differ in {name}: {first.get(name)} in {first_file.name}, {head.get(name)} in {file.name}"
                )
                raise InputError(what, _FIX, file)
        for name, count, expected in (("ImageOrientationPatient", 6, turned), ("PixelSpacing", 2, pixel)):
            values = _numbers(head, name, count, file)
            if np.abs(values - expected).max() > _TURN * (1 if count == 6 else pixel.min()):
                said = f"{expected.tolist()} in {first_file.name}, {values.tolist()} in {file.name}"
                raise InputError(f"slices differ in {name}: {said}", _FIX, file)


def _ordered(slices: list[tuple[Path, Any]], path: Path) -> tuple[list[tuple[Path, Any]], np.ndarray]:
    """The slices along the normal of their plane, and the affine."""
    _same(slices)
    file, first = slices[0]
    along_row, along_column = _numbers(first, "ImageOrientationPatient", 6, file).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    if abs(np.linalg.norm(normal) - 1) > 1e-2:
        raise InputError("ImageOrientationPatient is no pair of perpendicular directions", _FIX, file)
    normal /= np.linalg.norm(normal)
    at = [(_numbers(head, "ImagePositionPatient", 3, file), file, head) for file, head in slices]
    at.sort(key=lambda entry: (float(entry[0] @ normal), entry[1].name))
    step = _step([entry[0] for entry in at], normal, [entry[1] for entry in at], first)
    down, right = _numbers(first, "PixelSpacing", 2, file)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([along_row * right, along_column * down, step])
    affine[:3, 3] = at[0][0]
    return [entry[1:] for entry in at], LPS @ affine


def _step(at: list[np.ndarray], normal: np.ndarray, files: list[Path], first: Any) -> np.ndarray:
    """From one slice to the next, `(3,)` in mm; it leans where the gantry was tilted."""
    if len(at) == 1:
        thickness = float(first.get("SliceThickness") or 1)
        return normal * (thickness if thickness > 0 else 1.0)
    heights = np.asarray([position @ normal for position in at])
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    for gap, below, above in zip(gaps.tolist(), files, files[1:], strict=False):
        if gap < 1e-3 or gap < _UNEVEN * usual:
            what = f"{below.name} and {above.name} lie at one position: times or echoes in one series"
            raise InputError(what, _FIX, above)
    wrong = np.flatnonzero(np.abs(gaps - usual) > _UNEVEN * usual)
    if len(wrong):
        ratio = gaps[wrong] / usual
        where = f"between {files[wrong[0]].name} and {files[wrong[0] + 1].name}"
        if np.abs(ratio - np.round(ratio)).max() <= _UNEVEN * ratio.max():
            count = int(np.round(ratio).sum()) - len(ratio)
            what = f"{count} slice{' is' if count == 1 else 's are'} missing, the first {where}"
            raise InputError(what, "get the missing slices from the source", files[wrong[0]])
        what = f"slices lie {gaps.min():.4g} to {gaps.max():.4g} mm apart, unevenly first {where}"
        raise InputError(what, "resample the series to one spacing", files[wrong[0]])
    step = (at[-1] - at[0]) / (len(at) - 1)
    stray = max(np.linalg.norm(position - at[0] - number * step) for number, position in enumerate(at))
    if stray > max(_UNEVEN * usual, 0.01):
        raise InputError(f"slices do not lie in a row: one is {stray:.3g} mm aside", _FIX, files[0])
    return np.asarray(step)


def _radiograph(path: Path, image: tuple[Path, Any]) -> Volume:
    file, head = image
    if int(head.get("NumberOfFrames") or 1) > 1:
        what = f"a multi-frame file ({head.NumberOfFrames} frames), which is not supported"
        raise InputError(what, "convert it to NIfTI, with dcm2niix for one", file)
    name = next((name for name in ("PixelSpacing", "ImagerPixelSpacing") if name in head), None)
    down, right = (1.0, 1.0) if name is None else _numbers(head, name, 2, file)
    array = DicomArray([file], [head], flat=True)
    return Volume(array, (down, right), None, DicomHeader(head, (file,), "mm" if name else None), path)


class DicomArray:
    """The slices of a series as `(C, Z, Y, X)`, each read from its file when it is asked for."""

    def __init__(self, files: list[Path], heads: list[Any], flat: bool) -> None:
        self._files, self._flat = files, flat
        _check_pixels(files[0])
        self._plane = (int(heads[0].Rows), int(heads[0].Columns))
        channels = int(heads[0].get("SamplesPerPixel") or 1)
        kinds: dict[tuple[str, ...], np.dtype] = {}
        names = ("RescaleSlope", "RescaleIntercept", "PixelRepresentation", "BitsStored", "BitsAllocated")
        for file, head in zip(files, heads, strict=True):
            kind = tuple(str(head.get(name)) for name in names)
            if kind not in kinds:
                kinds[kind] = pixel_dtype(information(file, _IO), file)
        self.dtype = np.result_type(*kinds.values())
        self.shape = (channels, *(() if flat else (len(files),)), *self._plane)

    def __getitem__(self, key: Key) -> np.ndarray:
        index = full_key(key, self.shape)
        if self._flat:
            return self._slice(self._files[0])[index]
        start, stop, of_planes = span(index[1], self.shape[1])
        out_shape = (self.shape[0], stop - start, *self._plane)
        check_memory(self.dtype.itemsize * int(np.prod(out_shape, dtype=np.int64)), self._files[0].parent)
        out = np.empty(out_shape, self.dtype)
        for number in range(start, stop):
            out[:, number - start] = self._slice(self._files[number])
        return out[(index[0], of_planes, *index[2:])]

    def _slice(self, file: Path) -> np.ndarray:
        """`(C, Y, X)` after the rescaling of its own header."""
        _check_pixels(file)
        reader = information(file, _IO)
        try:
            values = simple_itk().GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise unreadable(file, error) from error
        values = values.reshape(*self._plane, self.shape[0])
        return np.moveaxis(values, -1, 0).astype(self.dtype, copy=False)


def _check_pixels(file: Path) -> None:
    """The stored pixels of a slice can be those that its header declares; GDCM does not ask.

    Raises:
        InputError: there are too few, or run-length coded ones have no segments.
    """
    pydicom = _pydicom()
    segments: list[int] = []
    try:
        head = pydicom.dcmread(file, defer_size=1 << 10)
        syntax = head.file_meta.TransferSyntaxUID
        needed = head.Rows * head.Columns * int(head.get("SamplesPerPixel") or 1) * int(head.BitsAllocated) // 8
        held = file.stat().st_size * (_MOST_RATIO if syntax.is_compressed or syntax.is_deflated else 1)
        if syntax == pydicom.uid.RLELossless:
            frames = pydicom.encaps.generate_frames(head.PixelData, number_of_frames=1)
            segments = [int.from_bytes(frame[:4], "little") for frame in frames]
    except Exception as error:  # pydicom raises many kinds for a broken file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"its pixels cannot be read: {error}", _AGAIN, file) from error
    if needed > held:
        raise InputError(f"truncated: holds at most {held} of {needed} bytes of pixels", _AGAIN, file)
    if not all(1 <= count <= 15 for count in segments):
        raise InputError(f"its run-length coded pixels have {segments[0]} segments", _AGAIN, file)
