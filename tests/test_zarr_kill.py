"""A program killed while it replaces a Zarr store, at each of its writes in turn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from densepred.files import sweep_parts
from densepred.volumes import Volume, open_volume

SCRIPT = """
import os, shutil, signal, sys
import numpy as np
import zarr
from zarr.storage import LocalStore
from densepred import files
from densepred.volumes import Volume, open_volume

path, after = sys.argv[1], int(sys.argv[2])
calls = 0

def counted():
    global calls
    calls += 1
    if calls > after:
        os.kill(os.getpid(), signal.SIGKILL)

def watched(call):
    def wrapper(*args, **options):
        counted()
        return call(*args, **options)
    return wrapper

original = LocalStore.set
async def set_counted(self, key, value):
    counted()
    await original(self, key, value)

while True:  # a child a kill; nothing of zarr's threads runs before the fork
    child = os.fork()
    if not child:
        found = np.unique(open_volume(path).numpy())
        if found.tolist() != [1]:
            os._exit(3 if found.tolist() == [2] else 4)
        LocalStore.set = set_counted
        files._put_folder, files.sync, shutil.rmtree = map(watched, (files._put_folder, files.sync, shutil.rmtree))
        Volume(np.full((1, 100, 9, 9), 2, np.uint8), (1, 1, 1)).save(path)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        sys.exit(after if os.waitstatus_to_exitcode(status) in (0, 3) else 200)
    after += 1
"""


def test_killed_at_any_write_the_old_store_or_the_new_one_is_there(tmp_path: Path) -> None:
    Volume(np.ones((1, 100, 9, 9), np.uint8), (1, 1, 1)).save(tmp_path / "x.zarr")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x.zarr"), "0"]
    done = subprocess.run(
        command, capture_output=True, timeout=120, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert 10 < done.returncode < 100, done.stderr.decode()
    assert (open_volume(tmp_path / "x.zarr").numpy() == 2).all()
    assert sweep_parts(tmp_path) > 10  # what the killed ones left
    assert os.listdir(tmp_path) == ["x.zarr"]
