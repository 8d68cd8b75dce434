"""Shards: the shares of a batch that several runs do at a time, each with its own records and lock."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from densepred.errors import InputError
from densepred.files import locked

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One of the shares of a batch.

    Args:
        number: which, from 1.
        count: of all.

    Example:
        >>> Shard.parse("2/3").of(["a", "b", "c", "d", "e"])
        ['b', 'e']
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `i/n`.

        Raises:
            InputError: it is none.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        shard = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= shard.number <= shard.count:
            raise InputError(f"--shard {text!r} is no share", "write i/n with i from 1 to n, such as 1/8")
        return shard

    def of(self, cases: Sequence[T]) -> list[T]:
        """Its share of the cases, which are in the order of their ids: every n-th, so that shares are of one size."""
        return list(cases[self.number - 1 :: self.count])

    @property
    def name(self) -> str:
        """What is put into the names of its records."""
        return f"-{self.number}-of-{self.count}"


def record_of(name: str, shard: Shard | None) -> str:
    """The name of a record of a run, such as `failures-2-of-3.tsv`.

    Example:
        >>> record_of("failures.tsv", Shard(2, 3)), record_of("failures.tsv", None)
        ('failures-2-of-3.tsv', 'failures.tsv')
    """
    stem, dot, suffix = name.partition(".")
    return f"{stem}{shard.name if shard else ''}{dot}{suffix}"


def records_of(name: str, folder: Path) -> list[Path]:
    """The files of a record that lie in a folder: that of whole runs, and those of shards."""
    stem, dot, suffix = name.partition(".")
    ours = re.compile(rf"{re.escape(stem)}(-[0-9]+-of-[0-9]+)?{re.escape(dot + suffix)}")
    found = {path.name: path for path in sorted(folder.glob(f"{stem}*{dot}{suffix}")) if ours.fullmatch(path.name)}
    return [path for path in (found.pop(name, None), *found.values()) if path is not None]


@contextlib.contextmanager
def held(folder: Path, shard: Shard | None) -> Iterator[None]:
    """Hold a folder for a run: a whole one alone, a shard beside the others of as many.

    Raises:
        LockedError: another run holds it: this shard, one of another number of shards, or a whole one.
    """
    if shard is None:
        with locked(folder):
            yield
            for path in folder.glob(".lock-*"):  # no shard runs
                path.unlink(missing_ok=True)
        return
    with locked(folder, shared=True), locked(folder, f".lock{shard.name}"):
        for path in folder.glob(".lock-*-of-*"):
            if not path.name.endswith(f"-of-{shard.count}"):
                with locked(folder, path.name, shared=True):  # two that look at the same time see no holder
                    pass
        yield
