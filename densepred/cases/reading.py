"""How the files of a case become one image: channels, planes of flags, and the pixels that count."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from densepred.cases.case import Case, is_truth
from densepred.config import ChannelConfig, DataConfig, Section, ValidityConfig
from densepred.config.base import Axes
from densepred.errors import InputError
from densepred.volumes import (
    Flags,
    Volume,
    flag_plane,
    masked,
    open_volume,
    paired,
    stack,
)
from densepred.volumes.members import open_each

VALIDITY = "validity"
"""Name of the channel that tells the network which pixels are valid."""
_ONE_PLANE: dict[str | None, Axes] = {"zyx": "zyx", "czyx": "zyx", "zcyx": "zyx", "zyxc": "zyx", "xyzt": "xyzt"}
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
        paths = self._paths(case, planes_required)
        open_one = {
            role: partial(open_volume, path, self._axes_of(role), self.checksum) for role, path in paths.items()
        }
        return self._joined(open_one)

    def count(self, case: Case) -> int:
        """How many images a case holds: more than one where its files are said to hold several (`[all]`, xyzt).

        Raises:
            InputError: a plane or channel holds neither one image nor as many as the others, or other versions.
        """
        case.check()
        return len(self._apart({role: path for role, path in case.roles.items() if not is_truth(role)}, case.id))

    def open_cases(self, case: Case, planes_required: bool = True) -> Generator[Volume, None, None]:
        """As `open_case`, for each of the images that a case holds; a file of one image goes with each of them.

        Raises:
            InputError: as `open_case` and `count`.
        """
        paths = self._paths(case, planes_required)
        images = self._apart(paths, case.id)
        with ExitStack() as opened:
            streams = {}
            for role, path in paths.items():
                stream = open_each(path, [image[role] for image in images], self._axes_of(role), self.checksum)
                streams[role] = opened.enter_context(closing(stream))
            for _ in images:
                yield self._joined({role: partial(next, stream) for role, stream in streams.items()})

    def _apart(self, paths: Mapping[str, Path], case: str) -> list[dict[str, str]]:
        try:
            return paired(paths, {role: self._axes_of(role) for role in paths})
        except InputError as error:
            raise error.of_case(case) from error

    def _paths(self, case: Case, planes_required: bool) -> dict[str, Path]:
        """What is read, by role; the planes only if the model knows them.

        Raises:
            InputError: a plane is missing, or the case has a fault.
        """
        case.check()
        wanted = {role for role in ("mask", "weight") if getattr(self.validity, role) is not None}
        paths = {role: path for role, path in case.roles.items() if role.startswith("image") or role in wanted}
        for role in sorted(wanted - paths.keys()):
            if planes_required:
                what = (
                    f"no {role}: the model was trained with one (data.validity.{role}: {getattr(self.validity, role)})"
                )
                fix = "add it, named by that pattern, or say inference.planes=optional"
                raise InputError(what, fix, case.images[0], case.id)
        return paths

    def _axes_of(self, role: str) -> Axes | None:
        return self.axes if role.startswith("image") and not self._bits_of(role) else self.plane_axes

    def _bits_of(self, role: str) -> int:
        number = int(role.removeprefix("image "))
        return self.bits[number] if self.bits else 0

    def _joined(self, opening: Mapping[str, Callable[[], Volume]]) -> Volume:
        """Channels next to each other, with NaN where the planes say that pixels do not count.

        Args:
            opening: role -> opens its file; what is open is closed again if not all can be opened and joined.
        """
        channels, planes = [], {}
        with ExitStack() as opened:
            for role, open_one in opening.items():
                volume = open_one()
                opened.callback(volume.close)
                if not role.startswith("image"):
                    planes[role] = volume
                elif bits := self._bits_of(role):
                    channels.append(flag_plane(volume, Flags(bits)))
                else:
                    channels.append(volume)
            image = masked(stack(channels), planes.get("mask"), self.bad, planes.get("weight"))
            opened.pop_all()
        return image

    @property
    def bad(self) -> Flags:
        """Which values of the mask are bad."""
        return Flags(joined_bits(self.validity.bits, self.validity.flags), self.validity.values)


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
