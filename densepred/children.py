"""Other processes of this program: started so that they import it, and nothing that lies in the working folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def python(*words: object) -> list[str]:
    """The command line of Python with these words, which does not look for modules in the working folder.

    Example:
        >>> python("-m", "densepred", "version")[1:]
        ['-P', '-m', 'densepred', 'version']
    """
    return [sys.executable, "-P", *map(str, words)]


def environment() -> dict[str, str]:
    """This one's, in which the package is found where it is not installed."""
    package = Path(__file__).parents[1]
    if package.name in ("site-packages", "dist-packages"):  # which should not come before Python's own library
        return dict(os.environ)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))}
