"""Running the command line as a user would, and killing it as a cluster would."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "densepred"]


def densepred(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=300)


def kill_at(seconds: float, *arguments: object, number: int = signal.SIGKILL) -> int | None:
    """Start a command and signal it after some seconds; None if it was done before, else its exit status."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    try:
        process.wait(seconds)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        return process.wait(60)


def run_killing(kills: int, longest: float, seed: int, first: list[object], again: list[object]) -> int:
    """Start `first`, kill it and its successors `again` at random moments, let the last finish; return the kills."""
    moments, killed, command = random.Random(seed), 0, first
    for _ in range(kills):
        if kill_at(moments.uniform(0.3, 1.0) * longest, *command) is None:
            break
        killed += 1
        command = again
    for command in (again, first):
        done = densepred(*command)
        if done.returncode == 0:
            return killed
    raise AssertionError(done.stderr)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
