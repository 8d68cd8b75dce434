"""Compressed files (`.gz`, `.bz2`) as plain ones: decompressed once into an unnamed file that goes with its handle."""

from __future__ import annotations

import bz2
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

from isal import igzip, isal_zlib

from densepred.errors import InputError, ResourceError
from densepred.files import needing_space
from densepred.volumes.bombs import FREE
from densepred.volumes.fits_scan import BLOCK, CutHeaderError, scan

MAX_SHARE = 0.8
"""Share of the free space that one scratch file may take."""
_CHUNK = 1 << 20
_LOOK = 1 << 27  # bytes that come out of a file before it is looked at again what they are
_AGAIN = "get the file again from its source"


def open_plain(path: Path) -> IO[bytes]:
    """The content of a file without its outer compression, which is told by content, not by name.

    A compressed file is read to its end and its checksum compared.

    Raises:
        InputError: the compressed stream is damaged or cut short.
        ResourceError: the scratch file would fill the disk.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        magic = file.read(3)
    if magic[:2] == b"\x1f\x8b":
        return _scratch(path, igzip.IGzipFile(path, "rb"))  # type: ignore[arg-type]
    if magic == b"BZh":
        return _scratch(path, bz2.BZ2File(path))
    return open(path, "rb")


def _scratch(path: Path, source: IO[bytes]) -> IO[bytes]:
    folder = Path(tempfile.gettempdir())
    most = int(shutil.disk_usage(folder).free * MAX_SHARE)
    held = 0
    with source, tempfile.TemporaryFile(dir=folder) as scratch:
        look = 1
        while chunk := _read(source, path, held):
            held += len(chunk)
            if held > most:
                what = (
                    f"decompressed it is larger than {most / 1e9:.3g} GB, {MAX_SHARE:.0%} of what is free in {folder}"
                )
                raise ResourceError(what, "set TMPDIR to a folder on a larger disk, or decompress the file", path)
            with needing_space(folder / "scratch"):
                scratch.write(chunk)
                scratch.flush()
            if held >= look:
                _check_so_far(scratch, path)
                look = max(_LOOK, 2 * held)
        return io.BufferedReader(io.FileIO(os.dup(scratch.fileno()), "rb"))


def _check_so_far(scratch: IO[bytes], path: Path) -> None:
    """Whether what has come out of a compressed file until now is FITS, lest a small one fills the disk with rubbish.

    Raises:
        InputError: it is none, or goes on far behind its last HDU.
    """
    try:
        last = scan(scratch, path).hdus[-1]
    except CutHeaderError:
        return  # as yet
    behind = scratch.seek(0, 2) - last.data - last.size - BLOCK
    if behind > FREE:
        what = f"decompressed it goes on for over {behind} bytes behind its last HDU, {last.index}"
        raise InputError(what, _AGAIN, path)


def _read(source: IO[bytes], path: Path, held: int) -> bytes:
    try:
        return source.read(_CHUNK)
    except EOFError as error:
        what = f"the compressed stream is cut off within a piece after {held} bytes (truncated, or download incomplete)"
        raise InputError(what, _AGAIN, path) from error
    except (igzip.BadGzipFile, isal_zlib.error) as error:  # type: ignore[misc]
        raise InputError(f"the gzip stream is corrupt ({error})", _AGAIN, path) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"the bzip2 stream is corrupt ({error})", _AGAIN, path) from error
