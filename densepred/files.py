"""Writing files that are whole or absent, hashing them, and holding a folder for one run.

No other module opens a final path for writing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from densepred.errors import DensepredError, DiskFullError, InputError, LockedError, UnsafeError

_OUT_OF_SPACE = (28, 122)  # ENOSPC, EDQUOT
_PART = re.compile(r"\.([0-9]+)\.[0-9a-f]{8}\.part\.")
"""The beginning of the names that `part_path` gives; the number is that of the process."""


def part_path(path: Path) -> Path:
    """A fresh name beside `path` for the unfinished file; it keeps the suffixes, which the format readers go by."""
    return path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.part.{path.name}")


@contextlib.contextmanager
def atomic_path(path: str | Path, verify: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success sync, verify and rename it to `path`.

    Args:
        path: the final file. A symbolic link there is refused.
        verify: called with the temporary path before the rename; it raises if the file is not what was meant.

    Raises:
        DiskFullError: the disk is full; the unfinished file is removed and what was at `path` stays.
    """
    path = Path(path)
    if path.is_symlink():
        raise UnsafeError("the output is a symbolic link", "remove the link or choose another output", path)
    part = part_path(path)
    try:
        with needing_space(path):
            yield part
            sync(part)
            if verify is not None:
                verify(part)
            os.replace(part, path)
            sync(path.parent)
    except DensepredError as error:
        _name(error, part, path)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, verify: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success sync, verify and put it in the place of `path`.

    Args:
        path: the final folder. One that is there is replaced; a symbolic link or a file there is refused.
        verify: called with the temporary folder before that; it raises if it is not what was meant.

    Raises:
        DiskFullError: the disk is full; the unfinished folder is removed and what was at `path` stays.
        InputError: the folder around it cannot be written to.
        UnsafeError: a link or a file is there.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "symbolic link" if path.is_symlink() else "file, and is to become a folder"
        raise UnsafeError(f"the output is a {kind}", "remove it or choose another output", path)
    part = part_path(path)
    try:
        with needing_space(path):
            _make(part)
            yield part
            for inner, _, names in os.walk(part):
                for name in names:
                    sync(Path(inner, name))
                sync(Path(inner))
            if verify is not None:
                verify(part)
            _put_folder(part, path)
            sync(path.parent)
    except DensepredError as error:
        _name(error, part, path)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _name(error: DensepredError, part: Path, path: Path) -> None:
    """Name the file that is written in an error: the unfinished one's name says nothing to anyone."""
    if error.file == part:
        error.file = path


def _make(folder: Path) -> None:
    try:
        folder.mkdir()
    except PermissionError as error:
        what = f"cannot write to this folder ({error.strerror})"
        raise InputError(what, "choose another folder or change its permissions", folder.parent) from error


def _put_folder(part: Path, path: Path) -> None:
    """Rename `part` to `path`; a folder there takes its place in the same step, where the system can exchange names."""
    if not path.exists():
        os.rename(part, path)
        return
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None and swap(here, os.fsencode(part), here, os.fsencode(path), exchange) == 0:
        return
    aside = path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")  # no `part`: killed here, it is not swept away
    os.rename(path, aside)
    os.rename(part, path)
    os.rename(aside, part)


@contextlib.contextmanager
def needing_space(path: Path) -> Iterator[None]:
    """Tell a full disk from other faults of writing `path`.

    Raises:
        DiskFullError: the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OUT_OF_SPACE:
            raise
        there = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(there).free / 1e6
        raise DiskFullError(f"the disk is full ({free:.0f} MB free)", "free some space and run again", path) from error


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as part:
        part.write_bytes(data)


def append(path: Path, line: str, forced: bool = True) -> None:
    """Add a line to a journal, whose readers drop a torn last one.

    Args:
        path: of the journal.
        line: with its end.
        forced: to disk, so that it outlives a power cut; without that it outlives the program.

    Raises:
        DiskFullError: the disk or the quota is full.
    """
    with needing_space(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
        if forced:
            sync(path)


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_parts(folder: Path, names: Collection[str] | None = None) -> int:
    """Remove unfinished files and folders whose writers are gone; returns how many.

    Called under the folder's lock before anything is written: what has this process's own number is an earlier one's.

    Args:
        folder: where they lie.
        names: of the files they would have become; all if None. Writers on other machines look gone from here, so who
            shares the folder with them names what it alone writes.
    """
    found = ((path, _PART.match(path.name)) for path in folder.glob(".*.part.*"))
    ours = ((path, known) for path, known in found if known is not None)
    named = ((path, known) for path, known in ours if names is None or path.name[known.end() :] in names)
    stale = [path for path, known in named if not _alive(int(known[1]))]
    for path in stale:
        remove(path)
    return len(stale)


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it; that it is gone already is no fault."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def is_pickled(head: bytes) -> bool:
    """Whether the first nine bytes of a weights file are those of a pickle, or of torch's archive of pickles.

    A safetensors file begins with the length of its header, whose first byte may be a pickle's 0x80 too; behind it
    stands the brace of JSON.

    Example:
        >>> is_pickled(bytes([0x80, 4, 0x95]) + bytes(6)), is_pickled(bytes([0x80, 2, 0, 0, 0, 0, 0, 0]) + b"{")
        (True, False)
    """
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] != b"{")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits; of a folder, that of the names and sums of its files."""
    path = Path(path)
    if path.is_dir():
        inner = sorted(file for file in path.rglob("*") if file.is_file())
        listed = "".join(f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in inner)
        return hashlib.sha256(listed.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def writable_folder(folder: str | Path) -> Path:
    """Make `folder` and prove by a probe that files can be written there.

    Raises:
        DiskFullError: not even an empty file can be made.
        InputError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    try:
        with needing_space(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe = part_path(folder / "probe")
            probe.write_bytes(b"")
            probe.unlink()
    except OSError as error:
        mode = f", mode {folder.stat().st_mode & 0o777:o}" if folder.exists() else ""
        what = f"cannot write to this folder ({error.strerror}{mode})"
        raise InputError(what, "choose another folder or change its permissions", folder) from error
    return folder


@contextlib.contextmanager
def locked(folder: str | Path, name: str = ".lock", shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process; the lock goes with the process, however it ends.

    Args:
        folder: what is held.
        name: of the lock's file in it.
        shared: several processes may hold it so at a time, but none beside one that holds it alone.
        wait: until it is free.

    Raises:
        LockedError: another process holds it.
        UnsafeError: the lock's file is a symbolic link.
        DiskFullError: there is no room for the lock's file.
        InputError: the file system has no locks.
    """
    path = Path(folder) / name
    with contextlib.ExitStack() as stack:
        with needing_space(path), _no_link(path):
            file = stack.enter_context(open(path, "a+", opener=_opened_as_it_is))
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = ", ".join(_holders(path)) or "unknown process"
            raise LockedError(f"another run holds this folder ({holder})", "wait for it, or stop it", folder) from None
        except OSError as error:
            what = f"cannot be locked ({error.strerror})"
            raise InputError(what, "choose a folder on a file system with locks", folder) from error
        with needing_space(path):
            file.truncate(0)
            if not shared:
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            if not shared:
                with contextlib.suppress(OSError):  # of a full disk: nothing may hide what ends the block
                    file.truncate(0)


def _opened_as_it_is(path: str, flags: int) -> int:
    """No symbolic link, whose target would be emptied."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def _no_link(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UnsafeError("the lock is a symbolic link", "remove the link", path) from error


def _holders(path: Path) -> list[str]:
    """Who holds a lock; of a shared one, who holds those of the same beginning."""
    said = (file.read_text(errors="replace").strip() for file in (path, *sorted(path.parent.glob(f"{path.name}-*"))))
    return [text for text in said if text]


def stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the last change (ns) of a file, or of every file in a folder; a change shows."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), (known := file.stat()).st_size, known.st_mtime_ns) for file in files]
