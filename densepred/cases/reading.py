"""How the files of a case become one image: channels, planes of flags, and the pixels that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from densepred.cases.case import Case
from densepred.config import ChannelConfig, DataConfig, Section, ValidityConfig
from densepred.config.base import Axes
from densepred.errors import InputError
from densepred.volumes import Flags, Volume, flag_plane, masked, open_volume, stack

VALIDITY = "validity"
"""Name of the channel that tells the network which pixels are valid."""
_ONE_PLANE: dict[str | None, Axes] = {"zyx": "zyx", "czyx": "zyx"}
"""The axes that a label, mask or weight has beside an image, where they must be declared."""


class Reading(Section):
    """How files are read; part of the plan, so that prediction reads as training did."""

    axes: Axes | None = None
    """Meaning of the axes of the images' files."""
    checksum: Literal["verify", "ignore", "require"] = "verify"
    """What is done with the checksums of FITS files."""
    bits: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """For each file of an image the bits that make a channel of a data-quality plane; 0: an ordinary image."""
    validity: ValidityConfig = ValidityConfig()
    """Which pixels count."""

    @classmethod
    def of(cls, data: DataConfig) -> Reading:
        """What a recipe says."""
        channels = data.images.values() if isinstance(data.images, dict) else ()
        named = [one.bits if isinstance(one, ChannelConfig) else () for one in channels]
        bits = tuple(joined_bits(one, data.validity.flags) for one in named)
        return cls(axes=data.axes, checksum=data.checksum, bits=bits if any(bits) else (), validity=data.validity)

    @property
    def plane_axes(self) -> Axes | None:
        """The axes of a label, mask or weight."""
        return _ONE_PLANE.get(self.axes)

    def open(self, path: Path) -> Volume:
        """One file of an image."""
        return open_volume(path, self.axes, self.checksum)

    def open_plane(self, path: Path) -> Volume:
        """A label, mask or weight."""
        return open_volume(path, self.plane_axes, self.checksum)

    def open_case(self, case: Case, planes_required: bool = True) -> Volume:
        """The image of a case `(C, *spatial)`, NaN where its planes say that pixels do not count.

        Args:
            case: its files.
            planes_required: a case without a mask or weight is an error where others have one.

        Raises:
            InputError: files that cannot be read, do not lie on one grid, or lack a plane.
        """
        bits = self.bits or (0,) * len(case.images)
        with ExitStack() as opened:
            channels = []
            for path, flags in zip(case.images, bits, strict=True):
                volume = self.open_plane(path) if flags else self.open(path)
                opened.callback(volume.close)
                channels.append(flag_plane(volume, Flags(flags)) if flags else volume)
            planes: dict[str, Volume | None] = {"mask": None, "weight": None}
            for role in planes:
                found = self._plane_of(case, role, planes_required)
                if found is not None:
                    planes[role] = plane = self.open_plane(found)
                    opened.callback(plane.close)
            image = masked(stack(channels), planes["mask"], self.bad, planes["weight"])
            opened.pop_all()
        return image

    @property
    def bad(self) -> Flags:
        """Which values of the mask are bad."""
        return Flags(joined_bits(self.validity.bits, self.validity.flags), self.validity.values)

    def _plane_of(self, case: Case, role: str, required: bool) -> Path | None:
        path: Path | None = getattr(case, role)
        pattern = getattr(self.validity, role)
        if required and pattern is not None and path is None:
            what = f"no {role}: the model was trained with one (data.validity.{role}: {pattern})"
            fix = "add it, named by that pattern, or say inference.planes=optional"
            raise InputError(what, fix, case.images[0], case.id)
        return path


def joined_bits(bits: Sequence[int | str], names: Mapping[str, int]) -> int:
    """The flags as one number.

    Raises:
        InputError: a name that stands for no flag.

    Example:
        >>> joined_bits([1, "SATURATED"], {"SATURATED": 256})
        257
    """
    total = 0
    for bit in bits:
        if isinstance(bit, str) and bit not in names:
            known = ", ".join(names) or "none"
            raise InputError(f"no flag is called {bit!r} (known: {known})", "name it in data.validity.flags")
        total |= names[bit] if isinstance(bit, str) else bit
    return total
