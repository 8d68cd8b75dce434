"""Cross-validation: all folds of a recipe, what they predict of the cases they did not see, and what follows from it.

Example:
    >>> from densepred.crossval import cross_validate
    >>> found = cross_validate("configs/hippocampus_unet3d.yaml", "runs/cv", devices="0,1")  # doctest: +SKIP
    >>> print(*found.lines, sep="\\n")  # doctest: +SKIP
"""

from __future__ import annotations

from densepred.crossval.combining import combine
from densepred.crossval.whole import Result, cross_validate

__all__ = ["Result", "combine", "cross_validate"]
