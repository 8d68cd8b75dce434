"""TensorBoard event files."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self


class EventLog:
    """Writes scalars for TensorBoard under `run/tensorboard`.

    Args:
        run: the run directory.
        step: steps done already; what an interrupted training logged beyond it is hidden.
        enabled: without it nothing is written and TensorBoard is not imported.
    """

    def __init__(self, run: Path, step: int, enabled: bool) -> None:
        self._writer = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log named values at a step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
