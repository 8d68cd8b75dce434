"""NRRD and MetaImage (`.nrrd`, `.nhdr`, `.mha`, `.mhd`) through SimpleITK, which is an extra.

ITK's world is left-posterior-superior; ours, as nibabel's, right-anterior-superior: the first two rows change sign. ITK
returns a damaged compressed file without a word, so its stream is checked here before ITK decodes it.

Reference: http://teem.sourceforge.net/nrrd/format.html, https://itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from densepred.errors import InputError, ResourceError
from densepred.files import atomic_path
from densepred.volumes import itk_stream
from densepred.volumes.arrays import SlabSink, affine_in_mm, stored_dtype
from densepred.volumes.nifti_header import AXES, voxel_sizes
from densepred.volumes.volume import Key, Volume, check_memory, full_key, span

_IMAGE_IO = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
_LABELS = "densepred_labels"
"""The entry of a header by which our own label maps are known."""
_OF_VOXELS = ("NRRD_", "ITK_", "Segment", "Modality", "densepred_")
"""Entries that ITK makes itself, or that describe the source's voxels."""
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class ItkHeader:
    """The free entries of a header, by name, and the unit of the spacing."""

    entries: Mapping[str, str] = field(default_factory=dict)
    unit: str = "mm"


def simple_itk() -> Any:
    """The module SimpleITK.

    Raises:
        InputError: it is not installed.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError("SimpleITK is not installed", "pip install 'densepred[itk]'") from error
    return SimpleITK


def read(path: str | Path, axes: str | None = None, part: str | None = None) -> Volume:
    """Open a file: its header is read, its voxels are left for later.

    Args:
        path: the file; of a pair, the header.
        axes: None, or what the axes hold, fastest first: "xyzc" for a fourth axis of channels, one of
            `nifti_header.AXES`. Components of vector and colour images are channels without a word.
        part: None: a file holds one image.

    Raises:
        InputError: ITK cannot read it, it is truncated, or its axes are not plain.

    Example:
        >>> read("ct.nrrd").spacing  # doctest: +SKIP
        (2.0, 0.8, 0.8)
    """
    path = Path(path)
    if part is not None:
        raise InputError(f"such a file holds one image, not a part [{part}]", "leave the brackets out", path)
    itk_stream.check_readable(path)
    itk_stream.locate(path).check_there()
    reader = information(path, _IMAGE_IO[path.suffix.lower()])
    array = ItkArray(path, reader, axes)
    dims = len(array.shape) - 1
    affine = affine_of(reader, dims, path)
    entries = _entries(reader, path)
    marked = _LABELS in entries or any(name.startswith("Segment0_") for name in entries)
    spacing = tuple(reversed(voxel_sizes(affine)[:dims].tolist()))
    return Volume(array, spacing, affine, ItkHeader(entries), path, marked and array.dtype.kind in "iu")


def _entries(reader: Any, path: Path) -> dict[str, str]:
    try:
        return {name: reader.GetMetaData(name) for name in reader.GetMetaDataKeys()}
    except (TypeError, UnicodeError) as error:
        what = "the name of an entry of its header is no text (UTF-8)"
        raise InputError(what, "mend its header, or get the file again from its source", path) from error


def information(path: Path, image_io: str) -> Any:
    """An ITK reader that has read the header of `path`.

    Raises:
        InputError: it cannot.
    """
    reader = simple_itk().ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise unreadable(path, error) from error
    return reader


def unreadable(path: Path, error: Exception) -> InputError:
    """The error for what ITK cannot read."""
    return InputError(f"ITK cannot read it: {last_words(error)}", "get the file again from its source", path)


def last_words(error: Exception) -> str:
    """The last line of what ITK says; those before tell where in its source it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160]


def affine_of(reader: Any, dims: int, path: Path) -> np.ndarray:
    """The 4x4 affine in our convention from spacing, direction and origin of ITK's.

    Raises:
        InputError: it is singular or not finite.
    """
    count = reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (count, count))[:dims, :dims]
    affine = np.eye(4)
    affine[:dims, :dims] = direction * np.asarray(reader.GetSpacing())[:dims]
    affine[:dims, 3] = reader.GetOrigin()[:dims]
    sizes = voxel_sizes(affine)
    if not np.isfinite(affine).all() or not sizes.all() or np.linalg.svd(affine[:3, :3] / sizes)[1].min() < 1e-4:
        rows = np.array2string(affine[:3], precision=4, separator=", ").replace("\n", "")
        raise InputError(f"the orientation is singular or not finite: {rows}", "write the true one there", path)
    return LPS @ affine


def pixel_dtype(reader: Any, path: Path) -> np.dtype:
    """The numpy type of the voxels of an ITK reader.

    Raises:
        InputError: they are no real numbers.
    """
    sitk = simple_itk()
    name = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    for kind in ("int", "float"):
        for bits in (8, 16, 32, 64):
            sign = "integer" if kind == "int" else "float"
            if f"{bits}-bit" in name and sign in name and "complex" not in name:
                return np.dtype(f"{'u' if 'unsigned' in name else ''}{kind}{bits}")
    raise InputError(f"voxels of type {name} are not supported", "save it with one real number per voxel", path)


class ItkArray:
    """The voxels of a file, `(C, *spatial)`: read by the region from plain MetaImages, else held once they are read."""

    def __init__(self, path: Path, reader: Any, axes: str | None) -> None:
        self._path, self._reader = path, reader
        self.dtype = pixel_dtype(reader, path)
        self._size = tuple(int(size) for size in reader.GetSize())
        self._components = int(reader.GetNumberOfComponents())
        self.shape = _layout(self._size, self._components, axes, path)
        voxels = self._components
        for size in self._size:
            voxels *= size
        self._stored = itk_stream.locate(path)
        self._bytes = voxels * self.dtype.itemsize
        self._stored.check_length(self._bytes, voxels)
        self._held: np.ndarray | None = None

    def __getitem__(self, key: Key) -> np.ndarray:
        index = full_key(key, self.shape)
        if not self._stored.windows or self._held is not None or len(self._size) != len(self.shape) - 1:
            return self._whole()[index]
        start, stop, of_planes = span(index[1], self.shape[1])
        if start == stop:
            return np.empty(self.shape, self.dtype)[:, :0][(index[0], of_planes, *index[2:])]
        check_memory(self._bytes // self.shape[1] * (stop - start), self._path)
        last = len(self._size) - 1
        corner, extent = [0] * len(self._size), list(self._size)
        corner[last], extent[last] = start, stop - start
        return self._execute(corner, extent)[(index[0], of_planes, *index[2:])]

    def _whole(self) -> np.ndarray:
        if self._held is None:
            check_memory(2 * self._bytes, self._path)
            self._stored.check_stream(self._bytes)
            self._held = self._execute([0] * len(self._size), list(self._size)).reshape(self.shape)
        return self._held

    def _execute(self, corner: list[int], extent: list[int]) -> np.ndarray:
        self._reader.SetExtractIndex(corner)
        self._reader.SetExtractSize(extent)
        try:
            values = simple_itk().GetArrayFromImage(self._reader.Execute())
        except RuntimeError as error:
            raise unreadable(self._path, error) from error
        return np.moveaxis(values, -1, 0) if self._components > 1 else values[np.newaxis]

    def verify(self) -> None:
        """Check the compressed stream, unless it was when it was read."""
        if self._held is None:
            self._stored.check_stream(self._bytes)

    def close(self) -> None:
        """Let go of the voxels that are held."""
        self._held = None


def _layout(size: tuple[int, ...], components: int, axes: str | None, path: Path) -> tuple[int, ...]:
    """`(C, Z, Y, X)` or `(C, Y, X)`; axes of size 1 beyond the spatial ones are dropped."""
    if axes is not None and axes not in AXES:
        raise InputError(f"axes '{axes}' are not known for this format", f"choose one of {', '.join(AXES)}", path)
    spatial = AXES[axes] if axes else min(len(size), 3)
    if len(size) < spatial or len(size) < 2:
        fix = "leave out `axes`" if axes else "choose another file"
        raise InputError(f"the file has {len(size)} axes: {size}", fix, path)
    extra = [count for count in size[spatial:] if count > 1]
    if extra and not (axes and axes.endswith("c")):
        fix = f"add `axes: {'xyc' if spatial == 2 else 'xyzc'}` if the last axis holds channels"
        raise InputError(f"{len(size)} axes {size}: what lies along the last is not declared", fix, path)
    if len(extra) + (components > 1) > 1:
        raise InputError(f"{len(size)} axes {size} of {components} components: one may hold channels", "split it", path)
    return (extra[0] if extra else components, *reversed(size[:spatial]))


@contextmanager
def open_writer(
    path: str | Path, like: Volume, dtype: np.dtype, channels: int = 1, labels: bool = False
) -> Iterator[Writer]:
    """Take a file slab by slab; it is compressed and written at the end, whole or not at all.

    ITK writes an image at once, so the voxels are held in memory.

    Args:
        path: a `.nrrd` or `.mha`. Pairs of a header and a file of voxels are not written: two files cannot be replaced
            in one step.
        like: gives the grid and, if it came from ITK, the free entries of the header.
        dtype: of the values; what is stored for it is told by `Writer.dtype`.
        channels: more than one become a vector image.
        labels: the values are classes.

    Raises:
        InputError: a pair, or a 2D image that lies obliquely in space.
        ValueError: the dtype cannot be stored, or not all planes were written.
        ResourceError: too large for the memory, the disk is full, or the file does not read back.
    """
    path = Path(path)
    if path.suffix.lower() not in (".nrrd", ".mha"):
        fix = f"write {path.with_suffix('.nrrd' if path.suffix.lower() == '.nhdr' else '.mha').name}"
        raise InputError(f"{path.suffix} is a header beside its voxels, which is only read", fix, path)
    simple_itk()
    writer = Writer((channels, *like.shape[1:]), stored_dtype(np.dtype(dtype), labels), like, labels, path)
    with atomic_path(path, writer.verify) as part:
        yield writer
        writer.finish()
        writer.store(part)


class Writer(SlabSink):
    """Takes slabs forward; made by `open_writer`."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, like: Volume, labels: bool, path: Path) -> None:
        super().__init__(shape, dtype)
        self._path = path
        check_memory(2 * dtype.itemsize * int(np.prod(shape, dtype=np.int64)), path)
        self._geometry = _itk_geometry(like, path)
        entries = like.header.entries if isinstance(like.header, ItkHeader) else {}
        self._entries = {name: text for name, text in entries.items() if not name.startswith(_OF_VOXELS)}
        if labels:
            self._entries[_LABELS] = "1"
        self._values = np.empty((*shape[1:], shape[0]), dtype)

    def _put(self, slab: np.ndarray, start: int) -> None:
        self._values[start : start + slab.shape[1]] = np.moveaxis(slab, 0, -1)

    def store(self, part: Path) -> None:
        """Write all that was taken."""
        sitk = simple_itk()
        vector = self.shape[0] > 1
        image = sitk.GetImageFromArray(self._values if vector else self._values[..., 0], isVector=vector)
        direction, spacing, origin = self._geometry
        image.SetDirection(direction)
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        for name, text in self._entries.items():
            image.SetMetaData(name, text)
        try:
            sitk.WriteImage(image, str(part), useCompression=True)
        except RuntimeError as error:
            itk_stream.check_space(part, self._values.nbytes)
            what = f"ITK cannot write it: {last_words(error)}"
            raise ResourceError(what, "check the disk, or write another format", self._path) from error

    def verify(self, part: Path) -> None:
        """Read `part` back; see `SlabSink.compare`."""
        self.compare(lambda: read(part))


def _itk_geometry(like: Volume, path: Path) -> tuple[list[float], list[float], list[float]]:
    """Direction, spacing and origin; an image without an affine lies along ITK's own axes."""
    dims = like.dims
    affine = affine_in_mm(like) if like.affine is None else LPS @ affine_in_mm(like)
    if dims == 2 and (np.abs(affine[2, :2]).max() > 1e-6 * min(like.spacing) or abs(affine[2, 3]) > 1e-6):
        raise InputError(
            "a 2D image that lies elsewhere in space than in its plane z = 0 has no place in this format",
            "write it as .nii.gz",
            path,
        )
    sizes = voxel_sizes(affine)[:dims]
    direction = affine[:dims, :dims] / sizes
    return direction.reshape(-1).tolist(), sizes.tolist(), affine[:dims, 3].tolist()
