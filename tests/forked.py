"""Commands as processes forked from one that has imported what they need, which takes longer than most of them run.

They are processes as any other: arguments, environment, streams, signals and exit codes are their own. What hangs on a
start from nothing (imports, hash seeds) is not tried by them.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parent.parent
WARM = (
    "densepred.cli",
    "densepred.crossval",
    "densepred.evaluation",
    "densepred.inference.batch",
    "densepred.training.loop",
    "densepred.volumes.nifti",
    "matplotlib.figure",
    "torch._dynamo",
)
"""Imported once."""
LONGEST = 300.0
"""Seconds of a command."""
_REQUEST = 1 << 20
"""Bytes of one, at most."""


class Forked:
    """What `subprocess.Popen` is to a process that was started."""

    def __init__(
        self,
        module: str,
        arguments: Iterable[object],
        env: Mapping[str, str],
        streams: tuple[int, int],
        session: bool = False,
        cwd: Path | None = None,
    ) -> None:
        self._server = _server()
        self.returncode: int | None = None
        words = list(map(str, arguments))
        self.pid = self._server.fork([module, words, dict(env), str(cwd or Path.cwd()), session], streams)

    def poll(self) -> int | None:
        """The exit status, or None while it runs; negative: the signal that ended it."""
        if self.returncode is None:
            self.returncode = self._server.ended(self.pid)
        return self.returncode

    def wait(self, timeout: float = LONGEST) -> int:
        """The exit status; a process that takes longer is killed."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"process {self.pid} has not ended in {timeout} s")
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fold(command: list[str], *, stdout: int, stderr: int, env: Mapping[str, str], **options: Any) -> Forked:
    """`subprocess.Popen` for folds (`python -P -m densepred.crossval.fold ... PARENT`), which are forked instead."""
    assert options == {"stdin": subprocess.DEVNULL, "start_new_session": True}
    module = command.index("-m") + 1
    arguments = [*command[module + 1 : -1], _server().pid]
    return Forked(command[module], arguments, env, (stdout, stderr), session=True)


def run(module: str, *arguments: object, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a module to its end; what it said."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = Forked(module, arguments, env, (out.fileno(), err.fileno())).wait()
        return subprocess.CompletedProcess([module, *map(str, arguments)], code, _read(out), _read(err))


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


class _Server:
    """The process that forks, seen from here; it ends with this one."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.forked", str(theirs.fileno())]
            env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            env["PYTHONPATH"] = str(ROOT)
            given = {"stdin": subprocess.DEVNULL, "pass_fds": [theirs.fileno()]}
            self._process = subprocess.Popen(command, env=env, cwd=ROOT, **given)
            self.pid = self._process.pid
        self._socket = ours
        self._ended: dict[int, int] = {}

    def fork(self, request: list[Any], streams: tuple[int, int]) -> int:
        """The new process; -1 and others are told of by `ended`."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], list(streams))
        while True:
            pid, code = json.loads(self._socket.recv(_REQUEST) or "[0, 0]")
            assert pid, "the server of forked commands has ended"
            if code is None:
                self._ended.pop(pid, None)  # of one that nobody waited for
                return pid
            self._ended[pid] = code

    def ended(self, pid: int) -> int | None:
        """Its exit status, once it has ended."""
        while select.select([self._socket], [], [], 0)[0]:
            one, code = json.loads(self._socket.recv(_REQUEST) or "[0, 0]")
            assert one, "the server of forked commands has ended"
            self._ended[one] = code
        return self._ended.pop(pid, None)


@functools.cache
def _server() -> _Server:
    return _Server()


def _serve(control: socket.socket) -> tuple[str, list[str]]:
    """Fork on request, and tell of those that end; returns in the forked process what it is to run."""
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready = select.select([control, woken], [], [])[0]
        if woken in ready:
            woken.recv(4096)
            while (ended := _reaped()) is not None:
                control.send(json.dumps(ended).encode())
        if control in ready:
            data, streams, _, _ = socket.recv_fds(control, _REQUEST, 2)
            if not data:
                os._exit(0)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for one in (control, woken, wake):
                    one.close()
                return _become(*json.loads(data), streams)
            control.send(json.dumps([pid, None]).encode())
            for stream in streams:
                os.close(stream)


def _reaped() -> tuple[int, int] | None:
    """A process that has ended, and how."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _become(
    module: str, arguments: list[str], env: dict[str, str], folder: str, session: bool, streams: array.array[int]
) -> tuple[str, list[str]]:
    """Take on what a process would have started with."""
    if session:
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, stream in enumerate((nothing, *streams)):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:  # which torch looks at when it is imported; this was, without it
        import torch

        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    return module, arguments


def _end(module: str, arguments: list[str]) -> NoReturn:
    """Run a module, and end as Python does, but for taking apart all that was imported: that takes a second."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _end(*_serve(socket.socket(fileno=int(sys.argv[1]))))
