"""Programs that answer requests, each a line of JSON, in processes forked from them: `read_trials`, `write_trials`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from densepred.volumes import FORMATS


def serve(answer: Callable[..., Any]) -> None:
    """Answer until the input ends. What forked processes would import is imported now; no thread is started."""
    for module in sorted(set(FORMATS.values())):
        importlib.import_module(module)
    for line in sys.stdin:
        try:
            said = {"answer": answer(*json.loads(line))}
        except Exception:
            said = {"error": traceback.format_exc()}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


@contextmanager
def serving(module: str) -> Iterator[Callable[..., Any]]:
    """Run `module` as a server; gives what asks it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", module], text=True, env=environment, **pipes) as process:

        def ask(*request: Any) -> Any:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            said = json.loads(process.stdout.readline())
            assert "error" not in said, said["error"]
            return said["answer"]

        yield ask
        assert process.stdin
        process.stdin.close()
