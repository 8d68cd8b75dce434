"""A catalogue as an astropy table, and its files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from astropy import units
from astropy.io import fits
from astropy.table import Column, Table

from densepred.catalogue.columns import Field
from densepred.errors import InputError
from densepred.files import atomic_path
from densepred.volumes.fits_cards import card_text
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.volume import Volume

_CARD = 67  # characters of a card, without its keyword and the signs between


def table_of(fields: Sequence[Field], meta: Mapping[str, Any]) -> Table:
    """A table with units and descriptions.

    Example:
        >>> import numpy as np
        >>> table_of([Field("ra", np.array([150.0]), "right ascension", "deg")], {})["ra"].unit
        Unit("deg")
    """
    table = Table(meta=dict(meta))
    for field in fields:
        table[field.name] = field.values
        table[field.name].description = field.description
        if field.unit:
            table[field.name].unit = units.Unit(field.unit, parse_strict="silent")
    return table


def unit_of(image: Volume | None) -> str:
    """BUNIT of a FITS image, whether astropy knows it or not; "" where there is none."""
    header = None if image is None else image.header
    return str(header.header.get("BUNIT", "")).strip() if isinstance(header, FitsHeader) else ""


def check_target(out: Path, inputs: Sequence[Path | None], overwrite: bool = False) -> None:
    """Refuse a file that cannot be written, is there, or is one of the inputs, before any work is done.

    Raises:
        InputError: its suffix is unknown, there is no such folder, or a file is there that may not be replaced.
    """
    if out.suffix.lower() not in WRITERS:
        known = ", ".join(WRITERS)
        raise InputError(f"a catalogue is not written as '{out.suffix}'", f"choose one of {known}", out)
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}", "make it first", out)
    if any(path is not None and out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise InputError("the catalogue would replace what it is made of", "choose another file", out)
    if out.exists() and not overwrite:
        raise InputError("the file is there already", "remove it, choose another, or allow overwriting", out)


def save(table: Table, out: Path) -> None:
    """Write a catalogue in the format of its suffix, whole or not at all.

    Raises:
        InputError: the folder cannot be written to.
    """
    with atomic_path(out) as part:
        try:
            WRITERS[out.suffix.lower()](table, part)
        except PermissionError as error:
            what = f"cannot write to this folder ({error.strerror})"
            raise InputError(what, "choose another folder or change its permissions", out.parent) from error


def _save_csv(table: Table, part: Path) -> None:
    """Units stand in brackets behind the names."""
    plain = table.copy(copy_data=False)
    for name in table.colnames:
        if table[name].unit is not None:
            plain.rename_column(name, f"{name} [{table[name].unit.to_string()}]")
    plain.write(part, format="ascii.csv")


def _save_ecsv(table: Table, part: Path) -> None:
    table.write(part, format="ascii.ecsv")


def _save_fits(table: Table, part: Path) -> None:
    """Units that the FITS standard does not have, such as electron, stand there all the same; names are in ASCII."""
    bare = table.copy()
    for name in bare.colnames:
        bare[name].unit = None
        if bare[name].dtype.kind == "U" and len(bare):
            bare.replace_column(name, Column([card_text(text) for text in bare[name]], name))
    hdu = fits.table_to_hdu(bare)
    for number, name in enumerate(table.colnames, 1):
        unit, room = table[name].unit, _CARD - max(20, len(name) + 2)
        if unit is not None:
            hdu.columns[name].unit = _standard(unit)
        hdu.header.comments[f"TTYPE{number}"] = table[name].description[:room]
    hdu.name = "CATALOG"
    hdu.writeto(part, checksum=True)


def _standard(unit: units.UnitBase) -> str:
    """As the standard writes it, if it has such a unit and scale."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return str(unit.to_string("fits"))
    except ValueError:
        return str(unit.to_string())


WRITERS: dict[str, Callable[[Table, Path], None]] = {".csv": _save_csv, ".ecsv": _save_ecsv, ".fits": _save_fits}
"""Suffix -> what writes the table to an unfinished file."""
