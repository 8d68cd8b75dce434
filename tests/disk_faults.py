"""A program killed, or out of space, at each of its calls that change the disk, whichever library makes them.

The kernel is asked, not the libraries: a forked child puts itself under a seccomp filter that reports every such system
call before it is done, and its parent lets it go on, lets it fail with ENOSPC, or kills the child there. So what HDF5,
ITK or libpng write in C is seen like what Python writes. Only stores into mapped memory would pass unseen.

Reference: seccomp_unotify(2), seccomp(2); the numbers are those of linux/seccomp.h, linux/audit.h and the system call
tables of x86-64 and arm64.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import platform
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Fault: TypeAlias = "Literal['kill', 'full', 'full once']"
"""SIGKILL at a call; ENOSPC at it and at all after it; ENOSPC at it alone."""

_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        {1: "write", 18: "pwrite", 20: "writev", 296: "pwritev", 328: "pwritev2", 40: "sendfile", 275: "splice"}
        | {326: "copy_file_range", 76: "truncate", 77: "ftruncate", 285: "fallocate", 74: "fsync", 75: "fdatasync"}
        | {82: "rename", 264: "renameat", 316: "renameat2", 86: "link", 265: "linkat", 88: "symlink", 266: "symlinkat"}
        | {83: "mkdir", 258: "mkdirat", 84: "rmdir", 87: "unlink", 263: "unlinkat", 85: "creat"},
        {2: 1, 257: 2},
        317,
    ),
    "aarch64": (
        0xC00000B7,
        {64: "write", 68: "pwrite", 66: "writev", 70: "pwritev", 287: "pwritev2", 71: "sendfile", 76: "splice"}
        | {285: "copy_file_range", 45: "truncate", 46: "ftruncate", 47: "fallocate", 82: "fsync", 83: "fdatasync"}
        | {38: "renameat", 276: "renameat2", 37: "linkat", 36: "symlinkat", 34: "mkdirat", 35: "unlinkat"},
        {56: 2},
        277,
    ),
}
"""Machine -> its number; calls that change the disk; those that open a file, with the place of their flags; seccomp."""
_OPENS = os.O_CREAT | os.O_TRUNC | getattr(os, "O_TMPFILE", 0) & ~getattr(os, "O_DIRECTORY", 0)
_TO_A_FILE = ("write", "pwrite", "writev", "pwritev", "pwritev2", "sendfile", "splice", "copy_file_range")
_NEEDS_NO_SPACE = ("unlink", "unlinkat", "rmdir")
_RECEIVE, _ANSWER, _GO_ON = 0xC0502100, 0xC0182101, 1
_LONGEST = 60  # seconds of a child


@dataclass
class Trial:
    """One run of the work.

    Attributes:
        struck: the call at which it was struck, with its file where that is known; None if it ended before.
        status: its exit status, as of `os.waitstatus_to_exitcode`.
        said: what it wrote into its pipe, or its traceback.
    """

    struck: str | None
    status: int
    said: str


@functools.cache
def available() -> str:
    """Why trials cannot be run here; empty if they can."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return f"no seccomp filters on {sys.platform} {platform.machine()}"
    trial = attempt(lambda: "", Path("/"), 0, "kill")
    return "" if trial.status == 0 else f"the kernel refuses a seccomp filter: {trial.said}"


def attempt(work: Callable[[], str], folder: Path, last: int, fault: Fault) -> Trial:
    """Do `work` in a forked child that is struck at its change number `last`, from 1, of what is in `folder`."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _child(work, theirs)
    theirs.close()
    try:
        _, handles, *_ = socket.recv_fds(ours, 1, 1)
        struck = _supervise(pid, handles[0], folder, last, fault) if handles else None
        said = b"".join(iter(lambda: ours.recv(1 << 16), b"")).decode()
    finally:
        ours.close()
    return Trial(struck, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said)


def _child(work: Callable[[], str], channel: socket.socket) -> None:
    code = 1
    try:
        listener = _filtered()
        socket.send_fds(channel, [b"."], [listener])
        os.close(listener)
        channel.sendall(work().encode())
        code = 0
    except BaseException:
        channel.sendall(traceback.format_exc().encode())
    finally:
        channel.close()
        os._exit(code)


def _filtered() -> int:
    """Put this thread, and those it will start, under the filter; returns the descriptor of its reports."""
    machine, calls, opens, seccomp = _ARCHITECTURES[platform.machine()]
    load, equal, any_bit, leave = 0x20, 0x15, 0x45, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, machine), (leave, 0, 0, 0x7FFF0000), (load, 0, 0, 0)]
    for number, place in opens.items():
        program += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * place), (any_bit, 0, 1, _OPENS)]
        program += [(leave, 0, 0, 0x7FC00000), (leave, 0, 0, 0x7FFF0000)]
    for number in calls:
        program += [(equal, 0, 1, number), (leave, 0, 0, 0x7FC00000)]
    program.append((leave, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    nothing = ctypes.c_ulong(0)
    libc.prctl(38, ctypes.c_ulong(1), nothing, nothing, nothing)  # no new privileges, which a filter needs
    found = int(libc.syscall(ctypes.c_long(seccomp), ctypes.c_long(1), ctypes.c_long(8), head))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def _supervise(pid: int, listener: int, folder: Path, last: int, fault: Fault) -> str | None:
    """Answer the reports of a child until it ends; returns the call at which it was struck."""
    calls = _ARCHITECTURES[platform.machine()][1]
    process, seen, struck = os.pidfd_open(pid), 0, None
    ready = select.poll()
    for handle in (listener, process):
        ready.register(handle, select.POLLIN)
    try:
        while True:
            events = dict(ready.poll(_LONGEST * 1000))
            if not events:
                os.kill(pid, signal.SIGABRT)
                return f"hung: {struck}"
            if not events.get(listener, 0) & select.POLLIN:
                return struck
            report = bytearray(80)
            try:
                fcntl.ioctl(listener, _RECEIVE, report)
            except OSError:  # its thread has gone meanwhile
                continue
            number, name, where = _told(report, pid, calls)
            counts = where is None or where.startswith(str(folder))
            seen += counts
            error = 0
            if counts and (seen == last or (seen > last > 0 and fault == "full")):
                struck = struck or f"{name} {'' if where is None else where.removeprefix(str(folder))}".strip()
                if fault == "kill":
                    os.kill(pid, signal.SIGKILL)
                    continue
                error = 0 if name in _NEEDS_NO_SPACE else -errno.ENOSPC
            done = error or name in ("fsync", "fdatasync")  # to sync tries nothing and takes long
            answer = struct.pack("=QqiI", number, 0, error, 0 if done else _GO_ON)
            try:
                fcntl.ioctl(listener, _ANSWER, answer)
            except OSError:
                continue
    finally:
        os.close(listener)
        os.close(process)


def _told(report: bytearray, pid: int, calls: dict[int, str]) -> tuple[int, str, str | None]:
    """The number of a report, the call, and the file of one that has a descriptor of it."""
    number, _, _, call, _, _, *arguments = struct.unpack("=QIIiIQ6Q", report)
    name = calls.get(call, "open")
    handle = arguments[{"splice": 2, "copy_file_range": 2}.get(name, 0)]
    if name not in (*_TO_A_FILE, "ftruncate", "fallocate", "fsync", "fdatasync"):
        return number, name, None
    try:
        return number, name, os.readlink(f"/proc/{pid}/fd/{handle & 0xFFFFFFFF}")
    except OSError:
        return number, name, "?"
