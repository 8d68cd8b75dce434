"""Running the command line as a user would, and killing it as a cluster would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parent.parent.parent
LONGEST = 120.0
"""Seconds after which a command that should have been stopped is given up."""


def densepred(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return forked.run("densepred", *arguments, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)


def started_anew(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one command to its end, in a Python of its own, as a user would."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "densepred", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def kill_when(moment: Callable[[], bool], *arguments: object, number: int = signal.SIGKILL) -> int | None:
    """Start a command and signal it as soon as `moment()` holds; its exit status, or None if it was done before."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(os.devnull, "w") as quiet:
        process = forked.Forked("densepred", arguments, env, (quiet.fileno(), quiet.fileno()))
    until = time.monotonic() + LONGEST
    try:
        while process.poll() is None and time.monotonic() < until:
            if moment():
                process.send_signal(number)
                return process.wait(60)
            time.sleep(0.002)
        return None
    finally:
        process.kill()


def steps_done(run: Path) -> int:
    """The step of the newest checkpoint of a run; 0 before the first."""
    return max((int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*")), default=0)


def cases_done(out: Path) -> int:
    """The number of cases that the manifest of a folder of predictions calls done."""
    manifest = out / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True) if manifest.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    done = [e for e in entries if not {"begun", "failed"} & set(e) and set(e) - {"id", "outputs", "turn"}]
    return len({entry["id"] for entry in done})


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
