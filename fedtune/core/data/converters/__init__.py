"""Converters are plug-ins that turn one unit's rows into the rows that are read.

This release has none. A converter of another distribution is named in site.toml (data.convert),
and the process that holds the records never imports it (../conversion.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fedtune.core.data.sources._interface import Row
from fedtune.core.registry import Group

__all__ = ["CONVERTERS", "Converter", "Row"]


@dataclass(frozen=True)
class Converter(ABC):
    """A conversion of one unit's rows, such as messages of which each holds several notes.

    Subclasses are frozen dataclasses whose fields are [data.convert.options] of site.toml."""

    @abstractmethod
    def convert(self, rows: list[Row]) -> list[Row]:
        """Return the rows that are read in place of these.

        rows: all rows of one unit, in the order of the file: a patient's rows, or a single row
        if the unit is the record, from which at most one row may result. They are dicts by
        column of texts, numbers, truth values, None, bytes, and lists and dicts of these; the
        result holds no bytes. An image or recording must be one that these rows name. The method
        runs in a process that ends with it, and that has no file, clock or network. If it
        raises, or does not finish within the limits of core/data/conversion.py, this unit has no
        record, and no other unit is affected."""


CONVERTERS = Group("converters", "data.convert.name", __name__, Converter)  # type: ignore[type-abstract]
