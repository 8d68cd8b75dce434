"""The NIfTI header: checked as it stands on disk, and made for what we write.

nibabel accepts negative sizes and repairs spacings silently, so its classes only decode the fields here.

Reference: nifti1.h and nifti2.h, https://nifti.nimh.nih.gov.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header, data_type_codes
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from densepred.errors import InputError
from densepred.volumes import arrays
from densepred.volumes.record import Record
from densepred.volumes.volume import Volume, label_dtype, spacing_affine

HEAD_BYTES = 540
"""The length of the longer header."""
INTENT_LABEL = 1002
AXES = {"xy": 2, "xyc": 2, "xyz": 3, "xyzc": 3, "xyzt": 3}
"""How a file's axes may be declared, with the number of spatial ones."""
_KINDS = {348: (Nifti1Header, b"n+1"), 540: (Nifti2Header, b"n+2")}
_FIX = "mend the header, or get the file again from its source"
_DISAGREE = 1e-2  # voxels between the corners by sform and by qform; quaternions are float32


def parse(head: bytes, path: Path) -> Nifti1Header:
    """Decode and check the first bytes of a file.

    Returns:
        The header as stored: nibabel's class for NIfTI-1 or its subclass for NIfTI-2, in the file's own byte order.

    Raises:
        InputError: it is no single-file NIfTI, or sizes, spacing, offset or scaling make no sense.
    """
    code = "<" if int.from_bytes(head[:4], "little") in _KINDS else ">"
    size = int(np.frombuffer(head[:4].ljust(4, b"\0"), f"{code}i4")[0])
    if size not in _KINDS:
        raise _stranger(head, path)
    kind, magic = _KINDS[size]
    if len(head) < size:
        raise InputError(f"truncated: holds {len(head)} of {size} header bytes", _FIX, path)
    header = kind(head[:size], code, check=False)
    if header["magic"].item()[:3] in (b"ni1", b"ni2"):
        raise InputError("the header of a two-file NIfTI (.hdr and .img)", "convert it to one .nii.gz file", path)
    if header["magic"].item()[:3] != magic:
        what = f"no NIfTI file: its magic is {header['magic'].item()!r} instead of {magic!r}"
        raise InputError(what, "convert it to NIfTI", path)
    _check_sizes(header, path)
    _check_values(header, path)
    return header


def _stranger(head: bytes, path: Path) -> InputError:
    if not head:
        return InputError("the file is empty (0 bytes)", "get the file again from its source", path)
    text = head[:200].decode("utf-8", "ignore")
    whole = len(text.encode()) >= len(head[:200]) - 3  # but for a letter cut in two at the end
    if whole and all(sign.isprintable() or sign.isspace() for sign in text):
        start = text.strip().split("\n")[0][:40]
        return InputError(f"no NIfTI file: starts with '{start}'", "get the image itself, not a page of text", path)
    return InputError(f"no NIfTI file: starts with the bytes {head[:4].hex(' ')}", "convert it to NIfTI", path)


def _check_sizes(header: Nifti1Header, path: Path) -> None:
    dim = [int(size) for size in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise InputError(f"impossible sizes: dim = {dim}", _FIX, path)
    if dim[0] == 1:
        raise InputError(f"one axis only, so no image: dim = {dim}", "choose another file", path)
    spatial = min(dim[0], 3)
    spacing = [float(size) for size in header["pixdim"][1 : spatial + 1]]
    if not all(0 < size < np.inf for size in spacing):
        what = f"impossible spacing: pixdim[1:{spatial + 1}] = {spacing}"
        raise InputError(what, "write the true spacing there", path)


def _check_values(header: Nifti1Header, path: Path) -> None:
    code = int(header["datatype"])
    if code not in data_type_codes.dtype:
        raise InputError(f"unknown datatype code {code}", _FIX, path)
    dtype = np.dtype(data_type_codes.dtype[code])  # type: ignore[call-overload]
    if dtype.kind not in "iuf" or dtype.itemsize == 0:
        name = data_type_codes.label[code]
        fix = "save it with one real number per voxel, several channels along a fourth axis"
        raise InputError(f"voxels of type {name} (code {code}) are not supported", fix, path)
    offset, least = float(header["vox_offset"]), header.sizeof_hdr
    if offset != 0 and not (offset >= least and offset.is_integer()):
        what = f"impossible start of the voxels: vox_offset = {offset:g}, at least {least} is needed"
        raise InputError(what, _FIX, path)
    scaling(header, path)


def scaling(header: Nifti1Header, path: Path | None = None) -> tuple[float, float] | None:
    """Slope and intercept of the stored values, or None where they are stored as they are.

    Raises:
        InputError: a slope without a finite intercept.
    """
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope) or (slope, inter) == (1, 0):
        return None
    if not np.isfinite(inter):
        raise InputError(f"impossible scaling: scl_slope = {slope}, scl_inter = {inter}", _FIX, path)
    return slope, inter


def data_offset(header: Nifti1Header) -> int:
    """Where the voxels start; an unset field means right behind the header."""
    return int(header["vox_offset"]) or header.single_vox_offset


def layout(header: Nifti1Header, axes: str | None, path: Path) -> tuple[int, ...]:
    """`(C, Z, Y, X)` or `(C, Y, X)` of the voxels; axes of size 1 beyond the spatial ones are dropped.

    Args:
        axes: one of `AXES`; None stands for "xy" or "xyz", by the number of axes in the file. With "xyzt" the result is
            `(T, Z, Y, X)`.

    Raises:
        InputError: axes beyond the spatial ones are not declared, or cannot be.
    """
    if axes is not None and axes not in AXES:
        raise InputError(f"axes '{axes}' are not known for NIfTI", f"choose one of {', '.join(AXES)}", path)
    dim = tuple(int(size) for size in header["dim"][1 : int(header["dim"][0]) + 1])
    spatial = AXES[axes] if axes else min(len(dim), 3)
    if len(dim) < spatial:
        raise InputError(f"axes '{axes}' were declared and the file has {len(dim)}: {dim}", "leave out `axes`", path)
    channels = [size for size in dim[spatial:] if size > 1]
    if channels and not (axes and axes[-1] in "ct"):
        frames = "" if spatial == 2 else ", `axes: xyzt` if it holds times"
        fix = f"add `axes: {'xyc' if spatial == 2 else 'xyzc'}` if the last axis holds channels{frames}"
        raise InputError(f"{len(dim)} axes {dim}: what lies along the last is not declared", fix, path)
    if len(channels) > 1:
        raise InputError(f"{len(dim)} axes {dim}: only one may hold channels or times", "split the file", path)
    return (channels[0] if channels else 1, *reversed(dim[:spatial]))


def affine_of(header: Nifti1Header, path: Path | None = None) -> np.ndarray:
    """The 4x4 affine: sform if its code is set, else qform, else the spacing alone. Warns where the first two disagree.

    Raises:
        InputError: it is singular or not finite.
    """
    qform = _qform(header) if header["qform_code"] > 0 else None
    if header["sform_code"] > 0:
        affine = np.asarray(header.get_sform(), np.float64)
    else:
        affine = np.asarray(header.get_base_affine(), np.float64) if qform is None else qform
    spatial = min(int(header["dim"][0]), 3)
    columns = affine[:3, :spatial]
    lengths = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or not lengths.all() or np.linalg.svd(columns / lengths)[1].min() < 1e-4:
        rows = np.array2string(affine[:3], precision=4, separator=", ").replace("\n", "")
        raise InputError(f"the affine is singular or not finite: {rows}", "write the true orientation there", path)
    if qform is not None and header["sform_code"] > 0:
        _compare(header, affine, qform, path)
    return affine


def _qform(header: Nifti1Header) -> np.ndarray:
    header = header.copy()
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1  # unset; the standard reads it as 1
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (HeaderDataError, ValueError):  # no unit quaternion
        return np.full((4, 4), np.nan)


def _compare(header: Nifti1Header, sform: np.ndarray, qform: np.ndarray, path: Path | None) -> None:
    ends = [(0, max(int(size) - 1, 1)) for size in header["dim"][1:4]]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], np.float64)
    apart = np.linalg.norm(corners @ (sform - qform)[:3].T, axis=1).max()
    if not apart <= _DISAGREE * voxel_sizes(sform).min():
        sizes = [" x ".join(f"{size:.4g}" for size in voxel_sizes(affine)) for affine in (sform, qform)]
        what = f"sform and qform disagree by {apart:.3g} mm: voxels of {sizes[0]} and {sizes[1]}; the sform is used"
        warnings.warn(f"{path}: {what}", stacklevel=2)


def voxel_sizes(affine: np.ndarray) -> np.ndarray:
    """The spacing (x, y, z): lengths of the affine's columns."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def stored_dtype(dtype: np.dtype, labels: bool) -> np.dtype:
    """The type that is written for `dtype`: one that all programs read.

    Raises:
        ValueError: labels that are no integers, or a type without numbers.
    """
    stored = arrays.stored_dtype(dtype, labels)
    return label_dtype(np.iinfo(stored).max, np.iinfo(stored).min) if labels else stored


def for_output(
    like: Volume, dtype: np.dtype, channels: int, labels: bool, frames: int = 1, record: Record | None = None
) -> Nifti1Header:
    """The header of a file on the grid of `like`, little-endian; frames lie along a fourth axis, channels behind them.

    A NIfTI source gives its own header: geometry, codes and units bit for bit; extensions, which describe the source's
    voxels, stay behind. Another source gets a new one, with its affine (or its spacing on a diagonal) as sform and,
    where it is not sheared, qform, both with code 1 (scanner), in mm.
    """
    spatial = like.shape[1:]
    if isinstance(like.header, Nifti1Header):
        header = like.header.as_byteswapped("<")
        source = tuple(int(size) for size in header["dim"][1 : int(header["dim"][0]) + 1])
    else:
        header = (Nifti2Header if max(*spatial, channels, frames) > 32767 else Nifti1Header)(endianness="<")
        header.set_xyzt_units("mm")
        source = ()
    shape = tuple(reversed(spatial))
    if further := [size for size in (frames, channels) if size > 1]:
        shape = (*shape, *[1] * (3 - len(shape)), *further)
    elif source[: len(shape)] == shape and set(source[len(shape) :]) <= {1}:
        shape = source  # axes of size 1 that reading dropped
    header.set_data_dtype(dtype)
    sizes = header["pixdim"][1:4].copy()
    header.set_data_shape(shape)
    if source:  # nibabel sets the third to 1 in a file of two axes; the qform needs it
        header["pixdim"][1:4] = sizes
    affine = (
        arrays.affine_in_mm(like)
        if not source
        else spacing_affine(like.spacing)
        if like.affine is None
        else like.affine
    )
    if not source or not np.array_equal(_quiet_affine(header), affine):
        _set_affine(header, affine)
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"] = header["cal_max"] = 0
    header["intent_code"] = INTENT_LABEL if labels else 0
    header["intent_name"] = b"" if labels or record is None else record.quantity.encode("ascii", "replace")[:15]
    for name in ("intent_p1", "intent_p2", "intent_p3"):
        header[name] = 0
    header["descrip"] = _description(record)
    return header


def moved(
    header: Nifti1Header, move: np.ndarray, spatial: Sequence[int], affine: np.ndarray | None
) -> tuple[Nifti1Header, np.ndarray | None]:
    """The header of a part or a coarser grid of an image, with the affine that it states; codes and units stay.

    Args:
        header: of the image.
        move: 4x4, from index (x, y, z) on the new grid to index on the old one: a scaling and a shift.
        spatial: the sizes of the new grid, slowest first.
        affine: the new grid's, which is given back where the header states none.
    """
    out = header.copy()
    out["dim"][1 : 1 + len(spatial)] = tuple(reversed(spatial))
    if header["qform_code"] > 0 and np.isfinite(qform := _qform(header)).all():
        out["qoffset_x"], out["qoffset_y"], out["qoffset_z"] = (qform @ move)[:3, 3]
    out["pixdim"][1:4] *= move.diagonal()[:3]
    if header["sform_code"] > 0:
        out.set_sform(np.asarray(header.get_sform(), np.float64) @ move)
    stated = header["sform_code"] > 0 or header["qform_code"] > 0
    return out, _quiet_affine(out) if stated else affine


def _quiet_affine(header: Nifti1Header) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return affine_of(header)


def _set_affine(header: Nifti1Header, affine: np.ndarray) -> None:
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)  # also sets the spacing
    if not np.allclose(_qform(header), affine, atol=1e-4 * voxel_sizes(affine).min()):
        header["qform_code"] = 0


def _description(record: Record | None) -> bytes:
    """Version and model, in the 79 bytes there are."""
    text = f"densepred {_version()}".strip()
    if record is not None and record.provenance.model:
        made = record.provenance
        text = f"{text}, weights {made.model_sha[:16]}, model {made.model}"
    return text.encode("ascii", "replace")[:79]


@functools.cache
def _version() -> str:
    try:
        return version("densepred")
    except PackageNotFoundError:
        return ""
