"""Converters: a plug-in each, which turns one unit's rows into the rows that are read.

None is of this release. One that another distribution brings is named in a site's own site.toml
(data.convert), and is never imported by the process that holds the records (../conversion.py)."""

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

        rows: all of one unit, in the order of the file: a patient's, or a single row where the unit
        is the record, of which at most one row comes. They are dicts by column of texts, numbers,
        truth values, None, bytes, and lists and dicts of these; what it returns holds no bytes. An
        image or recording has to be one that these rows name.
        It runs in a process of its own, which ends with it, and has no file, clock or network; what
        it raises, or does not finish within the limits of core/data/conversion.py, leaves this unit
        without a record, and no other."""


CONVERTERS = Group("converters", "data.convert.name", __name__, Converter)  # type: ignore[type-abstract]
